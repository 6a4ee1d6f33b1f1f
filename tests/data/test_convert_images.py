"""One wrist image and the composite."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from rdt2_data.converters.images import (
    PUBLISHED_CROP_COLUMNS,
    PUBLISHED_CROP_ROWS,
    composite_jpeg,
    wrist_image,
)
from rdt2_data.converters.options import ImageOptions
from rdt2_data.problems import SampleError

from rdt2_jax.config import parse_config
from rdt2_jax.errors import ConfigError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = noise(384, 384, 3)
    assert np.array_equal(wrist_image(image, ImageOptions(), "here"), image)


def test_reduction_takes_the_mean_of_the_area() -> None:
    image = noise(768, 1152, 3)
    means = image.reshape(384, 2, 384, 3, 3).mean(axis=(1, 3))
    assert np.abs(wrist_image(image, ImageOptions(), "here") - means).max() <= 1  # rounded twice


def test_small_images_are_interpolated() -> None:
    ramp = np.repeat(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], 96, axis=0).repeat(3, axis=2)
    result = wrist_image(ramp, ImageOptions(), "here")
    assert result.shape == (384, 384, 3)
    assert len(np.unique(result[0, :, 0])) > 96  # a mere repetition of pixels would have 96 values


def test_the_published_crop() -> None:
    rows, columns = PUBLISHED_CROP_ROWS, PUBLISHED_CROP_COLUMNS
    image = np.zeros((1080, 1440, 3), np.uint8)
    image[slice(*rows), slice(*columns)] = noise(996, 1011, 3) // 2 + 100
    result = wrist_image(image, ImageOptions(crop_rows=rows, crop_columns=columns), "here")
    assert result.min() >= 100  # nothing of the black border
    assert wrist_image(image, ImageOptions(), "here").min() == 0


def test_the_composite_is_left_then_right_and_the_same_every_time() -> None:
    left, right = np.full((384, 384, 3), (200, 20, 20), np.uint8), np.full((384, 384, 3), (20, 20, 200), np.uint8)
    data = composite_jpeg(left, right, 95)
    assert data == composite_jpeg(left, right, 95)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.layers, image.layer[0][1:3]) == ((768, 384), 3, (2, 2))  # type: ignore[attr-defined]
        decoded = np.asarray(image.convert("RGB")).astype(int)
    # Colours at half the resolution run one pixel over the seam.
    assert np.abs(decoded[:, :383] - left[:, :383]).max() <= 3
    assert np.abs(decoded[:, 385:] - right[:, 1:]).max() <= 3
    assert len(composite_jpeg(noise(384, 384, 3), right, 50)) < len(composite_jpeg(noise(384, 384, 3), right, 95))


@pytest.mark.parametrize(
    ("image", "options", "reason"),
    [
        (noise(48, 64), ImageOptions(), "wrong-image"),
        (noise(48, 64, 4), ImageOptions(), "wrong-image"),
        (noise(48, 64, 3).astype(np.float32), ImageOptions(), "wrong-image"),
        (noise(0, 64, 3), ImageOptions(), "wrong-image"),
        (noise(48, 64, 3), ImageOptions(crop_rows=(10, 49)), "wrong-image"),
        (np.full((48, 64, 3), 7, np.uint8), ImageOptions(), "blank-image"),
    ],
)
def test_what_is_no_image_is_refused(image: np.ndarray, options: ImageOptions, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        wrist_image(image, options, "here")
    assert caught.value.reason == reason


@pytest.mark.parametrize("values", [{"crop_rows": (5, 5)}, {"crop_rows": (-1, 5)}, {"jpeg_quality": 0}, {"crop": 1}])
def test_options_that_make_no_sense(values: dict) -> None:
    with pytest.raises(ConfigError):
        parse_config(ImageOptions, values, where="test")
