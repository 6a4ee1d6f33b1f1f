"""What every converter makes of one episode before chunks are cut: tracks on one clock, in policy frame and units.

A reader of a format (`umi_zarr`, `lerobot`, `rosbag`, `episodes`) knows that format and nothing of chunks or shards;
`chunks` knows this module and no format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rdt2_data.problems import SampleError
from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES, ArmName


@dataclass(frozen=True, eq=False)
class PoseTrack:
    """Where one arm was.

    Attributes:
        time_s: float64 (T,), when the arm was there (latency already taken off), strictly increasing.
        pose_world_policy: float64 (T, 4, 4), the policy frame of that hand in a world that stays the same within the
            episode; the two arms need not share it.
    """

    time_s: np.ndarray
    pose_world_policy: np.ndarray


@dataclass(frozen=True, eq=False)
class WidthTrack:
    """How far one gripper was open.

    Attributes:
        time_s: float64 (T,), strictly increasing.
        width: float64 (T,), policy units (0 to 0.088).
        valid: bool (T,), False where the width was not measured; such chunks get negative gripper tokens.
    """

    time_s: np.ndarray
    width: np.ndarray
    valid: np.ndarray


class Frames(Protocol):
    """Images of one camera, read when they are needed."""

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray | SampleError]:
        """Yields uint8 RGB images (height, width, 3) for strictly increasing indices.

        An image that cannot be read is yielded as a SampleError in its place, and reading goes on with the next one.

        Raises:
            SampleError: "bad-recording" or "corrupt-jpeg", where reading cannot go on. The image that was due counts as
                unreadable, and `read` is called again for those after it.
        """
        ...


@dataclass(frozen=True, eq=False)
class CameraTrack:
    """What one wrist camera saw.

    Attributes:
        time_s: float64 (N,), middle of each exposure (latency already taken off), strictly increasing.
        frames: the N images.
    """

    time_s: np.ndarray
    frames: Frames


@dataclass(frozen=True, eq=False)
class Recording:
    """One episode.

    Attributes:
        name: unique within the conversion; becomes part of messages and of `meta.json`.
        poses, widths: by arm ("right", "left").
        cameras: by name ("left_wrist", "right_wrist").
        instructions: (start time [s], sentence), sorted by time; each holds until the next. A frame before the first
            has no instruction and is left out. None at all, or a blank one, is a problem that `chunks` finds.
    """

    name: str
    poses: Mapping[ArmName, PoseTrack]
    widths: Mapping[ArmName, WidthTrack]
    cameras: Mapping[str, CameraTrack]
    instructions: Sequence[tuple[float, str]]

    def __post_init__(self) -> None:
        for mapping, names, what in (
            (self.poses, ARM_NAMES, "poses"),
            (self.widths, ARM_NAMES, "widths"),
            (self.cameras, CAMERA_NAMES, "cameras"),
        ):
            if set(mapping) != set(names):
                expected, found = ", ".join(names), ", ".join(map(str, mapping)) or "nothing"
                raise SampleError("bad-recording", where=f"{self.name}, {what}", expected=expected, found=found)
            for key, track in mapping.items():
                require_increasing(track.time_s, f"{self.name}, {what} of {key}")


@dataclass(frozen=True)
class EpisodeRef:
    """Names one episode of a source without opening it.

    Attributes:
        name: as `Recording.name`.
        index: position in the source.
    """

    name: str
    index: int


class RecordingReader(Protocol):
    """One source of recordings.

    Instances can be pickled. A process that takes part in a conversion gets one copy, asks it for many episodes, and
    keeps it until the end: files may be opened lazily and stay open, listings may be kept.

    A reader may also have
    - `settings() -> dict` (JSON): the options it was made with, compared by name when a conversion goes on;
    - `notes`: episode -> what there is to say about it once it was loaded, such as why it ends early.
    """

    def episodes(self) -> list[EpisodeRef]:
        """All episodes, in an order that never changes for the same source. Asked for once, where the plan is made.

        Raises:
            DataError: the source is missing or is of another format.
        """
        ...

    def load(self, episode: EpisodeRef) -> Recording:
        """One episode; its images are read later.

        Args:
            episode: one of `episodes()`, perhaps of another copy of this reader. Listing the source again for it would
                make a conversion slower by the number of episodes.

        Raises:
            SampleError: "bad-recording", "bad-time" and the like, for an episode that cannot be used.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when the source does (names, sizes and times of its files): a restarted conversion compares it."""
        ...


def require_increasing(time_s: np.ndarray, where: str) -> None:
    """Raises SampleError "bad-time" unless times are finite and strictly increasing; names the first that is not."""
    time_s = np.asarray(time_s)
    if time_s.ndim != 1 or not len(time_s):
        raise SampleError("bad-time", where=where, expected="one time per row", found=f"shape {time_s.shape}")
    if not np.isfinite(time_s).all():
        index = int(np.argwhere(~np.isfinite(time_s))[0, 0])
        found = f"{float(time_s[index])} at row {index}"
        raise SampleError("bad-time", where=where, expected="finite times", found=found)
    wrong = np.flatnonzero(np.diff(time_s) <= 0)
    if wrong.size:
        row = int(wrong[0]) + 1
        before, after = float(time_s[row - 1]), float(time_s[row])
        found = f"{wrong.size} that do not; the first, row {row}, is {after} after {before}"
        raise SampleError("bad-time", where=where, expected="times that increase", found=found)
