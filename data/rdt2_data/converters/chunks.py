"""From a recording to samples: which frames are used, and the relative chunk that belongs to each.

The reference is the right wrist camera; every frame of it is paired with the nearest left one. Each arm is anchored at
the time its OWN image was taken: action i is the pose at that time + (i + 1) / 30 s, relative to the pose at that time.
Poses are interpolated in float64; the chunk is rounded to float32 at the very end.

Source of the layout: the RDT2 paper (arXiv 2602.03310) and its public code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdt2_data.converters.options import ChunkOptions
from rdt2_data.converters.recording import PoseTrack, Recording, WidthTrack
from rdt2_data.converters.tracks import (
    MAX_REACH_M,
    WIDTH_LIMITS,
    any_between,
    bracket,
    farthest_m,
    implausible_widths,
    interpolate_poses,
    interpolate_values,
    rows_within,
    time_tolerance_s,
)
from rdt2_data.problems import SampleError, Tally
from rdt2_jax.actions.chunks import absolute_to_relative_chunk
from rdt2_jax.actions.layout import ACTION_DIM, ACTION_RATE_HZ, ARM_NAMES, CHUNK_LENGTH, ArmName

REFERENCE, OTHER = "right_wrist", "left_wrist"

BEFORE = "before the first pose or width"
AFTER = "after the last pose or width"
UNPAIRED = "before or after the left camera's images"
UNTOLD = "before the first instruction"
"""Frames at the edges of a recording, which every recording has: left out and counted, but no problem."""

_DUE_S = np.arange(1, CHUNK_LENGTH + 1) / ACTION_RATE_HZ
_ROTATION_TOLERANCE = 1e-4
_BLOCK = 1024
"""Frames handled at once, to bound memory."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The frames of a recording that become samples, in order of time.

    Attributes:
        right_frame, left_frame: int64 (S,), indices into the images of the two cameras.
        instruction: int64 (S,), index into `Recording.instructions`.
        frame_s: typical time between two samples [s].
        left_out: edge of the recording -> number of frames.
    """

    right_frame: np.ndarray
    left_frame: np.ndarray
    instruction: np.ndarray
    frame_s: float
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.right_frame)

    def part(self, start: int, stop: int) -> Selection:
        """The samples from `start` up to `stop`; what was left out stays with the whole."""
        rows = slice(start, stop)
        return Selection(self.right_frame[rows], self.left_frame[rows], self.instruction[rows], self.frame_s, {})


@dataclass(frozen=True, eq=False)
class Chunks:
    """What belongs to the samples of a selection.

    Attributes:
        actions: float32 (S, 24, 20), relative, policy frame and units.
        gripper_valid: bool (S, 2), right then left: whether all widths behind the chunk were measured.
    """

    actions: np.ndarray
    gripper_valid: np.ndarray


# ---------------------------------------------------------------------------------------------- selecting


def select_frames(recording: Recording, options: ChunkOptions, tally: Tally) -> Selection:
    """Chooses the frames that become samples; looks at times only, never at images.

    Frames whose images are too far apart ("camera-skew"), or whose window has a hole ("time-gap") or values that cannot
    be meant ("out-of-range"), go to the tally.

    Raises:
        SampleError: tracks that cannot be used ("wrong-shape", "not-finite", "bad-rotation"), no instruction or a blank
            one ("unknown-instruction"), or whatever a strict tally does not accept.
    """
    check_tracks(recording)
    frames = np.arange(0, len(recording.cameras[REFERENCE].time_s), options.every)
    time_s = recording.cameras[REFERENCE].time_s[frames]
    other_s = recording.cameras[OTHER].time_s
    tolerance_s = time_tolerance_s(time_s, other_s)
    nearest = _nearest(other_s, time_s)
    skew_s = np.abs(other_s[nearest] - time_s)
    told = np.searchsorted([start for start, _ in recording.instructions], time_s + tolerance_s, side="right") - 1

    far = skew_s > options.max_skew_s + tolerance_s
    unpaired = far & ((time_s < other_s[0]) | (time_s > other_s[-1]))
    anchors_s: dict[ArmName, np.ndarray] = {"right": time_s, "left": other_s[nearest]}
    before, after = _outside(recording, anchors_s, hold=options.at_end == "hold")
    left_out: Counter[str] = Counter()
    keep = np.ones(len(frames), bool)
    for name, mask in ((UNPAIRED, unpaired), (BEFORE, before), (AFTER, after), (UNTOLD, told < 0)):
        left_out[name] = int((keep & mask).sum())
        keep &= ~mask
    for row in np.flatnonzero(keep & far):
        expected, found = f"at most {options.max_skew_s * 1e3:g} ms", f"{skew_s[row] * 1e3:.1f} ms"
        tally.add(SampleError("camera-skew", where=_where(recording, frames[row]), expected=expected, found=found))
    keep &= ~far
    for row, track in _gaps(recording, anchors_s, keep, options.max_gap_s):
        expected = f"at most {options.max_gap_s:g} s between rows"
        tally.add(SampleError("time-gap", where=f"{_where(recording, frames[row])}, {track}", expected=expected))
        keep[row] = False
    for row, expected, found in _implausible(recording, anchors_s, keep):
        tally.add(
            SampleError(
                "out-of-range",
                where=_where(recording, frames[row]),
                expected=expected,
                found=found,
                fix="look at the units of the source: this is nearly always one of them",
            )
        )
        keep[row] = False
    all_s = recording.cameras[REFERENCE].time_s
    frame_s = float(np.median(np.diff(all_s))) * options.every if len(all_s) > 1 else 0.0
    return Selection(frames[keep], nearest[keep], told[keep], frame_s, {name: n for name, n in left_out.items() if n})


def _where(recording: Recording, frame: int) -> str:
    return f"{recording.name}, {REFERENCE} image {frame}"


def _nearest(time_s: np.ndarray, query_s: np.ndarray) -> np.ndarray:
    before, after, share = bracket(time_s, query_s)
    return np.where(share > 0.5, after, before)


def _outside(
    recording: Recording, anchors_s: dict[ArmName, np.ndarray], *, hold: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which frames start before, or reach beyond, the poses and widths of either arm."""
    before = np.zeros(len(anchors_s["right"]), bool)
    after = before.copy()
    for arm, anchor_s in anchors_s.items():
        last_s = anchor_s if hold else anchor_s + _DUE_S[-1]
        for track in (recording.poses[arm], recording.widths[arm]):
            tolerance_s = time_tolerance_s(track.time_s, anchor_s)
            before |= anchor_s < track.time_s[0] - tolerance_s
            after |= last_s > track.time_s[-1] + tolerance_s
    return before, after & ~before


