"""How far predicted actions are from the recorded ones.

`action_errors` computes the metrics of the paper with the formulas of the public code, so that numbers compare.
`chunk_errors` says the same in millimetres and degrees, chunk by chunk, with an angle that is accurate at zero.
Both take numpy or jax arrays; `action_errors` can be compiled with its masks as arguments.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rdt2_jax.actions.arrays import Array, as_arrays, require_trailing_shape, vector_norm
from rdt2_jax.actions.layout import (
    ACTION_DIM,
    ARM_ACTION_DIM,
    ARM_NAMES,
    POSITION,
    ROT6D,
    WIDTH,
    ArmName,
    arm_slice,
)
from rdt2_jax.actions.rotations import geodesic_angle, geodesic_angle_as_published, rot6d_to_matrix
from rdt2_jax.errors import DataError


def action_errors(
    predicted: Array,
    target: Array,
    valid: Array | None = None,
    gripper_valid: Array | None = None,
) -> dict[str, Array]:
    """The published metrics of a batch.

    Args:
        predicted, target: (..., T, 20), or (..., T, 10) for one arm; layout of `rdt2_jax.actions.layout`.
        valid: (...) one flag a chunk, whether the policy answered with a usable chunk. Others do not count, whatever
            they hold. None: all count.
        gripper_valid: (...) one flag a chunk, whether its recorded widths can be trusted. None: all can.

    Returns:
        scalars:

        - action_mse_error: mean square over all channels, rot6d and all widths included;
        - action_mse_error_pos: mean square of the positions [m^2];
        - action_geodesic_error_rot: mean angle [degrees], by the published clipped arccosine: never below about
          0.028 in float32;
        - action_mse_error_width: mean square of the widths of chunks with `gripper_valid` [policy units squared];
        - action_valid_rate: share of valid chunks.

        A mean over no chunk at all is NaN (the public code reports 0, as if the answers had been perfect).

    Raises:
        DataError: for shapes that do not fit.
    """
    xp, predicted, target = _same_shape(predicted, target)
    if predicted.ndim < 2 or predicted.shape[-1] not in (ARM_ACTION_DIM, ACTION_DIM):
        raise DataError(
            "actions have the wrong shape",
            where="predicted",
            expected=f"(..., T, {ACTION_DIM}) or (..., T, {ARM_ACTION_DIM})",
            found=str(predicted.shape),
        )
    leading = predicted.shape[:-2]
    counted = _mask(xp, valid, leading, "valid")
    counted_width = counted & _mask(xp, gripper_valid, leading, "gripper_valid")

    by_arm = (*leading, predicted.shape[-2], predicted.shape[-1] // ARM_ACTION_DIM, ARM_ACTION_DIM)
    predicted, target = predicted.reshape(by_arm), target.reshape(by_arm)
    square = (predicted - target) ** 2
    angle = geodesic_angle_as_published(rot6d_to_matrix(predicted[..., ROT6D]), rot6d_to_matrix(target[..., ROT6D]))
    degrees = angle * (180.0 / math.pi)
    everything = xp.ones_like(counted)
    return {
        "action_mse_error": _masked_mean(xp, xp.mean(square, axis=(-3, -2, -1)), counted),
        "action_mse_error_pos": _masked_mean(xp, xp.mean(square[..., POSITION], axis=(-3, -2, -1)), counted),
        "action_geodesic_error_rot": _masked_mean(xp, xp.mean(degrees, axis=(-2, -1)), counted),
        "action_mse_error_width": _masked_mean(xp, xp.mean(square[..., WIDTH], axis=(-3, -2, -1)), counted_width),
        "action_valid_rate": _masked_mean(xp, counted.astype(square.dtype), everything),
    }


def chunk_errors(predicted: Array, target: Array) -> dict[str, Array]:
    """Errors of every chunk and arm in millimetres and degrees.

    Args:
        predicted, target: (..., T, 20), layout of `rdt2_jax.actions.layout`.

    Returns:
        arrays (...), for each arm ("right", "left") and each of mean, max and final over the T frames:

        - {arm}_position_{mean,max,final}_mm: distance between the positions;
        - {arm}_rotation_{mean,max,final}_deg: angle between the rotations, exactly 0 for equal ones;
        - {arm}_width_{mean,max,final}_mm: absolute difference of the widths, in thousandths of policy units
          (millimetres of the policy gripper; the real gripper's are 1.136 times as many).

    Raises:
        DataError: for shapes that do not fit.
    """
    xp, predicted, target = _same_shape(predicted, target)
    require_trailing_shape(predicted, (ACTION_DIM,), "predicted")
    if predicted.ndim < 2 or predicted.shape[-2] == 0:
        raise DataError("a chunk needs frames", expected="(..., T, 20)", found=str(predicted.shape))
    errors: dict[str, Array] = {}
    for arm in ARM_NAMES:
        for quantity, values in _frame_errors(xp, predicted, target, arm).items():
            name, unit = quantity.rsplit("_", 1)
            errors[f"{arm}_{name}_mean_{unit}"] = xp.mean(values, axis=-1)
            errors[f"{arm}_{name}_max_{unit}"] = xp.max(values, axis=-1)
            errors[f"{arm}_{name}_final_{unit}"] = values[..., -1]
    return errors


def _frame_errors(xp: Any, predicted: Array, target: Array, arm: ArmName) -> dict[str, Array]:
    predicted, target = predicted[..., arm_slice(arm)], target[..., arm_slice(arm)]
    difference = predicted - target
    angle = geodesic_angle(rot6d_to_matrix(predicted[..., ROT6D]), rot6d_to_matrix(target[..., ROT6D]))
    return {
        "position_mm": 1e3 * vector_norm(xp, difference[..., POSITION]),
        "rotation_deg": angle * (180.0 / math.pi),
        "width_mm": 1e3 * xp.abs(difference[..., WIDTH][..., 0]),
    }


def _same_shape(predicted: Array, target: Array) -> tuple[Any, Array, Array]:
    xp, predicted, target = as_arrays(predicted, target)
    if predicted.shape != target.shape:
        raise DataError(
            "predicted and target actions differ in shape",
            where="predicted",
            expected=str(target.shape),
            found=str(predicted.shape),
        )
    return xp, predicted, target


def _mask(xp: Any, mask: Array | None, shape: tuple[int, ...], name: str) -> Array:
    if mask is None:
        return xp.ones(shape, dtype=bool)
    if np.shape(mask) != shape:
        raise DataError("one flag a chunk", where=name, expected=str(shape), found=str(np.shape(mask)))
    return xp.asarray(mask) != 0


def _masked_mean(xp: Any, values: Array, mask: Array) -> Array:
    """Mean of the values whose flag is set, NaN when none is; what the others hold does not matter."""
    total = xp.sum(xp.where(mask, values, xp.zeros_like(values)))
    count = xp.sum(mask.astype(values.dtype))
    return xp.where(count > 0, total / xp.maximum(count, xp.ones_like(count)), xp.full_like(count, xp.nan))
