"""Small shifts, rotations and scalings of each wrist image on its own.

Coordinates are fixed-point int32, see `fixed_point` for why: matrices in units of 2^-14, positions before the matrix
in 1/32 pixel, after it in 2^-19 pixel; the weights of neighbours come from 1/64 pixel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_data.augment.config import AffineConfig
from rdt2_data.augment.fixed_point import draw, happens, on_grid, range_table

MAX_SIDE_PX = 512
"""Of one wrist image: coordinates of larger ones, moved and scaled as far as the configuration allows, overflow."""

_ONE = 2**14
_STEPS_PER_PX = 32
_COORDINATE_BITS = 19
_WEIGHT_BITS = 6


class AffineDraw(NamedTuple):
    """Where the pixels of the left and the right wrist image come from.

    A pixel at p, from the centre of the image, comes from [[cosine, sine], [-sine, cosine]] (p - shift).

    Attributes:
        cosine, sine: (2,) int32 in units of 2^-14, cosine and sine of the rotation divided by the magnification. The
            rotation is from the x axis (right) towards the y axis (down).
        shift: (2, 2) int32 in 1/32 pixel, of each image along x and y.
    """

    cosine: jax.Array
    sine: jax.Array
    shift: jax.Array


def draw_affine(key: jax.Array, config: AffineConfig, height: int, width: int) -> AffineDraw:
    """Draws the motion of both wrist images (height, width) of one sample from its own key.

    With `config.probability` both move, each in its own way, else neither.
    """
    active_key, shift_key, rotation_key, scale_key = jax.random.split(key, 4)
    limit_rad = math.radians(config.rotation_deg)
    angles_rad = range_table(-limit_rad, limit_rad, 2**30) / 2**30
    shifts = np.stack(
        [range_table(-config.shift * side, config.shift * side, _STEPS_PER_PX) for side in (width, height)]
    )
    shrink = jnp.asarray(np.round(_ONE / np.linspace(*config.scale, len(angles_rad))), jnp.int32)[draw(scale_key, (2,))]
    rotation = draw(rotation_key, (2,))
    motion = AffineDraw(
        cosine=_product(jnp.asarray(np.round(_ONE * np.cos(angles_rad)), jnp.int32)[rotation], shrink),
        sine=_product(jnp.asarray(np.round(_ONE * np.sin(angles_rad)), jnp.int32)[rotation], shrink),
        shift=jnp.asarray(shifts, jnp.int32)[jnp.arange(2), draw(shift_key, (2, 2))],
    )
    return unless_still(happens(active_key, config.probability), motion)


def unless_still(moves: jax.Array, motion: AffineDraw) -> AffineDraw:
    """The motion where `moves` () holds, else the identity."""
    return AffineDraw(
        cosine=jnp.where(moves, motion.cosine, _ONE),
        sine=jnp.where(moves, motion.sine, 0),
        shift=jnp.where(moves, motion.shift, 0),
    )


def affine_motion(shift_px: np.ndarray, rotation_rad: np.ndarray, scale: np.ndarray) -> AffineDraw:
    """A motion by choice: shift (2, 2) in pixels along x and y, rotation (2,) and magnification (2,) of each image."""
    return AffineDraw(
        cosine=jnp.asarray(np.round(_ONE * np.cos(rotation_rad) / scale), jnp.int32),
        sine=jnp.asarray(np.round(_ONE * np.sin(rotation_rad) / scale), jnp.int32),
        shift=jnp.asarray(np.round(_STEPS_PER_PX * np.asarray(shift_px)), jnp.int32),
    )


def move_halves(image: jax.Array, motion: AffineDraw) -> jax.Array:
    """Moves each wrist image by bilinear interpolation; what comes from outside of it is black, as published.

    With the identity the result equals the input exactly.

    Args:
        image: (2, 3, H, W) float32 in [0, 255] on the grid, left and right wrist, sides up to 512.
        motion: how they move.

    Returns:
        Like `image`.
    """
    return jax.lax.map(lambda half: _move(*half), (image, motion))


def _move(image: jax.Array, motion: AffineDraw) -> jax.Array:
    """One wrist image (3, H, W): finds where each pixel comes from, in units of 2^-19 pixel."""
    height, width = image.shape[-2:]
    half_px = _STEPS_PER_PX // 2
    x = half_px * (2 * jnp.arange(width, dtype=jnp.int32)[None, :] - (width - 1)) - motion.shift[0]
    y = half_px * (2 * jnp.arange(height, dtype=jnp.int32)[:, None] - (height - 1)) - motion.shift[1]
    half = 2 ** (_COORDINATE_BITS - 1)
    from_x = motion.cosine * x + motion.sine * y + half * (width - 1)
    from_y = motion.cosine * y - motion.sine * x + half * (height - 1)
    return _interpolate(image, from_x, from_y)


def _interpolate(image: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Bilinear samples (3, H, W) of an image at (H, W) fixed-point coordinates; pixels outside count as black."""
    height, width = image.shape[-2:]
    flat = image.reshape(image.shape[0], height * width)
    (column, across), (row, down) = _split(x), _split(y)
    total = jnp.zeros_like(image)
    for row_step, row_weight in ((0, 1.0 - down), (1, down)):
        for column_step, column_weight in ((0, 1.0 - across), (1, across)):
            r, c = row + row_step, column + column_step
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            weight = jnp.where(inside, row_weight * column_weight, 0.0)
            index = jnp.clip(r, 0, height - 1) * width + jnp.clip(c, 0, width - 1)
            total = total + weight * flat[:, index]
    return on_grid(total)


def _split(coordinate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whole pixel, and the rest of it as a float32 that is a multiple of 1/64."""
    dropped = _COORDINATE_BITS - _WEIGHT_BITS
    rounded = (coordinate + 2 ** (dropped - 1)) >> dropped
    part = (rounded & (2**_WEIGHT_BITS - 1)).astype(jnp.float32)
    return rounded >> _WEIGHT_BITS, part * 2.0**-_WEIGHT_BITS


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b + _ONE // 2) // _ONE
