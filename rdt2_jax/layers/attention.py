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

_MAX_BLOCKS, _MIN_BLOCK = 4, 64
"""How many blocks of queries a causal product is cut into at most, and how many queries a block has at least."""

_MASKED = -1e30
"""Score of a masked key; finite, so that a query without keys gets an average instead of not a number."""


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
        query: (B, heads, Q, head_dim).
        key, value: (B, kv_heads, K, head_dim); each serves heads / kv_heads consecutive query heads.
        backend: which kernel.
        key_valid: (B, K) or (1, K) bool; keys that are False get no weight.
        causal: query i sees keys 0..i; needs Q = K.
        query_chunk: queries at a time, for `AttentionBackend.CHUNKED`.

    Returns:
        (B, heads, Q, head_dim) in the dtype of `query`.

    Raises:
        ConfigError: cuDNN is asked to take 32-bit floats.
    """
    if backend is AttentionBackend.CUDNN:
        return _fused(query, key, value, key_valid, causal)
    if backend is AttentionBackend.CHUNKED and query.shape[2] > query_chunk:
        return _chunked(query, key, value, key_valid, causal, query_chunk)
    if causal:
        return _causal(query, key, value, key_valid)
    return _grouped(query, key, value, None if key_valid is None else key_valid[:, None, None, :])


def _causal(query: jax.Array, key: jax.Array, value: jax.Array, key_valid: jax.Array | None) -> jax.Array:
    """Blocks of queries, each with the keys up to its own end alone: four of them save three eighths of the work."""
    length = query.shape[2]
    blocks = min(_MAX_BLOCKS, max(1, length // _MIN_BLOCK))
    size = -(-length // blocks)
    results = []
    for start in range(0, length, size):
        end = min(start + size, length)
        mask = _causal_mask(jnp.arange(start, end), end)
        if key_valid is not None:
            mask = mask & key_valid[:, None, None, :end]
        results.append(_grouped(query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask))
    return jnp.concatenate(results, axis=2) if len(results) > 1 else results[0]


def _causal_mask(query_positions: jax.Array, num_keys: int) -> jax.Array:
    """bool (1, 1, Q, K)."""
    return (jnp.arange(num_keys)[None, :] <= query_positions[:, None])[None, None]


def _and(a: jax.Array, b: jax.Array | None) -> jax.Array:
    return a if b is None else a & b


def _grouped(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """All scores at once: the query heads of one key head are rows of one product.

    Twice as fast on a CPU as `jax.nn.dot_product_attention`. Scores and sums are float32; division by the sum comes
    last, when fewer numbers are left. `mask` is bool (B or 1, 1, Q or 1, K).
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = (query * jnp.asarray(head_dim**-0.5, query.dtype)).reshape(batch, kv_heads, group * length, head_dim)
    scores = jnp.einsum("bnrd,bnkd->bnrk", rows, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, group, length, num_keys)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    flat = weights.astype(value.dtype).reshape(batch, kv_heads, group * length, num_keys)
    mixed = jnp.einsum("bnrk,bnkd->bnrd", flat, value, preferred_element_type=jnp.float32)
    mixed = mixed.reshape(batch, kv_heads, group, length, head_dim) / total
    return mixed.reshape(query.shape).astype(query.dtype)


def _chunked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_valid: jax.Array | None,
    causal: bool,
    chunk: int,
) -> jax.Array:
    """A scan over chunks of queries; each chunk's scores are computed again in the backward pass."""
    batch, heads, length, head_dim = query.shape
    count = -(-length // chunk)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, count * chunk - length), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(batch, heads, count, chunk, head_dim), 2, 0)

    @jax.checkpoint
    def one(index: jax.Array, queries: jax.Array) -> jax.Array:
        mask = None if key_valid is None else key_valid[:, None, None, :]
        if causal:
            mask = _and(_causal_mask(index * chunk + jnp.arange(chunk), key.shape[2]), mask)
        return _grouped(queries, key, value, mask)

    _, results = jax.lax.scan(lambda _, item: (None, one(*item)), None, (jnp.arange(count), chunks))
    return jnp.moveaxis(results, 0, 2).reshape(batch, heads, count * chunk, head_dim)[:, :, :length]


def _fused(query: jax.Array, key: jax.Array, value: jax.Array, key_valid: jax.Array | None, causal: bool) -> jax.Array:
    """cuDNN's kernel, which takes sequence before heads."""
    if jnp.dtype(query.dtype).itemsize != 2:
        raise ConfigError(
            "cuDNN's attention takes 16-bit floats",
            expected="bfloat16 or float16",
            found=query.dtype,
            fix="choose AttentionBackend.XLA, or a 16-bit dtype of activations",
        )
    length, num_keys = query.shape[2], key.shape[2]
    if (length % 2 or num_keys % 2) and key_valid is None:
        key_valid = jnp.ones((1, num_keys), bool)
    # with a mask, the kernel's backward pass takes even lengths alone; what is added is cut off and masked
    query, key, value = (_padded_to_even(x, axis=2) for x in (query, key, value))
    mask = None
    if key_valid is not None:
        key_valid = _padded_to_even(key_valid, axis=1)
        mask = jnp.broadcast_to(key_valid[:, None, None, :], (query.shape[0], 1, query.shape[2], key.shape[2]))
    swapped = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(*swapped, mask=mask, is_causal=causal, implementation="cudnn")
    return jnp.swapaxes(mixed, 1, 2)[:, :, :length]


def _padded_to_even(x: jax.Array, axis: int) -> jax.Array:
    """One more slice of zeros (False) where there is an odd number."""
    if x.shape[axis] % 2 == 0:
        return x
    return jnp.pad(x, [(0, int(i == axis)) for i in range(x.ndim)])
