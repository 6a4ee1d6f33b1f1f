"""Action frames as poses and widths, and the change from the policy's frame to the robot's.

A policy speaks of its own frame (the hand-held gripper it learned from) and of its own gripper's widths. A robot needs
the motion of its TCP and the opening of its jaws. `chunk_to_tcp` makes that change once, and the types keep it from
being made twice: it takes an `ActionChunk`, gives a `TcpChunk`, and refuses anything else.

Array functions take numpy or jax arrays with any leading axes and can be differentiated and compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from rdt2_jax.actions.arrays import Array, as_arrays, read_only_copy, require_trailing_shape
from rdt2_jax.actions.layout import ACTION_DIM, ARM_NAMES, MAX_POLICY_WIDTH, WIDTH, ArmName, arm_slice
from rdt2_jax.actions.poses import (
    absolute_to_relative,
    compose,
    conjugate,
    invert,
    make_pose,
    matrix_to_pose9d,
    pose9d_to_matrix,
    relative_to_absolute,
)
from rdt2_jax.actions.types import ActionChunk, TcpChunk
from rdt2_jax.actions.validation import check_poses
from rdt2_jax.errors import DataError

REAL_WIDTH_AT_MAX_POLICY_WIDTH_M = 0.10
"""Opening [m] of the real gripper (stroke 0.12 m) for a fully open policy gripper. Source: public deployment code."""

RobotName = Literal["ur5e", "fr3"]

_PUBLISHED_TRACKER_TCP_M: dict[RobotName, tuple[float, float, float]] = {
    "ur5e": (0.0, 0.070261, 0.272602),
    "fr3": (0.0, 0.062553, -0.026733),
}
"""Position [m] of the TCP in the tracker frame, no rotation. Source: robot configurations of the public code."""

_PUBLISHED_TRACKER_POLICY_M = (0.0, 0.078, -0.026705)
"""Position [m] of the policy frame in the tracker frame, no rotation. Source: public deployment code."""

# ------------------------------------------------------------------------------------- frames as poses


def chunk_to_poses(actions: Array) -> tuple[dict[ArmName, Array], dict[ArmName, Array]]:
    """Splits action frames.

    Args:
        actions: (..., 20), layout of `rdt2_jax.actions.layout`.

    Returns:
        poses and widths by arm: (..., 4, 4), rotations orthonormalised by Gram-Schmidt, and (...). The frame of the
        poses and the units of the widths are those of `actions`.

    Raises:
        DataError: when the last axis is not 20 long.
    """
    _, actions = as_arrays(actions)
    require_trailing_shape(actions, (ACTION_DIM,), "actions")
    poses: dict[ArmName, Array] = {}
    widths: dict[ArmName, Array] = {}
    for arm in ARM_NAMES:
        own = actions[..., arm_slice(arm)]
        poses[arm] = pose9d_to_matrix(own[..., : WIDTH.start])
        widths[arm] = own[..., WIDTH][..., 0]
    return poses, widths


def poses_to_chunk(poses: Mapping[ArmName, Array], widths: Mapping[ArmName, Array]) -> Array:
    """Inverse of `chunk_to_poses`: poses (..., 4, 4) and widths (...) by arm -> (..., 20).

    Raises:
        DataError: for a missing or unknown arm, or widths that do not have one number a pose.
    """
    _require_arms(poses, "poses")
    _require_arms(widths, "widths")
    xp, *arrays = as_arrays(*(values[arm] for arm in ARM_NAMES for values in (poses, widths)))
    parts = []
    for arm, pose, width in zip(ARM_NAMES, arrays[::2], arrays[1::2], strict=True):
        require_trailing_shape(pose, (4, 4), f"poses[{arm!r}]")
        if width.shape != pose.shape[:-2]:
            raise DataError(
                "widths do not fit the poses",
                where=f"widths[{arm!r}]",
                expected=str(pose.shape[:-2]),
                found=str(width.shape),
            )
        parts += [matrix_to_pose9d(pose), width[..., None]]
    return xp.concatenate(parts, axis=-1)


def absolute_to_relative_chunk(
    current_poses: Mapping[ArmName, Array],
    future_poses: Mapping[ArmName, Array],
    widths: Mapping[ArmName, Array],
) -> Array:
    """Action frames from absolute poses, each arm relative to its own current pose.

    Args:
        current_poses: by arm, `pose_world_now` (..., 4, 4).
        future_poses: by arm, `pose_world_future` (..., T, 4, 4), in the same world and of the same moving frame.
        widths: by arm, (..., T), passed through as they are.

    Returns:
        (..., T, 20).
    """
    _require_arms(current_poses, "current_poses")
    _require_arms(future_poses, "future_poses")
    relative: dict[ArmName, Array] = {
        arm: absolute_to_relative(current_poses[arm], future_poses[arm]) for arm in ARM_NAMES
    }
    return poses_to_chunk(relative, widths)


def relative_to_absolute_chunk(
    current_poses: Mapping[ArmName, Array], actions: Array
) -> tuple[dict[ArmName, Array], dict[ArmName, Array]]:
    """Inverse of `absolute_to_relative_chunk`: actions (..., T, 20) -> absolute poses and widths by arm."""
    _require_arms(current_poses, "current_poses")
    poses, widths = chunk_to_poses(actions)
    return {arm: relative_to_absolute(current_poses[arm], poses[arm]) for arm in ARM_NAMES}, widths


# --------------------------------------------------------------------------------------- gripper widths


def policy_width_to_real_m(width: Array) -> Array:
    """Policy units -> metres of the real gripper's opening: width / 0.088 * 0.10. Linear, without clamping."""
    _, width = as_arrays(width)
    return width / MAX_POLICY_WIDTH * REAL_WIDTH_AT_MAX_POLICY_WIDTH_M


