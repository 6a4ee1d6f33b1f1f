"""ROS messages as numbers and images: the types that a mapping can name, ROS 1 and ROS 2 alike.

Message objects are those of the `rosbags` library, which gives both generations the same field names. Field meanings
are those of the packages std_msgs, geometry_msgs, nav_msgs and sensor_msgs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rdt2_data.converters.encoded_images import decode_image
from rdt2_data.problems import SampleError

POSE_TYPES = (
    "geometry_msgs/msg/PoseStamped",
    "geometry_msgs/msg/TransformStamped",
    "nav_msgs/msg/Odometry",
)
WIDTH_TYPES = ("std_msgs/msg/Float64", "std_msgs/msg/Float32", "sensor_msgs/msg/JointState")
JOINT_STATE = "sensor_msgs/msg/JointState"
IMAGE_TYPES = ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image")
TEXT_TYPES = ("std_msgs/msg/String",)

_CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1}


def header_stamp_ns(message: Any) -> int | None:
    """The stamp of a message's header [ns], or None for a type without a header."""
    header = getattr(message, "header", None)
    return None if header is None else int(header.stamp.sec) * 10**9 + int(header.stamp.nanosec)


def pose_numbers(message: Any, message_type: str) -> tuple[list[float], str]:
    """Position [m] and quaternion (x, y, z, qx, qy, qz, qw), and the frames "parent -> child" they are given in."""
    frames = str(message.header.frame_id)
    if message_type == "geometry_msgs/msg/TransformStamped":
        position, rotation = message.transform.translation, message.transform.rotation
        frames = f"{frames} -> {message.child_frame_id}"
    elif message_type == "nav_msgs/msg/Odometry":
        position, rotation = message.pose.pose.position, message.pose.pose.orientation
        frames = f"{frames} -> {message.child_frame_id}"
    else:
        position, rotation = message.pose.position, message.pose.orientation
    numbers = [position.x, position.y, position.z, rotation.x, rotation.y, rotation.z, rotation.w]
    return [float(number) for number in numbers], frames


def joint_position(message: Any, joint: str, where: str) -> float | None:
    """Position of a joint of a JointState, or None for a message about other joints alone.

    Raises:
        SampleError: "bad-recording", for a message that names the joint and gives it no position.
    """
    if joint not in message.name:
        return None
    index = list(message.name).index(joint)
    if index >= len(message.position):
        expected, found = f"a position for joint {joint!r}", f"{len(message.position)} positions"
        raise SampleError("bad-recording", where=where, expected=expected, found=found)
    return float(message.position[index])


def message_image(message: Any, message_type: str, where: str) -> np.ndarray:
    """The image of a CompressedImage or Image, uint8 (height, width, 3), RGB; a copy.

    Raises:
        SampleError: "corrupt-jpeg" or "wrong-image".
    """
    if message_type == "sensor_msgs/msg/CompressedImage":
        return decode_image(bytes(message.data), where)
    channels = _CHANNELS.get(message.encoding)
    if channels is None:
        expected = " or ".join(_CHANNELS)
        raise SampleError("wrong-image", where=where, expected=expected, found=f"encoding {message.encoding!r}")
    height, width, step = int(message.height), int(message.width), int(message.step)
    data = np.asarray(message.data, np.uint8)
    if not height or not width or step < width * channels or data.size != height * step:
        expected = f"height times step = {height} x {step} bytes, step at least {width * channels}"
        raise SampleError("wrong-image", where=where, expected=expected, found=f"{data.size} bytes")
    pixels = data.reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    if message.encoding == "mono8":
        return np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels if message.encoding == "rgb8" else pixels[:, :, ::-1]).copy()
