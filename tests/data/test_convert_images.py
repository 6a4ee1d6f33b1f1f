"""One wrist image and the composite."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rdt2_data.converters.images import (
    PUBLISHED_CROP_COLUMNS,
    PUBLISHED_CROP_ROWS,
    composite_jpeg,
    resample,
    shape_notes,
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


def area_weights(size: int, new: int) -> np.ndarray:
    """(new, size) float64: the share of each source pixel in the stretch that a new one covers."""
    edges = np.arange(new + 1) * size / new
    pixels = np.arange(size)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return covered.clip(0) * new / size


def linear_weights(size: int, new: int) -> np.ndarray:
    """(new, size) float64: linear between the centres of pixels."""
    centres = ((np.arange(new) + 0.5) * size / new - 0.5).clip(0, size - 1)
    return (1 - np.abs(centres[:, None] - np.arange(size))).clip(0)


def reference(image: np.ndarray, rows: int = 384, columns: int = 384) -> np.ndarray:
    sides = [
        (area_weights if size > new else linear_weights)(size, new)
        for size, new in zip(image.shape, (rows, columns), strict=False)
    ]
    return np.einsum("ij,jkc,lk->ilc", sides[0], image.astype(np.float64), sides[1], optimize=True)


@pytest.mark.parametrize(
    "size", [(996, 1011), (400, 400), (480, 640), (768, 1152), (385, 384), (360, 640), (96, 128), (3000, 4000)]
)
def test_reduction_takes_the_mean_of_the_area_and_growth_is_linear(size: tuple[int, int]) -> None:
    image = noise(*size, 3)
    image[: size[0] // 2, : size[1] // 2] = image[: size[0] // 2, : size[1] // 2] // 255 * 255  # extremes
    result = wrist_image(image, ImageOptions(), "here")
    assert np.abs(result - reference(image)).max() <= 0.5 + 1e-9  # rounded once


@settings(max_examples=40, deadline=None)
@given(*[st.integers(1, 60)] * 4, st.integers(0, 255))
def test_resampling_keeps_one_colour_and_is_never_more_than_half_a_level_off(
    height: int, width: int, rows: int, columns: int, level: int
) -> None:
    image = noise(height, width, 3)
    assert np.abs(resample(image, rows, columns) - reference(image, rows, columns)).max() <= 0.5 + 1e-9
    flat = np.full((height, width, 3), level, np.uint8)
    assert (resample(flat, rows, columns) == level).all()


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        (["384x384", "1000x990"], ImageOptions(), []),
        (["640x480"], ImageOptions(), ["640x480 pixels became a square: the scene is squeezed by a factor of 1.33"]),
        (["640x480"], ImageOptions(crop_columns=(80, 560)), []),
        (["640x480"], ImageOptions(crop_rows=(0, 240)), ["640x240 pixels of 640x480 became a square"]),
        (["1440x1080"], ImageOptions(), ["--crop-rows 61:1057 --crop-columns 224:1235"]),
        (["1440x1080"], ImageOptions(crop_rows=PUBLISHED_CROP_ROWS, crop_columns=PUBLISHED_CROP_COLUMNS), []),
    ],
)
def test_shapes_that_deserve_a_note(sizes: list[str], options: ImageOptions, said: list[str]) -> None:
    notes = shape_notes(dict.fromkeys(sizes, 1), options)
    assert len(notes) == len(said)
    assert all(text in note for text, note in zip(said, notes, strict=True))


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
