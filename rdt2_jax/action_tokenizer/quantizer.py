"""The residual quantizer: each latent becomes one code per level, and codebooks move by exponential averages.

A level projects what the levels before it left over, picks the code nearest in angle, and takes away that code's
back-projection. Levels are stacked on a leading axis. Codebooks are not trained by gradient: they follow the
vectors assigned to them (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1), start from the first batch, and
codes that nobody used for `restart_interval` steps start again from vectors of the current batch.

All sums are over the global batch, so that under jit on a mesh XLA reduces them over the data axis and every
device holds the same codebook.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.params import ParamSpec, PyTree, fan_in_uniform, normal, ones, zeros

_MIN_NORM = 1e-12
_PRECISION = jax.lax.Precision.HIGHEST


@struct.dataclass
class Projections:
    """What the quantizer trains by gradient.

    in_kernel (levels, latent, embedding), in_bias (levels, embedding), out_kernel (levels, embedding, latent),
    out_bias (levels, latent).
    """

    in_kernel: PyTree
    in_bias: PyTree
    out_kernel: PyTree
    out_bias: PyTree


@struct.dataclass
class Codebook:
    """Codes and the statistics that move them.

    codes and ema_sum (levels, codes, embedding); ema_count (levels, codes); hits (levels, restart_interval, codes)
    int32, hits of each of the last steps; cursor () int32, rows of `hits` written since the last restart;
    initialized () bool, whether the codes have seen data.
    """

    codes: PyTree
    ema_sum: PyTree
    ema_count: PyTree
    hits: PyTree
    cursor: PyTree
    initialized: PyTree


@struct.dataclass
class Draw:
    """The random choices of one codebook update, injectable in tests.

    vector_order (levels, vectors) int32: the order in which vectors of the batch are handed out as new codes;
    code_order (levels, codes) int32: the order in which dead codes receive them.
    """

    vector_order: jax.Array
    code_order: jax.Array


def projection_specs(config: ActionTokenizerConfig, levels: int) -> Projections:
    """Declaration of the projections of `levels` levels."""
    latent, embedding = config.latent_size, config.embedding_dim
    into, out = fan_in_uniform(latent), fan_in_uniform(embedding)
    return Projections(
        in_kernel=ParamSpec((levels, latent, embedding), ("levels", None, "code_dim"), into),
        in_bias=ParamSpec((levels, embedding), ("levels", "code_dim"), into),
        out_kernel=ParamSpec((levels, embedding, latent), ("levels", "code_dim", None), out),
        out_bias=ParamSpec((levels, latent), ("levels", None), out),
    )


def codebook_specs(config: ActionTokenizerConfig, levels: int) -> Codebook:
    """Declaration of a codebook of `levels` levels: random codes, no statistics yet."""
    codes, embedding = config.num_codes, config.embedding_dim
    axes = ("levels", "codes", "code_dim")
    return Codebook(
        codes=ParamSpec((levels, codes, embedding), axes, normal(1.0)),
        ema_sum=ParamSpec((levels, codes, embedding), axes, zeros),
        ema_count=ParamSpec((levels, codes), axes[:2], ones),
        hits=ParamSpec((levels, config.restart_interval, codes), ("levels", None, "codes"), zeros, jnp.int32),
        cursor=ParamSpec((), (), zeros, jnp.int32),
        initialized=ParamSpec((), (), zeros, jnp.bool_),
    )


@struct.dataclass
class Quantized:
    """Result of quantizing latents (..., latent).

    latents (..., latent): sum of the codes' back-projections, with the gradient passed straight through to the
    projections; indices (..., levels) int32; commitment (): sum over levels of the mean squared distance between
    embedding and code, whose gradient reaches the embedding only.
    """

    latents: jax.Array
    indices: jax.Array
    commitment: jax.Array


def quantize(projections: Projections, codes: jax.Array, latents: jax.Array) -> Quantized:
    """Quantizes latents (..., latent) with fixed codes (levels, codes, embedding)."""

    def choose(level_codes: jax.Array, vectors: jax.Array):
        index = nearest(level_codes, vectors)
        return index, level_codes[index], None

    return _quantize_levels(projections, codes, latents, choose)[0]


def pass_through(projections: Projections, latents: jax.Array) -> Quantized:
    """What `quantize` would give with a code at every point: the projections alone, and nothing to commit to.

    Training may begin with it, so that encoder and projections carry every channel before codes are drawn from them.
    The indices are zeros.
    """
    levels = projections.in_bias.shape[0]

    def level(carry, projection):
        residual, quantized = carry
        output = project_out(projection, project_in(projection, residual))
        return (residual - output, quantized + output), None

    (_, quantized), _ = jax.lax.scan(level, (latents, jnp.zeros_like(latents)), projections)
    indices = jnp.zeros((*latents.shape[:-1], levels), jnp.int32)
    return Quantized(quantized, indices, jnp.zeros((), latents.dtype))


def dequantize(projections: Projections, codes: jax.Array, indices: jax.Array) -> jax.Array:
    """Indices (..., levels) -> the latents they stand for (..., latent)."""

    def level(quantized, stacked):
        projection, level_codes, index = stacked
        return quantized + project_out(projection, level_codes[index]), None

    shape = (*indices.shape[:-1], projections.out_bias.shape[-1])
    start = jnp.zeros(shape, projections.out_bias.dtype)
    return jax.lax.scan(level, start, (projections, codes, jnp.moveaxis(indices, -1, 0)))[0]


def nearest(codes: jax.Array, embeddings: jax.Array) -> jax.Array:
    """Index of the code with the largest cosine: codes (K, E), embeddings (..., E) -> (...) int32; ties: first."""
    cosine = jnp.matmul(_direction(embeddings), _direction(codes).T, precision=_PRECISION)
    return jnp.argmax(cosine, axis=-1).astype(jnp.int32)


def project_in(projection: Projections, residual: jax.Array) -> jax.Array:
    """Residual (..., latent) -> embedding (..., E), for one level."""
    return jnp.matmul(residual, projection.in_kernel, precision=_PRECISION) + projection.in_bias


def project_out(projection: Projections, codes: jax.Array) -> jax.Array:
    """Codes (..., E), not normalised -> latent contribution (..., latent), for one level."""
    return jnp.matmul(codes, projection.out_kernel, precision=_PRECISION) + projection.out_bias


def draw(key: jax.Array, levels: int, vectors: int, codes: int) -> Draw:
    """The random choices of one update, from one key."""

    def orders(count: int, level_keys: jax.Array) -> jax.Array:
        return jax.vmap(lambda k: jax.random.permutation(k, count))(level_keys).astype(jnp.int32)

    vector_key, code_key = jax.random.split(key)
    return Draw(
        orders(vectors, jax.random.split(vector_key, levels)),
        orders(codes, jax.random.split(code_key, levels)),
    )


def quantize_and_update(
    projections: Projections,
    codebook: Codebook,
    latents: jax.Array,
    choices: Draw,
    config: ActionTokenizerConfig,
) -> tuple[Quantized, Codebook]:
    """One training pass: quantizes the global batch, and moves the codebook.

    Order of events, per level, as published: codes are (re)started if due, the batch is quantized with them, and
    the averages then move. On the first batch the codes AND their averages start from the data; the public code
    starts only the codes, and its averages then overwrite them.

    Args:
        projections, codebook: of one VQ-VAE.
        latents: (batch, steps, latent).
        choices: random choices, see `draw`.
        config: decay, smoothing and restart interval.
    """
    restart_due = codebook.initialized & (codebook.cursor >= config.restart_interval)

    def choose(level: tuple[_LevelCodebook, Draw], vectors: jax.Array):
        flat = vectors.reshape(-1, vectors.shape[-1])
        started, restarted = _start_codes(*level, flat, ~codebook.initialized, restart_due)
        index = nearest(started.codes, flat)
        moved = _move_codes(started, flat, index, restarted, config)
        return index.reshape(vectors.shape[:-1]), started.codes[index].reshape(vectors.shape), moved

    levels = _LevelCodebook(codebook.codes, codebook.ema_sum, codebook.ema_count, codebook.hits)
    quantized, moved = _quantize_levels(projections, (levels, choices), latents, choose)
    cursor = jnp.where(restart_due, 0, codebook.cursor)
    row = cursor % config.restart_interval
    updated = Codebook(
        codes=moved.codes,
        ema_sum=moved.ema_sum,
        ema_count=moved.ema_count,
        hits=jax.lax.dynamic_update_index_in_dim(codebook.hits, moved.hits, row, axis=1),
        cursor=cursor + 1,
        initialized=jnp.ones_like(codebook.initialized),
    )
    return quantized, updated


def _quantize_levels(
    projections: Projections, level_states: PyTree, latents: jax.Array, choose: Callable[..., tuple]
) -> tuple[Quantized, PyTree]:
    """Scans the levels; `choose(level_state, vectors) -> (indices, codes, new_level_state)` sees no gradients."""

    def level(carry, stacked):
        residual, quantized, commitment = carry
        projection, state = stacked
        embedding = project_in(projection, residual)
        index, code, state = jax.lax.stop_gradient(choose(state, jax.lax.stop_gradient(embedding)))
        commitment += jnp.mean(jnp.square(embedding - code))
        output = project_out(projection, embedding + jax.lax.stop_gradient(code - embedding))
        return (residual - output, quantized + output, commitment), (index, state)

    start = (latents, jnp.zeros_like(latents), jnp.zeros((), latents.dtype))
    (_, quantized, commitment), (indices, states) = jax.lax.scan(level, start, (projections, level_states))
    return Quantized(quantized, jnp.moveaxis(indices, 0, -1), commitment), states


@struct.dataclass
class _LevelCodebook:
    """One level of a Codebook while it is scanned over; `hits` becomes the current step's row."""

    codes: jax.Array
    ema_sum: jax.Array
    ema_count: jax.Array
    hits: jax.Array


