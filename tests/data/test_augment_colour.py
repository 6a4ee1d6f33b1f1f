"""Colour operations against the published formulas in float64, the hue against the standard library."""

from __future__ import annotations

import colorsys

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from rdt2_data.augment import colour
from rdt2_data.augment.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColourDraw
from rdt2_data.augment.config import ColourConfig

ENHANCERS = {BRIGHTNESS: ImageEnhance.Brightness, CONTRAST: ImageEnhance.Contrast, SATURATION: ImageEnhance.Color}


@pytest.fixture(scope="module")
def composite():
    return np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def wrists(composite):
    height, width = composite.shape[0], composite.shape[1] // 2
    return composite.astype(np.float32).reshape(height, 2, width, 3).transpose(1, 3, 0, 2)


def composite_of(wrists):
    return np.asarray(wrists).transpose(2, 0, 3, 1).reshape(wrists.shape[2], -1, 3)


jitter = jax.jit(colour.jitter_colour)


def draw_of(order=(0, 1, 2, 3), factors=(1.0, 1.0, 1.0), hue_sextants=0.0):
    return ColourDraw(
        jnp.array(order, jnp.int32), jnp.array(factors, jnp.float32), jnp.asarray(hue_sextants, jnp.float32)
    )


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION])
@pytest.mark.parametrize("factor", [0.0, 0.5, 0.75, 1.375])
def test_blends_against_pillow(composite, operation, factor):
    factors = np.ones(3)
    factors[operation] = factor
    found = composite_of(jitter(wrists(composite), draw_of(factors=factors)))
    expected = np.asarray(ENHANCERS[operation](Image.fromarray(composite)).enhance(factor), float)
    assert np.abs(found - expected).max() <= 1.1  # pillow rounds the grey and the result to whole levels
    assert np.abs(found - expected).mean() <= 0.6


@pytest.mark.parametrize("turns", [-0.03, 0.01, 0.25])
def test_hue_against_dm_pix(composite, turns):
    """Beside the library's; ours is of another arithmetic, so that a batch's other images cannot change a bit of it."""
    sextants = round(6 * turns * 2048) / 2048
    found = composite_of(jitter(wrists(composite), draw_of(hue_sextants=sextants)))
    expected = 255 * dm_pix.adjust_hue(jnp.asarray(composite, jnp.float32) / 255, sextants / 6)
    np.testing.assert_allclose(found, expected, atol=0.2)


@pytest.mark.parametrize("turns", [-0.5, -0.03, 0.01, 0.25])
def test_hue_against_the_standard_library(composite, turns):
    sextants = round(6 * turns * 2048) / 2048
    found = composite_of(jitter(wrists(composite), draw_of(hue_sextants=sextants)))
    for pixel, result in zip(composite.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel.astype(float))
        expected = colorsys.hsv_to_rgb((hue + sextants / 6) % 1.0, saturation, value)
        np.testing.assert_allclose(result, expected, atol=0.12)


def test_grey_pixels_have_no_hue():
    image = np.broadcast_to(np.float32([0, 77, 255])[:, None], (2, 3, 3, 4)).copy()
    np.testing.assert_array_equal(colour.turn_hue(jnp.asarray(image), jnp.float32(1.3)), image)


def test_orders(composite):
    """All 24 orders, against the same operations in float64."""

    def reference(image, order, factors):
        for operation in order:
            grey = image @ [0.2989, 0.587, 0.114]
            if operation == HUE:
                hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3)]
                turned = [colorsys.hsv_to_rgb((h + 0.125 / 6) % 1.0, s, v) for h, s, v in hsv]
                image = np.reshape(turned, image.shape)
                continue
            other = {BRIGHTNESS: 0.0, CONTRAST: np.round(grey).mean(), SATURATION: grey[..., None]}[operation]
            image = np.clip(factors[operation] * image + (1 - factors[operation]) * other, 0, 255)
        return image

    factors = (1.25, 0.625, 1.5)
    orders = [tuple(np.random.default_rng(i).permutation(4)) for i in range(200)]
    distinct = sorted(set(orders))
    assert len(distinct) == 24
    draws = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[draw_of(order, factors, 0.125) for order in distinct])
    found = jax.jit(jax.vmap(colour.jitter_colour, in_axes=(None, 0)))(wrists(composite), draws)
    for order, result in zip(distinct, found, strict=True):
        expected = reference(composite.astype(float), order, factors)
        np.testing.assert_allclose(composite_of(result), expected, atol=0.7, err_msg=str(order))
    spread = {composite_of(result).tobytes() for result in np.round(np.asarray(found))}
    assert len(spread) > 6, "the order matters"


def test_ones_change_nothing(composite):
    image = wrists(composite)
    np.testing.assert_array_equal(np.round(jitter(image, draw_of(order=(3, 1, 0, 2)))), image)


def test_draws():
    keys = jax.random.split(jax.random.key(1), 4000)
    config = ColourConfig()
    draws = jax.jit(jax.vmap(lambda key: colour.draw_colour(key, config)))(keys)
    for column, width in enumerate((0.3, 0.4, 0.5)):
        factor = np.asarray(draws.factors[:, column])
        assert abs(factor.min() - (1 - width)) < 0.01
        assert abs(factor.max() - (1 + width)) < 0.01
        assert abs(factor.mean() - 1) < 5 * width / np.sqrt(3 * 4000)
    hue = np.asarray(draws.hue_sextants) / 6
    assert abs(hue.min() + 0.03) < 1e-3
    assert abs(hue.max() - 0.03) < 1e-3
    _, counts = np.unique(np.asarray(draws.order), axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 4000 / 24) ** 2 / (4000 / 24)).sum() < 49.7, "chi-square, 23 degrees of freedom, 0.1%"
