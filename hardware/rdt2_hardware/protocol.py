"""What a device is: arms, grippers, cameras and trackers, simulated or real, behind one set of protocols.

Life of a device: it is made (no I/O), its `spec` can be read at any time, `connect()` opens it, `read()` and `send()`
use it, `stop()` halts and closes it, from any state and any number of times. A fault is an exception, never a return
value, and leaves the device `FAULTED` until it is stopped; a stopped device can be connected again.

Frames are in names: `pose_base_tcp` is the TCP's pose expressed in the base frame, a 4x4 matrix. Units are in names:
metres, radians, seconds. Times are of the `Clock` the device was given. Vendor exceptions do not leave a driver: they
become a `DeviceError` that carries them as its cause.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from rdt2_jax.actions.arrays import read_only_copy
from rdt2_jax.actions.layout import ArmName
from rdt2_jax.actions.validation import check_poses
from rdt2_jax.errors import DataError, Rdt2Error


class DeviceError(Rdt2Error):
    """A device that is not connected, did not answer, refused a command, or reports a fault."""


class DeviceState(enum.Enum):
    """Where a device is in its life."""

    CREATED = "created"
    CONNECTED = "connected"
    FAULTED = "faulted"
    STOPPED = "stopped"


# --------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True, eq=False, kw_only=True)
class ArmSpec:
    """What is known about an arm before it is connected.

    Attributes:
        name: which of the two arms it is.
        model: e.g. "ur5e".
        control_rate_hz: how often it wants a command.
        joint_position_limits_rad: (num_joints, 2), lower and upper.
        joint_speed_limits_rad_s: (num_joints,).
        max_tcp_speed_m_s, max_tcp_rotation_speed_rad_s: commands faster than this are refused or reported, by the
            safety filter, not by the driver.
    """

    name: ArmName
    model: str
    control_rate_hz: float
    joint_position_limits_rad: np.ndarray
    joint_speed_limits_rad_s: np.ndarray
    max_tcp_speed_m_s: float
    max_tcp_rotation_speed_rad_s: float

    def __post_init__(self) -> None:
        limits = _vectors(self, "joint_position_limits_rad", 2)
        speeds = _vectors(self, "joint_speed_limits_rad_s", 1)
        if limits.shape != (len(speeds), 2) or not (limits[:, 0] < limits[:, 1]).all() or not (speeds > 0).all():
            raise DataError(
                "joint limits do not fit together",
                where=f"spec of the {self.name} arm",
                expected="(n, 2) positions with lower < upper, and (n,) positive speeds",
                found=f"{limits.tolist()} and {speeds.tolist()}",
            )
        _positive(self, "control_rate_hz", "max_tcp_speed_m_s", "max_tcp_rotation_speed_rad_s")

    @property
    def num_joints(self) -> int:
        """Number of joints."""
        return len(self.joint_speed_limits_rad_s)


@dataclass(frozen=True, eq=False, kw_only=True)
class ArmReading:
    """State of an arm at one time.

    Attributes:
        time_s: when it was measured.
        pose_base_tcp: (4, 4).
        joint_positions_rad, joint_speeds_rad_s: (num_joints,).
    """

    time_s: float
    pose_base_tcp: np.ndarray
    joint_positions_rad: np.ndarray
    joint_speeds_rad_s: np.ndarray

    def __post_init__(self) -> None:
        _finite(self, "time_s")
        _pose(self, "pose_base_tcp")
        positions, speeds = _vectors(self, "joint_positions_rad", 1), _vectors(self, "joint_speeds_rad_s", 1)
        if positions.shape != speeds.shape:
            raise DataError("one speed a joint", where="ArmReading", expected=positions.shape, found=speeds.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class ArmCommand:
    """Where the TCP shall be, (4, 4) in the base frame, and when. As sent, `time_s` is when it was sent."""

    time_s: float
    pose_base_tcp: np.ndarray

    def __post_init__(self) -> None:
        _finite(self, "time_s")
        _pose(self, "pose_base_tcp")


# ----------------------------------------------------------------------------------------------- grippers


@dataclass(frozen=True, kw_only=True)
class GripperSpec:
    """What is known about a gripper: the widest opening, the width a command can be told apart by, and its rate."""

    name: ArmName
    model: str
    max_width_m: float
    width_resolution_m: float
    command_rate_hz: float

    def __post_init__(self) -> None:
        _positive(self, "max_width_m", "width_resolution_m", "command_rate_hz")


@dataclass(frozen=True, kw_only=True)
class GripperReading:
    """Measured opening [m] at a time, and whether the fingers are pressing on something."""

    time_s: float
    width_m: float
    holding: bool

    def __post_init__(self) -> None:
        _finite(self, "time_s", "width_m")


@dataclass(frozen=True, kw_only=True)
class GripperCommand:
    """Opening [m] to go to, and when. As sent: quantised to what the device can do, and when it was sent.

    A width outside [0, max_width_m] is an error of the caller, who clamps and counts; a driver raises.
    """

    time_s: float
    width_m: float

    def __post_init__(self) -> None:
        _finite(self, "time_s", "width_m")


# -------------------------------------------------------------------------------------- cameras, trackers


@dataclass(frozen=True, kw_only=True)
class CameraSpec:
    """What is known about a camera: images are uint8 RGB (height, width, 3), `exposure_s` long, at `rate_hz`."""

    name: str
    model: str
    height: int
    width: int
    rate_hz: float
    exposure_s: float

    def __post_init__(self) -> None:
        _positive(self, "height", "width", "rate_hz", "exposure_s")


@dataclass(frozen=True, eq=False, kw_only=True)
class CameraReading:
    """One picture, uint8 RGB (height, width, 3).

    `time_s` is the middle of its exposure, mapped by the driver to the clock: nobody subtracts a latency from it
    again. `frame_number` counts the device's frames, so that a gap shows what was lost.
    """

    time_s: float
    frame_number: int
    image: np.ndarray

    def __post_init__(self) -> None:
        _finite(self, "time_s")
        image = np.asarray(self.image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise DataError(
                "a picture has the wrong form",
                where="CameraReading.image",
                expected="uint8 (height, width, 3)",
                found=f"{image.dtype} {image.shape}",
            )
        object.__setattr__(self, "image", read_only_copy(image))


@dataclass(frozen=True, kw_only=True)
class TrackerSpec:
    """What is known about a tracker: its serial number and how often it measures."""

    name: str
    model: str
    serial: str
    rate_hz: float

    def __post_init__(self) -> None:
        _positive(self, "rate_hz")


@dataclass(frozen=True, eq=False, kw_only=True)
class TrackerReading:
    """A tracker's pose (4, 4) in the tracking system's world; `tracking` is False when the pose is a guess."""

    time_s: float
    pose_world_tracker: np.ndarray
    tracking: bool

    def __post_init__(self) -> None:
        _finite(self, "time_s")
        _pose(self, "pose_world_tracker")


# ---------------------------------------------------------------------------------------------- protocols


@runtime_checkable
class Device(Protocol):
    """What all devices share."""

    @property
    def state(self) -> DeviceState:
        """Where the device is in its life."""
        ...

    def connect(self) -> None:
        """Opens the device; does nothing when it is open.

        Raises:
            DeviceError: when it cannot be opened. The device is then closed, and `connect` may be tried again.
        """
        ...

    def stop(self) -> None:
        """Halts all motion and closes the device, from any state, any number of times.

        Raises:
            DeviceError: only when the device may still be moving.
        """
        ...


@runtime_checkable
class Arm(Device, Protocol):
    """A robot arm that follows a stream of TCP poses."""

    @property
    def spec(self) -> ArmSpec:
        """Known before `connect()`."""
        ...

    def read(self) -> ArmReading:
        """The newest state; times never decrease.

        Raises:
            DeviceError: when the arm is not connected or has a fault.
        """
        ...

    def send(self, command: ArmCommand) -> ArmCommand:
        """Sends a target and returns what was really sent, and when. Does not wait for the motion.

        Raises:
            DeviceError: when the arm is not connected, has a fault, or refuses the target.
        """
        ...


@runtime_checkable
class Gripper(Device, Protocol):
    """A gripper that goes to an opening."""

    @property
    def spec(self) -> GripperSpec:
        """Known before `connect()`."""
        ...

    def read(self) -> GripperReading:
        """The newest state; times never decrease.

        Raises:
            DeviceError: when the gripper is not connected or has a fault.
        """
        ...

    def send(self, command: GripperCommand) -> GripperCommand:
        """Sends an opening and returns what was really sent, and when. Does not wait for the motion.

        Raises:
            DataError: for a width outside [0, max_width_m]; nothing is sent.
            DeviceError: when the gripper is not connected or has a fault.
        """
        ...


@runtime_checkable
class Camera(Device, Protocol):
    """A camera that runs on its own."""

    @property
    def spec(self) -> CameraSpec:
        """Known before `connect()`."""
        ...

    def read(self) -> CameraReading:
        """The newest picture, the same again when there is no newer one; times never decrease.

        Raises:
            DeviceError: when the camera is not connected, has a fault, or has taken no picture yet.
        """
        ...


@runtime_checkable
class Tracker(Device, Protocol):
    """A pose tracker that runs on its own."""

    @property
    def spec(self) -> TrackerSpec:
        """Known before `connect()`."""
        ...

    def read(self) -> TrackerReading:
        """The newest pose; times never decrease.

        Raises:
            DeviceError: when the tracker is not connected or has a fault.
        """
        ...


# -------------------------------------------------------------------------------------- checks of fields


def _finite(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not math.isfinite(value):
            where = f"{type(record).__name__}.{name}"
            raise DataError("a number is not finite", where=where, expected="a number", found=value)


def _positive(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not (math.isfinite(value) and value > 0):
            where = f"{type(record).__name__}.{name}"
            raise DataError("a number must be positive", where=where, expected="> 0", found=value)


def _pose(record: object, name: str) -> None:
    """Replaces a field by a checked read-only float64 (4, 4)."""
    where = f"{type(record).__name__}.{name}"
    pose = check_poses(getattr(record, name), name=where)
    if pose.ndim != 2:
        raise DataError("one pose is wanted", where=where, expected="(4, 4)", found=pose.shape)
    object.__setattr__(record, name, read_only_copy(pose, np.float64))


def _vectors(record: object, name: str, ndim: int) -> np.ndarray:
    """Replaces a field by a finite read-only float64 array with that many axes, and returns it."""
    where = f"{type(record).__name__}.{name}"
    values = read_only_copy(getattr(record, name), np.float64)
    if values.ndim != ndim or not np.isfinite(values).all():
        raise DataError("numbers are missing or not finite", where=where, expected=f"{ndim} axes", found=values)
    object.__setattr__(record, name, values)
    return values
