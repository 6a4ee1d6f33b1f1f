"""Colour jitter on the accelerator, with the semantics of torchvision's ColorJitter.

Brightness, contrast and saturation are the same blend, factor * image + (1 - factor) * other, where `other` is black,
the mean grey of the image, or the grey of each pixel. Four rounds of "blend or turn the hue", with the operation of
each round chosen by the sample, cover all 24 orders; enumerating orders would cost 24 times four.

The library dm-pix has operations of these names. Its brightness adds, its contrast takes one mean for every channel,
its saturation works in HSV, all unlike the published ones; its hue agrees, but not to the bit between programs (see
`fixed_point`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_data.augment.config import ColourConfig
from rdt2_data.augment.fixed_point import draw, on_grid, range_table

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Names of the operations in `ColourDraw.order`."""

_FACTOR_UNITS = 1024
_SEXTANT_UNITS = 2048
_GREY_WEIGHTS = (1224 / 4096, 2405 / 4096, 467 / 4096)
"""Luma of ITU-R BT.601 (0.2989, 0.587, 0.114) in 12 bits."""


class ColourDraw(NamedTuple):
    """What happens to the colours of one sample.

    Attributes:
        order: (4,) int32, the operations in the order in which they are done.
        factors: (3,) float32, of brightness, contrast and saturation, multiples of 1/1024; 1 changes nothing.
        hue_sextants: () float32, shift of the hue in sixths of a full turn, a multiple of 1/2048.
    """

    order: jax.Array
    factors: jax.Array
    hue_sextants: jax.Array


def draw_colour(key: jax.Array, config: ColourConfig) -> ColourDraw:
    """Draws the changes of one sample from its own key."""
    order_key, factor_key, hue_key = jax.random.split(key, 3)
    widths = (config.brightness, config.contrast, config.saturation)
    factors = np.stack([range_table(1.0 - x, 1.0 + x, _FACTOR_UNITS) / _FACTOR_UNITS for x in widths])
    sextants = range_table(-6.0 * config.hue, 6.0 * config.hue, _SEXTANT_UNITS) / _SEXTANT_UNITS
    return ColourDraw(
        order=jax.random.permutation(order_key, 4).astype(jnp.int32),
        factors=jnp.asarray(factors, jnp.float32)[jnp.arange(3), draw(factor_key, (3,))],
        hue_sextants=jnp.asarray(sextants, jnp.float32)[draw(hue_key)],
    )


def jitter_colour(image: jax.Array, drawn: ColourDraw) -> jax.Array:
    """Changes the colours of one sample; every operation clips to [0, 255], as the published one does.

    Args:
        image: (2, 3, H, W) float32 in [0, 255] on the grid, left and right wrist. The mean grey is that of both.
        drawn: what to do.

    Returns:
        Like `image`.
    """

    def one_round(image: jax.Array, operation: jax.Array) -> tuple[jax.Array, None]:
        turned = turn_hue(image, drawn.hue_sextants)
        return jnp.where(operation == HUE, turned, _blend(image, operation, drawn.factors)), None

    return jax.lax.scan(one_round, image, drawn.order)[0]


def turn_hue(image: jax.Array, sextants: jax.Array) -> jax.Array:
    """Shifts the hue of an image; the largest and the smallest channel of a pixel, so value and saturation, stay.

    With the hue h in sixths of a turn, a channel is smallest + (largest - smallest) * w, where w is a trapezoid of h:
    clip(|h - 3| - 1), clip(2 - |h - 2|), clip(2 - |h - 4|) for red, green, blue, clipped to [0, 1] (Smith 1978).

    Args:
        image: (..., 3, H, W) float32 in [0, 255] on the grid.
        sextants: () float32, in [-3, 3], a multiple of 1/2048.
    """
    red, green, blue = (image[..., channel, :, :] for channel in range(3))
    largest = jnp.maximum(jnp.maximum(red, green), blue)
    smallest = jnp.minimum(jnp.minimum(red, green), blue)
    span = largest - smallest
    is_red, is_green = largest == red, largest == green
    difference = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    start = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0))
    within = jnp.round(difference / jnp.where(span > 0.0, span, 1.0) * _SEXTANT_UNITS) * (1.0 / _SEXTANT_UNITS)
    hue = start + within + sextants
    hue = jnp.where(hue < 0.0, hue + 6.0, hue)
    hue = jnp.where(hue >= 6.0, hue - 6.0, hue)
    trapezoids = (jnp.abs(hue - 3.0) - 1.0, 2.0 - jnp.abs(hue - 2.0), 2.0 - jnp.abs(hue - 4.0))
    channels = [smallest + span * jnp.clip(trapezoid, 0.0, 1.0) for trapezoid in trapezoids]
    return on_grid(jnp.stack(channels, axis=-3))


def grey(image: jax.Array) -> jax.Array:
    """Grey (..., 1, H, W) of an image (..., 3, H, W) on the grid, on the grid too."""
    red, green, blue = (image[..., channel : channel + 1, :, :] for channel in range(3))
    return on_grid(_GREY_WEIGHTS[0] * red + _GREY_WEIGHTS[1] * green + _GREY_WEIGHTS[2] * blue)


def mean_grey(image: jax.Array) -> jax.Array:
    """Mean () of the grey of an image (2, 3, H, W), on the grid, from whole levels as in torchvision."""
    levels = jnp.round(grey(image)).astype(jnp.int32)
    total, count = jnp.sum(levels, dtype=jnp.int32), levels.size
    steps = (total % count * 16 + count // 2) // count
    return (total // count).astype(jnp.float32) + steps.astype(jnp.float32) / 16.0


def _blend(image: jax.Array, operation: jax.Array, factors: jax.Array) -> jax.Array:
    factor = factors[jnp.minimum(operation, SATURATION)]
    other = jnp.where(operation == SATURATION, grey(image), 0.0)
    other = jnp.where(operation == CONTRAST, mean_grey(image), other)
    return on_grid(factor * image + (1.0 - factor) * other)
