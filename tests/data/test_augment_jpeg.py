"""JPEG artefacts on the host: how often, how strong, reproducible, and refused input."""

from __future__ import annotations

import io

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from rdt2_data.augment.config import AugmentConfig, JpegConfig
from rdt2_data.augment.jpeg import corrupt_jpeg, draw_quality

from rdt2_jax.errors import DataError

KEYS = np.random.default_rng(0).integers(0, 2**32, (2000, 2), dtype=np.uint32)


def always(compression):
    return AugmentConfig(jpeg=JpegConfig(probability=1.0, compression=(compression, compression)))


@pytest.fixture(scope="module")
def image():
    y, x = np.mgrid[:48, :96]
    noise = np.random.default_rng(1).normal(0, 8, (48, 96, 3))
    return np.clip(np.stack([2 * x, 4 * y, x + y], -1) + noise, 0, 255).astype(np.uint8)


def test_how_often_and_how_strong():
    qualities = [draw_quality(key, AugmentConfig()) for key in KEYS]
    compressed = [quality for quality in qualities if quality is not None]
    low, high = scipy.stats.binom.interval(1 - 1e-6, len(KEYS), 0.4)
    assert low <= len(compressed) <= high
    assert set(compressed) == set(range(50, 101))
    assert abs(np.mean(compressed) - 75) < 5 * np.sqrt((51**2 - 1) / 12 / len(compressed))
    assert [draw_quality(key, AugmentConfig()) for key in KEYS[:50]] == qualities[:50]


def test_both_words_of_the_key_count():
    drawn = {
        tuple(draw_quality(np.array([a, b + i], np.uint32), RANDOM) for i in range(0, 40, 2))
        for a, b in ((0, 0), (1, 0), (0, 1))
    }
    assert len(drawn) == 3


RANDOM = AugmentConfig(jpeg=JpegConfig(probability=1.0))


@pytest.mark.parametrize("compression", [5, 50])
def test_against_pillow(image, compression):
    """Another encoder of the same quality and the same resolution of colours loses the same things."""
    found = corrupt_jpeg(image, KEYS[0], always(compression)).astype(float)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=100 - compression, subsampling="4:2:0")
    with Image.open(file) as opened:
        expected = np.asarray(opened, float)
    lost = np.abs(expected - image).mean()
    assert abs(np.abs(found - image).mean() / lost - 1) < 0.05
    assert np.abs(found - expected).mean() < 0.5 * lost


def test_stronger_is_worse(image):
    errors = [np.abs(corrupt_jpeg(image, KEYS[0], always(c)).astype(int) - image).mean() for c in (0, 25, 50)]
    assert 0 < errors[0] < errors[1] < errors[2] < 12


def test_left_alone(image):
    assert corrupt_jpeg(image, KEYS[0], AugmentConfig.none()) is image
    before = image.copy()
    corrupt_jpeg(image, KEYS[0], always(50))
    np.testing.assert_array_equal(image, before)


def test_a_view_is_fine(image):
    mirrored = image[:, ::-1]
    expected = corrupt_jpeg(mirrored.copy(), KEYS[0], always(50))
    np.testing.assert_array_equal(corrupt_jpeg(mirrored, KEYS[0], always(50)), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "key", "message"),
    [
        ((48, 96, 3), np.float32, KEYS[0], r"found: \(48, 96, 3\) float32"),
        ((48, 96), np.uint8, KEYS[0], r"found: \(48, 96\) uint8"),
        ((0, 96, 3), np.uint8, KEYS[0], r"found: \(0, 96, 3\)"),
        ((48, 96, 3), np.uint8, KEYS[:1], r"expected a numpy array \(2,\) uint32, found \(1, 2\) uint32"),
        ((48, 96, 3), np.uint8, [1, 2], "found list"),
    ],
)
def test_refused(shape, dtype, key, message):
    with pytest.raises(DataError, match=message):
        corrupt_jpeg(np.zeros(shape, dtype), key, RANDOM)
