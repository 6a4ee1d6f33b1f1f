"""Do the samples of an episode follow each other in time?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rdt2_data.problems import SampleError
from rdt2_data.samples import META
from rdt2_data.shards.pack import PACK_FILE
from rdt2_data.shards.storage import storage_for
from rdt2_jax.errors import DataError

MAX_GAP_S = 0.1
"""Consecutive samples of an episode further apart than this lack frames between them; three frames at 30 a second."""

_ROUNDING_S = 1e-9


@dataclass(frozen=True)
class Moment:
    """When a sample was taken.

    Attributes:
        where: archive and key, for messages.
        episode: folder and name of its episode; None: of none.
        frame: its number in the episode, or None where that is not known.
        capture_time_s: camera -> seconds.
    """

    where: str
    episode: tuple[str, str] | None
    frame: int | None
    capture_time_s: Mapping[str, float]


class CaptureTimes:
    """Compares every sample with the one that came before it in its episode. Memory grows with the episodes alone.

    In a folder whose samples are shuffled, the frames say which of the two is the later one, and gaps cannot be told.

    Args:
        max_gap_s: longest time between two samples that follow each other [s]; None does not ask.
        shuffled: the samples of all folders are, whatever `pack.json` says.
    """

    def __init__(self, max_gap_s: float | None, *, shuffled: bool = False) -> None:
        self._max_gap_s, self._all_shuffled = max_gap_s, shuffled
        self._last: dict[tuple[str, str], Moment] = {}
        self._shuffled: dict[str, bool] = {}

    def problems(self, now: Moment) -> Iterator[SampleError]:
        """What is wrong with the time of a sample, beside the last one of its episode."""
        if now.episode is None:
            return
        folder, episode = now.episode
        shuffled = self._is_shuffled(folder)
        last = self._last.get(now.episode)
        self._last[now.episode] = now
        if last is None:
            return
        if shuffled:
            if now.frame is None or last.frame is None:
                return
            if now.frame < last.frame:
                last, now = now, last
        for camera in sorted(now.capture_time_s.keys() & last.capture_time_s.keys()):
            step_s = now.capture_time_s[camera] - last.capture_time_s[camera]
            where, found = f"{now.where}, {META}, {camera}, episode {episode!r}", f"{step_s:.4f} s after {last.where}"
            if step_s <= 0:
                yield SampleError("bad-time", where=where, expected="a later time", found=found)
            elif not shuffled and self._max_gap_s is not None and step_s > self._max_gap_s + _ROUNDING_S:
                yield SampleError("time-gap", where=where, expected=f"at most {self._max_gap_s:g} s", found=found)

    @property
    def shuffled_folders(self) -> list[str]:
        """Folders with episodes in which no gaps were looked for."""
        return [folder for folder, shuffled in self._shuffled.items() if shuffled]

    def _is_shuffled(self, folder: str) -> bool:
        if folder not in self._shuffled:
            self._shuffled[folder] = self._all_shuffled or was_packed_shuffled(folder)
        return self._shuffled[folder]


def was_packed_shuffled(folder: str) -> bool:
    """Whether the `pack.json` of a folder, local or remote, says that its samples were written in another order."""
    path = f"{folder}/{PACK_FILE}" if folder else PACK_FILE
    try:
        document = json.loads(storage_for(path).use(path, lambda file: file.read()))
    except (OSError, ValueError, DataError):  # most folders were not packed, and have none
        return False
    return isinstance(document, dict) and document.get("shuffle_seed") is not None