def _start_codes(
    level: _LevelCodebook, choices: Draw, vectors: jax.Array, first: jax.Array, restart_due: jax.Array
) -> tuple[_LevelCodebook, jax.Array]:
    """First-batch initialisation or restart of dead codes; returns the codes (K,) that were restarted."""
    num_codes, num_vectors = level.codes.shape[0], vectors.shape[0]
    offered = vectors[choices.vector_order]

    # The j-th dead code, in the drawn order, receives the j-th offered vector; the rest stay dead until next time.
    dead_in_order = (jnp.sum(level.hits, axis=0) == 0)[choices.code_order]
    turn_in_order = jnp.cumsum(dead_in_order) - 1
    served_in_order = dead_in_order & (turn_in_order < num_vectors)
    turn = jnp.zeros(num_codes, turn_in_order.dtype).at[choices.code_order].set(turn_in_order)
    served = jnp.zeros(num_codes, bool).at[choices.code_order].set(served_in_order)
    restarted = served & restart_due
    codes = jnp.where(restarted[:, None], offered[jnp.minimum(turn, num_vectors - 1)], level.codes)

    # A first batch smaller than the codebook starts as many codes as it has vectors. Giving a vector to two codes would
    # leave the choice between them to rounding; the others wait, dead, for the first restart.
    fills = (jnp.arange(num_codes) < num_vectors)[:, None]
    initial = jnp.where(fills, offered[jnp.arange(num_codes) % num_vectors], 0.0)
    started = _LevelCodebook(
        codes=jnp.where(first, jnp.where(fills, initial, level.codes), codes),
        ema_sum=jnp.where(first, initial, level.ema_sum),
        ema_count=jnp.where(first, fills[:, 0].astype(level.ema_count.dtype), level.ema_count),
        hits=level.hits,
    )
    return started, restarted


