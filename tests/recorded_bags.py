"""Bags of ROS 1 and ROS 2 for the tests of converters; images say which one they are."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image as PillowImage
from recorded_motion import coded_image, motion
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_typestore

KINDS = ("ros1", "sqlite3", "mcap")
START_NS = 1_700_000_000_123_456_789
POSES, WIDTHS, IMAGES = 25, 14, 12
POSE_NS, WIDTH_NS, IMAGE_NS = 10_000_001, 20_000_003, 33_333_333
RECORDED_LATER_NS = 5_000_000
"""Every message is recorded this long after its stamp."""

MAPPING = """
frame: policy
right:
  pose: {topic: /right/pose}
  width: {topic: /right/joints, joint: gripper, scale: 0.5, offset: 0.001, unit: policy}
left:
  pose: {topic: /left/pose}
  width: {topic: /left/width, unit: real_m}
cameras: {left_wrist: {topic: /left/image}, right_wrist: {topic: /right/image}}
instruction: Pick up the apple.
"""

Changed = Callable[[str, int, int], int | None]
"""(topic, row, stamp [ns]) -> the stamp that is written instead, or None to leave the message out."""


@dataclass
class Messages:
    """Makes messages of one generation of ROS."""

    kind: str
    left_pose: str = "geometry_msgs/msg/TransformStamped"
    encoding: str = "jpeg"

    def __post_init__(self) -> None:
        self.store = get_typestore(Stores.ROS1_NOETIC if self.kind == "ros1" else Stores.ROS2_HUMBLE)

    def new(self, name: str, *values: Any) -> Any:
        return self.store.types[name](*values)

    def header(self, stamp_ns: int, frame: str = "world") -> Any:
        stamp = self.new("builtin_interfaces/msg/Time", *divmod(stamp_ns, 10**9))
        return self.new("std_msgs/msg/Header", *((0,) if self.kind == "ros1" else ()), stamp, frame)

    def pose(self, message_type: str, stamp_ns: int, numbers: np.ndarray, frame: str) -> Any:
        position, rotation = (
            self.new("geometry_msgs/msg/Point", *numbers[:3]),
            self.new("geometry_msgs/msg/Quaternion", *numbers[3:]),
        )
        if message_type.endswith("TransformStamped"):
            translation = self.new("geometry_msgs/msg/Vector3", *numbers[:3])
            transform = self.new("geometry_msgs/msg/Transform", translation, rotation)
            return self.new(message_type, self.header(stamp_ns, frame), "hand", transform)
        pose = self.new("geometry_msgs/msg/Pose", position, rotation)
        if message_type.endswith("PoseStamped"):
            return self.new(message_type, self.header(stamp_ns, frame), pose)
        zero = self.new("geometry_msgs/msg/Vector3", 0.0, 0.0, 0.0)
        twist = self.new("geometry_msgs/msg/Twist", zero, zero)
        return self.new(
            message_type,
            self.header(stamp_ns, frame),
            "hand",
            self.new("geometry_msgs/msg/PoseWithCovariance", pose, np.zeros(36)),
            self.new("geometry_msgs/msg/TwistWithCovariance", twist, np.zeros(36)),
        )

    def joints(self, stamp_ns: int, **positions: float) -> Any:
        values = (list(positions), np.array(list(positions.values())), np.zeros(0), np.zeros(0))
        return self.new("sensor_msgs/msg/JointState", self.header(stamp_ns), *values)

    def image(self, stamp_ns: int, image: np.ndarray) -> Any:
        if self.encoding in ("jpeg", "png"):
            data = np.frombuffer(encoded(image, self.encoding), np.uint8)
            return self.new("sensor_msgs/msg/CompressedImage", self.header(stamp_ns), self.encoding, data)
        pixels = {"rgb8": image, "bgr8": image[:, :, ::-1], "mono8": image[:, :, :1], "16UC1": image[:, :, :2]}
        rows = pixels[self.encoding].reshape(image.shape[0], -1)
        padded = np.pad(rows, ((0, 0), (0, 6)), constant_values=255)  # cameras pad rows to their own liking
        values = (*image.shape[:2], self.encoding, 0, padded.shape[1], padded.ravel())
        return self.new("sensor_msgs/msg/Image", self.header(stamp_ns), *values)


def encoded(image: np.ndarray, encoding: str) -> bytes:
    if encoding == "jpeg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), 95)
    PillowImage.fromarray(image).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def number_of(camera: str, row: int) -> int:
    return row * 2 + (camera == "right")


def content(make: Messages, seed: int, change: Changed) -> list[tuple[int, str, str, Any]]:
    """(time of recording [ns], topic, type, message), in the order of recording."""
    messages: list[tuple[int, str, str, Any]] = []

    def add(topic: str, row: int, stamp_ns: int, message_type: str, new: Callable[[int], Any]) -> None:
        if (changed := change(topic, row, stamp_ns)) is not None:
            messages.append((stamp_ns + RECORDED_LATER_NS, topic, message_type, new(changed)))

    for arm_index, arm in enumerate(("right", "left")):
        numbers = np.column_stack(motion(POSES, seed + arm_index)[:2])
        pose_type = "geometry_msgs/msg/PoseStamped" if arm == "right" else make.left_pose
        for row in range(POSES):
            stamp = START_NS + row * POSE_NS + arm_index
            add(f"/{arm}/pose", row, stamp, pose_type, lambda ns, n=numbers[row], t=pose_type: make.pose(t, ns, n, "w"))
        for row, number in enumerate(motion(WIDTHS, seed + arm_index)[2]):
            stamp = START_NS + row * WIDTH_NS
            if arm == "right":
                new = lambda ns, n=number: make.joints(ns, wrist=9.0, gripper=n)  # noqa: E731
                add("/right/joints", row, stamp, "sensor_msgs/msg/JointState", new)
                other = lambda ns: make.joints(ns, elbow=1.0)  # noqa: E731
                add("/right/joints", -1, stamp + 1000, "sensor_msgs/msg/JointState", other)
            else:
                new = lambda ns, n=number: make.new("std_msgs/msg/Float64", n)  # noqa: E731
                add("/left/width", row, stamp, "std_msgs/msg/Float64", new)
        image_type = f"sensor_msgs/msg/{'CompressedImage' if make.encoding in ('jpeg', 'png') else 'Image'}"
        for row in range(IMAGES):
            stamp = START_NS + row * IMAGE_NS + 7 * arm_index
            image = coded_image(number_of(arm, row))
            add(f"/{arm}/image", row, stamp, image_type, lambda ns, i=image: make.image(ns, i))
    for row, (offset_ns, text) in enumerate([(0, "Pick up the cup."), (200_000_000, "Put down the cup.")]):
        new = lambda ns, t=text: make.new("std_msgs/msg/String", t)  # noqa: E731
        add("/say", row, START_NS + offset_ns, "std_msgs/msg/String", new)
    return sorted(messages, key=lambda message: message[0])


def write_bag(
    path: Path,
    make: Messages,
    seed: int = 0,
    change: Changed = lambda topic, row, ns: ns,
    compression: tuple[Any, ...] = (),
) -> Path:
    """Writes a bag: a file `path` + ".bag" for ROS 1, a folder `path` for ROS 2."""
    if make.kind == "ros1":
        path = path.with_suffix(".bag")
        writer: Any = Writer1(path)
    else:
        writer = Writer2(path, version=9, storage_plugin=StoragePlugin[make.kind.upper()])
    if compression:
        writer.set_compression(*compression)
    serialize = make.store.serialize_ros1 if make.kind == "ros1" else make.store.serialize_cdr
    with writer:
        connections: dict[str, Any] = {}
        for bag_ns, topic, message_type, message in content(make, seed, change):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, message_type, typestore=make.store)
            writer.write(connections[topic], bag_ns, serialize(message, message_type))
    return path
