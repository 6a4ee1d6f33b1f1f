"""The fisheye camera model, and where a wrist camera sits on the hand.

Model: Kannala and Brandt, "A generic camera model and calibration method for conventional, wide-angle, and fish-eye
lenses", IEEE PAMI 28(8), 2006, in the convention of OpenCV's fisheye module. A ray at angle theta from the optical axis
meets the image at distance r(theta) = theta (1 + k1 theta^2 + k2 theta^4 + k3 theta^6 + k4 theta^8) from the principal
point, before the scaling by fx and fy. With k1 = ... = k4 = 0 the lens is equidistant, r = theta.

Camera frame: z forward along the optical axis, x right, y down. Pixels: (u, v) = (column, row), with the centre of the
upper left pixel at (0, 0). Needs numpy alone.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import pydantic

from rdt2_jax.actions.arrays import require_trailing_shape
from rdt2_jax.actions.poses import invert, make_pose, transform_points
from rdt2_jax.actions.rotations import quaternion_to_matrix
from rdt2_jax.config import FrozenConfig, PositiveInt
from rdt2_jax.errors import DataError

Focal = Annotated[float, pydantic.Field(gt=0)]
Vector3 = tuple[float, float, float]

ROTATION_TOLERANCE = 1e-4
"""How far a rotation in a file may be from a true one: such files carry few digits. It is then made exact."""

_MAX_ITERATIONS = 60
_EDGE = 1e-12
"""Relative slack at the image circle, so that a point projected onto it is found again."""


class FisheyeCamera(FrozenConfig):
    """Intrinsics of one camera.

    Attributes:
        width, height: of the image [pixels].
        fx, fy: pixels per radian on the optical axis, across and down.
        cx, cy: principal point [pixels], (0, 0) being the centre of the upper left pixel.
        k1, k2, k3, k4: how the lens departs from equidistant.
        max_angle_rad: largest angle from the optical axis that the lens lets through, in (0, pi). r must grow up to it.
    """

    width: PositiveInt
    height: PositiveInt
    fx: Focal
    fy: Focal
    cx: float
    cy: float
    k1: float = 0.0
    k2: float = 0.0
    k3: float = 0.0
    k4: float = 0.0
    max_angle_rad: Annotated[float, pydantic.Field(gt=0, lt=math.pi)]

    @pydantic.model_validator(mode="after")
    def _radius_grows(self) -> FisheyeCamera:
        # dr/dtheta is a polynomial in theta^2 that starts at 1: it stays positive until its first real root
        roots = np.roots([9 * self.k4, 7 * self.k3, 5 * self.k2, 3 * self.k1, 1.0])
        real = roots.real[np.abs(roots.imag) < 1e-9]
        turning = real[(real > 0) & (real <= self.max_angle_rad**2)]
        if turning.size:
            angle = math.sqrt(turning.min())
            raise ValueError(f"with k1 to k4 the radius stops growing at {angle:.4f} rad, before max_angle_rad")
        return self

    def radius(self, angle_rad: np.ndarray) -> np.ndarray:
        """r(theta), dimensionless, for angles (...) from the optical axis [rad]."""
        angle = np.asarray(angle_rad, np.float64)
        square = angle * angle
        return angle * (1 + square * (self.k1 + square * (self.k2 + square * (self.k3 + square * self.k4))))

    def project(self, points_camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points appear in the image.

        Args:
            points_camera: (..., 3), camera frame [m].

        Returns:
            pixels (..., 2) float64 (column, row), NaN beyond `max_angle_rad` and for the centre of the camera itself;
            visible (...) bool: within that angle and inside the image.

        Raises:
            DataError: the last axis is not 3 long.
        """
        points = np.asarray(points_camera, np.float64)
        require_trailing_shape(points, (3,), "points_camera")
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        across = np.hypot(x, y)
        angle = np.arctan2(across, z)
        seen = (angle <= self.max_angle_rad * (1 + _EDGE)) & ((across > 0) | (z > 0))
        radius = self.radius(angle)
        on_axis = across == 0
        per_metre = np.where(on_axis, 0.0, radius / np.where(on_axis, 1.0, across))
        u = np.where(seen, self.fx * per_metre * x + self.cx, np.nan)
        v = np.where(seen, self.fy * per_metre * y + self.cy, np.nan)
        with np.errstate(invalid="ignore"):  # NaN lies nowhere inside
            inside = (u >= -0.5) & (u < self.width - 0.5) & (v >= -0.5) & (v < self.height - 0.5)
        return np.stack([u, v], axis=-1), seen & inside

    def unproject(self, pixels: np.ndarray) -> np.ndarray:
        """The rays that pixels look along; the inverse of `project`.

        Args:
            pixels: (..., 2), (column, row); also between pixels and outside of the image.

        Returns:
            unit vectors (..., 3) float64, camera frame; NaN outside of the image circle, where the lens shows nothing.

        Raises:
            DataError: the last axis is not 2 long.
        """
        pixels = np.asarray(pixels, np.float64)
        require_trailing_shape(pixels, (2,), "pixels")
        x, y = (pixels[..., 0] - self.cx) / self.fx, (pixels[..., 1] - self.cy) / self.fy
        radius = np.hypot(x, y)
        angle = self._angle(radius)
        sine_per_radius = np.where(radius > 0, np.sin(angle) / np.where(radius > 0, radius, 1.0), 1.0)
        rays = np.stack([sine_per_radius * x, sine_per_radius * y, np.cos(angle)], axis=-1)
        return np.where(np.isfinite(angle)[..., None], rays, np.nan)

    def cropped_and_resized(
        self, *, rows: tuple[int, int], columns: tuple[int, int], width: int, height: int
    ) -> FisheyeCamera:
        """The camera of an image that was cut out of this one and then resized.

        Args:
            rows, columns: half-open ranges that are kept, of this image.
            width, height: of the result.

        Raises:
            DataError: an empty range.
        """
        if not (rows[0] < rows[1] and columns[0] < columns[1]):
            raise DataError("nothing is left of the image", where="crop", found=f"rows {rows}, columns {columns}")
        across, down = width / (columns[1] - columns[0]), height / (rows[1] - rows[0])
        changed = {
            "width": width,
            "height": height,
            "fx": self.fx * across,
            "fy": self.fy * down,
            # pixel centres lie half a pixel inside the edges, and it is the edges that are scaled
            "cx": (self.cx + 0.5 - columns[0]) * across - 0.5,
            "cy": (self.cy + 0.5 - rows[0]) * down - 0.5,
        }
        return FisheyeCamera(**{**self.model_dump(), **changed})

    def _angle(self, radius: np.ndarray) -> np.ndarray:
        """Inverse of `radius` on [0, max_angle_rad], NaN beyond: Newton's method, kept inside a shrinking bracket."""
        largest = self.radius(np.asarray(self.max_angle_rad))
        target = np.where(radius <= largest * (1 + _EDGE), np.minimum(radius, largest), 0.0)
        low, high = np.zeros_like(target), np.full_like(target, self.max_angle_rad)
        angle = np.minimum(target, high)
        for _ in range(_MAX_ITERATIONS):
            error = self.radius(angle) - target
            low, high = np.where(error <= 0, angle, low), np.where(error >= 0, angle, high)
            newton = angle - error / self._slope(angle)
            following = np.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
            done = np.all(np.abs(following - angle) <= 4e-16 * self.max_angle_rad)
            angle = following
            if done:
                break
        return np.where(radius <= largest * (1 + _EDGE), angle, np.nan)

    def _slope(self, angle: np.ndarray) -> np.ndarray:
        square = angle * angle
        return 1 + square * (3 * self.k1 + square * (5 * self.k2 + square * (7 * self.k3 + square * 9 * self.k4)))


