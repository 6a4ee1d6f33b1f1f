"""The robot side: what an arm, a gripper, a camera, a tracker and a clock are.

It holds the device protocols (`protocol`) and the clocks (`clock`); whatever drives a robot belongs here and is
written against them, so that the same code runs over the simulated twin, over the twin behind the robots' own network
protocols, and over real arms. It runs on a robot-side computer: importing it brings in neither jax nor mujoco, and of
`rdt2_jax` it knows only `rdt2_jax.actions` and `rdt2_jax.errors`.
"""

from rdt2_hardware.clock import (
    Clock,
    SimulatedClock,
    WallClock,
)
from rdt2_hardware.protocol import (
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
    Tracker,
    TrackerReading,
    TrackerSpec,
)

__all__ = [
    "Arm",
    "ArmCommand",
    "ArmReading",
    "ArmSpec",
    "Camera",
    "CameraReading",
    "CameraSpec",
    "Clock",
    "Device",
    "DeviceError",
    "DeviceState",
    "Gripper",
    "GripperCommand",
    "GripperReading",
    "GripperSpec",
    "SimulatedClock",
    "Tracker",
    "TrackerReading",
    "TrackerSpec",
    "WallClock",
]
