"""Checks that turn unusable actions, rotations and poses into errors that say where they are.

The conversions of this package are total and compile, so they let NaN and degenerate rotations through. These checks
run on the host, at the borders: where a policy's answer, a file or a robot's reading comes in. They never repair.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rdt2_jax.actions.arrays import Array, host_array, require_trailing_shape
from rdt2_jax.actions.layout import ACTION_DIM, ARM_NAMES, CHUNK_LENGTH, ROT6D, WIDTH, arm_slice
from rdt2_jax.errors import DataError

MIN_ROT6D_COLUMN_NORM = 1e-3
"""Below it a rot6d column (of norm 1 in a rotation) is taken to have no direction. Our choice."""

MIN_ROT6D_SINE = 1e-3
"""Below this sine of the angle between both rot6d columns they are taken to be parallel: rounding of float32 would
turn the rotation by up to 0.01 degrees, and any noise in the columns by a thousand times itself. Our choice."""


def check_actions(
    actions: Array,
    *,
    name: str = "actions",
    where: object = None,
    chunk_length: int | None = None,
    width_range: tuple[float, float] | None = None,
    normalized: bool = False,
) -> np.ndarray:
    """Checks action frames and returns them as float32 on the host.

    Args:
        actions: numpy or jax array (..., 20) of a floating-point type, layout of `rdt2_jax.actions.layout`.
        name: what to call the array in errors.
        where: file, key or request it came from, for errors.
        chunk_length: when given, the shape must be (..., chunk_length, 20).
        width_range: when given, both gripper widths must lie in [low, high], in the units of the array;
            (0, 0.088) is the range of the policy frame.
        normalized: the frames went through a normalizer, which may have scaled the rotation channels: these need
            only be finite then.

    Raises:
        DataError: wrong shape or type, NaN or infinity, a rot6d without two independent columns, or a width
            outside the range. The message counts the offenders and names the first.
    """
    values = host_array(actions, name, where)
    if values.dtype.kind != "f" and values.dtype.name != "bfloat16":
        raise DataError(f"{name} must be floating point", where=where, expected="float32", found=str(values.dtype))
    trailing = (ACTION_DIM,) if chunk_length is None else (chunk_length, ACTION_DIM)
    require_trailing_shape(values, trailing, name)
    with np.errstate(over="ignore"):
        converted = values.astype(np.float32)
    _require_none(~np.isfinite(converted), converted, f"{name} must be finite", where, "finite numbers")
    for arm in ARM_NAMES:
        if not normalized:
            _check_rot6d(converted[..., arm_slice(arm)][..., ROT6D], f"{name}: rotation of the {arm} arm", where)
        if width_range is not None:
            low, high = width_range
            width = converted[..., arm_slice(arm)][..., WIDTH][..., 0]
            outside = (width < np.float32(low)) | (width > np.float32(high))
            what = f"{name}: gripper width of the {arm} arm is out of range"
            _require_none(outside, width, what, where, f"{low} to {high}")
    return converted


def check_chunk(actions: Array, *, name: str = "actions", where: object = None) -> np.ndarray:
    """`check_actions` for whole chunks, (..., 24, 20)."""
    return check_actions(actions, name=name, where=where, chunk_length=CHUNK_LENGTH)


def check_rotations(
    rotations: Array, *, name: str = "rotations", where: object = None, tolerance: float = 1e-5
) -> np.ndarray:
    """Checks that matrices (..., 3, 3) are rotations and returns them on the host, in their own type.

    Args:
        rotations: numpy or jax array (..., 3, 3).
        name, where: for errors.
        tolerance: largest allowed entry of R^T R - I; the default allows what float32 arithmetic leaves behind.

    Raises:
        DataError: wrong shape, NaN or infinity, not orthonormal, or a reflection (determinant -1).
    """
    values = host_array(rotations, name, where)
    require_trailing_shape(values, (3, 3), name)
    exact = _as_float64(values, name, where)
    _require_none(~np.isfinite(exact), exact, f"{name} must be finite", where, "finite numbers")
    gram = np.swapaxes(exact, -1, -2) @ exact
    error = np.max(np.abs(gram - np.eye(3)), axis=(-1, -2), initial=0.0)
    _require_none(error > tolerance, error, f"{name} must be orthonormal", where, f"R^T R = I to {tolerance}")
    determinant = np.linalg.det(exact)
    _require_none(determinant < 0, determinant, f"{name} must not be reflections", where, "determinant 1")
    return values


def check_poses(poses: Array, *, name: str = "poses", where: object = None, tolerance: float = 1e-5) -> np.ndarray:
    """Checks that matrices (..., 4, 4) are rigid transforms and returns them on the host, in their own type.

    Raises:
        DataError: wrong shape, NaN or infinity, a last row other than (0, 0, 0, 1), or a part that is no rotation
            (see `check_rotations`).
    """
    values = host_array(poses, name, where)
    require_trailing_shape(values, (4, 4), name)
    exact = _as_float64(values, name, where)
    _require_none(~np.isfinite(exact), exact, f"{name} must be finite", where, "finite numbers")
    wrong_row = exact[..., 3, :] != np.array([0.0, 0.0, 0.0, 1.0])
    _require_none(wrong_row, exact[..., 3, :], f"{name}: wrong last row", where, "(0, 0, 0, 1)")
    check_rotations(exact[..., :3, :3], name=f"{name}: rotation part", where=where, tolerance=tolerance)
    return values


def _check_rot6d(rot6d: np.ndarray, what: str, where: object) -> None:
    columns = rot6d.astype(np.float64).reshape(*rot6d.shape[:-1], 2, 3)
    norms = np.linalg.norm(columns, axis=-1)
    short = np.min(norms, axis=-1, initial=np.inf)
    expected = f"columns of norm 1, at least {MIN_ROT6D_COLUMN_NORM}"
    _require_none(short < MIN_ROT6D_COLUMN_NORM, short, f"{what} has a column without direction", where, expected)
    crossed = np.linalg.norm(np.cross(columns[..., 0, :], columns[..., 1, :]), axis=-1)
    sine = crossed / (norms[..., 0] * norms[..., 1])
    expected = f"an angle of 90 degrees, its sine at least {MIN_ROT6D_SINE}"
    _require_none(sine < MIN_ROT6D_SINE, sine, f"{what} has parallel columns", where, expected)


def _as_float64(values: np.ndarray, name: str, where: object) -> np.ndarray:
    if values.dtype.kind not in "fiu":
        raise DataError(f"{name} must be numbers", where=where, expected="float", found=str(values.dtype))
    return values.astype(np.float64)


def _require_none(bad: Any, values: np.ndarray, what: str, where: object, expected: str) -> None:
    """Raises DataError when any entry of `bad` is set, naming how many there are, the first and its value."""
    bad = np.asarray(bad)
    if not bad.any():
        return
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    raise DataError(
        what,
        where=where,
        expected=expected,
        found=f"{int(bad.sum())} of {bad.size} are wrong; the first, at index {list(first)}, is {values[first]!s}",
    )
