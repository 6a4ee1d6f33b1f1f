"""UMI replay buffers: `.zarr.zip` files, or unzipped folders, of the zarr v2 layout.

Source of the layout: the replay buffers of the UMI project (Chi et al. 2024, arXiv 2402.10329) and what the public RDT2
code (thu-ml/RDT2) adds to them: videos, `timestamp`, `gripper_width_mask`. robot0 and camera0 are the right hand.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic

from rdt2_data.converters.damage import damage_named
from rdt2_data.converters.options import Latencies
from rdt2_data.converters.recording import CameraTrack, EpisodeRef, Frames, PoseTrack, Recording, WidthTrack
from rdt2_data.converters.replay_buffer import ReplayBuffer, ZarrFrames
from rdt2_data.converters.source_files import files_below, files_fingerprint
from rdt2_data.problems import SampleError
from rdt2_jax.actions.layout import ArmName
from rdt2_jax.actions.poses import pose6_to_matrix
from rdt2_jax.config import FrozenConfig
from rdt2_jax.errors import DataError

_ARM_NUMBER: dict[ArmName, int] = {"right": 0, "left": 1}
_CAMERA_NUMBER = {"right_wrist": 0, "left_wrist": 1}
_TIME = "data/timestamp"

VIDEOS_FILE = "videos.json"


class UmiZarrOptions(FrozenConfig):
    """What a replay buffer does not say itself.

    Attributes:
        fps: rate of the rows [Hz]; needed where there is no `data/timestamp`, refused where there is one.
        instruction: sentence of all episodes.
        instructions: JSON file with an entry for each episode: a sentence, `[[start in s, sentence], ...]`, or null.
        videos: JSON file that lists the videos, as in the published datasets; None takes `videos.json` beside the
            source if it is there.
    """

    fps: Annotated[float, pydantic.Field(gt=0)] | None = None
    instruction: Annotated[str, pydantic.Field(pattern=r"\S")] | None = None
    instructions: Path | None = None
    videos: Path | None = None


class UmiZarrReader:
    """Episodes of a replay buffer; implements `RecordingReader`.

    Args:
        source: `.zarr.zip` file, or folder.
        options: see `UmiZarrOptions`; one of `instruction` and `instructions` is needed.
        latencies: taken off the time of each row.

    Raises:
        DataError: files that are missing or of another format, or no instruction; from its methods also a buffer whose
            rows have no time, or two.
    """

    def __init__(self, source: str | Path, options: UmiZarrOptions, latencies: Latencies | None = None) -> None:
        self.source, self.options = Path(source), options
        if not self.source.exists():
            raise DataError("there is no such replay buffer", where=self.source, expected="a .zarr.zip file or folder")
        if (options.instruction is None) == (options.instructions is None):
            raise DataError(
                "a replay buffer holds no instructions",
                where=self.source,
                expected="one sentence for all episodes, or a file with one for each",
                fix="give either --instruction TEXT or --instructions FILE",
            )
        self.latencies = latencies or Latencies()
        beside = self.source.parent / VIDEOS_FILE
        self.videos = options.videos or (beside if beside.is_file() else None)
        self.buffer = ReplayBuffer(self.source)
        self._ends: np.ndarray | None = None
        self._lists: dict[Path, list[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lists": {}}  # long lists are read again faster than they are sent

    def episodes(self) -> list[EpisodeRef]:
        """See `RecordingReader.episodes`."""
        ends = self._episode_ends()
        path = self.options.instructions
        if path is not None and len(self._list(path)) != len(ends):
            expected, found = f"{len(ends)} entries, one for each episode", len(self._list(path))
            raise DataError("the instructions do not fit", where=path, expected=expected, found=found)
        return [EpisodeRef(f"episode_{index:06d}", index) for index in range(len(ends))]

    def load(self, episode: EpisodeRef) -> Recording:
        """See `RecordingReader.load`."""
        ends = self._episode_ends()
        start, stop = int(ends[episode.index - 1]) if episode.index else 0, int(ends[episode.index])
        time_s = self._time_s(start, stop)
        poses, widths = {}, {}
        valid = self._valid(start, stop)
        for arm, number in _ARM_NUMBER.items():
            position = self.buffer.numbers(f"data/robot{number}_eef_pos", start, stop, (3,))
            rotvec = self.buffer.numbers(f"data/robot{number}_eef_rot_axis_angle", start, stop, (3,))
            width = self.buffer.numbers(f"data/robot{number}_gripper_width", start, stop, (1,))[:, 0]
            pose = pose6_to_matrix(np.concatenate([position, rotvec], axis=1))
            poses[arm] = PoseTrack(time_s - self.latencies.pose_s, pose)
            widths[arm] = WidthTrack(time_s - self.latencies.gripper_s, width, valid[:, number])
        cameras = {
            camera: CameraTrack(time_s - self.latencies.camera_s, self._frames(number, episode, start, stop))
            for camera, number in _CAMERA_NUMBER.items()
        }
        seen_s = float(cameras["right_wrist"].time_s[0])
        return Recording(episode.name, poses, widths, cameras, self._instructions(episode, seen_s))

    def fingerprint(self) -> str:
        """See `RecordingReader.fingerprint`."""
        files = [self.source] if self.source.is_file() else files_below(self.source)
        parts = [files_fingerprint(self.source, files)]
        if self.options.instructions is not None:
            parts.append(files_fingerprint(self.options.instructions, [self.options.instructions]))
        if self.videos is not None and not all(name in self.buffer for name in _image_arrays()):
            listed = [entry for entry in self._list(self.videos) if isinstance(entry, dict)]
            paths = [path for entry in listed for path in entry.values() if isinstance(path, str)]
            parts.append(files_fingerprint(self.videos.parent, [self.videos, *map(self._beside_list, paths)]))
        return "-".join(parts)

    def settings(self) -> dict[str, Any]:
        """Everything apart from files that decides what comes out; for files see `fingerprint`."""
        options = self.options.model_dump(mode="json", exclude={"instructions", "videos"})
        return {"options": options, "latencies": self.latencies.model_dump(mode="json")}

    # ------------------------------------------------------------------------------------------ parts

    def _episode_ends(self) -> np.ndarray:
        if self._ends is None:
            name = "meta/episode_ends"
            shape = self.buffer.array(name).shape
            ends = self.buffer.rows(name, 0, shape[0]) if len(shape) == 1 and shape[0] else np.empty(0, int)
            rows = self.buffer.array("data/robot0_eef_pos").shape[0]
            increasing = len(ends) > 0 and (np.diff(ends, prepend=0) > 0).all()
            if not increasing or ends[-1] > rows:
                where, expected = f"{self.source}, meta/episode_ends", f"numbers that increase, up to {rows} rows"
                raise DataError(
                    "the ends of the episodes do not fit the data", where=where, expected=expected, found=ends
                )
            self._check_time()
            self._ends = ends
        return self._ends

    def _check_time(self) -> None:
        """A rate is never guessed, and never used in place of times that were recorded."""
        fps = self.options.fps
        if _TIME in self.buffer:
            if fps is not None:
                what, fix = "the replay buffer has timestamps of its own", "leave --fps away"
                raise DataError(what, where=self.source, expected="no rate", found=f"--fps {fps:g}", fix=fix)
        elif fps is None:
            raise DataError(
                "the replay buffer does not say when its rows were recorded",
                where=self.source,
                expected=f"{_TIME}, or the rate of the rows",
                fix="give --fps; public UMI buffers hold every frame of their videos, 59.94 in a second",
            )

    def _time_s(self, start: int, stop: int) -> np.ndarray:
        if self.options.fps is None:
            return self.buffer.numbers(_TIME, start, stop, ())
        return np.arange(stop - start) / self.options.fps

    def _valid(self, start: int, stop: int) -> np.ndarray:
        """bool (rows, 2), by number of the robot."""
        name = "data/gripper_width_mask"
        if name not in self.buffer:
            return np.ones((stop - start, 2), bool)
        columns = self.buffer.array(name).shape[1:]
        mask = self.buffer.numbers(name, start, stop, (2,) if columns == (2,) else ()) > 0
        return mask if mask.ndim == 2 else np.stack([mask, mask], axis=1)

    def _frames(self, number: int, episode: EpisodeRef, start: int, stop: int) -> Frames:
        name = _image_arrays()[number]
        if name in self.buffer:
            if self.buffer.array(name).shape[0] < stop:
                where, expected = f"{self.source}, {name}", f"at least {stop} images"
                raise SampleError("wrong-shape", where=where, expected=expected, found=self.buffer.array(name).shape)
            return ZarrFrames(self.buffer, name, start, stop - start)
        if self.videos is None:
            expected = f"{name}, or videos and {VIDEOS_FILE} that lists them"
            raise DataError(
                "the replay buffer has no images", where=self.source, expected=expected, fix="--videos FILE"
            )
        return self._video(self.videos, f"camera{number}_rgb", episode, start, stop)

    def _video(self, videos: Path, camera: str, episode: EpisodeRef, start: int, stop: int) -> Frames:
        from rdt2_data.converters.video import VideoFrames

        listed = self._list(videos)
        number = episode.index
        if "meta/episode_video_id" in self.buffer:
            number = int(self.buffer.rows("meta/episode_video_id", episode.index, episode.index + 1)[0])
        entry = listed[number] if 0 <= number < len(listed) else None
        if not isinstance(entry, dict) or not isinstance(entry.get(camera), str):
            where = f"{videos}, entry {number}, of {episode.name}"
            raise SampleError("bad-recording", where=where, expected=f"a path under {camera!r}", found=entry)
        path = self._beside_list(entry[camera])
        first_s, frame_s = _video_times(path)
        frame = np.arange(stop - start, dtype=np.float64)
        if "data/rgb" in self.buffer:
            frame = self.buffer.numbers("data/rgb", start, stop, ())
        return VideoFrames(path, first_s + frame * frame_s, frame_s / 2)

    def _beside_list(self, name: str) -> Path:
        """A file named in the list of videos."""
        return (self.videos or self.source).parent / name

    def _instructions(self, episode: EpisodeRef, start_s: float) -> list[tuple[float, str]]:
        """The file's times count from the episode's first image, whenever that was taken."""
        path = self.options.instructions
        if path is None:
            return [(start_s, self.options.instruction or "")]  # never blank: one of the two was demanded
        entry = self._list(path)[episode.index]
        where = f"{path}, entry {episode.index}"
        pairs = [[0.0, entry]] if isinstance(entry, str) else entry
        fits = isinstance(pairs, list) and pairs and all(_is_told(pair) for pair in pairs)
        if not fits or any(after[0] <= before[0] for before, after in pairwise(pairs)):
            expected = "a sentence, or [[start in s, sentence], ...] with rising times"
            raise SampleError("unknown-instruction", where=where, expected=expected, found=json.dumps(entry)[:80])
        return [(start_s + float(time_s), sentence) for time_s, sentence in pairs]

    def _list(self, path: Path) -> list[Any]:
        if path not in self._lists:
            try:
                document = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise DataError(
                    "a file cannot be read", where=path, expected="a JSON list", found=str(error)
                ) from error
            if not isinstance(document, list):
                raise DataError("not a list", where=path, expected="a JSON list", found=type(document).__name__)
            self._lists[path] = document
        return self._lists[path]


def _is_told(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], (int, float))
        and math.isfinite(pair[0])
        and isinstance(pair[1], str)
        and bool(pair[1].strip())
    )


def _image_arrays() -> tuple[str, str]:
    """By number of the camera."""
    return "data/camera0_rgb", "data/camera1_rgb"


def _video_times(path: Path) -> tuple[float, float]:
    """When the first frame of a video is shown, and the time between two [s]."""
    import av
    from av.error import FFmpegError

    damage = damage_named("the video cannot be read", path, FFmpegError, OSError, ValueError, IndexError)
    with damage, av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, base = stream.average_rate, stream.time_base
        if not rate or not base:
            raise ValueError("no frame rate")
        return float((stream.start_time or 0) * base), float(1 / rate)
