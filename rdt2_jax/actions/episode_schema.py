"""What an episode file contains: one table of topics, and the rules that every message obeys.

Both `EpisodeWriter` and `EpisodeReader` (see `rdt2_jax.actions.episode`) check messages here, so a file that was
written can be read. Times are seconds of the recorder's monotonic clock; every message carries its exact `time_s`.

Source of the image message: `foxglove.CompressedImage` (docs.foxglove.dev), with our exact times added to it.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np

from rdt2_jax.actions.layout import ACTION_DIM, ARM_NAMES, CAMERA_NAMES, CHUNK_LENGTH
from rdt2_jax.errors import DataError

SCHEMA_VERSION = 1
SOURCES = ("executor", "twin", "teleoperation")
QUATERNION_TOLERANCE = 1e-3
"""How far the norm of a recorded quaternion may be from 1: controllers report few digits."""

MAX_TIME_S = 1e10
"""Beyond any monotonic clock, and below what the container's 64-bit nanoseconds hold: catches a mistaken unit."""

JPEG_START = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Field:
    """One value of a message.

    Args:
        kind: number type of an array, "text", or "jpeg" for the bytes of a JPEG file.
        shape: of an array; None stands for an axis of any length that stays the same within an episode.
        unit: of the numbers.
        frame: coordinate frame the numbers are expressed in; "" where there is none.
        is_pose: the last axis is a pose7: position, then a unit quaternion (w, x, y, z).
    """

    kind: Literal["float64", "float32", "text", "jpeg"]
    shape: tuple[int | None, ...] = ()
    unit: str = ""
    frame: str = ""
    is_pose: bool = False


@dataclass(frozen=True)
class Channel:
    """One topic: the name of its message schema, and the fields of each message."""

    topic: str
    schema: str
    fields: Mapping[str, Field]


def _pose(frame: str, *leading: int) -> Field:
    return Field("float64", (*leading, 7), "position m, unit quaternion w x y z", frame, is_pose=True)


def _arm_channels(arm: str) -> list[Channel]:
    pose = {"pose_base_tcp": _pose(f"{arm} base")}
    joints = {"joint_positions_rad": Field("float64", (None,), "rad")}
    width = {"width_m": Field("float64", (), "m between the fingertips of the real gripper")}
    return [
        Channel(f"/{arm}/measured/pose", "rdt2.Pose", pose),
        Channel(f"/{arm}/measured/joints", "rdt2.Joints", joints),
        Channel(f"/{arm}/measured/gripper", "rdt2.Gripper", width),
        Channel(f"/{arm}/commanded/pose", "rdt2.Pose", pose),
        Channel(f"/{arm}/commanded/gripper", "rdt2.Gripper", width),
    ]


_IMAGE = {"jpeg": Field("jpeg"), "capture_time_s": Field("float64", (), "s, middle of the exposure")}
_POLICY_CHUNK = {
    "actions": Field("float32", (CHUNK_LENGTH, ACTION_DIM), "as predicted, see actions.layout", "policy"),
    "anchor_time_s": Field("float64", (len(ARM_NAMES),), "s, right then left arm"),
    "anchor_pose_base_tcp": _pose("base of each arm, right then left", len(ARM_NAMES)),
    "observation_id": Field("text"),
}

CHANNELS: dict[str, Channel] = {
    channel.topic: channel
    for channel in (
        *(channel for arm in ARM_NAMES for channel in _arm_channels(arm)),
        *(Channel(f"/{name}/image", "foxglove.CompressedImage", _IMAGE) for name in CAMERA_NAMES),
        Channel("/instruction", "rdt2.Instruction", {"instruction": Field("text")}),
        Channel("/policy/chunk", "rdt2.PolicyChunk", _POLICY_CHUNK),
        Channel("/events", "rdt2.Event", {"name": Field("text"), "text": Field("text")}),
    )
}
"""Every topic of an episode. The anchor of an arm is its TCP's pose at the time its own image was taken."""


