"""What every device must do, simulated or real: run these over each implementation of a protocol.

A check takes a function that makes a new device (not connected) and the clock it runs on, and raises AssertionError
at the first rule that is broken.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from rdt2_hardware import (
    Arm,
    ArmCommand,
    ArmReading,
    Camera,
    CameraReading,
    Clock,
    DeviceError,
    DeviceState,
    Gripper,
    GripperCommand,
    GripperReading,
    Tracker,
    TrackerReading,
)

from rdt2_jax.errors import DataError

NUM_READS = 5


def check_arm(make: Callable[[], Arm], clock: Clock, *, position_tolerance_m: float = 1e-6) -> None:
    """An arm: the shared life of devices, and commands that hold it where it is."""
    assert isinstance(make(), Arm)
    _check_life(make, clock, ArmReading, lambda arm: 1.0 / arm.spec.control_rate_hz)
    arm = make()
    here = ArmCommand(time_s=clock.now_s(), pose_base_tcp=np.eye(4))
    with _refused("a command before connect() must be refused"):
        arm.send(here)
    arm.connect()
    try:
        reading = arm.read()
        assert reading.joint_positions_rad.shape == (arm.spec.num_joints,), "one position a joint"
        here = ArmCommand(time_s=clock.now_s() + 0.1, pose_base_tcp=reading.pose_base_tcp)
        sent = arm.send(here)
        assert isinstance(sent, ArmCommand), "send() returns what was sent"
        np.testing.assert_allclose(sent.pose_base_tcp, here.pose_base_tcp, atol=position_tolerance_m)
        assert sent.time_s <= clock.now_s(), "a command cannot have been sent in the future"
    finally:
        arm.stop()
    with _refused("a command after stop() must be refused"):
        arm.send(here)


def check_gripper(make: Callable[[], Gripper], clock: Clock) -> None:
    """A gripper: the shared life of devices, widths as sent to within its resolution, and nothing clamped."""
    assert isinstance(make(), Gripper)
    _check_life(make, clock, GripperReading, lambda gripper: 1.0 / gripper.spec.command_rate_hz)
    gripper = make()
    command = GripperCommand(time_s=clock.now_s(), width_m=gripper.spec.max_width_m / 3)
    with _refused("a command before connect() must be refused"):
        gripper.send(command)
    gripper.connect()
    try:
        for width_m in (0.0, gripper.spec.max_width_m / 3, gripper.spec.max_width_m):
            sent = gripper.send(GripperCommand(time_s=clock.now_s(), width_m=width_m))
            assert isinstance(sent, GripperCommand), "send() returns what was sent"
            assert abs(sent.width_m - width_m) <= gripper.spec.width_resolution_m, "the width is quantised, not changed"
            assert sent.time_s <= clock.now_s(), "a command cannot have been sent in the future"
        for width_m in (-0.001, gripper.spec.max_width_m + 0.001):
            with pytest.raises(DataError):
                gripper.send(GripperCommand(time_s=clock.now_s(), width_m=width_m))
    finally:
        gripper.stop()
    with _refused("a command after stop() must be refused"):
        gripper.send(command)


def check_camera(make: Callable[[], Camera], clock: Clock) -> None:
    """A camera: the shared life of devices, pictures of the promised size, and frame numbers that fit the times."""
    assert isinstance(make(), Camera)
    readings = _check_life(make, clock, CameraReading, lambda camera: 1.0 / camera.spec.rate_hz)
    spec = make().spec
    for before, after in itertools.pairwise(readings):
        assert after.image.shape == (spec.height, spec.width, 3), "pictures have the size of the spec"
        assert (after.frame_number > before.frame_number) == (after.time_s > before.time_s), "a new frame, a new time"


def check_tracker(make: Callable[[], Tracker], clock: Clock) -> None:
    """A tracker: the shared life of devices."""
    assert isinstance(make(), Tracker)
    _check_life(make, clock, TrackerReading, lambda tracker: 1.0 / tracker.spec.rate_hz)


def check_fault(device: Arm | Gripper | Camera | Tracker, fault: Callable[[], None]) -> None:
    """A fault: reported by an exception, kept until the device is stopped, and gone after connecting again.

    Args:
        device: connected.
        fault: makes it fail.
    """
    fault()
    for _ in range(2):
        with _refused("a device with a fault must not answer"):
            device.read()
    assert device.state is DeviceState.FAULTED, "a device that failed says so"
    device.stop()
    assert device.state is DeviceState.STOPPED, "a device with a fault can be stopped"
    device.connect()
    device.read()
    device.stop()


def _check_life(make: Callable, clock: Clock, reading_type: type, period_s: Callable) -> list:
    device = make()
    spec = device.spec
    assert device.state is DeviceState.CREATED, "making a device does not connect it"
    assert dataclasses.is_dataclass(spec), "the spec can be read before connect()"
    assert spec.__dataclass_params__.frozen, "the spec cannot be changed"  # type: ignore[attr-defined]
    with _refused("read() before connect() must be refused"):
        device.read()
    for _ in range(2):
        device.stop()
        assert device.state is DeviceState.STOPPED, "stop() is allowed at any time, any number of times"

    device = make()
    for _ in range(2):
        device.connect()
        assert device.state is DeviceState.CONNECTED, "connect() connects, and does nothing the second time"
    readings = []
    for _ in range(NUM_READS):
        clock.sleep_until_s(clock.now_s() + 1.5 * period_s(device))
        readings.append(device.read())
    assert all(type(reading) is reading_type for reading in readings), f"read() returns a {reading_type.__name__}"
    times = [reading.time_s for reading in readings]
    assert times == sorted(times), "the times of readings never decrease"
    assert times[-1] > times[0], "the times of readings go on"
    assert times[-1] <= clock.now_s(), "a reading cannot be of the future"
    assert device.spec is spec or type(device.spec) is type(spec), "the spec stays readable"

    for _ in range(2):
        device.stop()
        assert device.state is DeviceState.STOPPED, "stop() stops, and does nothing the second time"
    with _refused("read() after stop() must be refused"):
        device.read()
    device.connect()
    assert device.read().time_s >= times[-1], "a stopped device can be connected again, and its time goes on"
    device.stop()
    return readings


class _refused:  # noqa: N801, it reads as a word of the sentence
    """Demands a DeviceError, with a reason when there is none."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        assert kind is not None, self._reason
        return issubclass(kind, DeviceError)
