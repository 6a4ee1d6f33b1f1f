"""Statistics of the noise, against the distributions that it should follow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from rdt2_data.augment import noise
from rdt2_data.augment.config import NoiseConfig, NoiseWeights
from rdt2_data.augment.noise import GAUSSIAN, LAPLACE, POISSON, NoiseDraw

CONFIG = NoiseConfig()
SIDE = 128
STRENGTH = 640
"""Index of the strength in most tests: 3.19 grey levels."""


def values(kind, strength=STRENGTH, per_channel=True, active=True, seed=0):
    drawn = NoiseDraw(
        kind=jnp.int32(kind),
        strength=jnp.int32(strength),
        active=jnp.asarray(active),
        per_channel=jnp.asarray(per_channel),
        key=jax.random.key(seed, impl="threefry2x32"),
    )
    return np.asarray(make(drawn), float)


make = jax.jit(lambda drawn: noise.noise_values(drawn, SIDE, SIDE, CONFIG))


def cdf(kind, strength):
    if kind == GAUSSIAN:
        return scipy.stats.norm(scale=strength).cdf
    if kind == LAPLACE:
        return scipy.stats.laplace(scale=strength).cdf

    def signed_poisson(x):
        poisson = scipy.stats.poisson(strength)
        return 0.5 * (poisson.cdf(np.floor(x)) + poisson.sf(np.ceil(-x) - 1))

    return signed_poisson


@pytest.mark.parametrize("kind", [GAUSSIAN, LAPLACE, POISSON])
@pytest.mark.parametrize("strength", [200, STRENGTH, 1024])
def test_distribution(kind, strength):
    level = noise.strengths(CONFIG)[strength]
    found = values(kind, strength).ravel()
    variance = {GAUSSIAN: level**2, LAPLACE: 2 * level**2, POISSON: level + level**2}[kind]
    assert abs(found.mean()) < 5 * np.sqrt(variance / found.size)
    assert abs(found.var() / variance - 1) < 0.03
    points = np.arange(-30, 31) + (0.5 if kind == POISSON else 0.0)
    empirical = np.searchsorted(np.sort(found), points, side="right") / found.size
    np.testing.assert_allclose(empirical, cdf(kind, level)(points), atol=2.5 / np.sqrt(found.size))


def test_laplace_has_heavy_tails():
    assert abs(scipy.stats.kurtosis(values(GAUSSIAN).ravel())) < 0.1
    assert 2.6 < scipy.stats.kurtosis(values(LAPLACE).ravel()) < 3.4
    assert set(np.unique(values(POISSON) % 1)) == {0.0}


@pytest.mark.parametrize("kind", [GAUSSIAN, LAPLACE, POISSON])
def test_channels(kind):
    shared = values(kind, per_channel=False)
    np.testing.assert_array_equal(shared[:, 0], shared[:, 1])
    np.testing.assert_array_equal(shared[:, 0], shared[:, 2])
    own = values(kind)
    for first, second in ((own[:, 0], own[:, 1]), (own[:, 1], own[:, 2]), (own[0], own[1])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("kind", [GAUSSIAN, LAPLACE, POISSON])
def test_silent(kind):
    assert not values(kind, strength=0).any()
    assert not values(kind, active=False).any()


def test_the_largest_strength_is_exact_in_float32():
    """Products of a strength and a quantile have at most 24 bits, which the promise of equal bits rests on."""
    largest = noise.strengths(NoiseConfig(strength=(0.1, 0.1)))[-1] * np.abs(noise._quantiles()).max()
    assert largest * noise.STRENGTH_UNITS * 256 < 2**24


def test_draws():
    keys = jax.random.split(jax.random.key(3), 2000)
    config = NoiseConfig(probability=0.25, weights=NoiseWeights(gaussian=2.0, laplace=0.0, poisson=1.0))
    for each, active, kinds in ((CONFIG, 1.0, [1 / 3] * 3), (config, 0.25, [2 / 3, 0, 1 / 3])):
        draws = jax.jit(jax.vmap(lambda key, each=each: noise.draw_noise(key, each)))(keys)
        counted = [(draws.active, active), (draws.per_channel, 0.5)]
        counted += [(draws.kind == kind, probability) for kind, probability in enumerate(kinds)]
        for happened, probability in counted:
            low, high = scipy.stats.binom.interval(1 - 1e-6, 2000, probability)
            assert low <= int(happened.sum()) <= high
        strength = noise.strengths(each)[np.asarray(draws.strength)]
        assert scipy.stats.kstest(strength, scipy.stats.uniform(0, 5.1).cdf).pvalue > 1e-4