@dataclass(frozen=True, kw_only=True)
class EpisodeMetadata:
    """What is known before the first message.

    Args:
        robot: name of the robot's configuration.
        config_hash: fingerprint of the configuration the episode was recorded with.
        source: "executor", "twin" or "teleoperation".
        fps: nominal rate of the images [Hz].
        start_time: wall-clock time of the start, ISO 8601 with its offset from UTC.
        start_time_s: the same instant on the monotonic clock of the messages [s].
        schema_version: version of `CHANNELS`.

    Raises:
        DataError: on construction, for a value that does not fit.
    """

    robot: str
    config_hash: str
    source: str
    fps: float
    start_time: str
    start_time_s: float
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in ("robot", "config_hash"):
            value = getattr(self, name)
            self._require(name, isinstance(value, str) and bool(value.strip()), "text that is not blank")
        self._require("source", self.source in SOURCES, " or ".join(SOURCES))
        self._require("fps", _is_number(self.fps) and self.fps > 0, "a rate in Hz")
        self._require("start_time", _has_utc_offset(self.start_time), "such as 2026-01-31T12:00:00+00:00")
        self._require("start_time_s", _is_number(self.start_time_s), "seconds")
        self._require("schema_version", self.schema_version == SCHEMA_VERSION, SCHEMA_VERSION)

    def _require(self, name: str, fits: bool, expected: object) -> None:
        if not fits:
            found = repr(getattr(self, name))
            raise DataError("the metadata of an episode do not fit", where=name, expected=expected, found=found)


def find_channel(topic: str, where: object) -> Channel:
    """The declaration of a topic.

    Raises:
        DataError: an unknown topic; the message lists the known ones.
    """
    if topic not in CHANNELS:
        raise DataError("unknown topic", where=where, expected=", ".join(CHANNELS), found=repr(topic))
    return CHANNELS[topic]


