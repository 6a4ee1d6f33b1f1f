"""How the twenty numbers of an action frame are laid out.

One frame is the RIGHT arm, then the LEFT arm; each arm is position xyz [m], rot6d (first two columns of the
rotation matrix, column after column), gripper width [policy units, 0 to 0.088]. A chunk is 24 frames at
30 Hz.
Source: the RDT2 paper (arXiv 2602.03310) and its public code, where robot0 and camera0 are the right arm.
"""

from __future__ import annotations

from typing import Literal

ArmName = Literal["right", "left"]

ARM_NAMES: tuple[ArmName, ...] = ("right", "left")
"""Order of the arms inside an action frame."""

CAMERA_NAMES = ("left_wrist", "right_wrist")
"""Order of the wrist images inside the composite picture, left to right: the reverse of the arms."""

CHUNK_LENGTH = 24
ACTION_RATE_HZ = 30.0
ARM_ACTION_DIM = 10
ACTION_DIM = 20
STATE_DIM = 20

MAX_POLICY_WIDTH = 0.088
"""Gripper width, in policy units, of a fully open policy gripper."""

POSITION = slice(0, 3)
ROT6D = slice(3, 9)
WIDTH = slice(9, 10)
"""Slices inside the ten numbers of one arm."""

GroupName = Literal["pos", "rot", "grip"]

GROUP_NAMES: tuple[GroupName, ...] = ("pos", "rot", "grip")
"""Order in which the channel groups are tokenized."""

GROUP_CHANNELS: dict[GroupName, tuple[int, ...]] = {
    "pos": (0, 1, 2, 10, 11, 12),
    "rot": (3, 4, 5, 6, 7, 8, 13, 14, 15, 16, 17, 18),
    "grip": (9, 19),
}
"""Channels of an action frame that belong to positions, rotations and widths of both arms."""


def arm_slice(arm: ArmName) -> slice:
    """The ten channels of one arm inside an action frame."""
    start = ARM_NAMES.index(arm) * ARM_ACTION_DIM
    return slice(start, start + ARM_ACTION_DIM)
