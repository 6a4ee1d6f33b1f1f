"""Additive Gaussian, Laplace or Poisson noise.

One random word a value serves all three: Gaussian and Laplace noise look it up in a table of 2^16 quantiles, Poisson
noise compares it with cumulative probabilities, and takes a random sign, as in the public code (imgaug's
AdditivePoissonNoise): its mean is 0, its variance rate + rate^2.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_data.augment.config import NoiseConfig
from rdt2_data.augment.fixed_point import choose, draw, happens, range_table

GAUSSIAN, LAPLACE, POISSON = range(3)
"""Kinds, in the order of the fields of `NoiseWeights`."""

STRENGTH_UNITS = 128
"""Strengths are multiples of 1/128 of a grey level."""

_QUANTILE_BITS = 16
_QUANTILE_UNITS = 256
_UNIFORM_BITS = 24


class NoiseDraw(NamedTuple):
    """The noise of one sample.

    Attributes:
        kind: () int32, GAUSSIAN, LAPLACE or POISSON.
        strength: () int32, index into `strengths`; the strength is a standard deviation, a scale or a rate.
        active: () bool, whether there is noise.
        per_channel: () bool, whether channels have noise of their own.
        key: key of the noise itself.
    """

    kind: jax.Array
    strength: jax.Array
    active: jax.Array
    per_channel: jax.Array
    key: jax.Array


def draw_noise(key: jax.Array, config: NoiseConfig) -> NoiseDraw:
    """Draws kind and strength for one sample from its own key.

    One of the three kinds is always drawn (`config.probability` is 1 as published), its strength from 0; with
    probability `config.per_channel` each channel has its own noise, else the three share it.
    """
    active_key, kind_key, strength_key, channel_key, noise_key = jax.random.split(key, 5)
    return NoiseDraw(
        kind=choose(kind_key, config.weights.values()),
        strength=draw(strength_key),
        active=happens(active_key, config.probability),
        per_channel=happens(channel_key, config.per_channel),
        key=noise_key,
    )


def strengths(config: NoiseConfig) -> np.ndarray:
    """Strengths (1025,) float64 in grey levels from which samples draw."""
    low, high = config.strength
    return range_table(255.0 * low, 255.0 * high, STRENGTH_UNITS) / STRENGTH_UNITS


def noise_values(drawn: NoiseDraw, height: int, width: int, config: NoiseConfig) -> jax.Array:
    """Noise (2, 3, height, width) float32 in grey levels, to be added to both wrist images of one sample.

    Args:
        drawn: what to make.
        height, width: of one wrist image, pixels.
        config: holds the strengths; kinds of weight 0 are not computed.
    """
    return jax.lax.map(lambda key: _one_wrist(key, drawn, height, width, config), jax.random.split(drawn.key, 2))


def _one_wrist(key: jax.Array, drawn: NoiseDraw, height: int, width: int, config: NoiseConfig) -> jax.Array:
    bits = jax.random.bits(key, (3, height, width), jnp.uint32)
    bits = jnp.where(drawn.per_channel, bits, bits[:1])
    values = jnp.zeros(bits.shape, jnp.float32)
    if config.weights.gaussian > 0.0 or config.weights.laplace > 0.0:
        start = jnp.where(drawn.kind == LAPLACE, 2**_QUANTILE_BITS, 0)
        unit = jnp.asarray(_quantiles())[start + (bits >> (32 - _QUANTILE_BITS)).astype(jnp.int32)]
        values = jnp.asarray(strengths(config), jnp.float32)[drawn.strength] * unit
    if config.weights.poisson > 0.0:
        table = _poisson_bounds(config)  # pyright: ignore[reportArgumentType]
        bounds = jnp.asarray(table)[drawn.strength]
        uniform = (bits >> (32 - _UNIFORM_BITS)).astype(jnp.int32)
        count = jnp.zeros_like(uniform)
        for k in range(bounds.shape[0]):
            count = count + (uniform >= bounds[k]).astype(jnp.int32)
        signed = jnp.where((bits & 1) == 0, count, -count)  # the lowest bit is no part of the uniform number
        values = jnp.where(drawn.kind == POISSON, signed.astype(jnp.float32), values)
    return jnp.where(drawn.active, values, 0.0)


@functools.cache
def _quantiles() -> np.ndarray:
    """Quantiles (2 * 2^16,) float32 of the standard Gaussian, then of the Laplace distribution of scale 1."""
    from scipy.special import ndtri

    probability = (np.arange(2**_QUANTILE_BITS) + 0.5) / 2**_QUANTILE_BITS
    centred = probability - 0.5
    laplace = -np.sign(centred) * np.log1p(-2.0 * np.abs(centred))
    both = np.concatenate([ndtri(probability), laplace])
    return (np.round(both * _QUANTILE_UNITS) / _QUANTILE_UNITS).astype(np.float32)


@functools.cache
def _poisson_bounds(config: NoiseConfig) -> np.ndarray:
    """P(X <= k) (1025, K) int32 in units of 2^-24, for each strength as the rate; the last column is 1 for all."""
    from scipy.special import pdtr

    rates = strengths(config)[:, None]
    counts = np.arange(int(20 + 4 * rates.max()))
    bounds = np.round(pdtr(counts, rates) * 2**_UNIFORM_BITS).astype(np.int32)
    used = int(np.argmax((bounds == 2**_UNIFORM_BITS).all(axis=0)))
    return bounds[:, :used]