def real_m_to_policy_width(width_m: Array) -> Array:
    """Inverse of `policy_width_to_real_m`."""
    _, width_m = as_arrays(width_m)
    return width_m / REAL_WIDTH_AT_MAX_POLICY_WIDTH_M * MAX_POLICY_WIDTH


# -------------------------------------------------------------------------------- policy frame, TCP frame


@dataclass(frozen=True, eq=False)
class PolicyFrames:
    """Where the TCP and the policy's frame sit on each hand, both expressed in the hand's tracker frame.

    Attributes:
        pose_tracker_tcp: by arm, float64 (4, 4). What the published configurations call tracker-to-TCP.
        pose_tracker_policy: by arm, float64 (4, 4). What the public code calls tracker-to-policy.

    Raises:
        DataError: on construction, for missing arms or matrices that are not rigid transforms.
    """

    pose_tracker_tcp: Mapping[ArmName, np.ndarray]
    pose_tracker_policy: Mapping[ArmName, np.ndarray]

    def __post_init__(self) -> None:
        for name in ("pose_tracker_tcp", "pose_tracker_policy"):
            poses = getattr(self, name)
            _require_arms(poses, name)
            checked = {}
            for arm in ARM_NAMES:
                where = f"{name}[{arm!r}]"
                pose = check_poses(poses[arm], name=where)
                if pose.ndim != 2:
                    raise DataError("one pose an arm", where=where, expected="(4, 4)", found=str(pose.shape))
                checked[arm] = read_only_copy(pose, np.float64)
            object.__setattr__(self, name, MappingProxyType(checked))

    @classmethod
    def published(cls, robot: RobotName) -> PolicyFrames:
        """The published constants of a robot, the same for both arms.

        "ur5e": the TCP is the fingertip. "fr3": the published TCP is the FLANGE, 0.30 m behind the fingertips. The
        public deployment code uses the UR5e's constants for every robot; these are each robot's own.

        Raises:
            DataError: for a robot without published constants.
        """
        if robot not in get_args(RobotName):
            expected = " or ".join(get_args(RobotName))
            raise DataError("no published frames for this robot", where="robot", expected=expected, found=robot)
        tcp: np.ndarray = make_pose(np.eye(3), np.array(_PUBLISHED_TRACKER_TCP_M[robot]))
        policy: np.ndarray = make_pose(np.eye(3), np.array(_PUBLISHED_TRACKER_POLICY_M))
        return cls(_both_arms(tcp), _both_arms(policy))

    def pose_tcp_policy(self, arm: ArmName) -> np.ndarray:
        """The policy frame expressed in the TCP frame, (4, 4): conjugation by it turns policy motion into TCP's."""
        return compose(invert(self.pose_tracker_tcp[arm]), self.pose_tracker_policy[arm])


