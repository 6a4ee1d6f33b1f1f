"""The vision tower: patches to image tokens.

Patches are put into window order once, at the start; most blocks attend within their windows (padded to whole ones
and computed as a batch, with the padding masked as keys), the last of each group over the whole image; the merger
joins the patches of a token, and the tokens are put back into reading order at the end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rdt2_jax.errors import DataError
from rdt2_jax.layers.attention import attention
from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.linear import GatedMLP, Linear, gated_mlp, gated_mlp_specs, linear, linear_specs
from rdt2_jax.layers.norms import norm_specs, rms_norm
from rdt2_jax.layers.rotary import frequencies, rotate
from rdt2_jax.layers.stack import over_layers, unstack
from rdt2_jax.params import PyTree, stack
from rdt2_jax.qwen2_5_vl.config import VisionConfig
from rdt2_jax.qwen2_5_vl.grid import Grid, Windows, check_grid, patch_positions, windows


@struct.dataclass
class VisionAttention:
    """One matrix for queries, keys and values, weight (heads, 3, head_dim, embed), and the output projection."""

    qkv: Linear
    out: Linear


@struct.dataclass
class VisionBlock:
    """A pre-norm transformer block."""

    attention_norm: Any
    attention: VisionAttention
    mlp_norm: Any
    mlp: GatedMLP


@struct.dataclass
class VisionGroups:
    """All blocks, `VisionBlock`s in one of two layouts.

    Attributes:
        windowed: stacked (groups, group_size - 1, ...), or a tuple of tuples; None where every block is a full one.
        full: stacked (groups, ...), or a tuple.
    """

    windowed: Any
    full: Any


@struct.dataclass
class Merger:
    """Joins the patches of a token: norm of each patch, then a two-layer MLP over all of them."""

    norm: Any
    up: Linear
    down: Linear


@struct.dataclass
class VisionParams:
    """The vision tower."""

    patch: Linear
    blocks: VisionGroups
    merger: Merger


@struct.dataclass
class VisionTrace:
    """What passes between stages, in window order: for tests and probes.

    Attributes:
        patches: (B, patches, hidden) after the patch embedding.
        blocks: (depth, B, patches, hidden) after each block.
    """

    patches: jax.Array
    blocks: jax.Array


def vision_specs(config: VisionConfig, dtype: Any = jnp.float32) -> VisionParams:
    """The declaration of a vision tower's parameters."""
    width, merged = config.hidden_size, config.hidden_size * config.merge_unit
    heads = (("heads", config.num_heads), ("head_dim", config.head_dim))
    embed = (("embed", width),)
    block = VisionBlock(
        attention_norm=norm_specs(width, dtype),
        attention=VisionAttention(
            qkv=linear_specs(embed, (heads[0], (None, 3), heads[1]), bias=True, dtype=dtype),
            out=linear_specs(heads, embed, bias=True, dtype=dtype),
        ),
        mlp_norm=norm_specs(width, dtype),
        # the published 3420 does not divide by 8
        mlp=gated_mlp_specs(width, config.intermediate_size, bias=True, dtype=dtype, may_replicate=True),
    )
    windowed = config.group_size - 1
    return VisionParams(
        patch=linear_specs(((None, config.patch_dim),), embed, bias=False, dtype=dtype),
        blocks=VisionGroups(
            windowed=stack(stack(block, windowed), config.num_groups, None) if windowed else None,
            full=stack(block, config.num_groups),
        ),
        merger=Merger(
            norm=norm_specs(width, dtype),
            up=linear_specs((("embed", merged),), (("mlp", merged),), bias=True, dtype=dtype),
            down=linear_specs((("mlp", merged),), (("embed", config.out_hidden_size),), bias=True, dtype=dtype),
        ),
    )


def unstack_vision(params: VisionParams, *, delete: bool = False) -> VisionParams:
    """The same parameters with a tree per block, for inference on one device. Not for use inside jit."""
    windowed = params.blocks.windowed
    if windowed is not None:
        windowed = tuple(unstack(group, delete=delete) for group in unstack(windowed, delete=delete))
    blocks = VisionGroups(windowed=windowed, full=unstack(params.blocks.full, delete=delete))
    return dataclasses.replace(params, blocks=blocks)


def encode_images(
    params: VisionParams, config: VisionConfig, patches: jax.Array, grid: Grid, compute: Compute
) -> jax.Array:
    """Image tokens in reading order.

    Args:
        params: the tower.
        config: its shape.
        patches: (B, patches, patch_dim) normalised pixels in merge order, as the processor makes them.
        grid: (1, rows, columns) of every image in the batch; static.
        compute: how to compute it.

    Returns:
        (B, patches / merge_unit, out_hidden_size).

    Raises:
        DataError: patches and grid do not fit each other or the model.
    """
    return _encode(params, config, patches, grid, compute, traced=False)[0]


def encode_images_traced(
    params: VisionParams, config: VisionConfig, patches: jax.Array, grid: Grid, compute: Compute
) -> tuple[jax.Array, VisionTrace]:
    """As `encode_images`, with what passes between the stages."""
    tokens, trace = _encode(params, config, patches, grid, compute, traced=True)
    return tokens, trace


