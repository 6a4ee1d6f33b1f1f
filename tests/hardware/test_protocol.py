"""The device protocols: small devices in memory pass the conformance checks, and broken ones fail them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hardware.conformance import check_arm, check_camera, check_fault, check_gripper, check_tracker
from rdt2_hardware import (
    Arm,
    ArmCommand,
    ArmReading,
    ArmSpec,
    Camera,
    CameraReading,
    CameraSpec,
    Device,
    DeviceError,
    DeviceState,
    Gripper,
    GripperCommand,
    GripperReading,
    GripperSpec,
    SimulatedClock,
    Tracker,
    TrackerReading,
    TrackerSpec,
)

from rdt2_jax.errors import DataError, Rdt2Error

ARM_SPEC = ArmSpec(
    name="right",
    model="in memory",
    control_rate_hz=100.0,
    joint_position_limits_rad=np.tile([-3.0, 3.0], (6, 1)),
    joint_speed_limits_rad_s=np.ones(6),
    max_tcp_speed_m_s=0.5,
    max_tcp_rotation_speed_rad_s=1.0,
)


class InMemoryDevice:
    """The life of a device without any device."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.clock = clock
        self.state = DeviceState.CREATED

    def connect(self) -> None:
        self.state = DeviceState.CONNECTED

    def stop(self) -> None:
        self.state = DeviceState.STOPPED

    def require_connected(self) -> None:
        if self.state is not DeviceState.CONNECTED:
            raise DeviceError("the device is not connected", found=self.state.value, fix="call connect() first")


class InMemoryArm(InMemoryDevice):
    spec = ARM_SPEC
    pose_base_tcp = np.eye(4)

    def read(self) -> ArmReading:
        self.require_connected()
        zeros = np.zeros(6)
        return ArmReading(
            time_s=self.clock.now_s(),
            pose_base_tcp=self.pose_base_tcp,
            joint_positions_rad=zeros,
            joint_speeds_rad_s=zeros,
        )

    def send(self, command: ArmCommand) -> ArmCommand:
        self.require_connected()
        self.pose_base_tcp = command.pose_base_tcp
        return ArmCommand(time_s=self.clock.now_s(), pose_base_tcp=command.pose_base_tcp)


class InMemoryGripper(InMemoryDevice):
    spec = GripperSpec(name="left", model="in memory", max_width_m=0.12, width_resolution_m=1e-5, command_rate_hz=15.0)
    width_m = 0.12

    def read(self) -> GripperReading:
        self.require_connected()
        return GripperReading(time_s=self.clock.now_s(), width_m=self.width_m, holding=False)

    def send(self, command: GripperCommand) -> GripperCommand:
        self.require_connected()
        if not 0.0 <= command.width_m <= self.spec.max_width_m:
            raise DataError("no such width", expected="0 to 0.12 m", found=command.width_m)
        self.width_m = round(command.width_m / 1e-5) * 1e-5
        return GripperCommand(time_s=self.clock.now_s(), width_m=self.width_m)


class InMemoryCamera(InMemoryDevice):
    spec = CameraSpec(name="left_wrist", model="in memory", height=4, width=6, rate_hz=30.0, exposure_s=0.02)

    def read(self) -> CameraReading:
        self.require_connected()
        frame = int(self.clock.now_s() * 30.0)
        image = np.full((4, 6, 3), frame % 256, np.uint8)
        return CameraReading(time_s=frame / 30.0, frame_number=frame, image=image)


class InMemoryTracker(InMemoryDevice):
    spec = TrackerSpec(name="right", model="in memory", serial="LHR-1", rate_hz=90.0)

    def read(self) -> TrackerReading:
        self.require_connected()
        return TrackerReading(time_s=self.clock.now_s(), pose_world_tracker=np.eye(4), tracking=True)


CHECKS = [
    (InMemoryArm, Arm, check_arm),
    (InMemoryGripper, Gripper, check_gripper),
    (InMemoryCamera, Camera, check_camera),
    (InMemoryTracker, Tracker, check_tracker),
]


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock(lambda: None, 0.001)


@pytest.mark.parametrize(("kind", "protocol", "check"), CHECKS)
def test_devices_in_memory_conform(kind, protocol, check, clock: SimulatedClock) -> None:
    assert isinstance(kind(clock), protocol)
    assert isinstance(kind(clock), Device)
    assert not isinstance(object(), protocol)
    check(lambda: kind(clock), clock)


@pytest.mark.parametrize(("kind", "protocol", "check"), CHECKS)
@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({"require_connected": lambda self: None}, "before connect"),
        ({"connect": lambda self: None}, "connect"),
        ({"stop": lambda self: None}, "any number of times"),
    ],
)
def test_broken_devices_are_found(kind, protocol, check, broken: dict, complaint: str, clock: SimulatedClock) -> None:
    bad = type("Bad", (kind,), broken)
    with pytest.raises(AssertionError, match=complaint):
        check(lambda: bad(clock), clock)


def test_a_gripper_that_clamps_is_found(clock: SimulatedClock) -> None:
    class Clamping(InMemoryGripper):
        def send(self, command: GripperCommand) -> GripperCommand:
            self.require_connected()
            return GripperCommand(time_s=self.clock.now_s(), width_m=min(max(command.width_m, 0.0), 0.12))

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_gripper(lambda: Clamping(clock), clock)


