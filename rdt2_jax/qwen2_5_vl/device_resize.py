"""Pillow's bicubic resizing on the accelerator, for training: images are augmented there, and resized after that.

The filter is Keys' cubic with a = -1/2, stretched when an image shrinks so that it does not alias; rows and columns are
filtered one after the other and rounded to bytes in between, columns of pixels first, as Pillow does. Both filters are
matrices that depend on the sizes alone, so that each pass is one product. What differs from Pillow is float32 in the
place of its fixed point: where a sum lies at the edge between two bytes.

Source of the method: the documentation and behaviour of Pillow's `Image.resize`, checked against it in the tests.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.errors import DataError

_SUPPORT = 2.0
_A = -0.5


def resize_bicubic(images: jax.Array, height: int, width: int) -> jax.Array:
    """Images of another size.

    Args:
        images: uint8 (..., rows, columns, channels).
        height, width: static.

    Returns:
        uint8 (..., height, width, channels).

    Raises:
        DataError: another type, or a size below 1.
    """
    if images.dtype != jnp.uint8 or images.ndim < 3 or min(height, width, *images.shape[-3:-1]) < 1:
        expected, found = "uint8 (..., rows, columns, channels), not empty", f"{images.dtype} {images.shape}"
        raise DataError("images cannot be resized", expected=expected, found=f"{found} to {height} x {width}")
    rows, columns = images.shape[-3:-1]
    if columns != width:
        images = _filtered("wj,...ijc->...iwc", bicubic_matrix(columns, width), images)
    if rows != height:
        images = _filtered("hi,...ijc->...hjc", bicubic_matrix(rows, height), images)
    return images


@functools.cache
def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """float32 (new_size, size): the weights of the old pixels in every new one; rows sum to 1."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    matrix = np.zeros((new_size, size))
    for new in range(new_size):
        centre = (new + 0.5) * scale
        first = max(math.floor(centre - _SUPPORT * stretch + 0.5), 0)
        last = min(math.floor(centre + _SUPPORT * stretch + 0.5), size)
        old = np.arange(first, last)
        weights = _cubic((old - centre + 0.5) / stretch)
        matrix[new, first:last] = weights / weights.sum()
    return matrix.astype(np.float32)


def _filtered(equation: str, matrix: np.ndarray, images: jax.Array) -> jax.Array:
    products = jnp.einsum(equation, matrix, images.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(jnp.floor(products + 0.5), 0, 255).astype(jnp.uint8)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel (IEEE TASSP 29, 1981) with a = -1/2."""
    x = np.abs(x)
    near = (_A + 2) * x**3 - (_A + 3) * x**2 + 1
    far = _A * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
