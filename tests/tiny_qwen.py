"""A small Qwen2.5-VL with random weights, written by transformers, and what transformers computes with it.

The weights are larger than a fresh model's, so that every stage matters to the result and a wrong port shows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_ID, VISION_START_ID, VISION_END_ID, VOCABULARY = 500, 498, 499, 512
WORDS = 490
"""Ids below this are plain words."""

Grid = tuple[int, int, int]


IDS = {"image": IMAGE_ID, "video": 501, "start": VISION_START_ID, "end": VISION_END_ID}


def peer_config(ids: Mapping[str, int] = IDS, **text: Any) -> Any:
    """The transformers configuration.

    Args:
        ids: of the control tokens.
        text: fields of the decoder to set otherwise.
    """
    from transformers import Qwen2_5_VLConfig

    tied = text.pop("tie_word_embeddings", False)
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0},
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": tied,
            **text,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
        tie_word_embeddings=tied,
    )


def make_peer(seed: int = 0, ids: Mapping[str, int] = IDS, **text: Any) -> Any:
    """A transformers model with random weights, in evaluation mode; arguments as for `peer_config`."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(peer_config(ids, **text)).eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = random.standard_normal(tuple(parameter.shape), np.float32)
            if parameter.ndim == 1:
                values = 0.3 * values if name.endswith("bias") else 1 + 0.2 * values
            elif "embed_tokens" not in name:
                values *= 0.9 / np.sqrt(np.prod(parameter.shape[1:]))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model


def save_peer(model: Any, folder: Path, *, newer_names: bool = False, **options: Any) -> Path:
    """Writes config.json and safetensors as transformers does, under the older names or the newer ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_original_format=not newer_names, **options)
    return folder


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """A left-padded batch with one image per row.

    Attributes:
        input_ids, mask: (B, length).
        patches: float32 (B, patches, 1176).
        grid: of every image.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    patches: np.ndarray
    grid: Grid


def make_prompts(grid: Grid, words: Sequence[int] = (7, 4), seed: int = 0) -> Prompts:
    """Two words, an image, then as many words as said, per row. The image's left half is brighter than its right."""
    random = np.random.default_rng(seed)
    tokens = grid[1] * grid[2] // 4
    rows = [
        [
            *random.integers(0, WORDS, 2),
            VISION_START_ID,
            *[IMAGE_ID] * tokens,
            VISION_END_ID,
            *random.integers(0, WORDS, count),
        ]
        for count in words
    ]
    length = max(map(len, rows))
    input_ids = np.array([[3] * (length - len(row)) + list(map(int, row)) for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    patches = random.standard_normal((len(rows), grid[1] * grid[2], 1176)).astype(np.float32)
    return Prompts(input_ids, mask, patches, grid)


def peer_stages(model: Any, prompts: Prompts) -> dict[str, np.ndarray]:
    """What transformers computes, by stage; see `qwen_stages.STAGES` for their names and shapes."""
    import torch
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    captured: dict[str, Any] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            captured[name] = output[0] if isinstance(output, tuple) else output

        return hook

    visual, decoder = model.model.visual, model.model.language_model
    handles.append(visual.patch_embed.register_forward_hook(keep("patch_embed")))
    handles += [block.register_forward_hook(keep(f"block_{i}")) for i, block in enumerate(visual.blocks)]
    handles += [layer.register_forward_hook(keep(f"layer_{i}")) for i, layer in enumerate(decoder.layers)]
    handles.append(decoder.norm.register_forward_hook(keep("norm")))
    handles.append(
        decoder.register_forward_pre_hook(
            lambda _, __, kwargs: captured.update(embeddings=kwargs["inputs_embeds"]), with_kwargs=True
        )
    )
    batch, patches, _ = prompts.patches.shape
    ids, mask = torch.tensor(prompts.input_ids), torch.tensor(prompts.mask)
    grids = torch.tensor([prompts.grid] * batch)
    kinds = torch.tensor((prompts.input_ids == IMAGE_ID).astype(np.int64))
    pixels = torch.tensor(prompts.patches.reshape(batch * patches, -1)).to(model.dtype)
    with torch.no_grad():
        output = model(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=kinds
        )
        positions, delta = model.model.get_rope_index(ids, kinds, grids, attention_mask=mask)
        features = model.model.get_image_features(pixels, grids).pooler_output
        one = torch.tensor([prompts.grid])
        window_index, boundaries = get_vision_window_index(one, spatial_merge_size=2, window_size=112, patch_size=14)
    for handle in handles:
        handle.remove()
    order = (np.asarray(window_index)[:, None] * 4 + np.arange(4)).reshape(-1)
    layers = range(len(decoder.layers))
    cache = output.past_key_values.layers

    def array(x: Any) -> np.ndarray:
        return x.detach().to(torch.float64).numpy()

    def per_image(x: Any) -> np.ndarray:
        return array(x).reshape(batch, patches, -1)

    return {
        "window_index": np.asarray(window_index),
        "cu_seqlens": np.asarray(boundaries),
        "vision_positions": get_vision_position_ids(one, 2).numpy(),
        "positions": positions.numpy(),
        "position_delta": delta.numpy()[:, 0],
        "patch_embed": per_image(captured["patch_embed"])[:, order],
        "vision_blocks": np.stack([per_image(captured[f"block_{i}"]) for i in range(len(visual.blocks))]),
        "merger": np.stack([array(x) for x in features]).reshape(batch, patches // 4, -1),
        "embeddings": array(captured["embeddings"]),
        "layers": np.stack([array(captured[f"layer_{i}"]) for i in layers]),
        "norm": array(captured["norm"]),
        "keys": np.stack([array(cache[i].keys) for i in layers]),
        "values": np.stack([array(cache[i].values) for i in layers]),
        "logits": array(output.logits),
    }
