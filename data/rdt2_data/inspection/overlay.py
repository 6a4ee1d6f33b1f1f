"""The motion of a chunk drawn into the wrist images it belongs to.

What is drawn is the point between the fingertips, where the chunk says it will be, seen from the camera where it stands
now: the camera rides on the hand, so the path begins at the fingers in the picture and leads to where they go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdt2_jax.actions.chunks import PolicyFrames, chunk_to_poses
from rdt2_jax.actions.layout import ARM_NAMES, ArmName
from rdt2_jax.actions.poses import invert, transform_points
from rdt2_jax.actions.types import IMAGE_SHAPE
from rdt2_jax.errors import DataError
from rdt2_jax.fisheye import WristCameraConfig

TIME_COLOURS = ((0, 180, 255), (255, 225, 77), (255, 45, 85))
"""RGB at the start, the middle and the end of a chunk."""

CAMERA_OF_ARM: dict[ArmName, str] = {"left": "left_wrist", "right": "right_wrist"}

_SUPERSAMPLING = 3
_BAR_EVERY = 4
_BACKGROUND = (20, 20, 20)


@dataclass(frozen=True, eq=False)
class ProjectedPath:
    """The path of one arm's fingertips in its own wrist image, 25 points: now, then the 24 frames of the chunk.

    Attributes:
        middle: (25, 2) pixels of the point between the fingertips.
        jaws: (25, 2, 2) pixels of the two fingertips, as far apart as the gripper is open.
        visible: (25,) whether the middle lies in the picture.
        jaws_visible: (25,) whether both fingertips do.
    """

    middle: np.ndarray
    jaws: np.ndarray
    visible: np.ndarray
    jaws_visible: np.ndarray


def time_colour(share: float) -> tuple[int, int, int]:
    """Colour of a time between 0, the capture of the image, and 1, the end of the chunk."""
    stops = np.linspace(0, 1, len(TIME_COLOURS))
    channels = np.array(TIME_COLOURS, np.float64).T
    red, green, blue = (round(float(np.interp(share, stops, channel))) for channel in channels)
    return red, green, blue


def fingertips_policy_m() -> np.ndarray:
    """(3,) the point between the fingertips in the policy frame: the published TCP of the UR5e is that point."""
    return np.asarray(invert(PolicyFrames.published("ur5e").pose_tcp_policy("right")))[:3, 3]


def project_path(action: np.ndarray, arm: ArmName, camera: WristCameraConfig) -> ProjectedPath:
    """Where the fingertips of one arm go, in pixels of its own wrist image.

    Args:
        action: (24, 20), relative chunk in the policy frame.
        arm: whose.
        camera: lens and mount.
    """
    poses, widths = chunk_to_poses(action.astype(np.float64))
    pose_now_then = np.concatenate([np.eye(4)[None], np.asarray(poses[arm])])
    width = np.asarray(widths[arm])
    width = np.concatenate([width[:1], width])  # the chunk does not say how open the gripper is now
    tip = fingertips_policy_m()
    half = np.zeros((len(width), 2, 3))
    half[:, 0, 0], half[:, 1, 0] = -width / 2, width / 2  # jaws open along x
    middle, visible = camera.project(transform_points(pose_now_then, np.broadcast_to(tip, (len(width), 3))))
    jaws, jaws_visible = camera.project(transform_points(pose_now_then[:, None], tip + half))
    return ProjectedPath(middle, jaws, visible, np.all(jaws_visible, axis=-1))


def require_cameras(cameras: Mapping[str, WristCameraConfig]) -> None:
    """Raises DataError unless the camera of each wrist has the size of a wrist image."""
    for name in CAMERA_OF_ARM.values():
        size = (cameras[name].intrinsics.height, cameras[name].intrinsics.width)
        if size != IMAGE_SHAPE[:2]:
            expected, found = f"rows and columns {IMAGE_SHAPE[:2]}", str(size)
            raise DataError("a camera is not of these images", where=name, expected=expected, found=found)


def draw_paths(
    image: np.ndarray, action: np.ndarray, cameras: Mapping[str, WristCameraConfig]
) -> tuple[np.ndarray, dict[ArmName, int]]:
    """Draws the paths of both arms into a composite.

    Args:
        image: uint8 (384, 768, 3), RGB, left wrist | right wrist.
        action: (24, 20).
        cameras: by name, of the size of half the image.

    Returns:
        the picture, like `image`; and per arm how many of the 24 frames lie inside it.

    Raises:
        DataError: see `require_cameras`.
    """
    require_cameras(cameras)
    halves: list[np.ndarray] = []
    seen: dict[ArmName, int] = {}
    by_camera: dict[str, ArmName] = {CAMERA_OF_ARM[arm]: arm for arm in ARM_NAMES}
    for name, half in zip(("left_wrist", "right_wrist"), np.split(image, 2, axis=1), strict=True):
        camera, arm = cameras[name], by_camera[name]
        path = project_path(action, arm, camera)
        seen[arm] = int(path.visible[1:].sum())
        halves.append(_draw(half, path))
    return np.concatenate(halves, axis=1), seen


def _draw(image: np.ndarray, path: ProjectedPath) -> np.ndarray:
    """One wrist image with one path, drawn large and reduced, which smooths the lines."""
    from PIL import Image, ImageDraw

    rows, columns = image.shape[:2]
    large = Image.fromarray(np.ascontiguousarray(image)).resize(
        (columns * _SUPERSAMPLING, rows * _SUPERSAMPLING), Image.Resampling.BICUBIC
    )
    pen = _Pen(ImageDraw.Draw(large))
    last = len(path.visible) - 1
    for i in range(last):
        if path.visible[i] and path.visible[i + 1]:
            pen.line(path.middle[i : i + 2], _BACKGROUND, 5.0)
    for i in range(last):
        if path.visible[i] and path.visible[i + 1]:
            pen.line(path.middle[i : i + 2], time_colour((i + 0.5) / last), 3.0)
    for i in (*range(0, last, _BAR_EVERY), last):
        if path.jaws_visible[i]:
            pen.line(path.jaws[i], _BACKGROUND, 3.0)
            pen.line(path.jaws[i], time_colour(i / last), 1.6)
    if path.visible[0]:
        pen.dot(path.middle[0], 4.5, (255, 255, 255))
    if path.visible[last]:
        pen.dot(path.middle[last], 3.5, time_colour(1.0))
    return np.asarray(large.resize((columns, rows), Image.Resampling.LANCZOS))


class _Pen:
    """Draws in pixels of the small image onto the large one."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw

    def line(self, pixels: np.ndarray, colour: tuple[int, int, int], width: float) -> None:
        ends = [self._place(pixel) for pixel in pixels]
        self._draw.line(ends, fill=colour, width=round(width * _SUPERSAMPLING))

    def dot(self, pixel: np.ndarray, radius: float, colour: tuple[int, int, int]) -> None:
        x, y = self._place(pixel)
        reach = radius * _SUPERSAMPLING
        box = (x - reach, y - reach, x + reach, y + reach)
        self._draw.ellipse(box, fill=colour, outline=_BACKGROUND, width=_SUPERSAMPLING)

    @staticmethod
    def _place(pixel: np.ndarray) -> tuple[float, float]:
        x, y = (pixel + 0.5) * _SUPERSAMPLING - 0.5
        return float(x), float(y)
