"""Between the rows of a track: poses and widths at any time, rows that a stretch of time touches, what is plausible."""

from __future__ import annotations

import numpy as np

from rdt2_data.converters.recording import PoseTrack, WidthTrack
from rdt2_jax.actions.rotations import matrix_to_rotvec, rotvec_to_matrix

WIDTH_LIMITS = (-0.01, 0.12)
"""Widths [policy units] outside of it are no gripper's: 0.088 is wide open. Room for any offset of a real calibration;
metres of an open gripper are inside by chance, millimetres and raw counts are not. Our choice."""

MAX_REACH_M = 2.0
"""A hand that is farther than this from where it was less than a second ago was not recorded in metres. Our choice."""

_LEAST_TOLERANCE_S, _MOST_TOLERANCE_S = 1e-6, 5e-4
_FLOAT32_STEPS = 4 * 2.0**-23


def time_tolerance_s(*times_s: np.ndarray) -> float:
    """Times this close count as one [s].

    Four steps of float32 at the latest time, since recorders often store seconds in it, but at least a microsecond
    (seconds since 1970 in float64 have steps of a quarter of it) and at most half a millisecond.
    """
    latest_s = max((float(np.abs(time_s).max()) for time_s in times_s if len(time_s)), default=0.0)
    return min(max(_FLOAT32_STEPS * latest_s, _LEAST_TOLERANCE_S), _MOST_TOLERANCE_S)


def bracket(time_s: np.ndarray, query_s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows around each time.

    Args:
        time_s: float64 (T,), strictly increasing.
        query_s: float64, any shape. Times outside the track get its first or last row.

    Returns:
        Row at or before, row at or after, and the share of the second one, in [0, 1): each of the shape of `query_s`.
        A query that equals the time of a row has that row twice, and share 0.
    """
    after = np.searchsorted(time_s, query_s, side="left").clip(0, len(time_s) - 1)
    before = np.where(time_s[after] <= query_s, after, np.maximum(after - 1, 0))
    # Past the end both are the last row; before the start the first row is on both sides.
    span = time_s[after] - time_s[before]
    share = np.where(span > 0, (query_s - time_s[before]) / np.where(span > 0, span, 1.0), 0.0)
    return before, after, share


def interpolate_poses(time_s: np.ndarray, pose: np.ndarray, query_s: np.ndarray) -> np.ndarray:
    """Poses (..., 4, 4) at times (...): positions linear, rotations along the shortest arc at constant speed (slerp).

    Args:
        time_s: float64 (T,), strictly increasing.
        pose: float64 (T, 4, 4).
        query_s: float64; at the time of a row exactly that row comes back, outside the track the nearest row.
    """
    before, after, share = bracket(time_s, query_s)
    result = pose[before].copy()
    between = share > 0
    if between.any():
        first, second = pose[before[between]], pose[after[between]]
        part = share[between][:, None]
        turn = matrix_to_rotvec(np.swapaxes(first[:, :3, :3], -1, -2) @ second[:, :3, :3])
        moved = first.copy()
        moved[:, :3, :3] = first[:, :3, :3] @ rotvec_to_matrix(part * turn)
        moved[:, :3, 3] += part * (second[:, :3, 3] - first[:, :3, 3])
        result[between] = moved
    return result


def interpolate_values(time_s: np.ndarray, value: np.ndarray, query_s: np.ndarray) -> np.ndarray:
    """Numbers (...) at times (...), linear; `value` is float64 (T,). Outside the track the nearest row."""
    before, after, share = bracket(time_s, query_s)
    return value[before] + share * (value[after] - value[before])


def rows_within(time_s: np.ndarray, start_s: np.ndarray, stop_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last row that interpolation between two times touches, each of the shape of `start_s`.

    Times closer than `time_tolerance_s` to a row do not reach beyond it.
    """
    tolerance_s = time_tolerance_s(time_s)
    first, _, _ = bracket(time_s, start_s + tolerance_s)
    _, last, _ = bracket(time_s, stop_s - tolerance_s)
    return first, np.maximum(first, last)


def any_between(flags: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Whether any of `flags[first:stop]` is set, for many pairs at once."""
    count = np.concatenate([[0], np.cumsum(flags)])
    return count[np.maximum(stop, first)] > count[first]


# ------------------------------------------------------------------------------------------ plausibility


def implausible_widths(track: WidthTrack) -> np.ndarray:
    """Which rows (T,) hold a measured width that no gripper has, see `WIDTH_LIMITS`."""
    low, high = WIDTH_LIMITS
    return track.valid & ((track.width < low) | (track.width > high))


def farthest_m(track: PoseTrack, anchor_s: np.ndarray, due_s: np.ndarray) -> np.ndarray:
    """How far the hand gets from where it was at `anchor_s` (S,), at any of the times `due_s` (S, n): (S,) [m]."""
    axes = track.pose_world_policy[:, :3, 3].T
    moved_m = [np.interp(due_s, track.time_s, axis) - np.interp(anchor_s, track.time_s, axis)[:, None] for axis in axes]
    return np.sqrt(np.sum(np.square(moved_m), axis=0)).max(axis=1, initial=0.0)