def test_times_that_stand_still_or_run_ahead_are_found(clock: SimulatedClock) -> None:
    def reading_at(time_s):
        def read(self) -> TrackerReading:
            self.require_connected()
            return TrackerReading(time_s=time_s(self.clock.now_s()), pose_world_tracker=np.eye(4), tracking=True)

        return type("Bad", (InMemoryTracker,), {"read": read})

    for time_s, complaint in ((lambda t: 1.0, "go on"), (lambda t: -t, "never decrease"), (lambda t: t + 1, "future")):
        bad = reading_at(time_s)
        with pytest.raises(AssertionError, match=complaint):
            check_tracker(lambda bad=bad: bad(clock), clock)


def test_faults_stay_until_the_device_is_stopped(clock: SimulatedClock) -> None:
    def fail(arm: InMemoryArm) -> None:
        arm.state = DeviceState.FAULTED

    arm = InMemoryArm(clock)
    arm.connect()
    check_fault(arm, lambda: fail(arm))
    arm.connect()
    with pytest.raises(AssertionError, match="must not answer"):
        check_fault(arm, lambda: None)


def test_device_errors_belong_to_the_project() -> None:
    with pytest.raises(Rdt2Error, match=r"not connected(.|\n)*call connect\(\) first"):
        InMemoryArm(SimulatedClock(lambda: None, 0.1)).read()


def test_readings_are_read_only_copies() -> None:
    pose, image = np.eye(4), np.zeros((2, 2, 3), np.uint8)
    command = ArmCommand(time_s=0.0, pose_base_tcp=pose)
    picture = CameraReading(time_s=0.0, frame_number=0, image=image)
    pose[0, 3], image[0] = 1.0, 1
    assert command.pose_base_tcp[0, 3] == 0.0
    assert picture.image[0, 0, 0] == 0
    for array in (command.pose_base_tcp, picture.image, ARM_SPEC.joint_speed_limits_rad_s):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert ARM_SPEC.num_joints == 6


ZEROS = np.zeros(6)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ArmCommand, {"time_s": np.nan, "pose_base_tcp": np.eye(4)}, r"not finite(.|\n)*ArmCommand.time_s"),
        (ArmCommand, {"time_s": 0.0, "pose_base_tcp": np.ones((4, 4))}, "ArmCommand.pose_base_tcp: wrong last row"),
        (ArmCommand, {"time_s": 0.0, "pose_base_tcp": np.eye(4)[None]}, "one pose is wanted"),
        (
            ArmReading,
            {
                "time_s": 0.0,
                "pose_base_tcp": np.eye(4),
                "joint_positions_rad": ZEROS,
                "joint_speeds_rad_s": np.zeros(7),
            },
            "one speed a joint",
        ),
        (
            ArmReading,
            {"time_s": 0.0, "pose_base_tcp": np.eye(4), "joint_positions_rad": ZEROS * np.nan},
            r"not finite(.|\n)*joint_positions_rad",
        ),
        (GripperCommand, {"time_s": 0.0, "width_m": np.inf}, r"not finite(.|\n)*GripperCommand.width_m"),
        (GripperReading, {"time_s": np.nan, "width_m": 0.0, "holding": False}, "GripperReading.time_s"),
        (CameraReading, {"time_s": 0.0, "frame_number": 0, "image": np.zeros((2, 2, 3))}, "picture has the wrong form"),
        (CameraReading, {"time_s": 0.0, "frame_number": 0, "image": np.zeros((2, 2), np.uint8)}, "wrong form"),
        (TrackerReading, {"time_s": 0.0, "pose_world_tracker": np.eye(3), "tracking": True}, "wrong shape"),
    ],
)
def test_bad_records_are_refused(kind: type, values: dict[str, Any], message: str) -> None:
    defaults = {"joint_speeds_rad_s": ZEROS} if kind is ArmReading else {}
    with pytest.raises(DataError, match=message):
        kind(**(defaults | values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_rate_hz": 0.0}, r"must be positive(.|\n)*ArmSpec.control_rate_hz"),
        ({"max_tcp_speed_m_s": np.nan}, "must be positive"),
        ({"joint_speed_limits_rad_s": np.ones(7)}, "joint limits do not fit together"),
        ({"joint_speed_limits_rad_s": np.zeros(6)}, "joint limits do not fit together"),
        ({"joint_position_limits_rad": np.tile([3.0, -3.0], (6, 1))}, "joint limits do not fit together"),
        ({"joint_position_limits_rad": np.zeros(6)}, "missing or not finite"),
    ],
)
def test_bad_arm_specs_are_refused(changes: dict[str, Any], message: str) -> None:
    good = {name: getattr(ARM_SPEC, name) for name in ARM_SPEC.__dataclass_fields__}
    with pytest.raises(DataError, match=message):
        ArmSpec(**(good | changes))


def test_other_bad_specs_are_refused() -> None:
    with pytest.raises(DataError, match=r"GripperSpec\.max_width_m"):
        GripperSpec(name="left", model="m", max_width_m=-0.1, width_resolution_m=1e-5, command_rate_hz=15.0)
    with pytest.raises(DataError, match=r"CameraSpec\.height"):
        CameraSpec(name="left_wrist", model="m", height=0, width=6, rate_hz=30.0, exposure_s=0.02)
    with pytest.raises(DataError, match=r"TrackerSpec\.rate_hz"):
        TrackerSpec(name="right", model="m", serial="1", rate_hz=0.0)


def test_importing_the_room_leaves_jax_and_mujoco_out() -> None:
    code = (
        "import sys, rdt2_hardware\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'torch', 'mujoco'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
