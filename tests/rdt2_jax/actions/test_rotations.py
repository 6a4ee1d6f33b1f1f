"""Rotations: axioms, hard angles, parity with the public code, and the same numbers in numpy and jax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from rdt2_jax.actions import rotations as r
from rdt2_jax.errors import DataError

DEGENERATE_ROWS = slice(0, 9)
PARALLEL_ROW = 6
"""Rows of the golden `rot6d_raw`: the degenerate ones, and the one whose result is rounding noise."""

vectors = hnp.arrays(np.float64, (3,), elements=st.floats(-10.0, 10.0))
angles = st.floats(0.0, 1.0) | st.sampled_from([0.0, 1e-300, 1e-12, 1e-7, 1e-4, 1e-3])


def random_matrices(count: int, seed: int = 0) -> np.ndarray:
    return Rotation.random(count, rng=np.random.default_rng(seed)).as_matrix()


def axis_angle(axis: np.ndarray, angle: float) -> np.ndarray:
    return axis / np.linalg.norm(axis) * angle


HARD_ANGLES = [0.0, 1e-12, 1e-9, 1e-5, 1e-4, 1e-3, 1.0, 3.0, *(np.pi - 10.0 ** -np.arange(1, 13)), np.pi]


@given(vectors)
def test_rotation_vectors_give_the_rotations_of_scipy(rotvec: np.ndarray) -> None:
    np.testing.assert_allclose(r.rotvec_to_matrix(rotvec), Rotation.from_rotvec(rotvec).as_matrix(), atol=1e-14)


@given(vectors)
def test_round_trips_keep_the_rotation(rotvec: np.ndarray) -> None:
    matrix = r.rotvec_to_matrix(rotvec)
    for back in (
        r.rot6d_to_matrix(r.matrix_to_rot6d(matrix)),
        r.rotvec_to_matrix(r.matrix_to_rotvec(matrix)),
        r.quaternion_to_matrix(r.matrix_to_quaternion(matrix)),
        r.rotvec_to_matrix(r.quaternion_to_rotvec(r.rotvec_to_quaternion(rotvec))),
    ):
        np.testing.assert_allclose(back, matrix, atol=1e-14)


@given(hnp.arrays(np.float64, (6,), elements=st.floats(-10.0, 10.0)))
def test_rot6d_gives_a_rotation_with_the_first_direction_kept(rot6d: np.ndarray) -> None:
    sine = np.linalg.norm(np.cross(rot6d[:3], rot6d[3:]))
    if sine < 1e-3:
        return
    matrix = r.rot6d_to_matrix(rot6d)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0, atol=1e-9)
    np.testing.assert_allclose(matrix[:, 0] * np.linalg.norm(rot6d[:3]), rot6d[:3], atol=1e-12)
    assert matrix[:, 1] @ rot6d[3:] > 0


def test_rot6d_is_two_columns_not_rows() -> None:
    matrix = random_matrices(1)[0]
    np.testing.assert_array_equal(r.matrix_to_rot6d(matrix), np.concatenate([matrix[:, 0], matrix[:, 1]]))


@pytest.mark.parametrize("angle", HARD_ANGLES)
def test_hard_angles_come_back(angle: float) -> None:
    axes = np.random.default_rng(1).normal(size=(50, 3))
    rotvecs = np.stack([axis_angle(axis, angle) for axis in axes])
    back = r.matrix_to_rotvec(r.rotvec_to_matrix(rotvecs))
    if angle < np.pi - 1e-13:
        np.testing.assert_allclose(back, rotvecs, atol=2e-15 + 1e-15 * angle, rtol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(back, axis=-1), angle, atol=4e-15)
    np.testing.assert_allclose(r.rotvec_to_matrix(back), r.rotvec_to_matrix(rotvecs), atol=1e-14)
    assert (np.linalg.norm(back, axis=-1) <= np.pi + 1e-15).all()


@pytest.mark.parametrize("angle", HARD_ANGLES)
def test_hard_angles_in_float32(angle: float) -> None:
    rotvecs = np.stack([axis_angle(axis, angle) for axis in np.random.default_rng(1).normal(size=(50, 3))])
    exact = Rotation.from_rotvec(rotvecs).as_matrix()
    back = r.rotvec_to_matrix(r.matrix_to_rotvec(exact.astype(np.float32)))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, exact, atol=1e-6)


@pytest.mark.parametrize("axis", np.vstack([np.eye(3), -np.eye(3), [[1, 1, 0], [0, -1, 1], [1, -1, 1]]]))
def test_half_turns_about_plain_axes(axis: np.ndarray) -> None:
    rotvec = axis_angle(axis, np.pi)
    matrix = Rotation.from_rotvec(rotvec).as_matrix()
    np.testing.assert_allclose(r.rotvec_to_matrix(r.matrix_to_rotvec(matrix)), matrix, atol=1e-15)
    np.testing.assert_allclose(np.abs(r.matrix_to_rotvec(matrix)), np.abs(rotvec), atol=1e-15)


def test_quaternions_are_scalar_first_with_a_positive_scalar() -> None:
    matrices = random_matrices(200)
    quaternions = r.matrix_to_quaternion(matrices)
    expected = Rotation.from_matrix(matrices).as_quat(canonical=True, scalar_first=True)
    np.testing.assert_allclose(quaternions, expected, atol=1e-14)
    np.testing.assert_allclose(r.quaternion_to_matrix(-3.0 * quaternions), matrices, atol=1e-14)
    assert (r.rotvec_to_quaternion(np.random.default_rng(0).normal(size=(200, 3)) * 4)[:, 0] >= 0).all()


def test_zero_and_vanishing_quaternions_are_the_identity() -> None:
    for scale in (0.0, 1e-30):
        quaternion = np.full(4, scale, np.float32)
        np.testing.assert_array_equal(r.quaternion_to_matrix(quaternion), np.eye(3, dtype=np.float32))


@given(vectors, angles)
def test_geodesic_angle_is_the_angle(axis: np.ndarray, part: float) -> None:
    if np.linalg.norm(axis) < 1e-3:
        return
    angle = part * np.pi
    base = random_matrices(1, seed=3)[0]
    turned = base @ Rotation.from_rotvec(axis_angle(axis, angle)).as_matrix()
    np.testing.assert_allclose(r.geodesic_angle(base, turned), angle, atol=4e-15)
    np.testing.assert_allclose(r.geodesic_angle(turned, base), angle, atol=4e-15)


def test_geodesic_angle_of_equal_rotations_is_exactly_zero() -> None:
    matrices = random_matrices(100).astype(np.float32)
    np.testing.assert_array_equal(r.geodesic_angle(matrices, matrices), 0.0)


def test_geodesic_angle_is_a_metric() -> None:
    a, b, c = random_matrices(300).reshape(3, 100, 3, 3)
    assert (r.geodesic_angle(a, c) <= r.geodesic_angle(a, b) + r.geodesic_angle(b, c) + 1e-12).all()
    np.testing.assert_allclose(r.geodesic_angle(c @ a, c @ b), r.geodesic_angle(a, b), atol=1e-14)


def test_parity_of_rotation_vectors_with_the_public_code(golden) -> None:
    pose = golden("pose", "pose.npz")
    matrices = r.rotvec_to_matrix(pose["pose6"][:, 3:])
    np.testing.assert_allclose(matrices, pose["mat"][:, :3, :3], atol=1e-10)
    back = r.rotvec_to_matrix(r.matrix_to_rotvec(pose["mat"][:, :3, :3]))
    np.testing.assert_allclose(back, r.rotvec_to_matrix(pose["pose6_back"][:, 3:]), atol=1e-9)
    in_float32 = r.rotvec_to_matrix(pose["pose6"][:, 3:].astype(np.float32))
    np.testing.assert_allclose(in_float32, pose["mat_from_f32_pose"][:, :3, :3], atol=1e-6)


def test_parity_of_rot6d_with_the_public_code(golden) -> None:
    pose = golden("pose", "pose.npz")
    np.testing.assert_array_equal(r.matrix_to_rot6d(pose["mat"][:, :3, :3]), pose["rot6d"])
    raw = pose["rot6d_raw"]
    rows = np.arange(len(raw)) != PARALLEL_ROW
    for dtype, atol in ((np.float64, 1e-10), (np.float32, 1e-6)):
        matrices = r.rot6d_to_matrix(raw.astype(dtype))
        assert matrices.dtype == dtype
        assert np.isfinite(matrices).all()
        for name in ("rot6d_raw_to_mat_np", "rot6d_raw_to_mat_torch_f64"):
            checked = rows if dtype == np.float64 else np.arange(len(raw)) >= DEGENERATE_ROWS.stop
            np.testing.assert_allclose(matrices[checked], pose[name][checked], atol=atol)
    for name in ("rot6d_raw_to_mat_np_f32", "rot6d_raw_to_mat_torch_f32"):
        matrices = r.rot6d_to_matrix(raw.astype(np.float32))
        np.testing.assert_allclose(matrices[rows], pose[name][rows], atol=1e-6)


def test_degenerate_rot6d_is_finite_but_no_rotation(golden) -> None:
    raw = golden("pose", "pose.npz")["rot6d_raw"][DEGENERATE_ROWS]
    for matrices in (r.rot6d_to_matrix(raw), r.rot6d_to_matrix(jnp.asarray(raw, jnp.float32))):
        assert np.isfinite(matrices).all()
    np.testing.assert_array_equal(r.rot6d_to_matrix(np.zeros(6)), np.zeros((3, 3)))


def test_parity_of_the_published_angle(golden) -> None:
    pose = golden("pose", "pose.npz")
    a, b = pose["geo_Ra"], pose["geo_Rb"]
    published = r.geodesic_angle_as_published(a, b)
    np.testing.assert_allclose(np.rad2deg(published), pose["geo_deg_f64"], atol=1e-7)
    np.testing.assert_allclose(published, pose["geo_rad_f64"], atol=1e-9)
    np.testing.assert_allclose(published / np.pi, pose["geo_normalised_f64"], atol=1e-9)
    np.testing.assert_allclose(np.rad2deg(published).mean(), pose["geo_deg_mean_f64"], atol=1e-7)
    single = r.geodesic_angle_as_published(a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_allclose(np.rad2deg(single), pose["geo_deg_f32"], atol=0.01)
    np.testing.assert_allclose(single, pose["geo_rad_f32"], atol=2e-4)
    np.testing.assert_allclose(single / np.pi, pose["geo_normalised_f32"], atol=6e-5)
    np.testing.assert_allclose(np.rad2deg(single).mean(), pose["geo_deg_mean_f32"], atol=0.01)


def test_the_published_angle_has_a_floor_and_ours_agrees_elsewhere(golden) -> None:
    pose = golden("pose", "pose.npz")
    for dtype in (np.float32, np.float64):
        identity = np.eye(3, dtype=dtype)
        floor = np.rad2deg(r.geodesic_angle_as_published(identity, identity))
        name = f"geo_deg_identical_f{np.dtype(dtype).itemsize * 8}"
        np.testing.assert_allclose(floor, pose[name], atol=1e-4)
        assert r.geodesic_angle(identity, identity) == 0.0
    ours = np.rad2deg(r.geodesic_angle(pose["geo_Ra"], pose["geo_Rb"]))
    between = (pose["geo_deg_f64"] > 0.1) & (pose["geo_deg_f64"] < 179.9)
    assert between.sum() > 40
    np.testing.assert_allclose(ours[between], pose["geo_deg_f64"][between], atol=1e-7)


ONE_ARGUMENT = [
    (r.rot6d_to_matrix, 6),
    (r.rotvec_to_matrix, 3),
    (r.quaternion_to_matrix, 4),
    (r.rotvec_to_quaternion, 3),
    (r.quaternion_to_rotvec, 4),
]


def everything(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every function of the module, so that one compilation covers them all."""
    results = {function.__name__: function(inputs[str(size)]) for function, size in ONE_ARGUMENT}
    for function in (r.matrix_to_rot6d, r.matrix_to_rotvec, r.matrix_to_quaternion):
        results[function.__name__] = function(inputs["matrix"])
    for function in (r.geodesic_angle, r.geodesic_angle_as_published):
        results[function.__name__] = function(inputs["matrix"], inputs["other"])
    return results


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    values = {str(size): random.normal(size=(4, 6, size)) for size in (3, 4, 6)}
    values["4"] /= np.linalg.norm(values["4"], axis=-1, keepdims=True)
    values["matrix"] = random_matrices(24).reshape(4, 6, 3, 3)
    values["other"] = random_matrices(24, seed=1).reshape(4, 6, 3, 3)
    return values


