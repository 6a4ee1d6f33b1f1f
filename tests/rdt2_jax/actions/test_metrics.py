"""Action metrics: the published formulas where they are right, NaN instead of zero where they are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from rdt2_jax.actions.layout import ARM_NAMES, arm_slice
from rdt2_jax.actions.metrics import action_errors, chunk_errors
from rdt2_jax.actions.rotations import matrix_to_rot6d
from rdt2_jax.errors import DataError

ERRORS = ("action_mse_error", "action_mse_error_pos", "action_geodesic_error_rot", "action_mse_error_width")
BATCHES = ("all_valid", "invalid_first", "invalid_after_valid", "odd", "single_valid", "all_invalid", "single_invalid")


def assert_as_published(ours: dict, reference, prefix: str, names: tuple[str, ...]) -> None:
    for name in names:
        tolerance = {"atol": 0.005} if name == "action_geodesic_error_rot" else {"rtol": 1e-5}
        np.testing.assert_allclose(ours[name], reference[f"{prefix}/{name}"], **tolerance, err_msg=f"{prefix}/{name}")


@pytest.mark.parametrize("case", ["0", "1", "2", "3", "one_robot"])
def test_parity_of_the_formulas_with_the_public_code(golden, case: str) -> None:
    utils = golden("utils", "io.npz")
    predicted, target = utils[f"err/{case}/pred"], utils[f"err/{case}/gt"]
    gripper_valid = None if case == "one_robot" else utils[f"err/{case}/gripper_valid"]
    ours = action_errors(predicted, target, gripper_valid=gripper_valid)
    names = ERRORS
    if gripper_valid is not None and not gripper_valid.any():
        assert utils[f"err/{case}/action_mse_error_width"] == 0.0
        assert np.isnan(ours["action_mse_error_width"])
        names = ERRORS[:3]
    assert_as_published(ours, utils, f"err/{case}", names)
    assert ours["action_valid_rate"] == 1.0
    assert {value.dtype for value in ours.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("batch", BATCHES)
def test_parity_of_batches_given_the_mask_of_the_public_code(golden, batch: str) -> None:
    utils = golden("utils", "io.npz")
    valid, gripper_valid = utils[f"{batch}/valid_mask_as_metrics_sees_it"], utils[f"{batch}/gripper_valid"]
    ours = action_errors(utils[f"{batch}/action_pred"], utils[f"{batch}/gt_action"], valid, gripper_valid)
    counted = [name for name in ERRORS[:3] if valid.any()]
    counted += ["action_mse_error_width"] if (valid & gripper_valid).any() else []
    assert_as_published(ours, utils, f"{batch}/metrics", (*counted, "action_valid_rate"))
    for name in set(ERRORS) - set(counted):
        assert utils[f"{batch}/metrics/{name}"] == 0.0, "the public code reports perfect answers"
        assert np.isnan(ours[name])


@pytest.mark.parametrize("batch", ["invalid_first", "invalid_after_valid"])
def test_stale_answers_do_not_count(golden, batch: str) -> None:
    """The public code repeats a valid answer for the invalid ones after it, and counts them as valid."""
    utils = golden("utils", "io.npz")
    truly, stale = utils[f"{batch}/truly_valid"], utils[f"{batch}/valid_mask_as_metrics_sees_it"]
    assert truly.sum() < stale.sum()
    predicted, target = utils[f"{batch}/action_pred"], utils[f"{batch}/gt_action"]
    ours = action_errors(predicted, target, truly)
    alone = action_errors(predicted[truly], target[truly])
    for name in ERRORS:
        np.testing.assert_allclose(ours[name], alone[name], rtol=1e-6)
    np.testing.assert_allclose(ours["action_valid_rate"], truly.mean())
    assert ours["action_valid_rate"] < utils[f"{batch}/metrics/action_valid_rate"]


def test_what_invalid_chunks_hold_does_not_matter() -> None:
    random = np.random.default_rng(0)
    predicted, target = random.normal(size=(2, 4, 24, 20))
    valid = np.array([True, False, True, False])
    expected = action_errors(predicted, target, valid)
    predicted[1], target[3] = np.nan, np.nan
    for name, value in action_errors(predicted, target, valid).items():
        assert value == expected[name]


def test_nan_in_a_valid_chunk_is_not_hidden() -> None:
    predicted = np.random.default_rng(0).normal(size=(3, 24, 20))
    target = predicted.copy()
    predicted[1, 2, 3] = np.nan
    assert np.isnan(action_errors(predicted, target)["action_mse_error"])


def test_a_batch_without_any_valid_chunk_has_no_error() -> None:
    actions = np.random.default_rng(0).normal(size=(3, 24, 20))
    for result in (action_errors(actions, actions, np.zeros(3)), jax.jit(action_errors)(actions, actions, np.zeros(3))):
        assert all(np.isnan(result[name]) for name in ERRORS)
        assert result["action_valid_rate"] == 0.0


def test_each_error_sees_its_own_channels() -> None:
    target = np.tile([0.0, 0, 0, 1, 0, 0, 0, 1, 0, 0.04] * 2, (1, 24, 1))
    moved, opened = target.copy(), target.copy()
    moved[..., [0, 11]] += 0.3
    opened[..., 19] += 0.02
    floor = action_errors(target, target)["action_geodesic_error_rot"]
    errors = action_errors(moved, target)
    np.testing.assert_allclose(errors["action_mse_error_pos"], 2 * 0.09 / 6)
    np.testing.assert_allclose(errors["action_mse_error"], 2 * 0.09 / 20)
    assert errors["action_mse_error_width"] == 0.0
    assert errors["action_geodesic_error_rot"] == floor
    errors = action_errors(opened, target)
    np.testing.assert_allclose(errors["action_mse_error_width"], 0.0004 / 2)
    assert errors["action_mse_error_pos"] == 0.0


def random_pair() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    predicted, target = np.zeros((2, 5, 24, 20))
    for actions in (predicted, target):
        for arm in ARM_NAMES:
            own = actions[..., arm_slice(arm)]
            own[..., :3] = 0.1 * random.normal(size=(5, 24, 3))
            rotations = Rotation.from_rotvec(random.normal(size=(120, 3))).as_matrix().reshape(5, 24, 3, 3)
            own[..., 3:9] = matrix_to_rot6d(rotations)
            own[..., 9] = random.uniform(0, 0.088, size=(5, 24))
    return predicted, target


def test_chunk_errors_are_distances_and_angles() -> None:
    predicted, target = random_pair()
    errors = chunk_errors(predicted, target)
    assert len(errors) == 2 * 3 * 3
    distance = 1e3 * np.linalg.norm(predicted[..., 10:13] - target[..., 10:13], axis=-1)
    np.testing.assert_allclose(errors["left_position_mean_mm"], distance.mean(-1))
    np.testing.assert_allclose(errors["left_position_max_mm"], distance.max(-1))
    np.testing.assert_allclose(errors["left_position_final_mm"], distance[:, -1])
    width = 1e3 * np.abs(predicted[..., 9] - target[..., 9])
    np.testing.assert_allclose(errors["right_width_max_mm"], width.max(-1))
    rotations = [
        np.stack([a[..., 3:6], a[..., 6:9], np.cross(a[..., 3:6], a[..., 6:9])], axis=-1).reshape(-1, 3, 3)
        for a in (predicted, target)
    ]
    angle = np.rad2deg((Rotation.from_matrix(rotations[0]).inv() * Rotation.from_matrix(rotations[1])).magnitude())
    np.testing.assert_allclose(errors["right_rotation_mean_deg"], angle.reshape(5, 24).mean(-1), rtol=1e-9)


def test_chunk_errors_of_equal_chunks_are_exactly_zero() -> None:
    actions = random_pair()[0].astype(np.float32)
    for name, value in chunk_errors(actions, actions).items():
        assert value.shape == (5,), name
        np.testing.assert_array_equal(value, 0.0, err_msg=name)


def test_numpy_and_jax_agree_and_gradients_are_finite() -> None:
    predicted, target = random_pair()
    valid, gripper_valid = np.array([1, 0, 1, 1, 1]), np.array([True, True, False, False, True])
    pair = (jnp.asarray(predicted, jnp.float32), jnp.asarray(target, jnp.float32))

    def everything(p, t, *masks):
        return action_errors(p, t, *masks) | chunk_errors(p, t)

    expected = everything(predicted, target, valid, gripper_valid)
    compiled = jax.jit(everything)(*pair, jnp.asarray(valid), jnp.asarray(gripper_valid))
    assert set(compiled) == set(expected)
    for name, value in compiled.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)
    total = jax.jit(jax.grad(lambda p: sum(jnp.sum(value) for value in everything(p, pair[1]).values())))
    assert np.isfinite(total(pair[1])).all()


def test_wrong_shapes_are_refused() -> None:
    actions = np.zeros((3, 24, 20))
    with pytest.raises(DataError, match="differ in shape"):
        action_errors(actions, actions[:2])
    with pytest.raises(DataError, match="actions have the wrong shape"):
        action_errors(actions[..., :9], actions[..., :9])
    with pytest.raises(DataError, match=r"one flag a chunk(.|\n)*gripper_valid(.|\n)*\(3,\)(.|\n)*\(2,\)"):
        action_errors(actions, actions, np.ones(3), np.ones(2))
    with pytest.raises(DataError, match="predicted has the wrong shape"):
        chunk_errors(actions[..., :10], actions[..., :10])
    with pytest.raises(DataError, match="a chunk needs frames"):
        chunk_errors(actions[:, :0], actions[:, :0])
