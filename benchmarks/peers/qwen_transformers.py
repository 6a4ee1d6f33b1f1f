"""Qwen2.5-VL as transformers computes it with torch on the CPU, pass by pass."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, to_published
from rdt2_jax.qwen2_5_vl.model import ModelInputs
from rdt2_jax.qwen2_5_vl.processor import ProcessorConfig

disable_progress_bar()


class Peer:
    """A model with random weights, float32.

    Weights are drawn larger than those of a fresh model, so that every part of it matters to what comes out.
    """

    def __init__(self, config: Qwen25VLConfig, seed: int = 0) -> None:
        published = to_published(config)
        published["text_config"] |= {"bos_token_id": None, "eos_token_id": None}
        self.model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**published)).eval()
        self.model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=generator)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                parameter.normal_(0.0, 0.9 / float(np.sqrt(np.prod(parameter.shape[1:]))), generator=generator)

    def save(self, folder: Path) -> None:
        """Writes config.json and safetensors."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(folder)

    def decoder(self, num_layers: int | None = None) -> Any:
        """The decoder, or one of its first layers with the same weights."""
        whole = self.model.model.language_model
        if num_layers is None:
            return whole
        part = copy.copy(whole)
        part._modules = {**whole._modules, "layers": whole.layers[:num_layers]}
        part.config = copy.deepcopy(whole.config)
        part.config.num_hidden_layers = num_layers
        part.config.layer_types = part.config.layer_types[:num_layers]
        return part

    def vision(self, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
        """(tokens, embed): the vision tower alone."""
        features = self.model.model.get_image_features(arguments["pixel_values"], arguments["image_grid_thw"])
        return torch.cat(tuple(features.pooler_output))

    def prefill_decoder(self, arguments: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Logits (1, vocab) at the last position and the cache, image tokens looked up like words."""
        done = self.decoder()(input_ids=arguments["input_ids"], position_ids=arguments["position_ids"], use_cache=True)
        return self.model.lm_head(done.last_hidden_state[:, -1]), done.past_key_values

    def prefill(self, arguments: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Logits (1, vocab) at the last position and the cache. Positions are given, so that none are computed."""
        done = self.model(**arguments, use_cache=True, logits_to_keep=1)
        return done.logits[:, -1], done.past_key_values

    def decode(self, token: torch.Tensor, following: int, cache: Any, steps: int) -> np.ndarray:
        """Greedy tokens after a prompt, (steps,); the cache is as before when it returns."""
        decoder, tokens = self.decoder(), []
        for i in range(steps):
            positions = torch.full((3, 1, 1), following + i)
            hidden = decoder(input_ids=token[None], position_ids=positions, past_key_values=cache, use_cache=True)
            token = self.model.lm_head(hidden.last_hidden_state[:, -1]).argmax(dim=-1)
            tokens.append(int(token))
        cache.crop(-steps)
        return np.array(tokens)

    def generate(self, arguments: dict[str, torch.Tensor], steps: int) -> np.ndarray:
        """Greedy tokens after a prompt through transformers' own loop, (steps,)."""
        given = {name: value for name, value in arguments.items() if name != "position_ids"}
        length = given["input_ids"].shape[1]
        whole = self.model.generate(**given, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
        return np.asarray(whole[0, length:])


def torch_arguments(config: Qwen25VLConfig, inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """A prompt as transformers takes it."""
    ids = torch.tensor(np.asarray(inputs.input_ids), dtype=torch.long)
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor(np.asarray(inputs.valid), dtype=torch.long),
        "position_ids": torch.tensor(np.asarray(inputs.positions), dtype=torch.long),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.tensor(np.asarray(inputs.patches[0, 0])),
        "image_grid_thw": torch.tensor([inputs.grid]),
    }


def image_processor(config: ProcessorConfig) -> Any:
    """The published image processor that needs no torchvision."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.merge_size,
        image_mean=list(config.mean),
        image_std=list(config.std),
    )
