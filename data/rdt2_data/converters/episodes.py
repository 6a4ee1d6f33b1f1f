"""Episodes that our executor, its twin or a teleoperation recorded, as recordings: what was measured, seen and asked.

A policy's answer becomes motion of the TCP when it is executed (`rdt2_jax.actions.chunks.chunk_to_tcp`); here measured
TCP poses and real widths go the way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from rdt2_data.converters.encoded_images import decode_image
from rdt2_data.converters.options import Latencies
from rdt2_data.converters.recording import CameraTrack, EpisodeRef, PoseTrack, Recording, WidthTrack
from rdt2_data.converters.source_files import files_fingerprint
from rdt2_data.problems import SampleError
from rdt2_jax.actions.chunks import PolicyFrames, RobotName, real_m_to_policy_width
from rdt2_jax.actions.episode import PARTIAL_SUFFIX, EpisodeReader, Series
from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES
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
class EpisodeFrames:
    """Images of one camera of an episode file; implements `Frames`. Every `read` goes through the file once."""

    path: Path
    topic: str

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """See `Frames.read`."""
        images = _read(self.path, self.topic)[1][self.topic].values["jpeg"]
        for index in indices:
            yield decode_image(images[index], f"{self.path}, {self.topic}, message {index}")


class EpisodesReader:
    """A folder of episode files, or one of them; implements `RecordingReader`.

    Interrupted recordings (`.mcap.partial`) are read as far as they go.

    Args:
        source: file or folder; folders are searched to any depth.
        options: see `EpisodesOptions`.
        latencies: of poses and widths; images carry their time of capture.

    Attributes:
        notes: episode -> why it ends early, for those that were loaded.

    Raises:
        DataError: no such source, or a latency of the camera.
    """

    def __init__(
        self, source: str | Path, options: EpisodesOptions | None = None, latencies: Latencies | None = None
    ) -> None:
        self.source, self.options = Path(source), options or EpisodesOptions()
        self.latencies = latencies or Latencies()
        self.notes: dict[str, str] = {}
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
        topics = [f"/{arm}/measured/{part}" for arm in ARM_NAMES for part in ("pose", "gripper")]
        images = [f"/{camera}/image" for camera in CAMERA_NAMES]
        reader, series = _read(path, *topics, *images, "/instruction")
        if reader.truncation:
            self.notes[episode.name] = reader.truncation
        frames = self._frames(reader)
        poses, widths = {}, {}
        for arm in ARM_NAMES:
            measured = _recorded(series, f"/{arm}/measured/pose", path)
            pose = compose(pose7_to_matrix(measured.values["pose_base_tcp"]), frames.pose_tcp_policy(arm))
            poses[arm] = PoseTrack(measured.time_s - self.latencies.pose_s, pose)
            gripper = _recorded(series, f"/{arm}/measured/gripper", path)
            width = np.asarray(real_m_to_policy_width(gripper.values["width_m"]))
            widths[arm] = WidthTrack(gripper.time_s - self.latencies.gripper_s, width, np.ones(len(width), bool))
        cameras = {}
        for camera, topic in zip(CAMERA_NAMES, images, strict=True):
            seen = _recorded(series, topic, path)
            cameras[camera] = CameraTrack(seen.values["capture_time_s"], EpisodeFrames(path, topic))
        told = series["/instruction"]
        instructions = list(zip(told.time_s.tolist(), told.values["instruction"], strict=True))
        return Recording(episode.name, poses, widths, cameras, instructions)

    def fingerprint(self) -> str:
        """See `RecordingReader.fingerprint`."""
        return files_fingerprint(self.source, self._files(), self.options, self.latencies)

    def _files(self) -> list[Path]:
        if self.source.is_file():
            return [self.source]
        names = (f"*{_SUFFIX}", f"*{_SUFFIX}{PARTIAL_SUFFIX}")
        return sorted(path for name in names for path in self.source.rglob(name))

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


def _read(path: Path, *topics: str) -> tuple[EpisodeReader, dict[str, Series]]:
    try:
        reader = EpisodeReader(path)
        return reader, reader.read(*topics)
    except DataError as error:
        raise SampleError(
            "bad-recording", what=error.what, where=error.where or path, expected=error.expected, found=error.found
        ) from error


def _recorded(series: dict[str, Series], topic: str, path: Path) -> Series:
    if not len(series[topic].time_s):
        raise SampleError("bad-recording", where=path, expected=f"messages of {topic}", found="none")
    return series[topic]
