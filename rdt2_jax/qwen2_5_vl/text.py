"""The decoder: embeddings, prefill that keeps keys and values, one-token steps, logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.attention import AttentionBackend, attention
from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.linear import WEIGHT_INIT, GatedMLP, Linear, gated_mlp, gated_mlp_specs, linear, linear_specs
from rdt2_jax.layers.norms import norm_specs, rms_norm
from rdt2_jax.layers.rotary import frequencies, rotate
from rdt2_jax.layers.stack import num_layers, over_layers, unstack
from rdt2_jax.params import ParamSpec, stack
from rdt2_jax.quantization import Int8Weight
from rdt2_jax.qwen2_5_vl.config import TextConfig

Rotary = tuple[jax.Array, jax.Array]
"""Cosines and sines, float32 (B, 1, length, head_dim / 2): alike for all heads."""


@struct.dataclass
class TextAttention:
    """Grouped-query attention: weights (heads, head_dim, embed), `out` (embed, heads, head_dim)."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear


@struct.dataclass
class TextLayer:
    """A pre-norm decoder layer."""

    attention_norm: Any
    attention: TextAttention
    mlp_norm: Any
    mlp: GatedMLP


@struct.dataclass
class TextParams:
    """The decoder.

    Attributes:
        embedding: (vocab, embed).
        layers: `TextLayer` stacked on a leading axis, or a tuple of them.
        norm: (embed,); None in a decoder that only gives keys and values.
        head: (vocab, embed), an array or an `Int8Weight`; None where embeddings are tied, or there is no `norm`.
    """

    embedding: Any
    layers: TextLayer | tuple[TextLayer, ...]
    norm: Any = None
    head: Any = None


@struct.dataclass
class KeysValues:
    """Keys after the rotary embedding, and values: (..., B, kv_heads, length, head_dim).

    Of all layers: one with a leading axis where the layers are stacked, a tuple where they are a tuple.
    """

    key: jax.Array
    value: jax.Array


@struct.dataclass
class Prefill:
    """What the decoder made of a prompt.

    Attributes:
        hidden: (B, length, embed) after the last layer, before the final norm.
        keys_values: of every layer.
        layer_outputs: (layers, B, length, embed) after every layer, where asked for.
    """

    hidden: jax.Array
    keys_values: KeysValues | tuple[KeysValues, ...]
    layer_outputs: Any = None


def text_specs(config: TextConfig, dtype: Any = jnp.float32, *, with_head: bool = True) -> TextParams:
    """The declaration of a decoder's parameters.

    Args:
        config: its shape. `num_layers` may be smaller than published: the first layers alone.
        dtype: of the stored parameters.
        with_head: with final norm and output projection. Without, only keys and values can be had.
    """
    width, head_dim = config.hidden_size, config.head_dim
    embed = (("embed", width),)
    heads = (("heads", config.num_heads), ("head_dim", head_dim))
    kv_heads = (("kv_heads", config.num_kv_heads), ("head_dim", head_dim))
    # a model with few key and value heads keeps them whole on every device of the tensor axis
    key_or_value = linear_specs(embed, kv_heads, bias=True, dtype=dtype, fallbacks=((None, None, "embed"),))
    layer = TextLayer(
        attention_norm=norm_specs(width, dtype),
        attention=TextAttention(
            query=linear_specs(embed, heads, bias=True, dtype=dtype),
            key=key_or_value,
            value=key_or_value,
            out=linear_specs(heads, embed, bias=False, dtype=dtype),
        ),
        mlp_norm=norm_specs(width, dtype),
        mlp=gated_mlp_specs(width, config.intermediate_size, bias=False, dtype=dtype),
    )
    table = ParamSpec((config.vocab_size, width), ("vocab", "embed"), WEIGHT_INIT, dtype)
    return TextParams(
        embedding=table,
        layers=stack(layer, config.num_layers),
        norm=norm_specs(width, dtype) if with_head else None,
        head=table if with_head and not config.tie_embeddings else None,
    )


def unstack_text(params: TextParams, *, delete: bool = False) -> TextParams:
    """The same parameters with a tree per layer, for inference on one device. Not for use inside jit."""
    return dataclasses.replace(params, layers=unstack(params.layers, delete=delete))


