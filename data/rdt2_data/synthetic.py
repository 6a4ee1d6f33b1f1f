"""Smooth synthetic bimanual motion: action chunks without a robot, for training and testing a tokenizer.

Each arm moves through random waypoints along minimum-jerk segments (Flash and Hogan 1985: s(u) = 10u^3 - 15u^4 + 6u^5,
peak speed 1.875 times the mean), with pauses; grippers open and close along the same profile. Speeds never exceed
`MAX_SPEED_M_S` and `MAX_ROTATION_SPEED_RAD_S`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from rdt2_jax.actions.layout import (
    ACTION_DIM,
    ACTION_RATE_HZ,
    ARM_NAMES,
    CHUNK_LENGTH,
    MAX_POLICY_WIDTH,
    POSITION,
    ROT6D,
    WIDTH,
    arm_slice,
)
from rdt2_jax.actions.rotations import matrix_to_rot6d, rotvec_to_matrix
from rdt2_jax.errors import DataError

MAX_SPEED_M_S = 0.3
MAX_ROTATION_SPEED_RAD_S = 1.0

_PEAK_OVER_MEAN = 1.875
_SEGMENT_S = (0.4, 2.0)
_GRASP_S = (0.3, 0.8)
_PAUSE_PROBABILITY = 0.15
_EPISODE_S = 20.0
_CHUNKS_PER_EPISODE = 20


def smooth_chunks(
    count: int, seed: int, chunk_length: int = CHUNK_LENGTH, progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """Relative action chunks (count, chunk_length, 20) float32 cut at random times from smooth episodes.

    Deterministic in `seed`. Chunks are relative to the pose at their start, in the layout of
    `rdt2_jax.actions.layout`; widths are in policy units. `progress` is called with the number of chunks done since
    the last call.

    Raises:
        DataError: `count` is not positive.
    """
    if count < 1:
        raise DataError("no chunks asked for", where="count", expected="a positive number", found=count)
    episodes = -(-count // _CHUNKS_PER_EPISODE)
    frames = int(_EPISODE_S * ACTION_RATE_HZ)
    chunks = np.empty((episodes, _CHUNKS_PER_EPISODE, chunk_length, ACTION_DIM), np.float32)
    for episode, generator in enumerate(np.random.default_rng(seed).spawn(episodes)):
        starts = generator.integers(0, frames - chunk_length, _CHUNKS_PER_EPISODE)
        window = starts[:, None] + 1 + np.arange(chunk_length)
        for arm in ARM_NAMES:
            position, rotation, width = smooth_arm_motion(generator, frames)
            inverse = np.swapaxes(rotation[starts], -1, -2)[:, None]
            target = chunks[episode, :, :, arm_slice(arm)]
            offset = position[window] - position[starts][:, None]
            target[..., POSITION] = (inverse @ offset[..., None])[..., 0]
            target[..., ROT6D] = matrix_to_rot6d(inverse @ rotation[window])
            target[..., WIDTH] = width[window, None]
        if progress is not None:
            progress(min(_CHUNKS_PER_EPISODE, count - episode * _CHUNKS_PER_EPISODE))
    return chunks.reshape(-1, chunk_length, ACTION_DIM)[:count]


def smooth_arm_motion(generator: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One arm at 30 Hz: position (frames, 3) m, rotation (frames, 3, 3), gripper width (frames,) policy units."""
    position, rotation = np.empty((frames, 3)), np.empty((frames, 3, 3))
    current_position, current_rotation = np.zeros(3), rotvec_to_matrix(generator.uniform(-np.pi, np.pi, 3))
    for start, stop, profile in _segments(generator, frames, _SEGMENT_S):
        mean_time_s = (stop - start) / ACTION_RATE_HZ / _PEAK_OVER_MEAN
        moving = generator.uniform(size=2) >= _PAUSE_PROBABILITY
        step = moving[0] * _random_vector(generator, MAX_SPEED_M_S * mean_time_s)
        turn = moving[1] * _random_vector(generator, MAX_ROTATION_SPEED_RAD_S * mean_time_s)
        count = min(stop, frames) - start
        position[start:stop] = current_position + profile[:count, None] * step
        rotation[start:stop] = current_rotation @ rotvec_to_matrix(profile[:count, None] * turn)
        current_position, current_rotation = current_position + step, current_rotation @ rotvec_to_matrix(turn)
    return position, rotation, _gripper_motion(generator, frames)


def _gripper_motion(generator: np.random.Generator, frames: int) -> np.ndarray:
    """Holds a width for a while, then moves to another: open, closed, or around an object."""
    width, current = np.empty(frames), float(generator.uniform(0, MAX_POLICY_WIDTH))
    start = 0
    while start < frames:
        hold = int(generator.uniform(0.5, 4.0) * ACTION_RATE_HZ)
        length = max(2, int(generator.uniform(*_GRASP_S) * ACTION_RATE_HZ))
        goal = float(generator.choice([0.0, MAX_POLICY_WIDTH, generator.uniform(0, MAX_POLICY_WIDTH)]))
        path = np.concatenate([np.full(hold, current), current + (goal - current) * _minimum_jerk(length)])
        stop = min(start + len(path), frames)
        width[start:stop] = path[: stop - start]
        start, current = stop, goal
    return width


def _segments(
    generator: np.random.Generator, frames: int, duration_s: tuple[float, float]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (start, stop, profile from 0 to 1) until all frames are covered."""
    start = 0
    while start < frames:
        length = max(2, int(generator.uniform(*duration_s) * ACTION_RATE_HZ))
        yield start, start + length, _minimum_jerk(length)
        start += length


def _minimum_jerk(length: int) -> np.ndarray:
    u = np.arange(1, length + 1) / length
    return u**3 * (10.0 - 15.0 * u + 6.0 * u**2)


def _random_vector(generator: np.random.Generator, max_length: float) -> np.ndarray:
    """Uniform direction, uniform length in [0.2, 1] of the maximum."""
    direction = generator.normal(size=3)
    return direction / np.linalg.norm(direction) * generator.uniform(0.2, 1.0) * max_length
