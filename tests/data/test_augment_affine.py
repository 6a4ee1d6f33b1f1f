"""The motion of each wrist image against scipy, its borders, and how it is drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from rdt2_data.augment import affine
from rdt2_data.augment.config import AffineConfig

HEIGHT, WIDTH = 24, 30
move = jax.jit(affine.move_halves)


@pytest.fixture(scope="module")
def wrists():
    """Smooth, as camera images are: the weights of neighbours are kept in 1/64 pixel."""
    rough = np.random.default_rng(0).uniform(0, 255, (2, 3, HEIGHT, WIDTH))
    return np.round(scipy.ndimage.gaussian_filter(rough, (0, 0, 2, 2)) * 16).astype(np.float32) / 16


def expected(image, shift_px, rotation_rad, scale):
    """One wrist image (3, H, W) by scipy, whose matrices take (row, column)."""
    cosine, sine = np.cos(rotation_rad) / scale, np.sin(rotation_rad) / scale
    matrix = np.array([[cosine, -sine], [sine, cosine]])
    centre = np.array([(HEIGHT - 1) / 2, (WIDTH - 1) / 2])
    offset = centre - matrix @ (centre + np.asarray(shift_px)[::-1])
    return np.stack(
        [scipy.ndimage.affine_transform(c.astype(float), matrix, offset, order=1, mode="grid-constant") for c in image]
    )


@pytest.mark.parametrize(
    ("shift_px", "rotation_deg", "scale"),
    [
        ([[2.5, -1.25], [0.0, 3.0]], [0.0, 0.0], [1.0, 1.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [2.0, -30.0], [1.0, 1.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0], [0.98, 1.5]),
        ([[0.5, -0.25], [-0.375, 4.0]], [-2.0, 90.0], [1.02, 0.75]),
    ],
)
def test_against_scipy(wrists, shift_px, rotation_deg, scale):
    rotation_rad = np.radians(rotation_deg)
    found = move(wrists, affine.affine_motion(np.array(shift_px), rotation_rad, np.array(scale)))
    for half in range(2):
        reference = expected(wrists[half], shift_px[half], rotation_rad[half], scale[half])
        difference = np.abs(np.asarray(found[half]) - reference)
        assert difference[:, 2:-2, 2:-2].max() < 1.5
        assert difference.mean() < 0.4


def test_a_positive_shift_goes_right_and_down():
    image = np.zeros((2, 3, 9, 9), np.float32)
    image[:, :, 4, 4] = 255.0
    shift_px = np.array([[2, 0], [0, 3]])
    moved = np.asarray(move(image, affine.affine_motion(shift_px, np.zeros(2), np.ones(2))))
    assert (moved[0, 0, 4, 6], moved[1, 0, 7, 4]) == (255.0, 255.0)
    assert moved.sum() == image.sum()


def test_a_positive_rotation_goes_from_right_to_down():
    image = np.zeros((2, 3, 9, 9), np.float32)
    image[:, :, 4, 7] = 255.0
    moved = np.asarray(move(image, affine.affine_motion(np.zeros((2, 2)), np.full(2, np.pi / 2), np.ones(2))))
    np.testing.assert_array_equal(moved[:, :, 7, 4], 255.0)


def test_black_comes_in_and_the_identity_is_exact(wrists):
    white = jnp.full_like(wrists, 255.0)
    moved = np.asarray(move(white, affine.affine_motion(np.array([[5, 0], [0, -4]]), np.zeros(2), np.ones(2))))
    assert (moved[0, :, :, :5] == 0).all()
    assert (moved[0, :, :, 5:] == 255).all()
    assert (moved[1, :, -4:] == 0).all()
    still = affine.affine_motion(np.zeros((2, 2)), np.zeros(2), np.ones(2))
    np.testing.assert_array_equal(move(wrists, still), wrists)


def test_halves_never_mix(wrists):
    motion = affine.affine_motion(np.array([[6.5, 1], [-7.5, 2]]), np.array([0.4, -0.3]), np.array([1.3, 0.7]))
    painted = wrists.copy()
    painted[1] = 255.0
    np.testing.assert_array_equal(move(painted, motion)[0], move(wrists, motion)[0])


def test_largest_motion_of_the_largest_image_does_not_overflow():
    side = affine.MAX_SIDE_PX
    ramp = np.broadcast_to(np.linspace(0, 255, side, dtype=np.float32), (2, 3, side, side)).copy()
    motion = affine.affine_motion(np.full((2, 2), side / 2), np.full(2, np.pi / 4), np.full(2, 0.5))
    moved = np.asarray(move(jnp.round(jnp.asarray(ramp)), motion))
    # The centre comes from shift / scale away along the rotated diagonal: outside, so black. The far corner is inside.
    assert moved[0, 0, 0, 0] == 0
    assert moved[0, 0, -1, -1] > 0


def test_draws():
    config = AffineConfig()
    keys = jax.random.split(jax.random.key(2), 2000)
    draws = jax.jit(jax.vmap(lambda key: affine.draw_affine(key, config, 384, 384)))(keys)
    cosine, sine = np.asarray(draws.cosine) / 2**14, np.asarray(draws.sine) / 2**14
    shift_px = np.asarray(draws.shift) / 32
    moved = (sine != 0).any(1) | (shift_px != 0).any((1, 2)) | (cosine != 1).any(1)
    low, high = scipy.stats.binom.interval(1 - 1e-6, 2000, 0.5)
    assert low <= moved.sum() <= high
    assert ((sine != 0).any(1) & (shift_px != 0).all((1, 2))).sum() > 0.95 * moved.sum(), "all or nothing"
    assert 7.5 < np.abs(shift_px).max() <= 7.69
    angle_deg, scale = np.degrees(np.arctan2(sine, cosine)), 1 / np.hypot(sine, cosine)
    assert 1.98 < np.abs(angle_deg).max() < 2.01
    assert abs(scale[moved].min() - 0.98) < 5e-4
    assert abs(scale[moved].max() - 1.02) < 5e-4
    for drawn in (angle_deg, scale, shift_px[..., 0]):
        assert abs(np.corrcoef(drawn[moved, 0], drawn[moved, 1])[0, 1]) < 0.17, "each wrist image on its own"
