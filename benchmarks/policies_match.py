"""The three policies on both sides: ours, and torch with transformers, of the same weights, and whether they agree.

The backbone is that of `qwen_match`, a thirtieth of the 7B. There are two experts for it: one of the published size
(but for the number of key heads, which is the backbone's), and one that is to the published expert about what this
backbone is to the 7B, so that the shares of a whole chunk's time are like the real ones.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from peers.rdt_torch import ActionExpert
from peers.rvq_torch import ActionTokenizer
from policies_workload import PROMPT_LENGTH, inputs_of, random_observation
from qwen_match import FULL, QUICK, Match, Setting, make_match
from safetensors.torch import load_file

from rdt2_jax.action_expert.checkpoint import LoadedExpert, save_expert
from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.model import param_specs, unstacked
from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer, save_tokenizer
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.action_tokenizer.tokenizer import param_specs as tokenizer_specs
from rdt2_jax.actions.layout import ACTION_DIM, CHUNK_LENGTH
from rdt2_jax.actions.types import Observation
from rdt2_jax.params import from_named_leaves, named_leaves
from rdt2_jax.policy.backbone import Backbone
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.model import ModelInputs
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer

_WORDS = ("system", "user", "assistant", "You", "Ġare", "Ġa", "Ġhelpful", "Ġassistant", "Pick", "Ġup", "Ġthe", "Ġapple")


@dataclasses.dataclass(frozen=True)
class PolicySetting:
    """What is run.

    Attributes:
        backbone: its model, how long turns are, and how many; its prompt and steps are not used.
        experts: name -> shape; the policies have the last one, the fm policy both.
        tokenizer: the action tokenizer.
    """

    backbone: Setting
    experts: dict[str, ActionExpertConfig]
    tokenizer: ActionTokenizerConfig


FULL_POLICIES = PolicySetting(
    FULL,
    {
        "published size": ActionExpertConfig(num_kv_heads=2),
        "in proportion": ActionExpertConfig(hidden_size=256, num_heads=2, num_kv_heads=2),
    },
    ActionTokenizerConfig(hidden_size=64, latent_size=64, embedding_dim=8),
)

QUICK_POLICIES = PolicySetting(
    QUICK,
    {
        "in proportion": ActionExpertConfig(
            hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2, mlp_multiple_of=32
        )
    },
    ActionTokenizerConfig(hidden_size=8, latent_size=16, embedding_dim=8, num_codes=64),
)


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertMatch:
    """One expert on both sides.

    Attributes:
        loaded: ours, with a tree per layer.
        peer: torch's.
    """

    loaded: LoadedExpert
    peer: ActionExpert

    @property
    def config(self) -> ActionExpertConfig:
        return self.loaded.config


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyMatch:
    """Everything on both sides.

    Attributes:
        setting: what is run.
        match: the backbone.
        backbone: ours, as policies take it.
        observation: what the policies are asked.
        inputs: the same as a batch on the device.
        noise: float32 (1, 24, 20).
        experts: by name.
        tokenizer, peer_tokenizer: the action tokenizer.
    """

    setting: PolicySetting
    match: Match
    backbone: Backbone
    observation: Observation
    inputs: ModelInputs
    noise: np.ndarray
    experts: dict[str, ExpertMatch]
    tokenizer: LoadedTokenizer
    peer_tokenizer: ActionTokenizer

    @property
    def options(self) -> PolicyOptions:
        return PolicyOptions(prompt_lengths=(PROMPT_LENGTH,))

    @property
    def proportionate(self) -> ExpertMatch:
        return list(self.experts.values())[-1]


def make_policy_match(setting: PolicySetting) -> PolicyMatch:
    """Random weights, exported by us and read by the peers (the backbone's the other way round)."""
    match = make_match(setting.backbone)
    preprocessor = Preprocessor(match.config, word_tokenizer(match.config), PUBLISHED)
    backbone = Backbone(match.config, match.unrolled, preprocessor, match.compute)
    observation = random_observation()
    inputs = inputs_of(backbone, observation, None)
    experts = {name: match_expert(config, seed) for seed, (name, config) in enumerate(setting.experts.items())}
    noise = np.random.default_rng(2).standard_normal((1, CHUNK_LENGTH, ACTION_DIM), np.float32)
    tokenizer, peer_tokenizer = match_tokenizer(setting.tokenizer)
    return PolicyMatch(setting, match, backbone, observation, inputs, noise, experts, tokenizer, peer_tokenizer)


def word_tokenizer(config: Qwen25VLConfig) -> Tokenizer:
    """Bytes, the words of one prompt, fillers up to the control tokens: a tokenizer for a vocabulary of any size, in
    which the prompt takes as many tokens as in the published one."""
    names = ("endoftext", "im_start", "im_end", "quad_start", "quad_end")
    placed = {
        "vision_start": config.vision_start_token_id,
        "vision_end": config.vision_end_token_id,
        "image_pad": config.image_token_id,
        "video_pad": config.video_token_id,
    }
    num_pieces = min(placed.values()) - len(names)
    control = {**{name: num_pieces + i for i, name in enumerate(names)}, **placed}
    pieces = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *_WORDS]
    # no text becomes a piece with a blank: a space is written Ġ in pieces
    pieces += [f"filler {i}" for i in range(len(pieces), num_pieces)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"type": "Split", "pattern": {"Regex": r" ?\p{L}+|\W"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    published = {
        "added_tokens": [{"id": i, "content": f"<|{name}|>", "special": True, **flags} for name, i in control.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [],
        },
    }
    return Tokenizer(published, where="the benchmark's tokenizer")


def match_expert(config: ActionExpertConfig, seed: int) -> ExpertMatch:
    """An expert with random weights on both sides."""
    loaded = LoadedExpert(config, drawn(param_specs(config), seed))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "expert"
        save_expert(loaded, folder)
        peer = ActionExpert.from_file(config, folder / "model.safetensors")
    return ExpertMatch(dataclasses.replace(loaded, params=unstacked(loaded.params, delete=True)), peer)


def match_tokenizer(config: ActionTokenizerConfig) -> tuple[LoadedTokenizer, ActionTokenizer]:
    """The action tokenizer with random weights on both sides."""
    loaded, peer = LoadedTokenizer(config, drawn(tokenizer_specs(config), seed=3)), ActionTokenizer(config)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(loaded, Path(folder))
        peer.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return loaded, peer.requires_grad_(False).eval()


def drawn(specs: Any, seed: int) -> Any:
    """Random parameters, drawn on the host: nothing to compile. What starts at zero or one in training is drawn too, so
    that every part matters to what comes out."""
    random, values = np.random.default_rng(seed), {}
    for name, spec in named_leaves(specs).items():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("ema_sum", "ema_count", "hits", "cursor", "initialized"):
            values[name] = jnp.zeros(spec.shape, spec.dtype)  # these matter in training alone
            continue
        normal = random.standard_normal(spec.shape, np.float32)
        if kind == "bias":
            normal *= 0.1
        elif "norm" in name:
            normal = 1 + 0.1 * normal
        elif kind == "kernel":
            normal /= math.prod(spec.shape[:-1]) ** 0.5
        elif kind == "weight":
            inputs = spec.shape[-2:] if name.endswith("attention.out.weight") else spec.shape[-1:]
            normal *= 0.7 / math.prod(inputs) ** 0.5
        values[name] = jnp.asarray(normal, spec.dtype)
    return from_named_leaves(specs, values)
