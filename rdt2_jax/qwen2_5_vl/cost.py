"""Arithmetic and memory traffic of the model, for floors: no machine does a pass faster than its rates allow.

Counted are the products of matrices: projections, attention scores, and the sums they weigh, a multiply-add as two
operations. Left out are norms, rotations, softmax, activations and biases, less than half a percent at the published
widths. Attention is counted over the pairs of queries and keys that see each other: half of all pairs in the decoder,
all pairs of a window or an image in the vision tower. Padding is not counted.

Bytes are counted from the parameters themselves, so that any storage type, eight-bit weights included, is right.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.stack import num_layers as count_layers
from rdt2_jax.params import tree_bytes
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, TextConfig, VisionConfig
from rdt2_jax.qwen2_5_vl.grid import Grid, windows
from rdt2_jax.qwen2_5_vl.text import TextParams


def vision_flops(config: VisionConfig, grid: Grid) -> float:
    """Operations of the vision tower over one image.

    Args:
        config: the tower.
        grid: (1, rows, columns) of patches.
    """
    table = windows(config, grid)  # pyright: ignore[reportArgumentType]
    patches, width = len(table.patch_order), config.hidden_size
    tokens, merged = patches // config.merge_unit, width * config.merge_unit
    weights = 4 * width**2 + 3 * width * config.intermediate_size
    pairs_in_windows = float(np.sum(np.diff(table.boundaries).astype(np.float64) ** 2))
    pairs = (config.depth - config.num_groups) * pairs_in_windows + config.num_groups * float(patches) ** 2
    embedding = patches * config.patch_dim * width
    merger = tokens * merged * (merged + config.out_hidden_size)
    return 2.0 * (embedding + config.depth * patches * weights + 2 * width * pairs + merger)


def text_flops(
    config: TextConfig,
    length: int,
    num_layers: int | None = None,
    *,
    keys_values_only: bool = False,
    logit_positions: int = 0,
) -> float:
    """Operations of the decoder over one prompt.

    Args:
        config: the decoder.
        length: tokens.
        num_layers: run only the first ones.
        keys_values_only: nothing but keys and values is read, so that the last layer projects these and stops.
        logit_positions: positions that get logits over the whole vocabulary.

    Raises:
        ConfigError: fewer than 1 layer, or more than there are.
    """
    layers = _checked_layers(config, num_layers)
    projected, rest = _layer_weights(config)
    whole = layers - 1 if keys_values_only else layers
    pairs = length * (length + 1) / 2 * config.num_heads * config.head_dim
    products = layers * length * projected + whole * (length * rest + 2 * pairs)
    return 2.0 * (products + logit_positions * config.vocab_size * config.hidden_size)


def prefill_flops(
    config: Qwen25VLConfig,
    length: int,
    num_layers: int | None = None,
    *,
    grid: Grid | None = None,
    num_images: int = 1,
    keys_values_only: bool = False,
) -> float:
    """Operations of one prompt: images through the vision tower, tokens through the decoder, logits at the last one.

    Args:
        config: the model.
        length: tokens of the prompt, those of its images among them.
        num_layers: run only the first decoder layers.
        grid: (1, rows, columns) of patches of every image; None: a prompt without images.
        num_images: images of this grid.
        keys_values_only: keys and values alone, as `model.keys_and_values` over layers in a tuple; no logits.

    Raises:
        ConfigError: fewer than 1 layer, or more than there are.
    """
    seen = 0.0 if grid is None else num_images * vision_flops(config.vision, grid)
    positions = 0 if keys_values_only else 1
    return seen + text_flops(
        config.text, length, num_layers, keys_values_only=keys_values_only, logit_positions=positions
    )


def decode_flops(config: TextConfig, cache_length: int) -> float:
    """Operations of one token that sees `cache_length` keys, itself among them, logits included."""
    projected, rest = _layer_weights(config)
    attended = 2 * cache_length * config.num_heads * config.head_dim
    return 2.0 * (config.num_layers * (projected + rest + attended) + config.vocab_size * config.hidden_size)


def cache_bytes(config: TextConfig, length: int, num_layers: int | None = None, dtype: Any = jnp.bfloat16) -> int:
    """Bytes of the keys and values of one prompt.

    Raises:
        ConfigError: fewer than 1 layer, or more than there are.
    """
    per_token = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return _checked_layers(config, num_layers) * length * per_token


def decode_bytes(params: TextParams, config: TextConfig, cache_length: int, dtype: Any = jnp.bfloat16) -> int:
    """Bytes that one token must read: all weights of the decoder but the embedding's other rows, and the cache.

    Args:
        params: the decoder, arrays or specs, in either layout, quantised or not.
        config: its shape.
        cache_length: keys that the token sees.
        dtype: of the cache.
    """
    head = params.embedding if params.head is None else params.head
    weights = tree_bytes((params.layers, params.norm, head))
    return weights + cache_bytes(config, cache_length, count_layers(params.layers), dtype)


def _layer_weights(config: TextConfig) -> tuple[float, float]:
    """Weights of a layer that keys and values need, and all others."""
    width, head_dim = config.hidden_size, config.head_dim
    projected = 2 * width * config.num_kv_heads * head_dim
    return projected, 2 * width * config.num_heads * head_dim + 3 * width * config.intermediate_size


def _checked_layers(config: TextConfig, num_layers: int | None) -> int:
    layers = config.num_layers if num_layers is None else num_layers
    if not 1 <= layers <= config.num_layers:
        raise ConfigError(
            "a model cannot have so many layers", where="num_layers", expected=f"1 to {config.num_layers}", found=layers
        )
    return layers
