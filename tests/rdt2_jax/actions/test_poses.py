"""Rigid transforms: group axioms, short forms, sequences, and parity with the public code."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from rdt2_jax.actions import poses as p
from rdt2_jax.actions.rotations import rotvec_to_matrix
from rdt2_jax.errors import DataError

seeds = st.integers(0, 2**32 - 1)


def random_poses(seed: int, *shape: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    count = int(np.prod(shape))
    rotations = Rotation.random(count, rng=random).as_matrix()
    return p.make_pose(rotations, random.normal(size=(count, 3))).reshape(*shape, 4, 4)


@given(seeds)
def test_poses_form_a_group(seed: int) -> None:
    a, b, c = random_poses(seed, 3, 5)
    identity = np.broadcast_to(np.eye(4), a.shape)
    np.testing.assert_allclose(p.compose(p.compose(a, b), c), p.compose(a, p.compose(b, c)), atol=1e-13)
    np.testing.assert_allclose(p.compose(a, p.invert(a)), identity, atol=1e-14)
    np.testing.assert_allclose(p.compose(p.invert(a), a), identity, atol=1e-14)
    np.testing.assert_allclose(p.invert(a), np.linalg.inv(a), atol=1e-13)
    np.testing.assert_allclose(p.invert(p.compose(a, b)), p.compose(p.invert(b), p.invert(a)), atol=1e-13)
    np.testing.assert_array_equal(p.compose(a, np.eye(4)), a)


@given(seeds)
def test_points_follow_the_frames(seed: int) -> None:
    pose_a_b, pose_b_c = random_poses(seed, 2)
    points_c = np.random.default_rng(seed).normal(size=(7, 3))
    points_a = p.transform_points(pose_a_b, p.transform_points(pose_b_c, points_c))
    np.testing.assert_allclose(points_a, p.transform_points(p.compose(pose_a_b, pose_b_c), points_c), atol=1e-13)
    homogeneous = np.concatenate([points_c, np.ones((7, 1))], axis=-1) @ pose_b_c.T
    np.testing.assert_allclose(p.transform_points(pose_b_c, points_c), homogeneous[:, :3], atol=1e-13)


@given(seeds)
def test_conjugation_is_the_same_motion_of_another_frame(seed: int) -> None:
    pose_w_b0, pose_w_b1, pose_c_b = random_poses(seed, 3)
    motion_b = p.compose(p.invert(pose_w_b0), pose_w_b1)
    pose_w_c0, pose_w_c1 = (p.compose(pose, p.invert(pose_c_b)) for pose in (pose_w_b0, pose_w_b1))
    motion_c = p.compose(p.invert(pose_w_c0), pose_w_c1)
    np.testing.assert_allclose(p.conjugate(motion_b, pose_c_b), motion_c, atol=1e-12)
    np.testing.assert_allclose(p.conjugate(motion_c, p.invert(pose_c_b)), motion_b, atol=1e-12)


@pytest.mark.parametrize(
    ("to_short", "to_matrix", "size"),
    [
        (p.matrix_to_pose9d, p.pose9d_to_matrix, 9),
        (p.matrix_to_pose6, p.pose6_to_matrix, 6),
        (p.matrix_to_pose7, p.pose7_to_matrix, 7),
    ],
)
def test_short_forms_come_back(to_short: Callable, to_matrix: Callable, size: int) -> None:
    poses = random_poses(0, 4, 6)
    short = to_short(poses)
    assert short.shape == (4, 6, size)
    np.testing.assert_array_equal(short[..., :3], poses[..., :3, 3])
    np.testing.assert_allclose(to_matrix(short), poses, atol=1e-14)
    assert to_matrix(short.astype(np.float32)).dtype == np.float32
    for wrong in (size - 1, size + 1):
        with pytest.raises(DataError, match=f"pose{size}d? has the wrong shape"):
            to_matrix(np.zeros((4, wrong)))


def test_pose7_is_scalar_first() -> None:
    quarter_about_z = [1.0, 2.0, 3.0, np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5)]
    expected = [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(p.pose7_to_matrix(quarter_about_z), expected, atol=1e-15)


@given(seeds)
def test_sequences_come_back(seed: int) -> None:
    base, chunk = random_poses(seed, 3), random_poses(seed + 1, 3, 24)
    for forward, backward in (
        (p.absolute_to_relative, p.relative_to_absolute),
        (p.absolute_to_delta, p.delta_to_absolute),
    ):
        np.testing.assert_allclose(backward(base, forward(base, chunk)), chunk, atol=1e-12)
        np.testing.assert_allclose(forward(base, backward(base, chunk)), chunk, atol=1e-12)


def test_relative_poses_do_not_depend_on_the_world() -> None:
    base, world, chunk = random_poses(0), random_poses(1), random_poses(2, 24)
    moved = p.absolute_to_relative(p.compose(world, base), p.compose(world, chunk))
    np.testing.assert_allclose(moved, p.absolute_to_relative(base, chunk), atol=1e-13)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 24])
def test_deltas_add_up_one_by_one(length: int) -> None:
    base, deltas = random_poses(0, 2), random_poses(1, 2, length)
    rotation, position = base[:, :3, :3], base[:, :3, 3]
    for t, pose in enumerate(np.moveaxis(p.delta_to_absolute(base, deltas), 1, 0)):
        rotation, position = deltas[:, t, :3, :3] @ rotation, position + deltas[:, t, :3, 3]
        np.testing.assert_allclose(pose, p.make_pose(rotation, position), atol=1e-13)


def test_one_base_serves_many_chunks_and_the_other_way() -> None:
    base, chunks = random_poses(0), random_poses(1, 5, 24)
    for function in (p.absolute_to_relative, p.relative_to_absolute, p.absolute_to_delta, p.delta_to_absolute):
        together = function(base, chunks)
        np.testing.assert_allclose(together[3], function(base, chunks[3]), atol=1e-14)
        bases = random_poses(2, 5)
        np.testing.assert_allclose(function(bases, chunks[0])[4], function(bases[4], chunks[0]), atol=1e-14)


def test_parity_of_matrices_with_the_public_code(golden) -> None:
    pose = golden("pose", "pose.npz")
    np.testing.assert_allclose(p.pose6_to_matrix(pose["pose6"]), pose["mat"], atol=1e-10)
    back = p.pose6_to_matrix(p.matrix_to_pose6(pose["mat"]))
    np.testing.assert_allclose(back, p.pose6_to_matrix(pose["pose6_back"]), atol=1e-9)
    np.testing.assert_allclose(p.matrix_to_pose9d(pose["mat"]), pose["pose9"], atol=1e-10)
    np.testing.assert_allclose(p.pose9d_to_matrix(pose["pose9"]), pose["mat_from_pose9"], atol=1e-10)
    single = p.pose6_to_matrix(pose["pose6"].astype(np.float32))
    np.testing.assert_allclose(single, pose["mat_from_f32_pose"], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("relative", p.absolute_to_relative, p.relative_to_absolute),
        ("delta", p.absolute_to_delta, p.delta_to_absolute),
        ("abs", lambda _, chunk: chunk, lambda _, chunk: chunk),
    ],
)
def test_parity_of_sequences_with_the_public_code(golden, name: str, forward: Callable, backward: Callable) -> None:
    pose = golden("pose", "pose.npz")
    chunk = pose["rep_chunk"]
    relative = forward(pose["rep_base_forward"], chunk)
    np.testing.assert_allclose(relative, pose[f"rep_{name}_forward"], atol=1e-10)
    np.testing.assert_allclose(backward(pose["rep_base_backward"], chunk), pose[f"rep_{name}_backward"], atol=1e-10)
    again = backward(pose["rep_base_forward"], relative)
    np.testing.assert_allclose(again, pose[f"rep_{name}_backward_of_forward"], atol=1e-10)


def test_parity_of_relative_poses_in_float32(golden) -> None:
    pose = golden("pose", "pose.npz")
    single = p.absolute_to_relative(pose["rep_base_forward"].astype(np.float32), pose["rep_chunk"].astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, pose["rep_relative_forward_f32"], atol=1e-6)


def test_parity_of_transforms_with_the_public_code(golden) -> None:
    pose = golden("pose", "pose.npz")
    moved = p.transform_pose(pose["tx"], pose["pose6"])
    np.testing.assert_allclose(p.pose6_to_matrix(moved), p.pose6_to_matrix(pose["transform_pose"]), atol=1e-9)
    np.testing.assert_allclose(p.transform_points(pose["tx"], pose["points"]), pose["transform_point"], atol=1e-10)
    added = p.apply_delta_pose(pose["pose6"], pose["delta_pose"])
    np.testing.assert_allclose(p.pose6_to_matrix(added), p.pose6_to_matrix(pose["apply_delta_pose"]), atol=1e-9)
    turned = p.rotation_between_directions(pose["from_vec"], pose["to_vec"])
    np.testing.assert_allclose(turned, rotvec_to_matrix(pose["rot_from_directions_rotvec"]), atol=1e-9)


@pytest.mark.parametrize("gap", [0.0, 1e-17, 1e-16, 1e-15, 1e-14, 1e-12, 1e-8, 1e-3])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["equal", "opposite"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_directions_that_are_almost_equal_or_opposite(gap: float, sign: float, dtype: type) -> None:
    random = np.random.default_rng(0)
    start = np.concatenate([np.eye(3), random.normal(size=(50, 3))]).astype(dtype)
    end = (sign * start + gap * random.normal(size=start.shape)).astype(dtype)
    rotation = p.rotation_between_directions(start, 5 * end)
    eps = np.finfo(dtype).eps
    assert rotation.dtype == dtype
    np.testing.assert_allclose(np.swapaxes(rotation, -1, -2) @ rotation, np.tile(np.eye(3), (53, 1, 1)), atol=8 * eps)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=16 * eps)
    start, end = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (start, end))
    np.testing.assert_allclose((rotation @ start[..., None])[..., 0], end, atol=16 * eps)


def test_a_zero_direction_gives_the_identity() -> None:
    zero, other = np.zeros(3), np.array([1.0, 2.0, 3.0])
    for start, end in ((zero, other), (other, zero), (zero, zero)):
        np.testing.assert_array_equal(p.rotation_between_directions(start, end), np.eye(3))


def everything(a, b, chunk, points):
    """Every function of the module, so that one compilation covers them all."""
    short = [f(a) for f in (p.matrix_to_pose9d, p.matrix_to_pose6, p.matrix_to_pose7)]
    wide = [f(x) for f, x in zip((p.pose9d_to_matrix, p.pose6_to_matrix, p.pose7_to_matrix), short, strict=True)]
    added = p.pose6_to_matrix(p.apply_delta_pose(short[1], p.matrix_to_pose6(b)))
    moved = p.pose6_to_matrix(p.transform_pose(a, p.matrix_to_pose6(b)))
    turned = p.rotation_between_directions(a[..., :3, 3], b[..., :3, 3])
    pairs = [p.compose(a, b), p.invert(a), p.conjugate(a, b), p.transform_points(a, points)]
    chunks = [
        f(a, chunk) for f in (p.absolute_to_relative, p.relative_to_absolute, p.absolute_to_delta, p.delta_to_absolute)
    ]
    return [*wide, added, moved, turned, *pairs, *chunks]


def test_numpy_and_jax_agree() -> None:
    inputs = (
        random_poses(0, 6),
        random_poses(1, 6),
        random_poses(2, 6, 24),
        np.random.default_rng(3).normal(size=(6, 3)),
    )
    expected = everything(*inputs)
    single = jax.eval_shape(everything, *(jnp.asarray(x, jnp.float32) for x in inputs))
    with jax.enable_x64(True):
        mapped = jax.jit(jax.vmap(everything))(*map(jnp.asarray, inputs))
    for index, value in enumerate(expected):
        assert isinstance(value, np.ndarray)
        assert (single[index].dtype, mapped[index].dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_allclose(mapped[index], value, atol=1e-12, err_msg=str(index))


def test_float32_stays_float32() -> None:
    inputs = (random_poses(0, 6), random_poses(1, 6), random_poses(2, 6, 24), np.zeros((6, 3)))
    assert {x.dtype for x in everything(*(x.astype(np.float32) for x in inputs))} == {np.dtype(np.float32)}


def test_gradients_are_finite_at_the_identity_and_at_half_turns() -> None:
    base = np.eye(4, dtype=np.float32)
    half = np.diag([1.0, -1.0, -1.0, 1.0]).astype(np.float32)

    def total(pose):
        both = [p.delta_to_absolute(pose, pose[None]), p.absolute_to_delta(pose, pose[None])]
        directions = p.rotation_between_directions(pose[:3, 0], jnp.array([1.0, 0.0, 0.0]))
        return sum(jnp.sum(x * x[..., ::-1]) for x in [*both, directions, p.matrix_to_pose6(pose)])

    gradients = jax.jit(jax.vmap(jax.grad(total)))(jnp.stack([base, half]))
    assert np.isfinite(gradients).all()


def test_nan_stays_nan() -> None:
    pose = np.eye(4)
    pose[0, 3] = np.nan
    assert np.isnan(p.matrix_to_pose9d(p.compose(np.eye(4), pose))[0])
    assert np.isnan(p.invert(pose)[0, 3])
    assert np.isnan(p.rotation_between_directions([np.nan, 0, 0], [1, 0, 0])).all()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="pose a has the wrong shape"):
        p.compose(np.zeros((4, 3)), np.eye(4))
    with pytest.raises(DataError, match="leading axes of pose a and pose b do not fit"):
        p.compose(random_poses(0, 2), random_poses(0, 3))
    with pytest.raises(DataError, match="leading axes of pose and points do not fit"):
        p.transform_points(random_poses(0, 2), np.zeros((3, 3)))
    with pytest.raises(DataError, match="leading axes of rotation and position do not fit"):
        p.make_pose(np.zeros((2, 3, 3)), np.zeros((3, 3)))
    with pytest.raises(DataError, match="needs a time axis"):
        p.absolute_to_relative(np.eye(4), np.eye(4))
    with pytest.raises(DataError, match="leading axes of base pose and pose chunk do not fit"):
        p.delta_to_absolute(random_poses(0, 2), random_poses(0, 3, 24))
    with pytest.raises(DataError, match="leading axes of pose6 and delta pose6 do not fit"):
        p.apply_delta_pose(np.zeros((2, 6)), np.zeros((3, 6)))
    with pytest.raises(DataError, match="end direction has the wrong shape"):
        p.rotation_between_directions(np.zeros(3), np.zeros(2))