def test_numpy_and_jax_agree(inputs) -> None:
    expected = everything(inputs)
    assert all(isinstance(value, np.ndarray) for value in expected.values())
    single = jax.eval_shape(everything, {key: jnp.asarray(x, jnp.float32) for key, x in inputs.items()})
    with jax.enable_x64(True):
        mapped = jax.jit(jax.vmap(jax.vmap(everything)))({key: jnp.asarray(x) for key, x in inputs.items()})
    for name, value in expected.items():
        assert single[name].dtype == jnp.float32, name
        assert mapped[name].dtype == jnp.float64, name
        np.testing.assert_allclose(mapped[name], value, atol=1e-12, err_msg=name)


def test_float32_stays_float32(inputs) -> None:
    for name, value in everything({key: x.astype(np.float32) for key, x in inputs.items()}).items():
        assert value.dtype == np.float32, name


SPECIAL_ROTVECS = np.array(
    [[0, 0, 0], [1e-30, 0, 0], [1e-5, 1e-5, 0], [3.1415925, 0, 0], [0, -2.2214, 2.2214], [9, 0, 0]]
)


def test_gradients_are_finite_at_hard_rotations() -> None:
    def through_everything(rotvec):
        matrix = r.rotvec_to_matrix(rotvec)
        again = r.rotvec_to_matrix(r.matrix_to_rotvec(matrix))
        six = r.rot6d_to_matrix(r.matrix_to_rot6d(again))
        return jnp.sum(six * jnp.arange(9.0).reshape(3, 3)) + r.geodesic_angle(matrix, jnp.eye(3))

    gradients = jax.jit(jax.vmap(jax.grad(through_everything)))(jnp.asarray(SPECIAL_ROTVECS, jnp.float32))
    assert np.isfinite(gradients).all()


