"""The picture of a chunk, and the numbers in it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rdt2_jax.actions.layout import arm_slice
from rdt2_jax.actions.rotations import matrix_to_rot6d, rotvec_to_matrix
from rdt2_jax.actions.types import ActionChunk
from rdt2_jax.errors import DataError, Rdt2Error
from rdt2_jax.policy.motion import arm_motion
from rdt2_jax.policy.plot import plot_chunk


def make_chunk(actions: np.ndarray) -> ActionChunk:
    return ActionChunk(
        actions=actions.astype(np.float32),
        anchor_time_s={"right": 1.0, "left": 1.01},
        capture_time_s={"right_wrist": 1.0, "left_wrist": 1.01},
        observation_id="seen",
    )


def still() -> np.ndarray:
    actions = np.zeros((24, 20))
    actions[:, [3, 7, 13, 17]] = 1
    return actions


def moving() -> np.ndarray:
    """Right: 48 mm along y and 24 degrees about z, closing. Left: there and back along x, open."""
    share = np.arange(1, 25) / 24
    actions = still()
    actions[:, 1] = 0.048 * share
    actions[:, 3:9] = matrix_to_rot6d(rotvec_to_matrix(np.radians(24) * share[:, None] * np.array([0, 0, 1.0])))
    actions[:, 9] = 0.08 * (1 - share)
    actions[:, 10] = 0.03 * np.sin(np.pi * share)
    actions[:, 19] = 0.088
    return actions


def test_motion_of_each_arm():
    right, left = (arm_motion(make_chunk(moving()), arm) for arm in ("right", "left"))
    assert right.times_s[[0, -1]] == pytest.approx([0, 0.8])
    np.testing.assert_allclose(right.positions_mm[:, 1], 2 * np.arange(25), atol=1e-4)
    np.testing.assert_allclose(right.angles_deg, np.arange(25), atol=1e-4)
    np.testing.assert_array_equal(right.rotations[0], np.eye(3))
    assert right.summary() == pytest.approx(
        {
            "moved_mm": 48,
            "farthest_mm": 48,
            "turned_deg": 24,
            "most_turned_deg": 24,
            "width_from_mm": 80 * 23 / 24,
            "width_to_mm": 0,
        },
        abs=1e-4,
    )
    assert left.summary() == pytest.approx(
        {
            "moved_mm": 0,
            "farthest_mm": 30,
            "turned_deg": 0,
            "most_turned_deg": 0,
            "width_from_mm": 88,
            "width_to_mm": 88,
        },
        abs=1e-4,
    )
    # the layout of the arms comes from the action space
    assert arm_slice("right") == slice(0, 10)


def colored(path, box=None) -> int:
    """Pixels that are neither white nor grey."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").crop(box) if box else image.convert("RGB")).astype(int)
    return int((np.ptp(pixels, axis=-1) > 60).sum())


def test_picture(tmp_path):
    path = tmp_path / "chunk.png"
    plot_chunk(make_chunk(moving()), path, instruction="Pick up the $5 and $6 coins.", source="policy fm")
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
    assert width > 1000
    # both paths above, the three curves below
    for box in (
        (0, 0, width // 2, 2 * height // 3),
        (width // 2, 0, width, 2 * height // 3),
        *((i * width // 3, 2 * height // 3, (i + 1) * width // 3, height) for i in range(3)),
    ):
        assert colored(path, box) > 300, box
    # the same chunk gives the same picture, another one another
    plot_chunk(make_chunk(moving()), tmp_path / "b.PNG", instruction="Pick up the $5 and $6 coins.", source="policy fm")
    assert path.read_bytes() == (tmp_path / "b.PNG").read_bytes()
    plot_chunk(make_chunk(still()), tmp_path / "still.png", instruction="x" * 500)
    assert path.read_bytes() != (tmp_path / "still.png").read_bytes()


def test_where_it_cannot_go(tmp_path):
    with pytest.raises(DataError, match=r"written as PNG(?s:.*)chunk\.jpg"):
        plot_chunk(make_chunk(still()), tmp_path / "chunk.jpg")
    with pytest.raises(Rdt2Error, match="folder to write into does not exist"):
        plot_chunk(make_chunk(still()), tmp_path / "absent" / "chunk.png")
    assert list(tmp_path.iterdir()) == []
