"""Gaussian, average, median and motion blur in windows of at most 5 x 5 pixels, of each wrist image on its own.

Gaussian, average and motion are one 5 x 5 filter, picked by the sample from a bank that numpy made (`fixed_point` says
why); the median is the only other operation. Beyond its edge an image is mirrored without repeating the edge (numpy's
"reflect"), so nothing crosses the middle of a composite. The published recipe blurs the composite: there, two columns
on each side of the middle differ.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_data.augment.config import MAX_BLUR_SIZE_PX, BlurConfig
from rdt2_data.augment.fixed_point import choose, happens, on_grid

IDENTITY, GAUSSIAN, AVERAGE, MEDIAN, MOTION = range(5)
"""Kinds; after the first in the order of the fields of `BlurWeights`."""

_RADIUS = MAX_BLUR_SIZE_PX // 2
_WEIGHT_UNITS = 4096
_SIGMAS, _ANGLES, _DIRECTIONS = 65, 72, 9
"""How finely the ranges of the configuration are divided."""


class FilterBank(NamedTuple):
    """Every blur that a configuration allows; the first leaves an image as it is.

    Attributes:
        weights: (N, 5, 5) float32, multiples of 1/4096 with the sum 1, rows down and columns right; a median has the
            identity here.
        median_px: (N,) int32, window of a median, 3 or 5; 0 for the others.
        kind: (N,) int32.
    """

    weights: np.ndarray
    median_px: np.ndarray
    kind: np.ndarray


@functools.cache
def filter_bank(config: BlurConfig) -> FilterBank:
    """The bank of a configuration: its ranges, evenly divided."""
    sizes = range(config.size_px[0], config.size_px[1] + 1)
    sigmas_px = np.linspace(*config.gaussian_sigma_px, _SIGMAS)
    angles_rad = np.radians(np.linspace(*config.motion_angle_deg, _ANGLES, endpoint=False))
    directions = np.linspace(*config.motion_direction, _DIRECTIONS)
    still = np.zeros((MAX_BLUR_SIZE_PX, MAX_BLUR_SIZE_PX))
    still[_RADIUS, _RADIUS] = 1.0
    rows: list[tuple[int, int, np.ndarray]] = [(IDENTITY, 0, still)]
    rows += [(GAUSSIAN, 0, gaussian_weights(sigma_px)) for sigma_px in sigmas_px]
    rows += [(AVERAGE, 0, average_weights(size)) for size in sizes]
    rows += [(MEDIAN, _odd(size), still) for size in sizes]
    motions = itertools.product(sizes, angles_rad, directions)
    rows += [(MOTION, 0, motion_weights(_odd(size), angle, direction)) for size, angle, direction in motions]
    kinds, medians_px, weights = zip(*rows, strict=True)
    return FilterBank(
        weights=np.stack([_rounded(each) for each in weights]).astype(np.float32),
        median_px=np.array(medians_px, np.int32),
        kind=np.array(kinds, np.int32),
    )


def draw_blur(key: jax.Array, config: BlurConfig) -> jax.Array:
    """Draws the blur of one sample from its own key: an index () int32 into the bank, 0 for none."""
    active_key, kind_key, entry_key = jax.random.split(key, 3)
    counts = np.bincount(filter_bank(config).kind, minlength=MOTION + 1)  # pyright: ignore[reportArgumentType]
    starts = np.cumsum(counts) - counts
    kind = 1 + choose(kind_key, config.weights.values())
    entry = jax.random.randint(entry_key, (), 0, jnp.asarray(counts, jnp.int32)[kind])
    return jnp.where(happens(active_key, config.probability), jnp.asarray(starts, jnp.int32)[kind] + entry, 0)


def blur(image: jax.Array, index: jax.Array, config: BlurConfig) -> jax.Array:
    """Blurs both wrist images of one sample alike; index 0 gives the input exactly.

    Args:
        image: (2, 3, H, W) float32 in [0, 255] on the grid, H and W at least 3.
        index: () int32, entry of `filter_bank(config)`.
        config: kinds of weight 0 are not computed.

    Returns:
        Like `image`.
    """
    return jax.lax.map(lambda wrist: _blur_one(wrist, index, config), image)


def _blur_one(image: jax.Array, index: jax.Array, config: BlurConfig) -> jax.Array:
    bank, weights = filter_bank(config), config.weights  # pyright: ignore[reportArgumentType]
    blurred = image
    if weights.gaussian > 0.0 or weights.average > 0.0 or weights.motion > 0.0:
        blurred = _filter(image, jnp.asarray(bank.weights)[index])
    if weights.median > 0.0:
        median_px = jnp.asarray(bank.median_px)[index]
        blurred = jnp.where(median_px > 0, _median(image, median_px), blurred)
    return blurred


def gaussian_weights(sigma_px: float) -> np.ndarray:
    """Weights (5, 5) of a Gaussian, cut off beyond two pixels and normalized; sigma 0 is the identity."""
    offset = np.arange(-_RADIUS, _RADIUS + 1)
    profile = np.exp(-0.5 * (offset / sigma_px) ** 2) if sigma_px > 0.0 else (offset == 0).astype(float)
    return np.outer(profile, profile) / profile.sum() ** 2


def average_weights(size_px: int) -> np.ndarray:
    """Weights (5, 5) of a mean over 3, 4 or 5 pixels; 4 have no middle and reach from -2 to 1, as in OpenCV."""
    offset = np.arange(-_RADIUS, _RADIUS + 1)
    profile = ((offset >= -(size_px // 2)) & (offset < (size_px + 1) // 2)) / size_px
    return np.outer(profile, profile)


def motion_weights(size_px: int, angle_rad: float, direction: float) -> np.ndarray:
    """Weights (5, 5) of a line of 3 or 5 pixels through the middle, each point shared among its four neighbours.

    Args:
        size_px: points on the line, one pixel apart.
        angle_rad: of the line, from the x axis (right) towards the y axis (down).
        direction: slope of the weights along it, from -1 (they rise from 0) over 0 (all equal) to 1 (they fall to 0).
    """
    step = np.arange(-(size_px // 2), size_px // 2 + 1)
    along = np.linspace(0.0, 1.0, size_px)
    weight = 0.5 * (1.0 + direction) * (1.0 - along) + 0.5 * (1.0 - direction) * along
    offset = np.arange(-_RADIUS, _RADIUS + 1)
    columns = np.maximum(1.0 - np.abs(step[:, None] * math.cos(angle_rad) - offset), 0.0)
    rows = np.maximum(1.0 - np.abs(step[:, None] * math.sin(angle_rad) - offset), 0.0)
    weights = np.einsum("n,nr,nc->rc", weight, rows, columns)
    return weights / weights.sum()


def _rounded(weights: np.ndarray) -> np.ndarray:
    """Multiples of 1/4096 whose sum is 1; what rounding lost goes to the largest."""
    units = np.round(weights * _WEIGHT_UNITS)
    units.flat[np.argmax(units)] += _WEIGHT_UNITS - units.sum()
    return units / _WEIGHT_UNITS


def _filter(image: jax.Array, weights: jax.Array) -> jax.Array:
    total = jnp.zeros_like(image)
    for (row, column), neighbour in _neighbours(image).items():
        total = total + weights[row, column] * neighbour
    return on_grid(total)


def _median(image: jax.Array, size_px: jax.Array) -> jax.Array:
    """Median of a window of 3 or 5 pixels.

    For 3, half of the outer 16 of 25 values become minus infinity and half infinity, which leaves the median of the
    inner 9. The median of 25 is found by forgetting: of 14 values, neither the smallest nor the largest can be the
    median of all; each time both go, one more comes in.
    """
    neighbours = _neighbours(image)
    outer = [place for place in neighbours if 0 in place or MAX_BLUR_SIZE_PX - 1 in place]
    for index, place in enumerate(outer):
        beyond = -jnp.inf if index % 2 else jnp.inf
        neighbours[place] = jnp.where(size_px < MAX_BLUR_SIZE_PX, beyond, neighbours[place])
    waiting = list(neighbours.values())
    first = len(waiting) // 2 + 2
    kept, waiting = waiting[:first], waiting[first:]
    while len(kept) > 1:
        kept = _without_extremes(kept)
        if waiting:
            kept.append(waiting.pop())
    return kept[0]


def _without_extremes(values: list[jax.Array]) -> list[jax.Array]:
    """The values without the smallest and the largest of them, element by element, in no particular order."""
    values = list(values)
    half = len(values) // 2
    for i in range(half):  # afterwards the smallest is in the first half, the largest in the second
        values[i], values[-1 - i] = jnp.minimum(values[i], values[-1 - i]), jnp.maximum(values[i], values[-1 - i])
    for i in range(1, len(values) - half):  # of an odd number, the middle one may be either
        values[0], values[i] = jnp.minimum(values[0], values[i]), jnp.maximum(values[0], values[i])
    for i in range(half, len(values) - 1):
        values[i], values[-1] = jnp.minimum(values[i], values[-1]), jnp.maximum(values[i], values[-1])
    return values[1:-1]


def _neighbours(image: jax.Array) -> dict[tuple[int, int], jax.Array]:
    """For each place of a 5 x 5 window, rows down and columns right, the image seen through it."""
    height, width = image.shape[-2:]
    edges = [(0, 0)] * (image.ndim - 2) + [(_RADIUS, _RADIUS)] * 2
    padded = jnp.pad(image, edges, mode="reflect")
    places = itertools.product(range(MAX_BLUR_SIZE_PX), repeat=2)
    return {(row, column): padded[..., row : row + height, column : column + width] for row, column in places}


def _odd(size_px: int) -> int:
    """The next odd size: a median and a motion need a middle."""
    return size_px + (size_px + 1) % 2