class RigidPose(FrozenConfig):
    """A pose in a file: a position, and a rotation as a quaternion or as a matrix.

    Attributes:
        position_m: origin of the inner frame, in the outer frame [m].
        quaternion_wxyz: unit quaternion, or None.
        matrix: rows of a rotation matrix, or None.
    """

    position_m: Vector3
    quaternion_wxyz: tuple[float, float, float, float] | None = None
    matrix: tuple[Vector3, Vector3, Vector3] | None = None

    @pydantic.model_validator(mode="after")
    def _one_rotation(self) -> RigidPose:
        if (self.quaternion_wxyz is None) == (self.matrix is None):
            raise ValueError("give a rotation: quaternion_wxyz or matrix, one of them")
        if self.quaternion_wxyz is not None:
            norm = float(np.linalg.norm(self.quaternion_wxyz))
            if abs(norm - 1) > ROTATION_TOLERANCE:
                raise ValueError(f"a rotation needs a quaternion of norm 1, not {norm:.6f}")
        else:
            matrix = np.array(self.matrix)
            error = float(np.abs(matrix.T @ matrix - np.eye(3)).max())
            if error > ROTATION_TOLERANCE or np.linalg.det(matrix) < 0:
                raise ValueError(f"the matrix is no rotation: R^T R differs from 1 by {error:.6f}, or it mirrors")
        return self

    def pose(self) -> np.ndarray:
        """The transform (4, 4) float64 from the inner frame to the outer one, its rotation exactly orthonormal."""
        if self.quaternion_wxyz is not None:
            quaternion = np.array(self.quaternion_wxyz)
            rotation = quaternion_to_matrix(quaternion / np.linalg.norm(quaternion))
        else:
            u, _, vt = np.linalg.svd(np.array(self.matrix))
            rotation = u @ vt
        return np.asarray(make_pose(rotation, np.array(self.position_m)))


class WristCameraConfig(FrozenConfig):
    """One wrist camera: its lens, and where it sits.

    Attributes:
        source: "calibrated" when the numbers were measured on this camera, "assumed" when they are a guess.
        intrinsics: of the image that the policy sees.
        pose_policy_camera: the camera's frame in the hand's policy frame (z forward, out of the gripper).
    """

    source: Literal["assumed", "calibrated"]
    intrinsics: FisheyeCamera
    pose_policy_camera: RigidPose

    def project(self, points_policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `FisheyeCamera.project`, for points (..., 3) in the policy frame of the camera's hand [m]."""
        points = np.asarray(points_policy, np.float64)
        require_trailing_shape(points, (3,), "points_policy")
        return self.intrinsics.project(np.asarray(transform_points(invert(self.pose_policy_camera.pose()), points)))
