"""Arithmetic that gives the same bits in every program: why and how.

A compiler may fuse, split and contract float operations differently in programs for one image and for eight, or for
eight devices. Results then differ in the last bit, and after rounding some pixels differ by a level. The augmentation
of a sample must not depend on such things, so

- whatever is random is a whole number that picks an entry of a table that numpy made (`draw`, `choose`), and
- images lie on a grid of sixteenths of a level (12 bits), and are multiplied by numbers of at most 12 bits: products
  and sums fit into the 24 bits of a float32 and are exact, in any order and with any contraction.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

GRID = 16
"""Steps of images per grey level, between operations."""

TABLE_STEPS = 1024
"""A range is divided into so many steps; even, so that the middle of a symmetric range is exactly 0."""


def on_grid(image: jax.Array) -> jax.Array:
    """Values rounded to the grid of images and clipped to [0, 255]."""
    return jnp.clip(jnp.round(image * GRID) * (1.0 / GRID), 0.0, 255.0)


def range_table(low: float, high: float, per_unit: int) -> np.ndarray:
    """Evenly spaced values (TABLE_STEPS + 1,) int64 from `low` to `high`, rounded, in units of 1 / `per_unit`."""
    return np.round(np.linspace(low, high, TABLE_STEPS + 1) * per_unit).astype(np.int64)


def draw(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Uniform indices into range tables, int32."""
    return jax.random.randint(key, shape, 0, TABLE_STEPS + 1)


def happens(key: jax.Array, probability: float) -> jax.Array:
    """True () with a probability."""
    return jax.random.uniform(key) < probability


def choose(key: jax.Array, weights: Sequence[float]) -> jax.Array:
    """Index () int32 of an alternative, with probabilities proportional to the weights; weight 0 is never chosen."""
    bounds = (np.cumsum(weights) / np.sum(weights))[:-1].astype(np.float32)
    return jnp.sum(jax.random.uniform(key) >= bounds, dtype=jnp.int32)
