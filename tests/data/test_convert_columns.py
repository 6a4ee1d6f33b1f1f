"""Recorded numbers become the poses and widths they mean, or an error that says where they do not."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from rdt2_data.converters.columns import (
    ROTATION_NUMBERS,
    PoseFrame,
    WidthUnits,
    poses_from_numbers,
    unmeasured_widths,
    width_track,
)
from rdt2_data.problems import SampleError
from scipy.spatial.transform import Rotation

from rdt2_jax.actions.chunks import PolicyFrames
from rdt2_jax.actions.poses import pose7_to_matrix
from rdt2_jax.config import parse_config
from rdt2_jax.errors import ConfigError

WRITTEN = {
    "quat_wxyz": lambda r: np.roll(r.as_quat(), 1, axis=-1),
    "quat_xyzw": lambda r: r.as_quat(),
    "rotvec": lambda r: r.as_rotvec(),
    "euler_xyz": lambda r: r.as_euler("xyz"),  # scipy: lower case turns about fixed axes
    "rot6d_columns": lambda r: r.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(-1, 6),
    "rot6d_rows": lambda r: r.as_matrix()[:, :2].reshape(-1, 6),
    "matrix": lambda r: r.as_matrix().reshape(-1, 9),
}


def test_every_format_is_tried_here():
    assert set(WRITTEN) == set(ROTATION_NUMBERS)


@pytest.mark.parametrize("rotation_format", WRITTEN)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.filterwarnings("ignore:Gimbal lock")
def test_a_rotation_is_read_back_from_every_format(rotation_format, seed):
    rotations = Rotation.random(5, random_state=np.random.RandomState(seed))
    positions = np.random.default_rng(seed).uniform(-1, 1, (5, 3))
    numbers = WRITTEN[rotation_format](rotations)
    poses = poses_from_numbers(positions, numbers, rotation_format, "test")
    np.testing.assert_allclose(poses[:, :3, :3], rotations.as_matrix(), atol=1e-9)
    np.testing.assert_array_equal(poses[:, :3, 3], positions)
    np.testing.assert_array_equal(poses[:, 3], np.tile([0.0, 0, 0, 1], (5, 1)))


def test_positions_in_millimetres():
    poses = poses_from_numbers(np.array([[10.0, 20, 30]]), np.zeros((1, 3)), "rotvec", "test", "mm")
    np.testing.assert_allclose(poses[0, :3, 3], [0.01, 0.02, 0.03])


@pytest.mark.parametrize(
    ("rotation_format", "numbers"),
    [
        ("quat_wxyz", [0.5, 0, 0, 0]),
        ("quat_xyzw", [0, 0, 0, 0]),
        ("rot6d_columns", [1, 0, 0, 1, 0, 0]),
        ("rot6d_rows", [2, 0, 0, 0, 2, 0]),
        ("matrix", [1, 0, 0, 0, 1, 0, 0, 0, -1]),
        ("matrix", [1, 0, 0, 0, 1, 0, 0, 0, 0.5]),
    ],
)
def test_numbers_that_are_no_rotation_are_refused_with_their_row(rotation_format, numbers):
    good = WRITTEN[rotation_format](Rotation.identity(1))
    with pytest.raises(SampleError, match="row 1") as caught:
        poses_from_numbers(np.zeros((2, 3)), np.concatenate([good, [numbers]]), rotation_format, "here")
    assert caught.value.reason == "bad-rotation"
    assert "here" in str(caught.value)


def test_other_sizes_and_infinities_are_refused():
    with pytest.raises(SampleError) as caught:
        poses_from_numbers(np.zeros((2, 3)), np.zeros((2, 3)), "quat_xyzw", "here")
    assert caught.value.reason == "wrong-shape"
    with pytest.raises(SampleError, match="nan at row 1") as caught:
        poses_from_numbers(np.array([[0, 0, 0], [0, np.nan, 0]]), np.zeros((2, 3)), "rotvec", "here")
    assert caught.value.reason == "not-finite"


def test_frames_change_by_the_published_constants_or_by_the_pose_given():
    pose_world_tcp = pose7_to_matrix(np.array([[0.1, 0.2, 0.3, 0.5, 0.5, 0.5, 0.5]]))
    assert parse_config(PoseFrame, {"frame": "policy"}, "x").policy_poses("left", pose_world_tcp) is pose_world_tcp
    by_robot = parse_config(PoseFrame, {"frame": "tcp", "robot": "fr3"}, "x").policy_poses("left", pose_world_tcp)
    np.testing.assert_array_equal(by_robot, pose_world_tcp @ PolicyFrames.published("fr3").pose_tcp_policy("left"))
    pose7 = [0.0, 0.1, 0.2, 0.0, 1.0, 0.0, 0.0]
    given_poses = {"right": [0, 0, 0, 1, 0, 0, 0], "left": pose7}
    frame = parse_config(PoseFrame, {"frame": "tcp", "pose_tcp_policy": given_poses}, "x")
    expected = pose_world_tcp @ pose7_to_matrix(np.array(pose7))
    np.testing.assert_allclose(frame.policy_poses("left", pose_world_tcp), expected, atol=1e-15)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frame": "tcp"}, "either 'robot' or 'pose_tcp_policy'"),
        ({"frame": "policy", "robot": "ur5e"}, "'robot' must go"),
        ({"frame": "tcp", "pose_tcp_policy": {"right": [0, 0, 0, 1, 0, 0, 0]}}, "both arms"),
        (
            {"frame": "tcp", "pose_tcp_policy": {"right": [0, 0, 0, 1, 0, 0, 0], "left": [0, 0, 0, 1, 1, 0, 0]}},
            "unit quaternion",
        ),
    ],
)
def test_frames_that_contradict_themselves_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(PoseFrame, values, "mapping.yaml")


def test_widths_are_scaled_once_and_in_their_unit():
    numbers, time_s = np.array([0.0, 50.0, 100.0]), np.arange(3.0)
    policy = width_track(WidthUnits(scale=0.00088, unit="policy"), time_s, numbers, "x")
    real = width_track(WidthUnits(scale=0.001, offset=0.01, unit="real_m"), time_s, numbers, "x")
    np.testing.assert_allclose(policy.width, [0, 0.044, 0.088])
    np.testing.assert_allclose(real.width, [0.0088, 0.0528, 0.0968])
    assert policy.valid.all()
    assert not unmeasured_widths(time_s).valid.any()


def test_a_width_that_is_no_number_is_named():
    with pytest.raises(SampleError, match="nan at row 1") as caught:
        width_track(WidthUnits(unit="policy"), np.arange(3.0), np.array([0.0, np.nan, 80.0]), "topic /gripper")
    assert caught.value.reason == "not-finite"
    assert "topic /gripper" in str(caught.value)