def _gaps(
    recording: Recording, anchors_s: dict[ArmName, np.ndarray], keep: np.ndarray, max_gap_s: float
) -> list[tuple[int, str]]:
    """(row, name of a track) for the frames whose window holds a gap; each frame once."""
    found: dict[int, str] = {}
    for arm, anchor_s in anchors_s.items():
        for name, track in ((f"{arm} poses", recording.poses[arm]), (f"{arm} widths", recording.widths[arm])):
            is_gap = np.diff(track.time_s) > max_gap_s + time_tolerance_s(track.time_s)
            first, last = rows_within(track.time_s, anchor_s, anchor_s + _DUE_S[-1])
            for row in np.flatnonzero(keep & any_between(is_gap, first, last)):
                found.setdefault(int(row), name)
    return sorted(found.items())


def _implausible(
    recording: Recording, anchors_s: dict[ArmName, np.ndarray], keep: np.ndarray
) -> list[tuple[int, str, str]]:
    """(row, expected, found) for the frames whose window holds values of another unit; each frame once."""
    problems: dict[int, tuple[str, str]] = {}
    kept = np.flatnonzero(keep)
    low, high = WIDTH_LIMITS
    for arm, anchor_s in anchors_s.items():
        poses, widths = recording.poses[arm], recording.widths[arm]
        wrong = implausible_widths(widths)
        first, last = rows_within(widths.time_s, anchor_s[kept], anchor_s[kept] + _DUE_S[-1])
        for place in np.flatnonzero(any_between(wrong, first, last + 1)):
            width = widths.width[first[place] : last[place] + 1][wrong[first[place] : last[place] + 1]][0]
            found = f"a width of {width:.4g} ({arm}; a wrong unit?)"
            problems.setdefault(int(kept[place]), (f"widths of {low} to {high} policy units", found))
        for start in range(0, len(kept), _BLOCK):
            rows = kept[start : start + _BLOCK]
            reach_m = farthest_m(poses, anchor_s[rows], anchor_s[rows, None] + _DUE_S)
            for place in np.flatnonzero(reach_m > MAX_REACH_M):
                found = f"{reach_m[place]:.4g} ({arm}; millimetres?)"
                problems.setdefault(int(rows[place]), (f"a hand that stays within {MAX_REACH_M:g} m in 0.8 s", found))
    return [(row, *problem) for row, problem in sorted(problems.items())]


# ------------------------------------------------------------------------------------------------ cutting


