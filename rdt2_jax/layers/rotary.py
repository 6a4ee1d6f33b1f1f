"""Rotary position embeddings (Su et al., arXiv 2104.09864), with angles that the caller composes.

A head of width D has D / 2 frequencies theta^(-2i/D); the numbers i and i + D / 2 of a head form the pair that turns
by the i-th angle (the "rotate half" convention of the published models).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(width: int, theta: float) -> np.ndarray:
    """theta^(-2i/width) for i < width / 2, float32 (width / 2,)."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns every head.

    Args:
        x: (..., heads, length, head_dim).
        cos, sin: of the angles, float32, such that they broadcast: (length, head_dim / 2), or with more in front.

    Returns:
        As `x`; computed in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
