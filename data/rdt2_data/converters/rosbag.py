"""ROS 1 and ROS 2 bags as recordings: one bag is one episode, and a mapping says which topics mean what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rdt2_data.converters.columns import pose_track, poses_from_numbers, unmeasured_widths, width_track
from rdt2_data.converters.frames import OrderedFrames, image_or_problem
from rdt2_data.converters.mappings import (
    ArmTopics,
    CameraTopic,
    RosbagMapping,
    StampSource,
    WidthTopic,
    load_mapping,
)
from rdt2_data.converters.options import Latencies
from rdt2_data.converters.recording import (
    CameraTrack,
    EpisodeRef,
    PoseTrack,
    Recording,
    WidthTrack,
    require_increasing,
)
from rdt2_data.converters.rosbag_files import bag_files, errors_named, find_bags, open_bag
from rdt2_data.converters.rosbag_messages import (
    IMAGE_TYPES,
    JOINT_STATE,
    POSE_TYPES,
    TEXT_TYPES,
    WIDTH_TYPES,
    header_stamp_ns,
    joint_position,
    message_image,
    pose_numbers,
)
from rdt2_data.converters.source_files import files_fingerprint, names_shown
from rdt2_data.problems import SampleError
from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES, ArmName

EXAMPLE = "data/rosbag_example.yaml"

Take = Callable[[Any, str, str], Any]
"""(message, its type, where it is) -> what is kept of it; None for a message that says nothing of what is wanted."""


class RosbagReader:
    """Reads bags; implements `rdt2_data.converters.recording.RecordingReader`.

    Times are seconds since the first message of the bag, so that none of their digits is lost to the years since 1970.

    Args:
        source: a ROS 1 `.bag` file, a ROS 2 folder with `metadata.yaml`, a `.db3` or `.mcap` file, or a folder of them.
        mapping: YAML file read into `RosbagMapping`: a path, or a name inside `configs/`.
        latencies: see `Latencies`.

    Raises:
        ConfigError: no mapping, or one that cannot be used.
    """

    def __init__(self, source: Path, mapping: str | Path | None, latencies: Latencies) -> None:
        self.source, self.latencies = Path(source), latencies
        self.mapping = load_mapping(RosbagMapping, mapping, EXAMPLE, self.source)
        self._found: list[Path] | None = None

    def episodes(self) -> list[EpisodeRef]:
        """One for each bag, by name: that of its file or folder, below the source.

        Raises:
            DataError: there is no bag.
        """
        return [EpisodeRef(self._name(path), index) for index, path in enumerate(self._bags())]

    def fingerprint(self) -> str:
        """Changes with names, sizes and times of the files."""
        return files_fingerprint(self.source, bag_files(self._bags()))

    def settings(self) -> dict[str, Any]:
        """Everything apart from files that decides what comes out."""
        return {"mapping": self.mapping.model_dump(mode="json"), "latencies": self.latencies.model_dump(mode="json")}

    def load(self, episode: EpisodeRef) -> Recording:
        """One bag; images are read later (all messages of the topics are read once, for their stamps).

        Raises:
            SampleError: "bad-recording" for damage, missing topics or other types, "bad-time" for stamps that do not
                increase, and what `rdt2_data.converters.columns` raises for numbers that cannot be meant.
        """
        path = self._bags()[episode.index]
        streams = self._streams(path)
        with open_bag(path, self.mapping.typestore) as reader:
            _collect(reader, streams, path)
            origin_ns = int(reader.start_time)
        times = {name: stream.seconds(origin_ns) for name, stream in streams.items()}
        poses: dict[ArmName, PoseTrack] = {}
        widths: dict[ArmName, WidthTrack] = {}
        for arm in ARM_NAMES:
            poses[arm], widths[arm] = self._arm(arm, streams, times)
        cameras = {
            name: CameraTrack(times[name] - self.latencies.camera_s, self._images(path, streams[name]))
            for name in CAMERA_NAMES
        }
        return Recording(episode.name, poses, widths, cameras, self._instructions(streams, times, cameras))

    def _bags(self) -> list[Path]:
        """Looked for once; pickled copies know them too."""
        if self._found is None:
            self._found = find_bags(self.source)
        return self._found

    def _name(self, path: Path) -> str:
        return path.name if path == self.source else path.relative_to(self.source).as_posix()

    def _streams(self, path: Path) -> dict[str, _Stream]:
        """Everything the mapping asks for, by a name of its own."""
        mapping, streams = self.mapping, {}

        def add(name: str, topic: str, stamps: StampSource | None, types: Sequence[str], take: Take) -> None:
            streams[name] = _Stream(path, topic, stamps or mapping.stamps, types, take)

        for arm in ARM_NAMES:
            topics: ArmTopics = getattr(mapping, arm)
            add(f"{arm} pose", topics.pose.topic, topics.pose.stamps, POSE_TYPES, _take_pose)
            width = topics.width
            if width.topic is not None:
                add(f"{arm} width", width.topic, width.stamps, WIDTH_TYPES, _take_width(width))
        for name in CAMERA_NAMES:
            camera: CameraTopic = getattr(mapping.cameras, name)
            add(name, camera.topic, camera.stamps, IMAGE_TYPES, _take_nothing)
        if mapping.instruction.startswith("/"):
            add("instruction", mapping.instruction, None, TEXT_TYPES, _take_text)
        return streams

    def _arm(
        self, arm: ArmName, streams: dict[str, _Stream], times: dict[str, np.ndarray]
    ) -> tuple[PoseTrack, WidthTrack]:
        stream, pose_s = streams[f"{arm} pose"], times[f"{arm} pose"]
        frames = {frames for _, frames in stream.kept}
        if len(frames) != 1:
            what = "poses are given in more than one frame"
            raise SampleError("bad-recording", what=what, where=stream.where, found=names_shown(frames))
        numbers = np.array([numbers for numbers, _ in stream.kept])
        pose_world = poses_from_numbers(numbers[:, :3], numbers[:, 3:], "quat_xyzw", stream.where)
        poses = pose_track(self.mapping, arm, pose_s - self.latencies.pose_s, pose_world, stream.where)
        units: WidthTopic = getattr(self.mapping, arm).width
        if units.topic is None:
            return poses, unmeasured_widths(pose_s - self.latencies.gripper_s)
        stream, width_s = streams[f"{arm} width"], times[f"{arm} width"] - self.latencies.gripper_s
        return poses, width_track(units, width_s, np.array(stream.kept), stream.where)

    def _images(self, path: Path, stream: _Stream) -> BagImages:
        return BagImages(
            path=path,
            typestore=self.mapping.typestore,
            topic=stream.topic,
            stamps=stream.stamps,
            stamp_ns=np.array(stream.stamp_ns, np.int64),
            bag_ns=np.array(stream.bag_ns, np.int64),
        )

    def _instructions(
        self, streams: dict[str, _Stream], times: dict[str, np.ndarray], cameras: dict[str, CameraTrack]
    ) -> list[tuple[float, str]]:
        if "instruction" not in streams:
            first_s = min(float(camera.time_s[0]) for camera in cameras.values())
            return [(first_s, self.mapping.instruction)]
        stream = streams["instruction"]
        return list(zip(times["instruction"].tolist(), stream.kept, strict=True))


# ------------------------------------------------------------------------------------------------- topics


@dataclass
class _Stream:
    """One topic of a mapping, and what a bag holds of it, in the order of recording.

    Attributes:
        path, topic, stamps, types, take: where from, what is accepted, and what is kept of each message.
        stamp_ns, bag_ns: chosen stamp, and time of recording, of each message kept.
        kept: what `take` made of it.
    """

    path: Path
    topic: str
    stamps: StampSource
    types: Sequence[str]
    take: Take
    stamp_ns: list[int] = field(default_factory=list)
    bag_ns: list[int] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    @property
    def where(self) -> str:
        """Bag and topic, for messages."""
        return f"{self.path}, topic {self.topic}"

    def add(self, message: Any, message_type: str, bag_ns: int) -> None:
        kept = self.take(message, message_type, f"{self.where}, message at {bag_ns} ns")
        if kept is not None:
            self.stamp_ns.append(_stamp_ns(message, self.stamps, bag_ns))
            self.bag_ns.append(bag_ns)
            self.kept.append(kept)

    def seconds(self, origin_ns: int) -> np.ndarray:
        """Stamps in seconds since `origin_ns`, or SampleError "bad-time"."""
        stamp_ns = np.array(self.stamp_ns, np.int64)
        if not stamp_ns.any():
            fix = "write 'stamps: bag' for this topic in the mapping"
            found = "0 in every header"
            raise SampleError("bad-time", what="stamps were never set", where=self.where, found=found, fix=fix)
        time_s = (stamp_ns - origin_ns) / 1e9
        require_increasing(time_s, self.where)
        return time_s


def _collect(reader: Any, streams: dict[str, _Stream], path: Path) -> None:
    """Reads all messages of the topics once, into the streams."""
    connections = [_connections(reader, stream) for stream in streams.values()]
    unique = list({id(each): each for several in connections for each in several}.values())
    for connection, bag_ns, data in _messages(reader, unique, path):
        message = _message(reader, connection, data, path)
        for stream in streams.values():
            if stream.topic == connection.topic:
                stream.add(message, connection.msgtype, bag_ns)
    for stream in streams.values():
        if not stream.kept:
            what = "a topic holds nothing of what is wanted"
            joint = getattr(stream.take, "joint", None)
            expected = f"messages about joint {joint!r}" if joint else "messages"
            raise SampleError("bad-recording", what=what, where=stream.where, expected=expected, found="none")


def _connections(reader: Any, stream: _Stream) -> list[Any]:
    """The connections of a topic, whose type must be one of those that are understood."""
    found = [connection for connection in reader.connections if connection.topic == stream.topic]
    if not found:
        present = names_shown({f"{each.topic} ({each.msgtype})" for each in reader.connections})
        what = "the bag has no such topic"
        raise SampleError("bad-recording", what=what, where=stream.path, expected=stream.topic, found=present)
    for connection in found:
        if connection.msgtype not in stream.types:
            what = "a topic of another type"
            expected = " or ".join(stream.types)
            raise SampleError(
                "bad-recording", what=what, where=stream.where, expected=expected, found=connection.msgtype
            )
    return found


def _messages(
    reader: Any, connections: list[Any], path: Path, start_ns: int | None = None, stop_ns: int | None = None
) -> Iterator[tuple[Any, int, bytes]]:
    """(connection, time of recording [ns], data) from `start_ns` up to, but without, `stop_ns`, as recorded.

    The library finds the range by the index of the container.
    """
    with errors_named(path):
        messages = iter(reader.messages(connections=connections, start=start_ns, stop=stop_ns))
    while True:
        with errors_named(path):
            item = next(messages, None)
        if item is None:
            return
        yield item[0], int(item[1]), item[2]


def _message(reader: Any, connection: Any, data: bytes, path: Path) -> Any:
    with errors_named(path):
        return reader.deserialize(data, connection.msgtype)


def _stamp_ns(message: Any, stamps: StampSource, bag_ns: int) -> int:
    header_ns = header_stamp_ns(message) if stamps == "header" else None
    return bag_ns if header_ns is None else header_ns


def _take_pose(message: Any, message_type: str, where: str) -> tuple[list[float], str]:
    return pose_numbers(message, message_type)


def _take_nothing(message: Any, message_type: str, where: str) -> bool:
    return True


def _take_text(message: Any, message_type: str, where: str) -> str:
    return str(message.data)


@dataclass(frozen=True)
class _TakeWidth:
    """The number of a gripper message; of a JointState, the position of one joint."""

    joint: str | None

    def __call__(self, message: Any, message_type: str, where: str) -> float | None:
        if message_type != JOINT_STATE:
            return float(message.data)
        if self.joint is None:
            what = "a JointState carries several numbers"
            fix = "name the gripper's 'joint' in the mapping"
            raise SampleError("bad-recording", what=what, where=where, found=names_shown(message.name), fix=fix)
        return joint_position(message, self.joint, where)


def _take_width(width: WidthTopic) -> Take:
    return _TakeWidth(width.joint)


# ------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, eq=False)
class BagImages(OrderedFrames):
    """Images of one topic. A `read` goes no further than from the first to the last image that it is asked for.

    Attributes:
        path, typestore: the bag, opened by every `read`.
        topic: of CompressedImage or Image.
        stamps: where `stamp_ns` comes from.
        stamp_ns, bag_ns: int64 (N,), stamp and time of recording of the N messages, in the order of recording.
    """

    path: Path
    typestore: str
    topic: str
    stamps: StampSource
    stamp_ns: np.ndarray
    bag_ns: np.ndarray

    def _count(self) -> int:
        return len(self.stamp_ns)

    def _where(self) -> str:
        return f"{self.path}, topic {self.topic}"

    def _read(self, indices: list[int]) -> Iterator[np.ndarray | SampleError]:
        start_ns = int(self.bag_ns[indices[0] :].min())
        stop_ns = int(self.bag_ns[: indices[-1] + 1].max()) + 1
        position = int((self.bag_ns < start_ns).sum())  # messages that the library leaves out
        wanted = set(indices)
        with open_bag(self.path, self.typestore) as reader:
            connections = [connection for connection in reader.connections if connection.topic == self.topic]
            for connection, bag_ns, data in _messages(reader, connections, self.path, start_ns, stop_ns):
                if position in wanted:
                    yield image_or_problem(self._image, reader, connection, bag_ns, data, position)
                position += 1
                if position > indices[-1]:
                    return
        what = "the bag holds fewer images than when it was opened first"
        raise SampleError("bad-recording", what=what, where=self._where(), found=position)

    def _image(self, reader: Any, connection: Any, bag_ns: int, data: bytes, index: int) -> np.ndarray:
        where = f"{self._where()}, image {index}"
        message = _message(reader, connection, data, self.path)
        if _stamp_ns(message, self.stamps, bag_ns) != self.stamp_ns[index]:
            what = "the bag is not what it was when it was opened first"
            raise SampleError("bad-recording", what=what, where=where)
        return message_image(message, connection.msgtype, where)
