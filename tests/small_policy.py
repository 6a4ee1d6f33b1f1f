"""Policies small enough to be made on the spot: tiny backbone, tiny expert, tiny action tokenizer, all random."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from qwen_vocabulary import byte_ranks, qwen_tokenizer_folder, tokenizer_json

from rdt2_jax.action_expert import config as expert_config
from rdt2_jax.action_expert import model as expert_model
from rdt2_jax.action_expert.checkpoint import LoadedExpert
from rdt2_jax.action_tokenizer import tokenizer as action_tokenizer
from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.types import Observation
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import from_named_leaves, named_leaves
from rdt2_jax.policy.backbone import Backbone
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.qwen2_5_vl import model, processor
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, preset
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer

LENGTHS = (64, 80)
"""Prompt lengths: with images of 18 tokens, a prompt in Qwen's vocabulary has about 50."""

SMALL_IMAGES = processor.PUBLISHED.model_copy(update={"max_pixels": 28 * 28 * 18})
"""The composite image becomes 84 x 168 pixels, 18 tokens."""

INSTRUCTIONS = ("Pick up the apple.", "Press the key.", "Place the red cup on the small plate, please.", "Wipe.")


def options(**choices: Any) -> PolicyOptions:
    return PolicyOptions(**{"prompt_lengths": LENGTHS, "compile_at_start": False, **choices})


def random_tree(specs: Any, seed: int) -> Any:
    """Weights larger than fresh ones, and biases and modulations that are not zero, so that all of them matter."""
    random, values = np.random.default_rng(seed), {}
    for name, spec in named_leaves(specs).items():
        drawn = random.standard_normal(spec.shape, np.float32)
        norm = "norm" in name and name.endswith(("norm", "scale"))
        values[name] = jnp.asarray(1 + 0.2 * drawn if norm else 0.1 * drawn, spec.dtype)
    return from_named_leaves(specs, values)


def backbone_config(words: Tokenizer, vocab_size: int) -> Qwen25VLConfig:
    """The preset "tiny" for a vocabulary."""
    tiny, control = preset("tiny"), words.control
    ids = {
        "image_token_id": control.image_pad,
        "video_token_id": control.video_pad,
        "vision_start_token_id": control.vision_start,
        "vision_end_token_id": control.vision_end,
    }
    return tiny.model_copy(update={"text": tiny.text.model_copy(update={"vocab_size": vocab_size}), **ids})


@functools.cache
def stacked_params(config: Qwen25VLConfig) -> model.Qwen25VLParams:
    return random_tree(model.param_specs(config), 7)


@functools.cache
def backbone() -> Backbone:
    """With Qwen's own vocabulary."""
    words = Tokenizer.from_folder(qwen_tokenizer_folder())
    return backbone_of(words, 152064)


@functools.cache
def byte_backbone() -> Backbone:
    """With a vocabulary of bytes: little to write and to read."""
    return backbone_of(Tokenizer(tokenizer_json(byte_ranks())), 320)


def backbone_of(words: Tokenizer, vocab_size: int) -> Backbone:
    config = backbone_config(words, vocab_size)
    params = model.unstacked(stacked_params(config))
    return Backbone(config, params, Preprocessor(config, words, SMALL_IMAGES), Compute())


@functools.cache
def expert(condition_layers: tuple[int, ...] = ()) -> LoadedExpert:
    config = expert_config.preset("tiny").model_copy(update={"condition_layers": condition_layers or (0, 1, 2, 3)})
    return LoadedExpert(config, random_tree(expert_model.param_specs(config), 11))


@functools.cache
def codec(num_codes: int = 1024) -> LoadedTokenizer:
    config = ActionTokenizerConfig(hidden_size=8, latent_size=16, embedding_dim=4, num_codes=num_codes)
    params = random_tree(action_tokenizer.param_specs(config), 13)
    return LoadedTokenizer(config, params)


@functools.cache
def normalizer() -> LinearNormalizer:
    random = np.random.default_rng(17)
    chunks = random.uniform(-0.5, 0.5, (50, 24, 20)).astype(np.float32) * np.arange(1, 21, dtype=np.float32)
    return LinearNormalizer.fit_actions(chunks)


def observations(count: int, *, instructions: Sequence[str] = INSTRUCTIONS, states: bool = True) -> list[Observation]:
    """All different; every second one has a state."""
    return [observation(i, instructions[i % len(instructions)], state=states and i % 2 == 1) for i in range(count)]


def observation(seed: int = 0, instruction: str = INSTRUCTIONS[0], *, state: bool = False) -> Observation:
    random = np.random.default_rng([seed, 23])
    left, right = random.integers(0, 256, (2, 384, 384, 3), np.uint8)
    return Observation(
        images={"left_wrist": left, "right_wrist": right},
        capture_time_s={"left_wrist": 10.0 + seed, "right_wrist": 10.015 + seed},
        instruction=instruction,
        id=f"observation {seed}",
        state=random.standard_normal(20).astype(np.float32) if state else None,
    )


def with_nan(tree: Any, name: str) -> Any:
    """The tree with one leaf of NaN."""
    leaves = named_leaves(tree)
    return from_named_leaves(tree, {**leaves, name: jnp.full_like(leaves[name], jnp.nan)})


def with_params(part: Any, params: Any) -> Any:
    return dataclasses.replace(part, params=params)