def test_gradients_are_finite_at_degenerate_rot6d(golden) -> None:
    raw = jnp.asarray(golden("pose", "pose.npz")["rot6d_raw"][DEGENERATE_ROWS], jnp.float32)

    def loss(rot6d, target):
        return r.geodesic_angle(r.rot6d_to_matrix(rot6d), r.rot6d_to_matrix(target))

    gradient = jax.jit(jax.vmap(jax.grad(loss)))
    for target in (raw, jnp.broadcast_to(jnp.array([1.0, 0, 0, 0, 1, 0]), raw.shape)):
        assert np.isfinite(gradient(raw, target)).all()


def test_geodesic_gradient_matches_differences() -> None:
    rotvec = np.array([0.3, -0.2, 0.5])
    target = random_matrices(1, seed=9)[0]

    def angle(vector):
        return r.geodesic_angle(r.rotvec_to_matrix(vector), target)

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(angle))(jnp.asarray(rotvec))
    numeric = [(angle(rotvec + step) - angle(rotvec - step)) / 2e-6 for step in 1e-6 * np.eye(3)]
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)


@pytest.mark.parametrize(("function", "size"), ONE_ARGUMENT)
def test_nan_stays_nan(function, size: int) -> None:
    x = np.ones((2, size))
    x[1, 0] = np.nan
    result = function(x)
    assert np.isfinite(result[0]).all()
    assert np.isnan(result[1]).any()
    assert np.isnan(r.matrix_to_rotvec(np.full((3, 3), np.nan))).all()
    assert np.isnan(r.geodesic_angle(np.full((3, 3), np.nan), np.eye(3)))


@pytest.mark.parametrize(("function", "size"), ONE_ARGUMENT)
def test_wrong_shapes_are_refused(function, size: int) -> None:
    with pytest.raises(DataError, match="wrong shape"):
        function(np.zeros((size, size + 1)))
    with pytest.raises(DataError, match="rotation matrix a has the wrong shape"):
        r.geodesic_angle(np.zeros((3, 2)), np.eye(3))
    with pytest.raises(DataError, match="rotation matrix b has the wrong shape"):
        r.geodesic_angle_as_published(np.eye(3), np.zeros(9))


def test_empty_batches_pass() -> None:
    assert r.rot6d_to_matrix(np.zeros((0, 6))).shape == (0, 3, 3)
    assert r.matrix_to_rotvec(np.zeros((0, 24, 3, 3))).shape == (0, 24, 3)
