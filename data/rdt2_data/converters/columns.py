"""From recorded numbers to poses and widths: what a mapping says of frames, rotations and units, applied and checked.

A column is an array with one row per time; where it came from (a Parquet column, the fields of a message) is not known
here. Numbers that are no rotation (a quaternion of norm 3) are refused: they are nearly always the wrong column or the
wrong format, and a policy would learn them. Whether widths and positions are plausible is looked at for all formats
alike, see `rdt2_data.converters.tracks`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pydantic

from rdt2_data.converters.recording import PoseTrack, WidthTrack, require_increasing
from rdt2_data.problems import SampleError
from rdt2_jax.actions.chunks import PolicyFrames, RobotName, real_m_to_policy_width
from rdt2_jax.actions.layout import ArmName
from rdt2_jax.actions.poses import make_pose, pose7_to_matrix
from rdt2_jax.actions.rotations import matrix_to_quaternion, quaternion_to_matrix, rot6d_to_matrix, rotvec_to_matrix
from rdt2_jax.config import FrozenConfig

RotationFormat = Literal["quat_wxyz", "quat_xyzw", "rotvec", "euler_xyz", "rot6d_columns", "rot6d_rows", "matrix"]
"""How a rotation is written.

- quat_wxyz, quat_xyzw: unit quaternion, scalar first or last;
- rotvec: axis times angle [rad];
- euler_xyz: roll, pitch, yaw [rad] about the FIXED axes x, y, z, in this order: R = Rz(yaw) Ry(pitch) Rx(roll), as ROS
  and URDF mean it;
