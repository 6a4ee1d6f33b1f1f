"""Attention by every backend that a CPU has, against the formula written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.attention import AttentionBackend, attention, default_backend
from rdt2_jax.layers.compute import Compute, default_compute

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_DIM = 2, 6, 2, 13, 8
ON_CPU = (AttentionBackend.XLA, AttentionBackend.CHUNKED)


def random_heads(seed: int, heads: int, length: int = LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (BATCH, heads, length, HEAD_DIM))


def written_out(query: np.ndarray, key: np.ndarray, value: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """softmax over the keys that are seen (B, Q, K), one query at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    result = np.zeros(query.shape)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            k, v = key[b, h // (query.shape[1] // key.shape[1])], value[b, h // (query.shape[1] // key.shape[1])]
            for q in range(query.shape[2]):
                scores = k[seen[b, q]] @ query[b, h, q] / np.sqrt(HEAD_DIM)
                weights = np.exp(scores - scores.max())
                result[b, h, q] = weights @ v[seen[b, q]] / weights.sum()
    return result


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_formula(backend: AttentionBackend, causal: bool, padded: bool) -> None:
    query, key, value = random_heads(0, HEADS), random_heads(1, KV_HEADS), random_heads(2, KV_HEADS)
    valid = np.ones((BATCH, LENGTH), bool)
    if padded:
        valid[1, :4] = False
    seen = np.broadcast_to(valid[:, None, :], (BATCH, LENGTH, LENGTH)).copy()
    if causal:
        seen &= np.tril(np.ones((LENGTH, LENGTH), bool))
    has_keys = seen.any(axis=-1)
    found = attention(
        query,
        key,
        value,
        backend=backend,
        key_valid=jnp.asarray(valid) if padded else None,
        causal=causal,
        query_chunk=5,
    )
    seen[~has_keys] = True
    expected = written_out(query, key, value, seen)
    keep = np.broadcast_to(has_keys[:, None, :, None], expected.shape)
    np.testing.assert_allclose(np.where(keep, found, 0), np.where(keep, expected, 0), atol=2e-6)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("backend", ON_CPU)
def test_queries_without_keys_give_finite_values_and_no_gradient_to_the_scores(backend: AttentionBackend) -> None:
    query, key, value = random_heads(0, HEADS), random_heads(1, KV_HEADS), random_heads(2, KV_HEADS)

    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        nothing = jnp.zeros((BATCH, LENGTH), bool)
        return attention(query, key, value, backend=backend, key_valid=nothing, query_chunk=5).sum()

    value_found, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(query, key, value)
    assert np.isfinite(value_found)
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[0], 0)
    np.testing.assert_array_equal(gradients[1], 0)


def test_chunks_have_the_gradients_of_the_whole() -> None:
    heads = random_heads(0, HEADS), random_heads(1, KV_HEADS), random_heads(2, KV_HEADS)
    weight = jax.random.normal(jax.random.key(9), (BATCH, HEADS, LENGTH, HEAD_DIM))

    def loss(heads: tuple[jax.Array, ...], backend: AttentionBackend) -> jax.Array:
        return jnp.sum(weight * attention(*heads, backend=backend, causal=True, query_chunk=4))

    whole = jax.grad(loss)(heads, AttentionBackend.XLA)
    chunked = jax.grad(loss)(heads, AttentionBackend.CHUNKED)
    for a, b in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_chunks_never_hold_all_scores() -> None:
    length = 512
    shapes = [jax.ShapeDtypeStruct((1, 4, length, HEAD_DIM), jnp.float32)] * 3

    def temporary_bytes(backend: AttentionBackend) -> int:
        run = jax.jit(lambda q, k, v: attention(q, k, v, backend=backend, causal=True, query_chunk=32))
        return run.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * length * length * 4
    assert temporary_bytes(AttentionBackend.XLA) >= scores
    assert temporary_bytes(AttentionBackend.CHUNKED) < scores / 4


def test_choice_of_the_backend() -> None:
    assert default_backend("gpu", jnp.bfloat16) is AttentionBackend.CUDNN
    assert default_backend("gpu", jnp.float32) is AttentionBackend.XLA
    assert default_backend("tpu", jnp.bfloat16) is AttentionBackend.CHUNKED
    assert default_backend("cpu", jnp.bfloat16) is AttentionBackend.XLA
    assert default_compute("gpu") == Compute(dtype=jnp.bfloat16, attention=AttentionBackend.CUDNN)
    assert default_compute("cpu") == Compute()
    assert default_compute("tpu", remat="full").remat == "full"


def test_cudnn_refuses_32_bit_floats() -> None:
    heads = random_heads(0, HEADS), random_heads(1, KV_HEADS), random_heads(2, KV_HEADS)
    with pytest.raises(ConfigError, match="16-bit"):
        attention(*heads, backend=AttentionBackend.CUDNN)


def test_cudnn_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: the call is answered by XLA, after a look at what was asked for."""
    asked: dict[str, object] = {}
    right = jax.nn.dot_product_attention

    def answer(query: jax.Array, key: jax.Array, value: jax.Array, **options: object) -> jax.Array:
        asked.update(options, query=query.shape, key=key.shape)
        return right(query, key, value, **{**options, "implementation": "xla"})  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    heads = [
        x.astype(jnp.bfloat16) for x in (random_heads(0, HEADS), random_heads(1, KV_HEADS), random_heads(2, KV_HEADS))
    ]
    valid = jnp.ones((BATCH, LENGTH), bool).at[1, :4].set(False)
    found = attention(*heads, backend=AttentionBackend.CUDNN, key_valid=valid, causal=True)
    assert asked["implementation"] == "cudnn"
    # 13 tokens made even, which the kernel's backward pass wants
    assert asked["query"] == (BATCH, LENGTH + 1, HEADS, HEAD_DIM)
    assert asked["key"] == (BATCH, LENGTH + 1, KV_HEADS, HEAD_DIM)
    assert found.shape == heads[0].shape
    expected = attention(*heads, backend=AttentionBackend.XLA, key_valid=valid, causal=True)
    keep = np.asarray(valid)[:, None, :, None]
    np.testing.assert_allclose(
        np.where(keep, found.astype(jnp.float32), 0), np.where(keep, expected.astype(jnp.float32), 0), atol=0.03
    )
    bare = attention(*heads, backend=AttentionBackend.CUDNN)
    whole = attention(*heads, backend=AttentionBackend.XLA)
    np.testing.assert_allclose(bare.astype(jnp.float32), whole.astype(jnp.float32), atol=0.03)


def test_unknown_remat_policy() -> None:
    with pytest.raises(ConfigError, match="remat"):
        Compute(remat="some")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("length", [63, 64, 127, 130, 257])
def test_blocks_of_queries_are_the_whole(length: int) -> None:
    """Long causal products are cut into blocks: seams where lengths divide and where they do not."""
    query, key, value = (random_heads(i, heads, length) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    valid = jnp.ones((BATCH, length), bool).at[1, :3].set(False)
    found = attention(query, key, value, backend=AttentionBackend.XLA, key_valid=valid, causal=True)
    expected = attention(
        query, key, value, backend=AttentionBackend.CHUNKED, key_valid=valid, causal=True, query_chunk=16
    )
    keep = np.asarray(valid)[:, None, :, None]
    np.testing.assert_allclose(np.where(keep, found, 0), np.where(keep, expected, 0), atol=2e-6)