def embed_tokens(params: TextParams, input_ids: jax.Array, compute: Compute) -> jax.Array:
    """(B, length) int -> (B, length, embed).

    Over a mesh the table is never gathered: every device looks its own columns up for all rows of the batch that its
    peers along the columns have, and the results change from columns to rows.
    """
    ids = compute.constrain(input_ids, "batch_within_embed", "sequence")
    looked_up = jnp.take(params.embedding, ids, axis=0, mode="clip").astype(compute.dtype)
    looked_up = compute.constrain(looked_up, "batch_within_embed", "sequence", "embed")
    return compute.constrain(looked_up, "batch", "sequence", None)


def insert_images(embeddings: jax.Array, is_image: jax.Array, image_tokens: jax.Array) -> jax.Array:
    """Puts image tokens where the prompt has places for them.

    Args:
        embeddings: (B, length, embed).
        is_image: bool (B, length); row by row, the i-th True takes the row's i-th image token.
        image_tokens: (B, n, embed); a row with fewer places leaves the rest unused.
    """
    index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image_tokens.shape[1] - 1)
    placed = jnp.take_along_axis(image_tokens, index[:, :, None], axis=1)
    return jnp.where(is_image[:, :, None], placed.astype(embeddings.dtype), embeddings)


def rotary_of(config: TextConfig, positions: jax.Array) -> Rotary:
    """Cosines and sines of multimodal positions.

    Args:
        config: the decoder.
        positions: int (3, B, length): time, row, column. The first `mrope_sections[0]` frequencies turn by time, the
            next by row, the last by column.
    """
    component = np.repeat(np.arange(3), config.mrope_sections)
    chosen = jnp.moveaxis(positions[component], 0, -1).astype(jnp.float32)
    angles = chosen * frequencies(config.head_dim, config.rope_theta)
    return jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]


def prefill(
    params: TextParams,
    config: TextConfig,
    embeddings: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    compute: Compute,
    *,
    with_layer_outputs: bool = False,
) -> Prefill:
    """Runs all layers of `params` over a prompt.

    With layers in a tuple, whatever is not used is not computed: where only keys and values are read, the last layer
    computes nothing but its own.

    Args:
        params: the decoder; as many layers as it has are run.
        config: its shape; `num_layers` is not read.
        embeddings: (B, length, embed).
        positions: int (3, B, length).
        valid: bool (B, length), False for padding, on the left.
        compute: how to compute it.
        with_layer_outputs: keep what every layer gives.
    """
    rotary = rotary_of(config, positions)
    x = compute.constrain(embeddings.astype(compute.dtype), "batch", "sequence", None)

    def body(x: jax.Array, layer: TextLayer, _: Any) -> tuple[jax.Array, tuple[KeysValues, Any]]:
        query, key, value = _project(layer, config, x, rotary)
        mixed = attention(
            query,
            key,
            value,
            backend=compute.attention,
            key_valid=valid,
            causal=True,
            query_chunk=compute.query_chunk,
        )
        x = _finish(layer, config, x, mixed)
        x = compute.constrain(x, "batch", "sequence", None)
        return x, (KeysValues(key, value), x if with_layer_outputs else None)

    hidden, outputs = over_layers(body, x, params.layers, compute)
    if isinstance(outputs, tuple) and isinstance(params.layers, tuple):
        keys_values: Any = tuple(kv for kv, _ in outputs)
        layer_outputs = jnp.stack([x for _, x in outputs]) if with_layer_outputs else None
    else:
        keys_values, layer_outputs = outputs
    return Prefill(hidden, keys_values, layer_outputs)


def new_cache(keys_values: Any, length: int) -> Any:
    """Room for more tokens behind a prompt's keys and values: (..., B, kv_heads, length, head_dim)."""

    def extend(x: jax.Array) -> jax.Array:
        missing = length - x.shape[-2]
        if missing < 0:
            raise ConfigError("a cache must hold the prompt", expected=f"{x.shape[-2]} or more", found=length)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])

    return jax.tree.map(extend, keys_values)


