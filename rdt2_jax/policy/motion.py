"""What a chunk does, arm by arm, in millimetres and degrees: for reports and pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rdt2_jax.actions.layout import POSITION, ROT6D, WIDTH, ArmName, arm_slice
from rdt2_jax.actions.rotations import matrix_to_rotvec, rot6d_to_matrix
from rdt2_jax.actions.types import ActionChunk


@dataclass(frozen=True, eq=False)
class ArmMotion:
    """One arm's part of a chunk in the POLICY frame, relative to its own pose at the anchor time.

    Attributes:
        times_s: (25,) after the anchor time; the first is the anchor itself.
        positions_mm: (25, 3), the first zero.
        rotations: (25, 3, 3) matrices, the first the identity.
        widths_mm: (24,) gripper widths, thousandths of policy units; at the anchor time none is known.
    """

    times_s: np.ndarray
    positions_mm: np.ndarray
    rotations: np.ndarray
    widths_mm: np.ndarray

    @property
    def distances_mm(self) -> np.ndarray:
        """(25,) distances from the start."""
        return np.linalg.norm(self.positions_mm, axis=-1)

    @property
    def angles_deg(self) -> np.ndarray:
        """(25,) angles by which the arm has turned since the start."""
        return np.degrees(np.linalg.norm(matrix_to_rotvec(self.rotations), axis=-1))

    def summary(self) -> dict[str, float]:
        """In a few numbers: the motion at its end and at its most, the gripper's first and last width."""
        return {
            "moved_mm": float(self.distances_mm[-1]),
            "farthest_mm": float(self.distances_mm.max()),
            "turned_deg": float(self.angles_deg[-1]),
            "most_turned_deg": float(self.angles_deg.max()),
            "width_from_mm": float(self.widths_mm[0]),
            "width_to_mm": float(self.widths_mm[-1]),
        }


def arm_motion(chunk: ActionChunk, arm: ArmName) -> ArmMotion:
    """One arm's motion; the anchor pose is put before the first action."""
    actions = chunk.actions.astype(np.float64)[:, arm_slice(arm)]
    return ArmMotion(
        times_s=np.arange(len(actions) + 1) / chunk.fps,
        positions_mm=np.concatenate([np.zeros((1, 3)), 1e3 * actions[:, POSITION]]),
        rotations=np.concatenate([np.eye(3)[None], rot6d_to_matrix(actions[:, ROT6D])]),
        widths_mm=1e3 * actions[:, WIDTH][:, 0],
    )