- rot6d_columns, rot6d_rows: the first two columns (as in an action chunk), or the first two rows, one after the other;
- matrix: nine numbers, row after row.
"""

ROTATION_NUMBERS: dict[RotationFormat, int] = {
    "quat_wxyz": 4,
    "quat_xyzw": 4,
    "rotvec": 3,
    "euler_xyz": 3,
    "rot6d_columns": 6,
    "rot6d_rows": 6,
    "matrix": 9,
}
"""Numbers in one rotation."""

_ROTATION_TOLERANCE = 1e-2
"""Largest departure of a norm from 1, and of a cosine of axes at right angles from 0. Numbers printed with three
decimals pass, numbers that mean something else do not. Our choice."""

_POSITION_SCALE_M = {"m": 1.0, "mm": 1e-3}


class PoseFrame(FrozenConfig):
    """Which frame of each hand was recorded.

    Attributes:
        frame: "policy" (the hand-held gripper's, as in the published recordings), or "tcp" (a robot's).
        robot: with "tcp": take the published constants of this robot. Its "fr3" TCP is the FLANGE.
        pose_tcp_policy: with "tcp", instead of `robot`: by arm, the policy frame expressed in the TCP frame as
            position [m] and quaternion (x, y, z, qw, qx, qy, qz).
    """

    frame: Literal["policy", "tcp"]
    robot: RobotName | None = None
    pose_tcp_policy: dict[ArmName, tuple[float, float, float, float, float, float, float]] | None = None

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> PoseFrame:
        given = [name for name in ("robot", "pose_tcp_policy") if getattr(self, name) is not None]
        if self.frame == "policy" and given:
            raise ValueError(f"'frame: policy' needs no change of frame, so '{given[0]}' must go, or frame be 'tcp'")
        if self.frame == "tcp" and len(given) != 1:
            raise ValueError("'frame: tcp' needs either 'robot' or 'pose_tcp_policy', and not both")
        if self.pose_tcp_policy is not None:
            if set(self.pose_tcp_policy) != {"right", "left"}:
                raise ValueError("'pose_tcp_policy' must name both arms, right and left")
            for arm, pose7 in self.pose_tcp_policy.items():
                if abs(np.linalg.norm(pose7[3:]) - 1) > _ROTATION_TOLERANCE:
                    raise ValueError(f"'pose_tcp_policy.{arm}' must end with a unit quaternion (qw, qx, qy, qz)")
        return self

    def policy_poses(self, arm: ArmName, pose_world: np.ndarray) -> np.ndarray:
        """`pose_world_policy` (T, 4, 4) of recorded poses (T, 4, 4) in this frame."""
        if self.pose_tcp_policy is not None:
            pose_tcp_policy = pose7_to_matrix(np.array(self.pose_tcp_policy[arm], np.float64))
        elif self.robot is not None:
            pose_tcp_policy = PolicyFrames.published(self.robot).pose_tcp_policy(arm)
        else:
            return pose_world
        return pose_world @ pose_tcp_policy


class WidthUnits(FrozenConfig):
    """What a recorded gripper number means: width = number * scale + offset, in `unit`.

    Attributes:
        scale, offset: applied to the number as recorded.
        unit: of the result: "policy" (0 to 0.088), or "real_m", the opening [m] of the real gripper, of which 0.10 m
            correspond to 0.088. Required where a width is recorded at all.
    """

    scale: float = 1.0
    offset: float = 0.0
    unit: Literal["policy", "real_m"] | None = None

    def policy_width(self, numbers: np.ndarray, where: str) -> np.ndarray:
        """Policy widths (T,) of recorded numbers (T,).

        Raises:
            SampleError: "not-finite".
        """
        width = require_finite(numbers, where) * self.scale + self.offset
        return real_m_to_policy_width(width) if self.unit == "real_m" else width


# ------------------------------------------------------------------------------------------------- tracks


def pose_track(frame: PoseFrame, arm: ArmName, time_s: np.ndarray, pose_world: np.ndarray, where: str) -> PoseTrack:
    """The track of one arm from recorded poses (T, 4, 4), whose frame is `frame`'s, at times (T,).

    Raises:
        SampleError: "bad-time".
    """
    require_increasing(time_s, where)
    return PoseTrack(time_s=time_s, pose_world_policy=frame.policy_poses(arm, pose_world))


def width_track(units: WidthUnits, time_s: np.ndarray, numbers: np.ndarray, where: str) -> WidthTrack:
    """The track of one gripper from recorded numbers (T,) at times (T,).

    Raises:
        SampleError: "bad-time" or "not-finite".
    """
    require_increasing(time_s, where)
    width = units.policy_width(numbers, where)
    return WidthTrack(time_s=time_s, width=width, valid=np.ones(len(width), bool))


def unmeasured_widths(time_s: np.ndarray) -> WidthTrack:
    """The track of a gripper whose width was not recorded: zeros, none of them valid."""
    return WidthTrack(time_s=time_s, width=np.zeros(len(time_s)), valid=np.zeros(len(time_s), bool))


# -------------------------------------------------------------------------------------------------- poses


def poses_from_numbers(
    position: np.ndarray,
    rotation: np.ndarray,
    rotation_format: RotationFormat,
    where: str,
    position_unit: Literal["m", "mm"] = "m",
) -> np.ndarray:
    """Poses float64 (T, 4, 4) from recorded numbers.

    Args:
        position: (T, 3) in `position_unit`.
        rotation: (T, n), n as in `ROTATION_NUMBERS`.
        rotation_format: how `rotation` is written.
        where: file and columns, or topic, for messages.

    Raises:
        SampleError: "wrong-shape", "not-finite", or "bad-rotation" for numbers that are no rotation.
    """
    for name, numbers, count in (
        ("position", position, 3),
        (f"rotation as {rotation_format}", rotation, ROTATION_NUMBERS[rotation_format]),
    ):
        if numbers.ndim != 2 or numbers.shape[1] != count:
            expected = f"{count} numbers in each row for {name}"
            raise SampleError("wrong-shape", where=where, expected=expected, found=f"shape {numbers.shape}")
    position_m = require_finite(position, f"{where}, position") * _POSITION_SCALE_M[position_unit]
    matrix = _rotations(require_finite(rotation, f"{where}, rotation"), rotation_format, where)
    return make_pose(matrix, position_m)


def require_finite(numbers: np.ndarray, where: str) -> np.ndarray:
    """The numbers as float64, or SampleError "not-finite" that names the first row that is not."""
    numbers = np.asarray(numbers, np.float64)
    if not np.isfinite(numbers).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(numbers))[0]]
        found = f"{numbers[tuple(index)]} at row {index[0]}"
        raise SampleError("not-finite", where=where, expected="finite numbers", found=found)
    return numbers


def _rotations(numbers: np.ndarray, rotation_format: RotationFormat, where: str) -> np.ndarray:
    """(T, n) -> (T, 3, 3)."""
    if rotation_format in ("quat_wxyz", "quat_xyzw"):
        _require_unit(numbers[:, None, :], where, "a unit quaternion")
        scalar_first = numbers if rotation_format == "quat_wxyz" else np.roll(numbers, 1, axis=1)
        return quaternion_to_matrix(scalar_first)
    if rotation_format == "rotvec":
        return rotvec_to_matrix(numbers)
    if rotation_format == "euler_xyz":
        x, y, z = (rotvec_to_matrix(np.eye(3)[axis] * numbers[:, axis : axis + 1]) for axis in range(3))
        return z @ y @ x
    if rotation_format in ("rot6d_columns", "rot6d_rows"):
        _require_unit(numbers.reshape(-1, 2, 3), where, "two unit vectors at right angles")
        matrix = rot6d_to_matrix(numbers)
        return matrix if rotation_format == "rot6d_columns" else np.swapaxes(matrix, -1, -2)
    matrix = numbers.reshape(-1, 3, 3)
    _require_unit(matrix, where, "a rotation matrix, row after row")
    if (np.linalg.det(matrix) < 0).any():
        row = int(np.flatnonzero(np.linalg.det(matrix) < 0)[0])
        raise SampleError("bad-rotation", where=where, expected="determinant 1", found=f"a reflection at row {row}")
    return quaternion_to_matrix(matrix_to_quaternion(matrix))  # orthonormal again, whatever was rounded


def _require_unit(vectors: np.ndarray, where: str, expected: str) -> None:
    """Checks that the rows of (T, k, n) have norm 1 and are at right angles, within the tolerance."""
    gram = vectors @ np.swapaxes(vectors, -1, -2)
    error = np.abs(gram - np.eye(vectors.shape[1])).max(axis=(-1, -2))
    wrong = np.flatnonzero(error > 2 * _ROTATION_TOLERANCE)  # a norm of 1 + e has the square 1 + 2e
    if wrong.size:
        row = int(wrong[0])
        first = np.round(vectors[row].ravel(), 4).tolist()
        raise SampleError(
            "bad-rotation",
            what="recorded numbers are no rotations",
            where=where,
            expected=expected,
            found=f"{wrong.size} rows that are not; the first, row {row}, is {first}",
            fix="look at the columns and the format of the rotation in the mapping",
        )
