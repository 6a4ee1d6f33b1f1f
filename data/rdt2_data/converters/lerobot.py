"""LeRobot datasets (v2.0, v2.1, v3.0) as recordings: a mapping says which columns are poses, widths and images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from rdt2_data.converters.columns import (
    ROTATION_NUMBERS,
    pose_track,
    poses_from_numbers,
    unmeasured_widths,
    width_track,
)
from rdt2_data.converters.lerobot_metadata import IMAGE_TYPES, LeRobotEpisode, LeRobotMetadata, read_metadata
from rdt2_data.converters.lerobot_rows import EpisodeRows, ParquetImages, read_rows
from rdt2_data.converters.mappings import TASK, ArmColumns, ColumnRef, LeRobotMapping, column_refs, load_mapping
from rdt2_data.converters.options import Latencies
from rdt2_data.converters.recording import (
    CameraTrack,
    EpisodeRef,
    Frames,
    PoseTrack,
    Recording,
    WidthTrack,
    require_increasing,
)
from rdt2_data.converters.source_files import files_below, files_fingerprint, names_shown
from rdt2_data.converters.video import VideoFrames
from rdt2_data.problems import SampleError
from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES, ArmName
from rdt2_jax.errors import ConfigError
from rdt2_jax.problems import Problems

EXAMPLE = "data/lerobot_example.yaml"
_FOLDERS = ("meta", "data", "videos")
_SENT_EPISODES = 1000
"""Longer lists of episodes are read again by each process: that is faster than sending them."""

_TIME, _TASK_INDEX, _EPISODE = "timestamp", "task_index", "episode_index"


class LeRobotReader:
    """Reads a LeRobot dataset from a local folder; implements `rdt2_data.converters.recording.RecordingReader`.

    All rows of an episode carry one time, `timestamp`, seconds from its beginning; each latency is taken off it for its
    own kind of data. In version 3 the time in a video is that time after the episode's `from_timestamp`.

    Args:
        source: folder with meta/, data/ and videos/.
        mapping: YAML file read into `LeRobotMapping`: a path, or a name inside `configs/`.
        latencies: see `Latencies`.

    Raises:
        ConfigError: no mapping, or one that cannot be used.
    """

    def __init__(self, source: Path, mapping: str | Path | None, latencies: Latencies) -> None:
        self.source, self.latencies = Path(source), latencies
        self.mapping = load_mapping(LeRobotMapping, mapping, EXAMPLE, self.source)
        self._read: LeRobotMetadata | None = None

    def __getstate__(self) -> dict[str, Any]:
        is_short = self._read is not None and len(self._read.episodes) <= _SENT_EPISODES
        return {**self.__dict__, "_read": self._read if is_short else None}

    def episodes(self) -> list[EpisodeRef]:
        """All episodes, by rising number.

        Raises:
            DataError: no dataset, one of another version, or one whose description is damaged.
            ConfigError: the mapping names columns or cameras that the dataset does not have.
        """
        episodes = self._metadata().episodes
        return [EpisodeRef(f"episode_{each.episode_index:06d}", number) for number, each in enumerate(episodes)]

    def fingerprint(self) -> str:
        """Changes with names, sizes and times of the dataset's files; other files beside them do not count."""
        return files_fingerprint(self.source, files_below(*(self.source / name for name in _FOLDERS)))

    def settings(self) -> dict[str, Any]:
        """Everything apart from files that decides what comes out."""
        return {"mapping": self.mapping.model_dump(mode="json"), "latencies": self.latencies.model_dump(mode="json")}

    def load(self, episode: EpisodeRef) -> Recording:
        """One episode; images are read later.

        Raises:
            SampleError: "bad-recording" for missing or damaged files, "bad-time" for timestamps that do not increase,
                and what `rdt2_data.converters.columns` raises for numbers that cannot be meant.
        """
        entry = self._metadata().episodes[episode.index]
        rows = read_rows(entry.data_path, self._columns(), entry.episode_index)
        if len(rows.row_numbers) != entry.length:
            expected, where = f"{entry.length} rows, as listed in meta/", f"{entry.data_path}, {episode.name}"
            raise SampleError("bad-recording", where=where, expected=expected, found=len(rows.row_numbers))
        time_s = rows.columns[_TIME][:, 0]
        require_increasing(time_s, f"{entry.data_path}, {episode.name}, column {_TIME}")
        poses: dict[ArmName, PoseTrack] = {}
        widths: dict[ArmName, WidthTrack] = {}
        for arm in ARM_NAMES:
            poses[arm], widths[arm] = self._arm(arm, rows, time_s)
        camera_s = time_s - self.latencies.camera_s
        cameras = {
            camera: CameraTrack(camera_s, self._frames(getattr(self.mapping.cameras, camera), entry, rows, time_s))
            for camera in CAMERA_NAMES
        }
        return Recording(episode.name, poses, widths, cameras, self._instructions(rows, camera_s))

    def _arm(self, arm: ArmName, rows: EpisodeRows, time_s: np.ndarray) -> tuple[PoseTrack, WidthTrack]:
        columns: ArmColumns = getattr(self.mapping, arm)
        where = f"{rows.path}, {arm} arm"
        pose_world = poses_from_numbers(
            rows.numbers(column_refs(columns.position)),
            rows.numbers(column_refs(columns.rotation.columns)),
            columns.rotation.format,
            f"{where}, columns {columns.position} and {columns.rotation.columns}",
            columns.position_unit,
        )
        poses = pose_track(self.mapping, arm, time_s - self.latencies.pose_s, pose_world, where)
        width_s = time_s - self.latencies.gripper_s
        if columns.width.column is None:
            return poses, unmeasured_widths(width_s)
        numbers = rows.numbers(column_refs(columns.width.column))
        where = f"{where}, column {columns.width.column}"
        if numbers.shape[1] != 1:
            raise SampleError("wrong-shape", where=where, expected="one number in each row", found=numbers.shape[1])
        return poses, width_track(columns.width, width_s, numbers[:, 0], where)

    def _frames(self, key: str, entry: LeRobotEpisode, rows: EpisodeRows, time_s: np.ndarray) -> Frames:
        if key not in entry.videos:
            return ParquetImages(rows.path, key, rows.row_numbers)
        span, frame_s = entry.videos[key], 1.0 / self._metadata().fps
        if not span.path.is_file():
            folder = span.path.parent
            present = names_shown(path.name for path in folder.iterdir()) if folder.is_dir() else f"no folder {folder}"
            raise SampleError("bad-recording", what="a video is missing", where=span.path, found=present)
        shown_s = span.from_s + time_s
        # A quarter of a frame, because the last frame of an episode is half a frame from the next one's at most.
        if shown_s[0] < span.from_s - frame_s / 4 or (span.to_s is not None and shown_s[-1] > span.to_s - frame_s / 4):
            raise SampleError(
                "bad-recording",
                what="timestamps lead out of the episode's part of the video",
                where=f"{span.path}, {_EPISODE} {entry.episode_index}",
                expected=f"{span.from_s} to {span.to_s} s",
                found=f"{shown_s[0]:.6f} to {shown_s[-1]:.6f} s",
            )
        return VideoFrames(span.path, shown_s, tolerance_s=frame_s / 2)

    def _instructions(self, rows: EpisodeRows, camera_s: np.ndarray) -> list[tuple[float, str]]:
        """The fixed sentence from the first image on, or every task from the image on whose row begins it."""
        if self.mapping.instruction != TASK:
            return [(float(camera_s[0]), self.mapping.instruction)]
        numbers, tasks = rows.columns[_TASK_INDEX][:, 0], self._metadata().tasks
        starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
        for row in starts:
            if not tasks.get(int(numbers[row]), "").strip():
                where, expected = f"{rows.path}, column {_TASK_INDEX}", f"one of {sorted(tasks)}, with a sentence"
                what = "a row belongs to a task without a sentence"
                found = int(numbers[row])
                raise SampleError("unknown-instruction", what=what, where=where, expected=expected, found=found)
        return [(float(camera_s[row]), tasks[int(numbers[row])]) for row in starts]

    # ------------------------------------------------------------------------------ mapping and dataset

    def _metadata(self) -> LeRobotMetadata:
        if self._read is None:
            metadata = read_metadata(self.source)
            self._check_mapping(metadata)
            self._read = metadata
        return self._read

    def _columns(self) -> list[str]:
        """Names of all columns of numbers that the mapping needs."""
        names = [_TIME, *(ref.name for _, ref in self._refs())]
        return list(dict.fromkeys([*names, _TASK_INDEX] if self.mapping.instruction == TASK else names))

    def _refs(self) -> list[tuple[str, ColumnRef]]:
        """(key of the mapping, column)."""
        found = []
        for arm in ARM_NAMES:
            columns: ArmColumns = getattr(self.mapping, arm)
            found += [(f"{arm}.position", ref) for ref in column_refs(columns.position)]
            found += [(f"{arm}.rotation", ref) for ref in column_refs(columns.rotation.columns)]
            if columns.width.column is not None:
                found += [(f"{arm}.width", ref) for ref in column_refs(columns.width.column)]
        return found

    def _check_mapping(self, metadata: LeRobotMetadata) -> None:
        """Every name of the mapping against the dataset's features, so that a wrong one is told once and at once."""
        problems, features, counts = Problems(), metadata.features, {}
        for key, ref in self._refs():
            shape = features.get(ref.name, {}).get("shape")
            if ref.name not in features:
                problems.add(f"{key}: no column {ref.name!r}")
            elif features[ref.name].get("dtype") in IMAGE_TYPES:
                problems.add(f"{key}: {ref.name!r} holds images, not numbers")
            elif isinstance(shape, list) and all(isinstance(size, int) for size in shape):
                length = math.prod(shape)
                stop = length if ref.numbers is None else ref.numbers.stop
                if stop > length:
                    problems.add(f"{key}: {ref.name!r} has {length} numbers, not {stop}")
                counts[key] = counts.get(key, 0) + (length if ref.numbers is None else stop - ref.numbers.start)
        for arm in ARM_NAMES:
            rotation = getattr(self.mapping, arm).rotation.format
            for key, wanted in (("position", 3), ("rotation", ROTATION_NUMBERS[rotation]), ("width", 1)):
                if counts.get(f"{arm}.{key}", wanted) != wanted:
                    problems.add(f"{arm}.{key}: must be {wanted} numbers, not {counts[f'{arm}.{key}']}")
        for camera in CAMERA_NAMES:
            name = getattr(self.mapping.cameras, camera)
            if features.get(name, {}).get("dtype") not in IMAGE_TYPES:
                images = names_shown(name for name, feature in features.items() if feature.get("dtype") in IMAGE_TYPES)
                problems.add(f"cameras.{camera}: no images {name!r}; there are: {images}")
        needed = [_TIME, _EPISODE, *([_TASK_INDEX] if self.mapping.instruction == TASK else [])]
        for name in needed:
            if name not in features:
                problems.add(f"no column {name!r}, which every LeRobot dataset has")
        described = names_shown(f"{name} {feature.get('shape', '')}" for name, feature in features.items())
        problems.raise_if_any(
            ConfigError, "the mapping does not fit the dataset", where=self.source, expected=f"names among: {described}"
        )