class MessageChecker:
    """Checks the messages of an episode one after the other; it remembers what must not change between them."""

    def __init__(self) -> None:
        self._last_time_s: dict[str, float] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}

    def check(self, channel: Channel, time_s: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The message as `{"time_s": ..., field: value}`, values in their declared types.

        Raises:
            DataError: fields that are missing or unknown, a value of another type or shape, NaN or infinity, a pose
                without a unit quaternion, bytes that are no JPEG, or a time that is negative or goes backwards.
        """
        if set(values) != set(channel.fields):
            raise DataError("wrong fields", where=where, expected=", ".join(channel.fields), found=", ".join(values))
        if not _is_number(time_s) or not 0 <= time_s <= MAX_TIME_S:
            expected = f"seconds, 0 to {MAX_TIME_S:g}"
            raise DataError("the time is not in seconds of a clock", where=where, expected=expected, found=repr(time_s))
        last = self._last_time_s.get(channel.topic, 0.0)
        if time_s < last:
            raise DataError("time goes backwards", where=where, expected=f"at least {last!r} s", found=f"{time_s!r} s")
        message: dict[str, Any] = {"time_s": float(time_s)}
        for name, declared in channel.fields.items():
            place = f"{where}, {name}"
            if declared.kind in ("text", "jpeg"):
                message[name] = _check_bytes_or_text(declared, values[name], place)
            else:
                message[name] = _check_numbers(declared, values[name], place)
                shape = self._shapes.setdefault((channel.topic, name), message[name].shape)
                if message[name].shape != shape:
                    raise DataError("the shape changed", where=place, expected=shape, found=message[name].shape)
        if not 0 <= message.get("capture_time_s", 0.0) <= MAX_TIME_S:
            expected, found = f"seconds, 0 to {MAX_TIME_S:g}", message["capture_time_s"]
            raise DataError(
                "the capture time is not in seconds of a clock", where=where, expected=expected, found=found
            )
        self._last_time_s[channel.topic] = message["time_s"]
        return message


def encode_message(channel: Channel, message: Mapping[str, Any]) -> bytes:
    """A checked message as JSON. Numbers are printed so that they read back bit for bit."""
    document = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in message.items()}
    if "jpeg" in channel.fields:
        sec, nsec = divmod(round(document["capture_time_s"] * 1e9), 10**9)
        document["timestamp"] = {"sec": sec, "nsec": nsec}
        document["frame_id"] = channel.topic.strip("/").split("/")[0]
        document["format"] = "jpeg"
        document["data"] = base64.b64encode(document.pop("jpeg")).decode("ascii")
    return json.dumps(document, allow_nan=False).encode()


def decode_message(channel: Channel, data: bytes, where: str) -> tuple[Any, dict[str, Any]]:
    """`(time_s, values)` of a JSON message, not yet checked.

    Raises:
        DataError: data that are no message of this channel.
    """
    try:
        document = json.loads(data)
        time_s = document.pop("time_s")
        if "jpeg" in channel.fields:
            if document.pop("format") != "jpeg":
                raise ValueError("the image is no JPEG")
            document["jpeg"] = base64.b64decode(document.pop("data"), validate=True)
            del document["timestamp"], document["frame_id"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        found = f"{type(error).__name__}: {error}"
        raise DataError("a message cannot be decoded", where=where, expected=channel.schema, found=found) from error
    return time_s, document


def json_schema(channel: Channel) -> bytes:
    """The JSON Schema of a channel's messages."""
    properties: dict[str, Any] = {"time_s": {"type": "number"}}
    for name, declared in channel.fields.items():
        if declared.kind == "jpeg":
            integer = {"type": "integer", "minimum": 0}
            properties["timestamp"] = {"type": "object", "properties": {"sec": integer, "nsec": integer}}
            properties["data"] = {"type": "string", "contentEncoding": "base64"}
            properties |= {"frame_id": {"type": "string"}, "format": {"type": "string"}}
        else:
            entry: dict[str, Any] = {"type": "string" if declared.kind == "text" else "number"}
            for size in reversed(declared.shape):
                entry = {"type": "array", "items": entry}
                entry |= {} if size is None else {"minItems": size, "maxItems": size}
            properties[name] = entry
    schema = {"title": channel.schema, "type": "object", "properties": properties, "required": list(properties)}
    return json.dumps(schema).encode()


def _check_bytes_or_text(declared: Field, value: Any, where: str) -> Any:
    if declared.kind == "text" and not isinstance(value, str):
        raise DataError("a value must be text", where=where, found=type(value).__name__)
    if declared.kind == "jpeg" and not (isinstance(value, bytes) and value.startswith(JPEG_START)):
        raise DataError("an image must be the bytes of a JPEG file", where=where, found=repr(value)[:40])
    return value


def _check_numbers(declared: Field, value: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError("a value is no array", where=where, expected=declared.shape, found=str(error)) from error
    fits = len(array.shape) == len(declared.shape) and all(
        size in (None, found) for size, found in zip(declared.shape, array.shape, strict=True)
    )
    if array.dtype.kind not in "fiu" or not fits:
        expected = f"{declared.kind}, shape {declared.shape}".replace("None", "any")
        raise DataError("wrong type or shape", where=where, expected=expected, found=f"{array.dtype}, {array.shape}")
    if not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0].tolist()
        raise DataError("a value is not finite", where=where, found=f"{array[tuple(index)]} at index {index}")
    with np.errstate(over="ignore"):
        typed = array.astype(declared.kind)
    if not np.array_equal(typed, array):
        raise DataError(
            f"a value does not fit into {declared.kind}", where=where, fix="convert it on purpose before recording it"
        )
    if declared.is_pose:
        norm = np.linalg.norm(typed[..., 3:], axis=-1)
        if np.any(np.abs(norm - 1) > QUATERNION_TOLERANCE):
            raise DataError("a pose needs a unit quaternion", where=where, expected="norm 1", found=f"norm {norm}")
    return typed


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _has_utc_offset(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).utcoffset() is not None
    except (TypeError, ValueError):
        return False