def rotary_angles(config: VisionConfig, grid: Grid) -> np.ndarray:
    """Angles by which each patch turns a head, in merge order: float32 (patches, head_dim / 2).

    The first half of the frequencies turns by row, the second by column.
    """
    turns = frequencies(config.head_dim // 2, config.rope_theta)
    positions = patch_positions(config, grid).astype(np.float32)
    return (positions[:, :, None] * turns).reshape(len(positions), -1)


def embed_patches(params: VisionParams, patches: jax.Array, compute: Compute) -> jax.Array:
    """(B, patches, patch_dim) -> (B, patches, hidden_size), the order unchanged."""
    return linear(params.patch, patches.astype(compute.dtype))


def merge_patches(params: Merger, config: VisionConfig, x: jax.Array) -> jax.Array:
    """(B, patches, hidden_size) -> (B, tokens, out_hidden_size). The GELU is the exact one."""
    x = rms_norm(params.norm, x, config.norm_eps)
    x = x.reshape(x.shape[0], x.shape[1] // config.merge_unit, -1)
    return linear(params.down, jax.nn.gelu(linear(params.up, x), approximate=False))


def _encode(
    params: VisionParams, config: VisionConfig, patches: jax.Array, grid: Grid, compute: Compute, *, traced: bool
) -> tuple[jax.Array, Any]:
    grid = check_grid(config, grid)
    expected = (grid[0] * grid[1] * grid[2], config.patch_dim)
    if patches.ndim != 3 or patches.shape[1:] != expected:
        raise DataError(
            "patches do not fit their grid",
            where=f"grid {grid}",
            expected=f"(batch, {expected[0]}, {expected[1]})",
            found=patches.shape,
        )
    table = windows(config, grid)  # pyright: ignore[reportArgumentType]
    angles = rotary_angles(config, grid)[table.patch_order]
    rotary = jnp.cos(angles), jnp.sin(angles)
    x = embed_patches(params, patches, compute)[:, table.patch_order]
    x = compute.constrain(x, "batch", "sequence", None)
    embedded = x

    def windowed_block(x: jax.Array, block: VisionBlock, _: Any) -> tuple[jax.Array, Any]:
        x = _block(block, config, x, rotary, compute, table)
        return x, x if traced else None

    def group(x: jax.Array, blocks: tuple[Any, VisionBlock], _: Any) -> tuple[jax.Array, Any]:
        windowed, full = blocks
        outputs = None
        if windowed is not None:
            x, outputs = over_layers(windowed_block, x, windowed, compute)
        x = compute.rematerialized(lambda x, block: _block(block, config, x, rotary, compute, None))(x, full)
        return x, (outputs, x) if traced else None

    x, outputs = _over_groups(group, x, params.blocks)
    tokens = merge_patches(params.merger, config, x)[:, table.token_restore]
    return tokens, VisionTrace(embedded, _in_depth_order(outputs)) if traced else None


def _over_groups(group: Any, x: jax.Array, blocks: VisionGroups) -> tuple[jax.Array, PyTree]:
    """Runs every group; rematerialisation is up to the blocks."""
    if not isinstance(blocks.full, tuple):
        return jax.lax.scan(lambda c, xs: group(c, xs, None), x, (blocks.windowed, blocks.full))
    outputs = []
    for i, full in enumerate(blocks.full):
        x, output = group(x, (None if blocks.windowed is None else blocks.windowed[i], full), None)
        outputs.append(output)
    return x, outputs


def _in_depth_order(outputs: PyTree) -> jax.Array:
    """Outputs of windowed and full blocks as one (depth, ...) array."""
    if isinstance(outputs, list):
        return jnp.stack([x for windowed, full in outputs for x in (*(windowed or ()), full)])
    windowed, full = outputs
    full = full[:, None]
    groups = full if windowed is None else jnp.concatenate([windowed, full], axis=1)
    return groups.reshape(-1, *groups.shape[2:])


def _block(
    block: VisionBlock,
    config: VisionConfig,
    x: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    compute: Compute,
    table: Windows | None,
) -> jax.Array:
    """One block; `table` says which windows to attend in, None the whole image."""
    normalized = rms_norm(block.attention_norm, x, config.norm_eps)
    qkv = linear(block.attention.qkv, normalized)
    query, key, value = (jnp.swapaxes(qkv[..., i, :], 1, 2) for i in range(3))
    query, key = rotate(query, *rotary), rotate(key, *rotary)
    mixed = (
        attention(query, key, value, backend=compute.attention, query_chunk=compute.query_chunk)
        if table is None
        else _windowed_attention(query, key, value, compute, table)
    )
    x = x + linear(block.attention.out, jnp.swapaxes(mixed, 1, 2), num_inputs=2)
    return x + gated_mlp(block.mlp, rms_norm(block.mlp_norm, x, config.norm_eps))


def _windowed_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, compute: Compute, table: Windows
) -> jax.Array:
    """Attention within windows of ordered patches: (B, heads, patches, head_dim), the windows as a batch."""
    batch, heads, _, head_dim = query.shape
    count, size = table.members.shape

    def gather(x: jax.Array) -> jax.Array:
        ordered = x if table.all_whole else x[:, :, table.members.reshape(-1)]
        split = ordered.reshape(batch, heads, count, size, head_dim)
        return jnp.swapaxes(split, 1, 2).reshape(batch * count, heads, size, head_dim)

    valid = None if table.all_whole else jnp.tile(table.valid, (batch, 1))
    mixed = attention(gather(query), gather(key), gather(value), backend=compute.attention, key_valid=valid)
    mixed = jnp.swapaxes(mixed.reshape(batch, count, heads, size, head_dim), 1, 2)
    mixed = mixed.reshape(batch, heads, count * size, head_dim)
    return mixed if table.all_whole else mixed[:, :, table.places]
