"""The layout of an action frame: every channel belongs to exactly one arm, one group and one quantity."""

from __future__ import annotations

import numpy as np
import pytest

from rdt2_jax.actions import layout


def test_groups_split_the_channels() -> None:
    channels = sorted(channel for group in layout.GROUP_NAMES for channel in layout.GROUP_CHANNELS[group])
    assert channels == list(range(layout.ACTION_DIM))
    assert set(layout.GROUP_CHANNELS) == set(layout.GROUP_NAMES)


@pytest.mark.parametrize(("group", "part"), [("pos", layout.POSITION), ("rot", layout.ROT6D), ("grip", layout.WIDTH)])
def test_groups_are_the_slices_of_both_arms(group: layout.GroupName, part: slice) -> None:
    frame = np.arange(layout.ACTION_DIM)
    expected = np.concatenate([frame[layout.arm_slice(arm)][part] for arm in layout.ARM_NAMES])
    np.testing.assert_array_equal(layout.GROUP_CHANNELS[group], expected)


def test_the_right_arm_comes_first_and_the_left_camera_comes_first() -> None:
    assert layout.arm_slice("right") == slice(0, 10)
    assert layout.arm_slice("left") == slice(10, 20)
    assert layout.CAMERA_NAMES == ("left_wrist", "right_wrist")


def test_parts_fill_an_arm() -> None:
    arm = np.arange(layout.ARM_ACTION_DIM)
    parts = np.concatenate([arm[layout.POSITION], arm[layout.ROT6D], arm[layout.WIDTH]])
    np.testing.assert_array_equal(parts, arm)
    assert len(layout.ARM_NAMES) * layout.ARM_ACTION_DIM == layout.ACTION_DIM
