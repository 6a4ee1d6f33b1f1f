"""Filters and medians against scipy, and how they are drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from rdt2_data.augment import blur as room
from rdt2_data.augment.blur import AVERAGE, GAUSSIAN, IDENTITY, MEDIAN, MOTION
from rdt2_data.augment.config import BlurConfig, BlurWeights

CONFIG = BlurConfig()
BANK = room.filter_bank(CONFIG)
blur = jax.jit(lambda image, index: room.blur(image, index, CONFIG))


@pytest.fixture(scope="module")
def wrists():
    return np.random.default_rng(0).integers(0, 256, (2, 3, 11, 14)).astype(np.float32)


def test_the_bank():
    np.testing.assert_array_equal(BANK.weights.astype(float).sum((1, 2)), 1.0)
    assert (BANK.weights >= 0).all()
    np.testing.assert_array_equal(BANK.weights * 4096 % 1, 0.0)
    assert set(BANK.median_px[BANK.kind == MEDIAN]) == {3, 5}
    assert not BANK.median_px[BANK.kind != MEDIAN].any()
    assert [int((BANK.kind == kind).sum()) for kind in (IDENTITY, AVERAGE, MEDIAN)] == [1, 3, 3]


@pytest.mark.parametrize("kind", [GAUSSIAN, AVERAGE, MOTION])
def test_filters_against_scipy(wrists, kind):
    for index in np.flatnonzero(BANK.kind == kind)[[0, 1, -1]]:
        weights = BANK.weights[index].astype(float)
        expected = scipy.ndimage.correlate(wrists.astype(float), weights[None, None], mode="mirror")
        np.testing.assert_allclose(blur(wrists, int(index)), expected, atol=1 / 32)


@pytest.mark.parametrize("size_px", [3, 5])
def test_median_against_scipy(wrists, size_px):
    index = int(np.flatnonzero(BANK.median_px == size_px)[0])
    expected = scipy.ndimage.median_filter(wrists, size=(1, 1, size_px, size_px), mode="mirror")
    np.testing.assert_array_equal(blur(wrists, index), expected)


def test_known_filters():
    gaussian = np.zeros((5, 5))
    gaussian[2, 2] = 1.0
    gaussian = scipy.ndimage.gaussian_filter(gaussian, 1.25, mode="constant", radius=2)
    np.testing.assert_allclose(room.gaussian_weights(1.25), gaussian, atol=1e-9)
    np.testing.assert_array_equal(np.argwhere(room.average_weights(3)).min(0), [1, 1])
    np.testing.assert_array_equal(np.argwhere(room.average_weights(4)).max(0), [3, 3])
    assert np.count_nonzero(room.average_weights(4)) == 16
    level = room.motion_weights(5, 0.0, 0.0)
    np.testing.assert_allclose(level[2], 0.2)
    np.testing.assert_allclose(room.motion_weights(3, np.pi / 2, 0.0)[1:4, 2], 1 / 3)
    np.testing.assert_allclose(room.motion_weights(3, 0.0, 1.0)[2], [0, 2 / 3, 1 / 3, 0, 0], atol=1e-12)


def test_the_first_entry_is_the_identity_and_halves_never_mix(wrists):
    np.testing.assert_array_equal(blur(wrists, 0), wrists)
    painted = wrists.copy()
    painted[1] = 0.0
    for index in (int(np.flatnonzero(BANK.kind == kind)[-1]) for kind in (GAUSSIAN, AVERAGE, MEDIAN, MOTION)):
        np.testing.assert_array_equal(blur(painted, index)[0], blur(wrists, index)[0])
        assert not np.array_equal(blur(wrists, index)[0], wrists[0])


@pytest.mark.parametrize(
    ("config", "probability", "shares"),
    [
        (CONFIG, 0.168, {GAUSSIAN: 1 / 6, AVERAGE: 1 / 6, MEDIAN: 1 / 6, MOTION: 1 / 2}),
        (BlurConfig(probability=1.0, weights=BlurWeights(motion=0.0, average=0.0)), 1.0, {GAUSSIAN: 0.5, MEDIAN: 0.5}),
    ],
)
def test_draws(config, probability, shares):
    keys = jax.random.split(jax.random.key(4), 2000)
    index = np.asarray(jax.jit(jax.vmap(lambda key: room.draw_blur(key, config)))(keys))
    kind = room.filter_bank(config).kind[index]
    expected = {kind: probability * shares.get(kind, 0.0) for kind in (GAUSSIAN, AVERAGE, MEDIAN, MOTION)}
    expected[IDENTITY] = 1.0 - probability
    for each, share in expected.items():
        low, high = scipy.stats.binom.interval(1 - 1e-6, 2000, share)
        assert low <= (kind == each).sum() <= high


def test_kinds_without_weight_are_not_computed(wrists):
    def minima(weights):
        program = jax.make_jaxpr(lambda image: room.blur(image, jnp.int32(0), BlurConfig(weights=weights)))(wrists)
        return str(program).count("= min ")

    assert minima(BlurWeights(median=0.0)) < 5
    assert minima(BlurWeights()) > 50