def decode_step(
    params: TextParams,
    config: TextConfig,
    embeddings: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    cache: Any,
    index: jax.Array,
    compute: Compute,
) -> tuple[jax.Array, Any]:
    """Runs all layers over one token per row.

    Args:
        params: the decoder.
        config: its shape.
        embeddings: (B, 1, embed).
        positions: int (3, B, 1).
        valid: bool (B, cache length): which slots of the cache hold tokens, this one's among them.
        cache: keys and values of every layer, in the layout of the layers.
        index: int (): the slot in which this token's keys and values are put.
        compute: how to compute it.

    Returns:
        (B, 1, embed) after the last layer, and the cache.
    """
    rotary = rotary_of(config, positions)

    def body(x: jax.Array, layer: TextLayer, stored: KeysValues) -> tuple[jax.Array, KeysValues]:
        query, key, value = _project(layer, config, x, rotary)
        stored = KeysValues(
            jax.lax.dynamic_update_slice_in_dim(stored.key, key, index, axis=2),
            jax.lax.dynamic_update_slice_in_dim(stored.value, value, index, axis=2),
        )
        # one query: cuDNN's kernel has nothing to gain, and wants even lengths
        mixed = attention(query, stored.key, stored.value, backend=AttentionBackend.XLA, key_valid=valid)
        return _finish(layer, config, x, mixed), stored

    return over_layers(body, embeddings.astype(compute.dtype), params.layers, compute, cache)


def logits(
    params: TextParams,
    config: TextConfig,
    hidden: jax.Array,
    rows: jax.Array | Int8Weight | None = None,
    *,
    compute: Compute | None = None,
) -> jax.Array:
    """Final norm and output projection.

    Args:
        params: the decoder.
        config: its shape.
        hidden: (..., embed) after the last layer.
        rows: (n, embed), the output projection's rows of the tokens of interest, see `output_rows`; None: all of them.
        compute: over a mesh, give the one that `hidden` was computed with: rows of the batch then stay where they are,
            also in the backward pass, which else gathers the logits of the whole batch.

    Returns:
        float32 (..., vocab) or (..., n).

    Raises:
        ConfigError: the decoder was loaded without its head.
    """
    if params.norm is None:
        raise ConfigError(
            "this decoder has no head", where="text.norm", fix="load the model with all its layers to have logits"
        )
    table = output_table(params) if rows is None else rows
    normalized = rms_norm(params.norm, hidden, config.norm_eps)
    if compute is not None:
        normalized = compute.constrain(normalized, "batch", *[None] * (normalized.ndim - 1))
    weight = table.values if isinstance(table, Int8Weight) else table
    products = jnp.einsum("...e,ve->...v", normalized, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return products * table.scale if isinstance(table, Int8Weight) else products


def output_table(params: TextParams) -> jax.Array | Int8Weight:
    """(vocab, embed): the rows with which hidden states are compared."""
    return params.embedding if params.head is None else params.head


def output_rows(params: TextParams, token_ids: jax.Array) -> jax.Array | Int8Weight:
    """(n, embed): the rows of `output_table` that belong to the tokens, int (n,)."""
    return jax.tree.map(lambda part: jnp.take(part, token_ids, axis=0), output_table(params))


def _project(
    layer: TextLayer, config: TextConfig, x: jax.Array, rotary: Rotary
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (B, heads, length, head_dim), keys (both turned) and values of one layer's input."""
    normalized = rms_norm(layer.attention_norm, x, config.norm_eps)
    query, key, value = (
        jnp.swapaxes(linear(part, normalized), 1, 2)
        for part in (layer.attention.query, layer.attention.key, layer.attention.value)
    )
    return rotate(query, *rotary), rotate(key, *rotary), value


def _finish(layer: TextLayer, config: TextConfig, x: jax.Array, mixed: jax.Array) -> jax.Array:
    """Everything after a layer's attention."""
    x = x + linear(layer.attention.out, jnp.swapaxes(mixed, 1, 2), num_inputs=2)
    return x + gated_mlp(layer.mlp, rms_norm(layer.mlp_norm, x, config.norm_eps))


def require_layers(params: TextParams, count: int) -> None:
    """Raises ConfigError if the decoder has another number of layers."""
    found = num_layers(params.layers)
    if found != count:
        raise ConfigError(
            "the decoder has another number of layers",
            expected=count,
            found=found,
            fix=f"load the model with num_layers={count}, or take them with first_layers outside of jit",
        )
