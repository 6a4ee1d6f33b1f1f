"""Attention with grouped heads, and the choice of the kernel that computes it.

Masks have one shape here: which keys are valid, and whether a query sees the keys at later positions. A query whose
keys are all masked gives finite values and gradients.
"""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp

from rdt2_jax.errors import ConfigError


class AttentionBackend(enum.Enum):
    """Which kernel computes attention; never guessed from the inputs.

    Attributes:
        XLA: scores of all queries at once, on any device.
        CHUNKED: the same, a chunk of queries at a time, so that memory does not grow with the square of the length.
        CUDNN: cuDNN's fused kernel, for 16-bit floats on Nvidia GPUs.
    """

    XLA = "xla"
    CHUNKED = "chunked"
    CUDNN = "cudnn"


def default_backend(platform: str, dtype: Any) -> AttentionBackend:
    """cuDNN for 16-bit floats on GPUs, query chunks on TPUs, else XLA.

    Args:
        platform: `jax.Device.platform`.
        dtype: of the activations.
    """
    if platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2:
        return AttentionBackend.CUDNN
    return AttentionBackend.CHUNKED if platform == "tpu" else AttentionBackend.XLA


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    backend: AttentionBackend,
    key_valid: jax.Array | None = None,
    causal: bool = False,
    query_chunk: int = 256,
) -> jax.Array:
    """softmax(query key^T / sqrt(head_dim)) value, computed in float32 where it matters.

    Args:
        query: (B, Q, heads, head_dim).
        key, value: (B, K, kv_heads, head_dim); each of them serves heads / kv_heads consecutive query heads.
        backend: which kernel.
        key_valid: (B, K) or (1, K) bool; keys that are False get no weight.
        causal: query i sees keys 0..i; needs Q = K.
        query_chunk: queries at a time, for `AttentionBackend.CHUNKED`.

    Returns:
        (B, Q, heads, head_dim) in the dtype of `query`.

    Raises:
        ConfigError: cuDNN is asked to take 32-bit floats.
    """
    if backend is AttentionBackend.CUDNN and jnp.dtype(query.dtype).itemsize != 2:
        raise ConfigError(
            "cuDNN's attention takes 16-bit floats", expected="bfloat16 or float16", found=query.dtype,
            fix="choose AttentionBackend.XLA, or a 16-bit dtype of activations",
        )
    if backend is AttentionBackend.CHUNKED and query.shape[1] > query_chunk:
        return _chunked(query, key, value, key_valid, causal, query_chunk)
    mask = None if key_valid is None else key_valid[:, None, None, :]
    if mask is not None and backend is AttentionBackend.CUDNN:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    implementation = "cudnn" if backend is AttentionBackend.CUDNN else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=implementation
    )


def _chunked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_valid: jax.Array | None,
    causal: bool,
    chunk: int,
) -> jax.Array:
    """A scan over chunks of queries; each chunk's scores are computed again in the backward pass."""
    batch, length, heads, head_dim = query.shape
    count = -(-length // chunk)
    padded = jnp.pad(query, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(batch, count, chunk, heads, head_dim), 1, 0)
    positions = jnp.arange(key.shape[1])

    @jax.checkpoint
    def one(index: jax.Array, queries: jax.Array) -> jax.Array:
        mask = None if key_valid is None else key_valid[:, None, None, :]
        if causal:
            seen = positions[None, :] <= (index * chunk + jnp.arange(chunk))[:, None]
            mask = seen[None, None] if mask is None else mask & seen[None, None]
        return jax.nn.dot_product_attention(queries, key, value, mask=mask, implementation="xla")

    _, results = jax.lax.scan(lambda _, item: (None, one(*item)), None, (jnp.arange(count), chunks))
    return jnp.moveaxis(results, 0, 1).reshape(batch, count * chunk, heads, head_dim)[:, :length]