def _move_codes(
    level: _LevelCodebook,
    vectors: jax.Array,
    index: jax.Array,
    restarted: jax.Array,
    config: ActionTokenizerConfig,
) -> _LevelCodebook:
    """Exponential moving averages of cluster sizes and sums; restarted codes take this batch's sums undecayed."""
    num_codes, decay = level.codes.shape[0], config.ema_decay
    assignment = jax.nn.one_hot(index, num_codes, dtype=vectors.dtype)
    batch_count = jnp.sum(assignment, axis=0)
    batch_sum = jnp.matmul(assignment.T, vectors, precision=_PRECISION)
    count = jnp.where(restarted, batch_count, decay * level.ema_count + (1 - decay) * batch_count)
    total = jnp.where(restarted[:, None], batch_sum, decay * level.ema_sum + (1 - decay) * batch_sum)
    mass = jnp.sum(count)
    smoothed = (count + config.ema_epsilon) / (mass + num_codes * config.ema_epsilon) * mass
    # A code that never met a vector has nothing to average: it stays where it is instead of collapsing to zero.
    keep = restarted | (count <= 0)
    average = total / jnp.where(keep, 1.0, smoothed)[:, None]
    return _LevelCodebook(
        codes=jnp.where(keep[:, None], level.codes, average),
        ema_sum=total,
        ema_count=count,
        hits=batch_count.astype(jnp.int32),
    )


def _direction(vectors: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True))
    return vectors / jnp.maximum(norm, _MIN_NORM)
