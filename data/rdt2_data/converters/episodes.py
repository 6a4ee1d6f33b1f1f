"""Episodes that our executor, its twin or a teleoperation recorded, as recordings: what was measured, seen and asked.

A policy's answer becomes motion of the TCP when it is executed (`rdt2_jax.actions.chunks.chunk_to_tcp`); here measured
TCP poses and real widths go the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from rdt2_data.converters.encoded_images import decode_image
from rdt2_data.converters.frames import OrderedFrames, image_or_problem
from rdt2_data.converters.options import Latencies
from rdt2_data.converters.recording import CameraTrack, EpisodeRef, PoseTrack, Recording, WidthTrack
from rdt2_data.converters.source_files import files_fingerprint
from rdt2_data.problems import SampleError
from rdt2_jax.actions.chunks import PolicyFrames, RobotName, real_m_to_policy_width
from rdt2_jax.actions.episode import PARTIAL_SUFFIX, EpisodeReader
from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES, ArmName
from rdt2_jax.actions.poses import compose, pose7_to_matrix
from rdt2_jax.config import FrozenConfig
from rdt2_jax.errors import DataError

_SUFFIX = ".mcap"


class EpisodesOptions(FrozenConfig):
    """What an episode file does not say, or says wrongly.

    Attributes:
        robot: whose published frames turn TCP into policy poses; None takes the robot named in each file.
    """

    robot: RobotName | None = None


@dataclass(frozen=True, eq=False)
class EpisodeFrames(OrderedFrames):
    """Images of one camera of an episode file; a `read` goes no further than the last image that it is asked for.

    Attributes:
        reader: of the file.
        topic: of the camera.
        count: images in it.
    """

    reader: EpisodeReader
    topic: str
    count: int

    def _count(self) -> int:
        return self.count

    def _where(self) -> str:
        return f"{self.reader.path}, {self.topic}"

    def _read(self, indices: list[int]) -> Iterator[np.ndarray | SampleError]:
        messages = self.reader.pick(self.topic, indices)
        for index in indices:
            with _errors_renamed(self.reader.path):
                message = next(messages)
            yield image_or_problem(decode_image, message["jpeg"], f"{self._where()}, message {index}")


class EpisodesReader:
    """A folder of episode files, or one of them; implements `RecordingReader`.

    Interrupted recordings (`.mcap.partial`) are read as far as they go.

    Args:
        source: file or folder; folders are searched to any depth.
        options: see `EpisodesOptions`.
        latencies: of poses and widths; images carry their time of capture.

    Attributes:
        notes: episode -> why it ends early, and how many messages were repeated, for those that were loaded.

    Raises:
        DataError: no such source, or a latency of the camera.
    """

    def __init__(
        self, source: str | Path, options: EpisodesOptions | None = None, latencies: Latencies | None = None
    ) -> None:
        self.source, self.options = Path(source), options or EpisodesOptions()
        self.latencies = latencies or Latencies()
        self.notes: dict[str, str] = {}
        self._found: list[Path] | None = None
        if not self.source.exists():
            expected = "an .mcap file, or a folder of them"
            raise DataError("there are no such episodes", where=self.source, expected=expected)
        if self.latencies.camera_s:
            what = "images of episodes carry their time of capture: nothing is taken off"
            raise DataError(what, where="camera latency", expected=0, found=self.latencies.camera_s)

    def episodes(self) -> list[EpisodeRef]:
        """See `RecordingReader.episodes`."""
        files = self._files()
        if not files:
            expected = f"files ending in {_SUFFIX} or {_SUFFIX}{PARTIAL_SUFFIX}"
            raise DataError("there are no episodes", where=self.source, expected=expected)
        return [EpisodeRef(self._name(path), index) for index, path in enumerate(files)]

    def load(self, episode: EpisodeRef) -> Recording:
        """See `RecordingReader.load`."""
        path = self._files()[episode.index]
        with _errors_renamed(path):
            reader = EpisodeReader(path)
            topics = _read_topics(reader)
        frames, repeated = self._frames(reader), 0
        poses: dict[ArmName, PoseTrack] = {}
        widths: dict[ArmName, WidthTrack] = {}
        for arm in ARM_NAMES:
            time_s, measured, again = _without_repeats(*topics.column(f"/{arm}/measured/pose", "pose_base_tcp"))
            pose = compose(pose7_to_matrix(measured), frames.pose_tcp_policy(arm))
            poses[arm] = PoseTrack(time_s - self.latencies.pose_s, pose)
            repeated += again
            time_s, width_m, again = _without_repeats(*topics.column(f"/{arm}/measured/gripper", "width_m"))
            width = np.asarray(real_m_to_policy_width(width_m))
            widths[arm] = WidthTrack(time_s - self.latencies.gripper_s, width, np.ones(len(width), bool))
            repeated += again
        cameras = {}
        for camera in CAMERA_NAMES:
            topic = f"/{camera}/image"
            _, capture_s = topics.column(topic, "capture_time_s")
            cameras[camera] = CameraTrack(capture_s, EpisodeFrames(reader, topic, len(capture_s)))
        recording = Recording(episode.name, poses, widths, cameras, topics.instructions())
        self._note(episode, reader, repeated)
        return recording

    def fingerprint(self) -> str:
        """See `RecordingReader.fingerprint`."""
        return files_fingerprint(self.source, self._files())

    def settings(self) -> dict[str, Any]:
        """Everything apart from files that decides what comes out."""
        return {"options": self.options.model_dump(mode="json"), "latencies": self.latencies.model_dump(mode="json")}

    def _note(self, episode: EpisodeRef, reader: EpisodeReader, repeated: int) -> None:
        notes = [reader.truncation] if reader.truncation else []
        if repeated:
            notes.append(f"{repeated} exact repeats of poses and widths were left out")
        if notes:
            self.notes[episode.name] = "; ".join(notes)

    def _files(self) -> list[Path]:
        """Looked for once; pickled copies know them too."""
        if self._found is None:
            names = (f"*{_SUFFIX}", f"*{_SUFFIX}{PARTIAL_SUFFIX}")
            is_file = self.source.is_file()
            self._found = [self.source] if is_file else sorted(p for name in names for p in self.source.rglob(name))
        return self._found

    def _name(self, path: Path) -> str:
        relative = Path(path.name) if self.source.is_file() else path.relative_to(self.source)
        return relative.as_posix().removesuffix(_SUFFIX)

    def _frames(self, reader: EpisodeReader) -> PolicyFrames:
        robot = self.options.robot or reader.metadata.robot
        try:
            return PolicyFrames.published(cast(RobotName, robot))
        except DataError as error:
            raise SampleError(
                "bad-recording",
                what="the robot of the episode has no published frames",
                where=reader.path,
                expected=error.expected,
                found=robot,
                fix="say which constants it uses (--robot)",
            ) from error


class _Topics:
    """What an episode says of poses, widths, times of images, and instructions; images themselves are not kept.

    Args:
        path: of the file, for messages.
        kept: topic -> messages, without images.
    """

    def __init__(self, path: Path, kept: dict[str, list[dict[str, Any]]]) -> None:
        self.path, self.kept = path, kept

    def column(self, topic: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Times (N,) of the messages of a topic, and one of their values (N, ...), or SampleError where N is 0."""
        messages = self.kept[topic]
        if not messages:
            raise SampleError("bad-recording", where=self.path, expected=f"messages of {topic}", found="none")
        return np.array([message["time_s"] for message in messages]), np.stack([message[name] for message in messages])

    def instructions(self) -> list[tuple[float, str]]:
        """(time [s], sentence)."""
        return [(message["time_s"], message["instruction"]) for message in self.kept["/instruction"]]


def _read_topics(reader: EpisodeReader) -> _Topics:
    measured = [f"/{arm}/measured/{part}" for arm in ARM_NAMES for part in ("pose", "gripper")]
    names = [*measured, *(f"/{camera}/image" for camera in CAMERA_NAMES), "/instruction"]
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for topic, message in reader.messages(*names):
        message.pop("jpeg", None)
        kept[topic].append(message)
    return _Topics(reader.path, kept)


def _without_repeats(time_s: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows (N,) and (N, ...) without those that repeat time and value of the row before, and how many these are.

    Some controllers report a state again when there is no newer one. Another value at the same time is no repeat.
    """
    same = np.diff(time_s) == 0
    same &= (values[1:] == values[:-1]).reshape(len(same), -1).all(axis=1)
    new = np.concatenate([[True], ~same])
    return time_s[new], values[new], int(same.sum())


@contextmanager
def _errors_renamed(path: Path) -> Iterator[None]:
    """Errors of the episode's reader as those of a recording."""
    try:
        yield
    except SampleError:
        raise
    except DataError as error:
        raise SampleError(
            "bad-recording", what=error.what, where=error.where or path, expected=error.expected, found=error.found
        ) from error
