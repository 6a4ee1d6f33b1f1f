"""The checks: what is good comes back unchanged, what is bad is named with its index."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rdt2_jax.actions.validation import check_actions, check_chunk, check_poses, check_rotations
from rdt2_jax.errors import DataError

IDENTITY_ARM = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.04]


def identity_chunk(*shape: int) -> np.ndarray:
    return np.tile(np.float32(IDENTITY_ARM * 2), (*shape, 1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_good_actions_come_back_in_float32(xp, dtype) -> None:
    if xp is jnp and dtype is np.float64:
        dtype = np.float32  # jax holds no float64 here
    actions = identity_chunk(2, 24).astype(dtype)
    checked = check_actions(xp.asarray(actions), width_range=(0.0, 0.088), chunk_length=24)
    assert isinstance(checked, np.ndarray)
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, actions.astype(np.float32))


def test_real_actions_pass_although_they_are_not_orthonormal(golden) -> None:
    action = golden("deploy", "actions.npz")["action"]
    assert np.abs(np.linalg.norm(action[..., 3:6], axis=-1) - 1).max() > 0.03
    np.testing.assert_array_equal(check_chunk(action), action.astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    actions = identity_chunk(2, 24)
    actions[1, 5, 12] = actions[1, 7, 0] = bad
    with pytest.raises(DataError, match="predicted must be finite") as error:
        check_actions(actions, name="predicted", where="shard 3")
    assert "2 of 960 are wrong; the first, at index [1, 5, 12]" in str(error.value)
    assert "where: shard 3" in str(error.value)


def test_values_too_large_for_float32_are_not_made_infinite() -> None:
    actions = identity_chunk(1).astype(np.float64)
    actions[0, 0] = 1e39
    with pytest.raises(DataError, match="must be finite"):
        check_actions(actions)


@pytest.mark.parametrize(
    ("channels", "values", "message"),
    [
        (slice(3, 6), 0.0, "rotation of the right arm has a column without direction"),
        (slice(16, 19), 1e-4, "rotation of the left arm has a column without direction"),
        (slice(13, 19), [0.3, 0.4, 0.5, -0.6, -0.8, -1.0], "rotation of the left arm has parallel columns"),
        (slice(3, 9), [1.0, 0.0, 0.0, 1.0, 5e-4, 0.0], "rotation of the right arm has parallel columns"),
    ],
)
def test_degenerate_rotations_are_named(channels: slice, values, message: str) -> None:
    actions = identity_chunk(3, 24)
    actions[2, 4, channels] = values
    with pytest.raises(DataError, match=message) as error:
        check_actions(actions)
    assert "1 of 72 are wrong; the first, at index [2, 4]" in str(error.value)


def test_rotations_far_from_orthonormal_but_clear_pass() -> None:
    actions = identity_chunk(24)
    actions[:, 3:9] = [0.01, 0.0, 0.0, 100.0, 1.0, 0.0]
    np.testing.assert_array_equal(check_chunk(actions), actions)


@pytest.mark.parametrize(("channel", "arm"), [(9, "right"), (19, "left")])
@pytest.mark.parametrize("width", [-0.001, 0.0881])
def test_widths_are_checked_only_when_asked(channel: int, arm: str, width: float) -> None:
    actions = identity_chunk(24)
    actions[3, channel] = width
    np.testing.assert_array_equal(check_actions(actions), actions)
    with pytest.raises(DataError, match=f"gripper width of the {arm} arm is out of range") as error:
        check_actions(actions, width_range=(0.0, 0.088))
    assert "index [3]" in str(error.value)
    assert "0.0 to 0.088" in str(error.value)


def test_the_ends_of_the_width_range_belong_to_it() -> None:
    actions = identity_chunk(24)
    actions[:, 9], actions[:, 19] = 0.0, 0.088
    check_actions(actions, width_range=(0.0, 0.088))


@pytest.mark.parametrize("shape", [(20, 24), (24, 19), (), (24, 20, 1)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="actions has the wrong shape"):
        check_actions(np.zeros(shape, np.float32))


def test_wrong_lengths_are_refused_for_chunks_only() -> None:
    assert check_actions(identity_chunk(7)).shape == (7, 20)
    assert check_actions(identity_chunk()).shape == (20,)
    for actions in (identity_chunk(7), identity_chunk(24, 7), identity_chunk()):
        with pytest.raises(DataError, match=r"wrong shape(.|\n)*\(\.\.\., 24, 20\)"):
            check_chunk(actions)


@pytest.mark.parametrize("dtype", [np.int32, bool, complex, object, "U4"])
def test_other_types_are_refused(dtype) -> None:
    with pytest.raises(DataError, match="must be floating point"):
        check_actions(np.zeros((24, 20), dtype))


def test_tracers_are_refused() -> None:
    with pytest.raises(DataError, match="actions cannot be checked inside a jax transformation"):
        jax.jit(check_actions)(jnp.zeros((24, 20)))


def test_checking_does_not_change_the_input() -> None:
    actions = identity_chunk(24)
    checked = check_actions(actions)
    checked[0, 0] = 1.0
    assert actions[0, 0] == 0.0


def test_empty_batches_pass() -> None:
    assert check_actions(np.zeros((0, 24, 20))).shape == (0, 24, 20)
    assert check_rotations(np.zeros((0, 3, 3))).shape == (0, 3, 3)


def test_rotations_come_back_in_their_own_type() -> None:
    for dtype in (np.float32, np.float64):
        rotations = np.tile(np.eye(3, dtype=dtype), (2, 1, 1))
        checked = check_rotations(jnp.asarray(rotations) if dtype is np.float32 else rotations)
        assert checked.dtype == dtype
        np.testing.assert_array_equal(checked, rotations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m * 1.001, "must be orthonormal"),
        (lambda m: -m, "must not be reflections"),
        (lambda m: m * np.nan, "must be finite"),
        (lambda m: m * 0, "must be orthonormal"),
    ],
)
def test_matrices_that_are_no_rotations_are_named(change, message: str) -> None:
    rotations = np.tile(np.eye(3), (2, 4, 1, 1))
    rotations[1, 2] = change(rotations[1, 2])
    with pytest.raises(DataError, match=f"tool {message}") as error:
        check_rotations(rotations, name="tool")
    assert "at index [1, 2" in str(error.value)
    poses = np.tile(np.eye(4), (2, 4, 1, 1))
    poses[..., :3, :3] = rotations
    with pytest.raises(DataError, match=message):
        check_poses(poses)


def test_the_tolerance_is_a_choice() -> None:
    rotation = np.eye(3) * 1.001
    np.testing.assert_array_equal(check_rotations(rotation, tolerance=0.01), rotation)


def test_the_last_row_of_a_pose_is_checked() -> None:
    pose = np.eye(4)
    np.testing.assert_array_equal(check_poses(pose), pose)
    pose[3, 0] = 0.1
    with pytest.raises(DataError, match="camera: wrong last row"):
        check_poses(pose, name="camera")
    with pytest.raises(DataError, match="poses has the wrong shape"):
        check_poses(np.eye(3))
    with pytest.raises(DataError, match="rotations must be numbers"):
        check_rotations(np.zeros((3, 3), "U4"))


def test_normalized_actions_need_only_be_finite():
    scaled = np.zeros((2, 24, 20), np.float32)
    np.testing.assert_array_equal(check_actions(scaled, normalized=True), scaled)
    with pytest.raises(DataError, match="without direction"):
        check_actions(scaled)
    scaled[1, 2, 3] = np.nan
    with pytest.raises(DataError, match="finite"):
        check_actions(scaled, normalized=True)
