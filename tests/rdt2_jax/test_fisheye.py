"""The fisheye model: known values, the inverse, crops, and configurations that are refused."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt2_jax.actions.chunks import PolicyFrames
from rdt2_jax.config import load_config
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.fisheye import FisheyeCamera, RigidPose, WristCameraConfig

EQUIDISTANT = FisheyeCamera(width=384, height=384, fx=115.0, fy=117.0, cx=190.5, cy=193.25, max_angle_rad=1.66)
LENS = FisheyeCamera(
    width=640, height=480, fx=160.0, fy=158.0, cx=318.2, cy=241.7, k1=-0.021, k2=0.009, k3=-0.003, k4=0.0004,
    max_angle_rad=1.7,
)  # fmt: skip


def ray(angle: float, around: float) -> np.ndarray:
    """Unit vector at an angle from the axis, turned around it from x (right) towards y (down)."""
    return np.array([math.sin(angle) * math.cos(around), math.sin(angle) * math.sin(around), math.cos(angle)])


def test_an_equidistant_lens_maps_angles_to_distances():
    for angle in (0.1, 0.7, math.pi / 2, 1.65):
        pixels, _ = EQUIDISTANT.project(3.0 * np.stack([ray(angle, 0.0), ray(angle, math.pi / 2)]))
        np.testing.assert_allclose(pixels[0], [190.5 + 115.0 * angle, 193.25], rtol=0, atol=1e-11)
        np.testing.assert_allclose(pixels[1], [190.5, 193.25 + 117.0 * angle], rtol=0, atol=1e-11)


def test_axes_are_right_and_down_and_the_centre_is_where_the_axis_meets_the_image():
    pixels, visible = EQUIDISTANT.project(np.array([[0, 0, 2.0], [0.1, 0, 2.0], [0, 0.1, 2.0]]))
    assert visible.all()
    np.testing.assert_array_equal(pixels[0], [190.5, 193.25])
    assert pixels[1, 0] > pixels[0, 0]
    assert pixels[1, 1] == pixels[0, 1]
    assert pixels[2, 1] > pixels[0, 1]


def test_the_polynomial_is_that_of_the_source():
    """r(theta) summed term by term with rational numbers, apart from the Horner form of the code."""
    from fractions import Fraction

    angle = Fraction(5, 4)
    ks = [Fraction(LENS.k1), Fraction(LENS.k2), Fraction(LENS.k3), Fraction(LENS.k4)]
    expected = angle + sum((k * angle ** (2 * i + 3) for i, k in enumerate(ks)), Fraction(0))
    pixels, _ = LENS.project(ray(1.25, 0.3))
    np.testing.assert_allclose(LENS.radius(np.array(1.25)), float(expected), rtol=1e-15)
    aim = [318.2 + 160.0 * float(expected) * math.cos(0.3), 241.7 + 158.0 * float(expected) * math.sin(0.3)]
    np.testing.assert_allclose(pixels, aim, atol=1e-10)


@given(angle=st.floats(0, 1.7), around=st.floats(-math.pi, math.pi), distance=st.floats(1e-3, 1e3))
def test_unproject_inverts_project(angle, around, distance):
    direction = ray(angle, around)
    pixels, _ = LENS.project(distance * direction)
    np.testing.assert_allclose(LENS.unproject(pixels), direction, rtol=0, atol=1e-9)


def test_project_inverts_unproject_over_a_whole_image():
    u, v = np.meshgrid(np.linspace(-0.5, 639.5, 97), np.linspace(-0.5, 479.5, 61))
    pixels = np.stack([u, v], axis=-1)
    rays = LENS.unproject(pixels)
    inside = np.isfinite(rays[..., 0])
    assert 0.5 < inside.mean() < 1  # the image circle does not fill the corners
    np.testing.assert_allclose(np.linalg.norm(rays[inside], axis=-1), 1, atol=1e-14)
    np.testing.assert_allclose(LENS.project(rays[inside])[0], pixels[inside], rtol=0, atol=1e-9)


def test_what_cannot_be_seen_is_said_so():
    beyond = ray(EQUIDISTANT.max_angle_rad + 1e-3, 0.5)
    outside = ray(1.65, 0.0) * 2  # within the angle, but the image ends before it
    narrow = EQUIDISTANT.model_copy(update={"width": 300})
    pixels, visible = narrow.project(np.stack([beyond, outside, np.zeros(3), [0, 0, -1.0], [0, 0, 1.0]]))
    assert visible.tolist() == [False, False, False, False, True]
    assert np.isnan(pixels[[0, 2, 3]]).all()
    assert np.isfinite(pixels[1]).all()
    with pytest.raises(DataError, match="points_camera"):
        narrow.project(np.zeros((4, 2)))
    with pytest.raises(DataError, match="pixels"):
        narrow.unproject(np.zeros((4, 3)))


def test_crops_and_sizes_move_pixels_as_edges_do():
    whole = FisheyeCamera(width=1440, height=1080, fx=301.6, fy=301.6, cx=730.0, cy=560.0, max_angle_rad=1.6)
    policy = whole.cropped_and_resized(rows=(61, 1057), columns=(224, 1235), width=384, height=384)
    assert policy.fx != policy.fy
    point = ray(0.8, 2.1)
    (u, v), _ = whole.project(point)
    (small_u, small_v), _ = policy.project(point)
    np.testing.assert_allclose(small_u + 0.5, (u + 0.5 - 224) * 384 / 1011, atol=1e-10)
    np.testing.assert_allclose(small_v + 0.5, (v + 0.5 - 61) * 384 / 996, atol=1e-10)
    with pytest.raises(DataError, match="nothing is left"):
        whole.cropped_and_resized(rows=(5, 5), columns=(0, 10), width=4, height=4)


def test_a_lens_whose_radius_shrinks_is_refused():
    with pytest.raises(pydantic.ValidationError, match=r"stops growing at 1\.0541 rad"):
        EQUIDISTANT.model_validate({**EQUIDISTANT.model_dump(), "k1": -0.3})  # 1 - 0.9 theta^2


def test_the_shipped_camera_sees_the_fingertips_ahead_and_below_its_centre():
    camera = load_config(WristCameraConfig, "camera/wrist_fisheye_assumed.yaml")
    assert camera.source == "assumed"
    tip = np.linalg.inv(PolicyFrames.published("ur5e").pose_tcp_policy("right"))[:3, 3]
    pixels, visible = camera.project(tip)
    assert visible
    assert abs(pixels[0] - 191.5) < 1
    assert 200 < pixels[1] < 300


def test_poses_take_quaternions_and_matrices_alike():
    c = math.sqrt(0.5)
    by_quaternion = RigidPose(position_m=(1, 2, 3), quaternion_wxyz=(c, 0, 0, c)).pose()
    by_matrix = RigidPose(position_m=(1, 2, 3), matrix=((0, -1, 0), (1, 0, 0), (0, 0, 1))).pose()
    np.testing.assert_allclose(by_quaternion, by_matrix, atol=1e-12)
    np.testing.assert_allclose(by_matrix @ [1, 0, 0, 1], [1, 3, 3, 1], atol=1e-12)


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        ({}, "give a rotation"),
        ({"quaternion_wxyz": (1, 0, 0, 0), "matrix": ((1, 0, 0), (0, 1, 0), (0, 0, 1))}, "one of them"),
        ({"quaternion_wxyz": (1, 0, 0, 0.1)}, "norm 1"),
        ({"matrix": ((1, 0, 0), (0, 1, 0), (0, 0, -1))}, "mirrors"),
        ({"matrix": ((1, 0, 0), (0, 1.01, 0), (0, 0, 1))}, "no rotation"),
    ],
)
def test_poses_that_are_none_are_refused(rotation, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        RigidPose(position_m=(0, 0, 0), **rotation)


def test_a_misspelt_key_is_named(tmp_path):
    path = tmp_path / "camera.yaml"
    path.write_text("source: assumed\nintrinsic: {}\n")
    with pytest.raises(ConfigError, match="did you mean 'intrinsics'"):
        load_config(WristCameraConfig, path)


def test_importing_the_model_loads_no_jax():
    code = "import sys, rdt2_jax.fisheye; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
