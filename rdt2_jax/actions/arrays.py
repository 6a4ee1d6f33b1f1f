"""One array namespace for numpy and jax arguments, and the few small operations that need care in both.

The functions of `rdt2_jax.actions` take numpy or jax arrays alike and return what they were given. They never
import jax: both libraries hand out their own namespace through the array API standard's
`__array_namespace__` (jax tracers included), and anything else is made a numpy array.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from rdt2_jax.errors import DataError

Array = Any
"""A numpy or jax array. jax cannot be named here, because this package must not import it."""

_MIN_NORM = 1e-12
"""Floor of a vector's norm before division, as in the public code: a zero vector stays zero."""


def namespace(*arrays: Array) -> Any:
    """The module (numpy or jax.numpy) whose functions fit the arguments; jax wins over numpy."""
    for array in arrays:
        if hasattr(array, "__array_namespace__") and not isinstance(array, (np.ndarray, np.generic)):
            return array.__array_namespace__()
    return np


def as_arrays(*values: Any) -> tuple[Any, ...]:
    """`(xp, array, ...)`: the common namespace, then every value as a floating-point array of it.

    Integers and booleans become the namespace's default floating type; floating types are kept, except that
    jax holds float64 as float32 unless its 64-bit mode is on.

    Raises:
        DataError: for values that are not real numbers (complex, text, objects, ragged lists).
    """
    xp = namespace(*values)
    arrays = []
    for value in values:
        try:
            array = xp.asarray(value)
        except ValueError as error:
            raise DataError("values do not form an array", expected="numbers", found=str(error)) from error
        if not xp.issubdtype(array.dtype, xp.floating):
            if array.dtype.kind not in "biuV" or array.dtype.names:  # V: ml_dtypes' types, unknown to numpy
                raise DataError(
                    "an array has a type without arithmetic on real numbers",
                    expected="floating point, integer or boolean",
                    found=str(array.dtype),
                )
            array = array.astype(xp.asarray(0.0).dtype)
        arrays.append(array)
    return (xp, *arrays)


def is_concrete(array: Array) -> bool:
    """True when the values can be looked at now; False for a tracer inside a jax transformation."""
    jax = sys.modules.get("jax")  # a tracer can only exist once somebody else has imported jax
    return jax is None or not isinstance(array, jax.core.Tracer)


def require_trailing_shape(array: Array, shape: Sequence[int], name: str) -> None:
    """Raises DataError unless the last axes of `array` have the given `shape`."""
    found = tuple(np.shape(array))
    if found[len(found) - len(shape) :] != tuple(shape) or len(found) < len(shape):
        raise DataError(
            f"{name} has the wrong shape",
            where=name,
            expected="(..., " + ", ".join(map(str, shape)) + ")",
            found=str(found),
        )


def common_shape(names: str, *shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape all `shapes` broadcast to; DataError, naming the arrays, when there is none."""
    try:
        return np.broadcast_shapes(*map(tuple, shapes))
    except ValueError as error:
        raise DataError(
            f"leading axes of {names} do not fit each other",
            expected="equal axes, or 1",
            found=" and ".join(str(tuple(shape)) for shape in shapes),
        ) from error


def host_array(array: Array, name: str, where: object = None) -> np.ndarray:
    """The values as a numpy array; DataError for a tracer, which has none yet, and for ragged lists."""
    if not is_concrete(array):
        raise DataError(
            f"{name} cannot be checked inside a jax transformation",
            where=where,
            expected="a numpy or jax array with values",
            found=str(array),
            fix="check before or after the compiled function",
        )
    try:
        return np.asarray(array)
    except ValueError as error:
        raise DataError(f"{name} is not an array", where=where, found=str(error)) from error


def read_only_copy(values: Any, dtype: Any = None) -> np.ndarray:
    """A numpy copy that cannot be written to; jax arrays are brought to the host."""
    copy = np.array(values, dtype=dtype)
    copy.setflags(write=False)
    return copy


def matmul(xp: Any, a: Array, b: Array) -> Array:
    """Product of small matrices (..., i, k) x (..., k, j) -> (..., i, j) in the arrays' own precision.

    Written as multiply and sum: accelerators run jax's `matmul` in reduced precision by default (TF32,
    bfloat16 passes), which would cost a pose three of its seven digits.
    """
    return xp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


def cross(xp: Any, a: Array, b: Array) -> Array:
    """Cross product over the last axis; written out, because the libraries' own is slow on short axes."""
    return xp.stack(
        [
            a[..., 1] * b[..., 2] - a[..., 2] * b[..., 1],
            a[..., 2] * b[..., 0] - a[..., 0] * b[..., 2],
            a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0],
        ],
        axis=-1,
    )


def vector_norm(xp: Any, vector: Array) -> Array:
    """Euclidean norm over the last axis whose gradient at zero is zero instead of NaN."""
    squared = xp.sum(vector * vector, axis=-1)
    is_zero = squared == 0
    root = xp.sqrt(xp.where(is_zero, xp.ones_like(squared), squared))
    return xp.where(is_zero, xp.zeros_like(squared), root)


def unit_vector(xp: Any, vector: Array) -> Array:
    """The vector over its norm (..., n); a zero vector stays zero."""
    length = vector_norm(xp, vector)[..., None]
    return vector / xp.maximum(length, xp.asarray(_MIN_NORM, dtype=vector.dtype))
