"""Synthetic motion keeps its promises: speeds, layout, determinism."""

from __future__ import annotations

import numpy as np
import pytest
from rdt2_data.synthetic import MAX_ROTATION_SPEED_RAD_S, MAX_SPEED_M_S, smooth_arm_motion, smooth_chunks

from rdt2_jax.actions.layout import ACTION_RATE_HZ, ARM_NAMES, MAX_POLICY_WIDTH, POSITION, ROT6D, WIDTH, arm_slice
from rdt2_jax.actions.rotations import geodesic_angle, rot6d_to_matrix
from rdt2_jax.errors import DataError


@pytest.fixture(scope="module")
def chunks():
    return smooth_chunks(500, seed=1)


@pytest.mark.parametrize("arm", ARM_NAMES)
def test_speeds_and_ranges(chunks, arm):
    frames = chunks[..., arm_slice(arm)].astype(np.float64)
    steps = np.diff(frames[..., POSITION], axis=1)
    assert np.linalg.norm(steps, axis=-1).max() * ACTION_RATE_HZ <= MAX_SPEED_M_S
    rotations = rot6d_to_matrix(frames[..., ROT6D])
    turns = geodesic_angle(rotations[:, :-1], rotations[:, 1:])
    assert turns.max() * ACTION_RATE_HZ <= MAX_ROTATION_SPEED_RAD_S
    assert frames[..., WIDTH].min() >= 0
    assert frames[..., WIDTH].max() <= MAX_POLICY_WIDTH + 1e-7
    # It does move: an empty promise would pass the lines above.
    assert np.linalg.norm(frames[:, -1, POSITION], axis=-1).mean() > 0.03


def test_chunks_are_relative_to_their_start(chunks):
    """The first frame is one thirtieth of a second away from the identity."""
    first = chunks[:, 0, arm_slice("right")]
    assert np.linalg.norm(first[:, POSITION], axis=-1).max() <= MAX_SPEED_M_S / ACTION_RATE_HZ


def test_deterministic_in_seed_and_count():
    np.testing.assert_array_equal(smooth_chunks(30, seed=4), smooth_chunks(30, seed=4))
    assert not np.array_equal(smooth_chunks(30, seed=4), smooth_chunks(30, seed=5))


def test_progress_counts_every_chunk():
    counts = []
    smooth_chunks(45, seed=0, progress=counts.append)
    assert sum(counts) == 45


def test_arm_motion_is_continuous():
    position, rotation, width = smooth_arm_motion(np.random.default_rng(0), 600)
    assert np.abs(np.diff(position, axis=0)).max() < 0.3 / ACTION_RATE_HZ
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=1e-9)
    assert np.abs(np.diff(width)).max() < MAX_POLICY_WIDTH


def test_no_chunks_asked_for():
    with pytest.raises(DataError, match="no chunks"):
        smooth_chunks(0, seed=0)