def cut_chunks(recording: Recording, selection: Selection) -> Chunks:
    """The chunks of selected frames. Beyond the end of a track its last row is held."""
    actions = np.empty((len(selection), CHUNK_LENGTH, ACTION_DIM), np.float32)
    valid = np.empty((len(selection), len(ARM_NAMES)), bool)
    right_s = recording.cameras[REFERENCE].time_s[selection.right_frame]
    left_s = recording.cameras[OTHER].time_s[selection.left_frame]
    widths = {arm: _filled(recording.widths[arm]) for arm in ARM_NAMES}
    for start in range(0, len(selection), _BLOCK):
        rows = slice(start, start + _BLOCK)
        anchors_s: dict[ArmName, np.ndarray] = {"right": right_s[rows], "left": left_s[rows]}
        now, future, width = {}, {}, {}
        for arm, anchor_s in anchors_s.items():
            due_s = anchor_s[:, None] + _DUE_S
            poses, track = recording.poses[arm], recording.widths[arm]
            now[arm] = interpolate_poses(poses.time_s, poses.pose_world_policy, anchor_s)
            future[arm] = interpolate_poses(poses.time_s, poses.pose_world_policy, due_s)
            width[arm] = interpolate_values(track.time_s, widths[arm], due_s)
            first, last = rows_within(track.time_s, anchor_s, due_s[:, -1])
            valid[rows, ARM_NAMES.index(arm)] = ~any_between(~track.valid, first, last + 1)
        actions[rows] = absolute_to_relative_chunk(now, future, width).astype(np.float32)
    return Chunks(actions, valid)


def _filled(track: WidthTrack) -> np.ndarray:
    """Widths with numbers everywhere: what was not measured and is no number is interpolated, or 0 without any."""
    missing = ~np.isfinite(track.width)
    if not missing.any():
        return track.width
    if missing.all():
        return np.zeros_like(track.width)
    return np.where(missing, np.interp(track.time_s, track.time_s[~missing], track.width[~missing]), track.width)


# ----------------------------------------------------------------------------------------------- checking


def check_tracks(recording: Recording) -> None:
    """Raises SampleError for arrays that do not belong together, numbers that are none, matrices that are no poses, or
    instructions that say nothing.

    A width may be NaN where it is marked as not measured.
    """
    for arm in ARM_NAMES:
        _check_poses(recording.poses[arm], f"{recording.name}, poses of {arm}")
        _check_widths(recording.widths[arm], f"{recording.name}, widths of {arm}")
    _check_instructions(recording.instructions, f"{recording.name}, instructions")


def _check_instructions(instructions: Sequence[tuple[float, str]], where: str) -> None:
    starts = [start for start, _ in instructions]
    if not np.isfinite(starts).all() or starts != sorted(starts):
        raise SampleError("bad-time", where=where, expected="times that increase", found=starts[:5])
    blank = [start for start, sentence in instructions if not sentence.strip()]
    if blank or not instructions:
        raise SampleError(
            "unknown-instruction",
            what="the recording does not say what is being done",
            where=where,
            expected="a sentence",
            found=f"a blank one at {float(blank[0]):g} s" if blank else "none",
        )


def _check_poses(track: PoseTrack, where: str) -> None:
    pose, rows = track.pose_world_policy, len(track.time_s)
    if pose.shape != (rows, 4, 4):
        raise SampleError("wrong-shape", where=where, expected=(rows, 4, 4), found=pose.shape)
    _require_finite(np.isfinite(pose).all(axis=(1, 2)), where)
    rotation = pose[:, :3, :3]
    error = np.abs(np.swapaxes(rotation, -1, -2) @ rotation - np.eye(3)).max(axis=(1, 2))
    wrong = (error > _ROTATION_TOLERANCE) | (np.linalg.det(rotation) < 0) | (pose[:, 3] != [0, 0, 0, 1]).any(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        what, found = "a matrix is no rigid transform", f"{int(wrong.sum())}; the first is row {row}"
        raise SampleError("bad-rotation", what=what, where=where, expected="rotations and positions", found=found)


def _check_widths(track: WidthTrack, where: str) -> None:
    rows = len(track.time_s)
    if track.width.shape != (rows,) or track.valid.shape != (rows,):
        found = f"{track.width.shape} and {track.valid.shape}"
        raise SampleError("wrong-shape", where=where, expected=f"({rows},) widths and marks", found=found)
    _require_finite(np.isfinite(track.width) | ~track.valid, where)


def _require_finite(row_fits: Any, where: str) -> None:
    fits = np.asarray(row_fits)
    if not fits.all():
        found = f"{int((~fits).sum())} rows; the first is row {int(np.flatnonzero(~fits)[0])}"
        raise SampleError("not-finite", where=where, expected="numbers", found=found)