def chunk_to_tcp(chunk: ActionChunk, frames: PolicyFrames) -> TcpChunk:
    """A policy's answer as motion of the TCP, with real gripper widths. The only place where this happens.

    The arithmetic is float64; rotations are orthonormalised on the way. Widths are scaled once and NOT clamped: the
    executor clamps to its gripper's stroke after any pre-closing, and reports what it clamped.

    Raises:
        DataError: for anything that is not an `ActionChunk`, above all a `TcpChunk`, which is converted already.
    """
    _require_type(chunk, ActionChunk, "chunk_to_tcp")
    _require_type(frames, PolicyFrames, "chunk_to_tcp")
    poses, widths = chunk_to_poses(chunk.actions.astype(np.float64))
    return TcpChunk(
        poses_anchor_tcp={arm: conjugate(poses[arm], frames.pose_tcp_policy(arm)) for arm in ARM_NAMES},
        widths_m={arm: policy_width_to_real_m(widths[arm]) for arm in ARM_NAMES},
        anchor_time_s=chunk.anchor_time_s,
        observation_id=chunk.observation_id,
        capture_time_s=chunk.capture_time_s,
        fps=chunk.fps,
    )


def tcp_to_chunk(chunk: TcpChunk, frames: PolicyFrames) -> ActionChunk:
    """Inverse of `chunk_to_tcp`, for recordings: float32 actions in the policy frame and policy widths.

    A round trip gives the orthonormalised actions, to within float32 rounding.

    Raises:
        DataError: for anything that is not a `TcpChunk`.
    """
    _require_type(chunk, TcpChunk, "tcp_to_chunk")
    _require_type(frames, PolicyFrames, "tcp_to_chunk")
    poses: dict[ArmName, Array] = {
        arm: conjugate(chunk.poses_anchor_tcp[arm], invert(frames.pose_tcp_policy(arm))) for arm in ARM_NAMES
    }
    widths: dict[ArmName, Array] = {arm: real_m_to_policy_width(chunk.widths_m[arm]) for arm in ARM_NAMES}
    return ActionChunk(
        actions=poses_to_chunk(poses, widths).astype(np.float32),
        anchor_time_s=chunk.anchor_time_s,
        observation_id=chunk.observation_id,
        capture_time_s=chunk.capture_time_s,
        fps=chunk.fps,
    )


def _both_arms(pose: np.ndarray) -> dict[ArmName, np.ndarray]:
    return {"right": pose, "left": pose}


def _require_arms(by_arm: Mapping[ArmName, Array], name: str) -> None:
    if not isinstance(by_arm, Mapping) or set(by_arm) != set(ARM_NAMES):
        found = sorted(map(str, by_arm)) if isinstance(by_arm, Mapping) else type(by_arm).__name__
        raise DataError(f"{name} must name both arms", where=name, expected=sorted(ARM_NAMES), found=found)


def _require_type(value: object, wanted: type, where: str) -> None:
    if not isinstance(value, wanted):
        fix = None
        if isinstance(value, TcpChunk):
            fix = "it is converted already: real widths and the TCP frame are applied exactly once"
        elif isinstance(value, ActionChunk):
            fix = "it is in the policy frame already"
        elif wanted is ActionChunk:
            fix = "wrap the array in an ActionChunk, which says what its numbers mean"
        raise DataError(
            f"{where} takes {'an' if wanted is ActionChunk else 'a'} {wanted.__name__}",
            where=where,
            expected=wanted.__name__,
            found=type(value).__name__,
            fix=fix,
        )
