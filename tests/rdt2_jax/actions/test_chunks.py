"""Chunks as poses, frames and widths: parity with the public code, and conversion exactly once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt2_jax.actions import chunks as c
from rdt2_jax.actions import poses as p
from rdt2_jax.actions.layout import ARM_NAMES
from rdt2_jax.actions.rotations import geodesic_angle, rotvec_to_matrix
from rdt2_jax.actions.types import ActionChunk, TcpChunk
from rdt2_jax.errors import DataError

TIMES: dict[str, Any] = {
    "anchor_time_s": {"right": 1.0, "left": 1.01},
    "observation_id": "42",
    "capture_time_s": {"left_wrist": 1.01, "right_wrist": 1.0},
    "fps": 25.0,
}


def random_actions(seed: int, *shape: int) -> np.ndarray:
    """Action frames with true rotations of up to about a radian."""
    random = np.random.default_rng(seed)
    poses, widths = {}, {}
    for arm in ARM_NAMES:
        rotations = rotvec_to_matrix(0.4 * random.normal(size=(*shape, 3)))
        poses[arm] = p.make_pose(rotations, random.normal(size=(*shape, 3)))
        widths[arm] = random.uniform(0.0, 0.088, size=shape)
    return c.poses_to_chunk(poses, widths)


def frames_of(golden, name: str) -> c.PolicyFrames:
    actions = golden("deploy", "actions.npz")
    tcp = {"default": "tx_tracker_to_tcp_ur5e", "fr3": "tx_tracker_to_tcp_fr3", "custom": "tx_custom"}[name]
    policy = c.PolicyFrames.published("ur5e").pose_tracker_policy
    return c.PolicyFrames(dict.fromkeys(ARM_NAMES, actions[tcp]), policy)


@given(st.integers(0, 2**32 - 1))
def test_frames_split_and_join(seed: int) -> None:
    actions = random_actions(seed, 2, 24)
    poses, widths = c.chunk_to_poses(actions)
    assert tuple(poses) == tuple(widths) == ARM_NAMES
    np.testing.assert_array_equal(poses["right"][..., :3, 3], actions[..., 0:3])
    np.testing.assert_allclose(poses["left"][..., :3, 0], actions[..., 13:16], atol=1e-15)
    np.testing.assert_array_equal(widths["left"], actions[..., 19])
    np.testing.assert_allclose(c.poses_to_chunk(poses, widths), actions, atol=1e-15)


@given(st.integers(0, 2**32 - 1))
def test_relative_chunks_come_back_and_forget_the_world(seed: int) -> None:
    future, widths = c.chunk_to_poses(random_actions(seed, 24))
    current, _ = c.chunk_to_poses(random_actions(seed + 1))
    actions = c.absolute_to_relative_chunk(current, future, widths)
    poses, same_widths = c.relative_to_absolute_chunk(current, actions)
    world = {arm: current["left"] for arm in ARM_NAMES}
    moved = c.absolute_to_relative_chunk(
        {arm: p.compose(world[arm], current[arm]) for arm in ARM_NAMES},
        {arm: p.compose(world[arm], future[arm]) for arm in ARM_NAMES},
        widths,
    )
    np.testing.assert_allclose(moved, actions, atol=1e-12)
    for arm in ARM_NAMES:
        np.testing.assert_allclose(poses[arm], future[arm], atol=1e-13)
        np.testing.assert_array_equal(same_widths[arm], widths[arm])


@pytest.mark.parametrize("name", ["default", "fr3", "custom"])
def test_parity_of_the_frame_change_with_the_public_code(golden, name: str) -> None:
    actions = golden("deploy", "actions.npz")
    frames = frames_of(golden, name)
    poses, widths = c.chunk_to_poses(actions["action"])
    change = {arm: frames.pose_tcp_policy(arm) for arm in ARM_NAMES}
    for direction, by_arm in (("forward", change), ("backward", {arm: p.invert(change[arm]) for arm in ARM_NAMES})):
        converted = c.poses_to_chunk({arm: p.conjugate(poses[arm], by_arm[arm]) for arm in ARM_NAMES}, widths)
        np.testing.assert_allclose(converted, actions[f"tcp_{name}_{direction}"], atol=1e-9)


@pytest.mark.parametrize("name", ["default", "fr3", "custom"])
def test_parity_of_chunk_conversion_with_the_public_code(golden, name: str) -> None:
    actions, frames = golden("deploy", "actions.npz"), frames_of(golden, name)
    for index, action in enumerate(actions["action"]):
        converted = c.chunk_to_tcp(ActionChunk(actions=action.astype(np.float32), **TIMES), frames)
        poses, widths = c.chunk_to_poses(actions[f"tcp_{name}_forward"][index])
        for arm in ARM_NAMES:
            np.testing.assert_allclose(converted.poses_anchor_tcp[arm], poses[arm], atol=5e-7)
            np.testing.assert_allclose(converted.widths_m[arm], widths[arm] / 0.088 * 0.1, atol=1e-8)
        poses, widths = c.chunk_to_poses(action)
        backward = c.tcp_to_chunk(TcpChunk(poses_anchor_tcp=poses, widths_m=widths, **TIMES), frames)
        expected = actions[f"tcp_{name}_backward"][index].copy()
        expected[:, [9, 19]] *= 0.088 / 0.1
        np.testing.assert_allclose(backward.actions, expected, atol=5e-7)


def test_parity_of_float32_chunks_with_the_public_code(golden) -> None:
    actions, frames = golden("deploy", "actions.npz"), c.PolicyFrames.published("ur5e")
    for action, reference in zip(actions["action"], actions["tcp_default_forward_f32in"], strict=True):
        chunk = ActionChunk(actions=action.astype(np.float32), **TIMES)
        converted = c.chunk_to_tcp(chunk, frames)
        widths = {"right": chunk.actions[:, 9], "left": chunk.actions[:, 19]}
        joined = c.poses_to_chunk(converted.poses_anchor_tcp, widths)
        np.testing.assert_allclose(joined, reference, atol=5e-7)


FROM_BASE = {
    "abs": lambda base, chunk: chunk,
    "relative": p.relative_to_absolute,
    "delta": p.delta_to_absolute,
}


@pytest.mark.parametrize("name", list(FROM_BASE))
def test_parity_of_absolute_waypoints_with_the_public_code(golden, name: str) -> None:
    actions = golden("deploy", "actions.npz")
    current = {arm: p.pose6_to_matrix(actions["current_pose"][:, i]) for i, arm in enumerate(ARM_NAMES)}
    for suffix, atol in (("", 1e-9), ("_f32in", 1e-6)):
        expected = actions[f"env_action_{name}{suffix}"].astype(np.float64)
        poses, widths = c.chunk_to_poses(actions["tcp_default_forward"])
        for i, arm in enumerate(ARM_NAMES):
            waypoints = FROM_BASE[name](current[arm], poses[arm])
            np.testing.assert_allclose(waypoints, p.pose6_to_matrix(expected[..., 7 * i : 7 * i + 6]), atol=atol)
            np.testing.assert_allclose(widths[arm], expected[..., 7 * i + 6], atol=atol)
        if name == "relative":
            absolute, _ = c.relative_to_absolute_chunk(current, actions["tcp_default_forward"])
            np.testing.assert_allclose(absolute["left"], p.pose6_to_matrix(expected[..., 7:13]), atol=atol)


def test_parity_of_one_arm_alone_with_the_public_code(golden) -> None:
    actions = golden("deploy", "actions.npz")
    base = p.pose6_to_matrix(actions["current_pose"][:, 0])
    poses, widths = c.chunk_to_poses(actions["action"])
    expected = actions["unimanual_env_action_relative"]
    absolute = p.relative_to_absolute(base, poses["right"])
    np.testing.assert_allclose(absolute, p.pose6_to_matrix(expected[..., :6]), atol=1e-9)
    np.testing.assert_array_equal(widths["right"], expected[..., 6])


def test_widths_are_scaled_once_where_the_public_loop_scales_the_left_one_three_times(golden) -> None:
    actions, frames = golden("deploy", "actions.npz"), c.PolicyFrames.published("ur5e")
    public = actions["post_reference_binarize0"]
    ratios = {}
    for arm, channel, column in (("right", 9, 6), ("left", 19, 13)):
        policy = actions["action"][..., channel]
        ours = np.stack(
            [
                c.chunk_to_tcp(ActionChunk(actions=a.astype(np.float32), **TIMES), frames).widths_m[arm]
                for a in actions["action"]
            ]
        )
        np.testing.assert_allclose(ours, policy * (0.1 / 0.088), atol=1e-8)
        # Its loop also subtracts a pre-closing from some widths, so only the largest ratio shows the scaling.
        ratios[arm] = np.max(public[..., column][policy > 0.01] / policy[policy > 0.01])
    np.testing.assert_allclose(ratios["right"], 0.1 / 0.088, rtol=1e-6)
    np.testing.assert_allclose(ratios["left"], (0.1 / 0.088) ** 3, rtol=1e-6)


def test_width_scaling_is_linear_and_comes_back() -> None:
    widths = np.linspace(-0.01, 0.1, 12)
    np.testing.assert_allclose(c.policy_width_to_real_m(0.088), 0.10)
    np.testing.assert_allclose(c.policy_width_to_real_m(widths), widths / 0.088 * 0.10)
    np.testing.assert_allclose(c.real_m_to_policy_width(c.policy_width_to_real_m(widths)), widths, atol=1e-17)
    single = c.policy_width_to_real_m(jnp.float32(0.044))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, 0.05, rtol=1e-6)


@pytest.mark.parametrize("robot", ["ur5e", "fr3"])
@given(seed=st.integers(0, 2**32 - 1))
def test_chunks_come_back(robot: c.RobotName, seed: int) -> None:
    chunk = ActionChunk(actions=random_actions(seed, 24).astype(np.float32), **TIMES)
    frames = c.PolicyFrames.published(robot)
    converted = c.chunk_to_tcp(chunk, frames)
    again = c.tcp_to_chunk(converted, frames)
    np.testing.assert_allclose(again.actions, chunk.actions, atol=1e-6)
    for made in (converted, again):
        assert (made.observation_id, made.fps) == ("42", 25.0)
        assert dict(made.anchor_time_s) == TIMES["anchor_time_s"]
        assert dict(made.capture_time_s) == TIMES["capture_time_s"]


def test_a_conversion_keeps_rotation_angles_and_changes_positions() -> None:
    chunk = ActionChunk(actions=random_actions(0, 24).astype(np.float32), **TIMES)
    converted = c.chunk_to_tcp(chunk, c.PolicyFrames.published("ur5e"))
    poses, _ = c.chunk_to_poses(chunk.actions.astype(np.float64))
    for arm in ARM_NAMES:
        before = geodesic_angle(np.eye(3), poses[arm][..., :3, :3])
        after = geodesic_angle(np.eye(3), converted.poses_anchor_tcp[arm][..., :3, :3])
        np.testing.assert_allclose(after, before, atol=1e-12)
        assert np.abs(converted.poses_anchor_tcp[arm][..., :3, 3] - poses[arm][..., :3, 3]).max() > 0.01


def test_the_frame_change_is_the_one_of_the_hand() -> None:
    """Moving a hand in the world: the policy sees its own frame move, the TCP moves as the chunk says."""
    frames = c.PolicyFrames.published("fr3")
    hand, chunk = random_actions(3), random_actions(4, 24)
    pose_world_tracker, _ = c.chunk_to_poses(hand)
    pose_world_tracker_later, widths = c.chunk_to_poses(chunk)
    now = {a: p.compose(pose_world_tracker[a], frames.pose_tracker_policy[a]) for a in ARM_NAMES}
    later = {a: p.compose(pose_world_tracker_later[a], frames.pose_tracker_policy[a]) for a in ARM_NAMES}
    seen = ActionChunk(actions=c.absolute_to_relative_chunk(now, later, widths).astype(np.float32), **TIMES)
    for arm in ARM_NAMES:
        tcp_now = p.compose(pose_world_tracker[arm], frames.pose_tracker_tcp[arm])
        tcp_later = p.compose(pose_world_tracker_later[arm], frames.pose_tracker_tcp[arm])
        commanded = p.relative_to_absolute(tcp_now, c.chunk_to_tcp(seen, frames).poses_anchor_tcp[arm])
        np.testing.assert_allclose(commanded, tcp_later, atol=2e-6)


def test_converting_twice_is_impossible() -> None:
    frames = c.PolicyFrames.published("ur5e")
    chunk = ActionChunk(actions=random_actions(0, 24).astype(np.float32), **TIMES)
    converted = c.chunk_to_tcp(chunk, frames)
    with pytest.raises(DataError, match=r"takes an ActionChunk(.|\n)*TcpChunk(.|\n)*applied exactly once"):
        c.chunk_to_tcp(converted, frames)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"takes a TcpChunk(.|\n)*in the policy frame already"):
        c.tcp_to_chunk(chunk, frames)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"takes an ActionChunk(.|\n)*wrap the array"):
        c.chunk_to_tcp(chunk.actions, frames)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="takes a PolicyFrames"):
        c.chunk_to_tcp(chunk, np.eye(4))  # type: ignore[arg-type]
    assert not hasattr(converted, "actions")


def test_nothing_is_clamped() -> None:
    actions = random_actions(0, 24).astype(np.float32)
    actions[:, 9] = np.linspace(-0.02, 0.2, 24)
    widths = c.chunk_to_tcp(ActionChunk(actions=actions, **TIMES), c.PolicyFrames.published("ur5e")).widths_m
    np.testing.assert_allclose(widths["right"], np.linspace(-0.02, 0.2, 24) / 0.088 * 0.1, atol=1e-8)


def test_published_frames_are_those_of_the_robot(golden) -> None:
    actions = golden("deploy", "actions.npz")
    for robot in ("ur5e", "fr3"):
        frames = c.PolicyFrames.published(robot)
        for arm in ARM_NAMES:
            np.testing.assert_array_equal(frames.pose_tracker_tcp[arm], actions[f"tx_tracker_to_tcp_{robot}"])
            np.testing.assert_array_equal(frames.pose_tracker_policy[arm][:3, 3], [0.0, 0.078, -0.026705])
    with pytest.raises(DataError, match=r"no published frames(.|\n)*ur5e or fr3(.|\n)*panda"):
        c.PolicyFrames.published("panda")  # type: ignore[arg-type]


def test_bad_frames_are_refused() -> None:
    good = dict.fromkeys(ARM_NAMES, np.eye(4))
    with pytest.raises(DataError, match="pose_tracker_policy must name both arms"):
        c.PolicyFrames(good, {"right": np.eye(4)})  # type: ignore[dict-item]
    with pytest.raises(DataError, match=r"pose_tracker_tcp\['left'\]: rotation part must be orthonormal"):
        c.PolicyFrames({"right": np.eye(4), "left": np.diag([2.0, 1, 1, 1])}, good)
    with pytest.raises(DataError, match="one pose an arm"):
        c.PolicyFrames(dict.fromkeys(ARM_NAMES, np.eye(4)[None]), good)
    frames = c.PolicyFrames(good, good)
    with pytest.raises(ValueError, match="read-only"):
        frames.pose_tracker_tcp["right"][0, 0] = 2.0


def test_bad_arguments_are_named() -> None:
    poses, widths = c.chunk_to_poses(random_actions(0, 24))
    with pytest.raises(DataError, match="actions has the wrong shape"):
        c.chunk_to_poses(np.zeros((24, 10)))
    with pytest.raises(DataError, match="poses must name both arms"):
        c.poses_to_chunk({"right": poses["right"]}, widths)
    with pytest.raises(DataError, match="widths do not fit the poses"):
        c.poses_to_chunk(poses, {arm: width[:3] for arm, width in widths.items()})
    with pytest.raises(DataError, match="current_poses must name both arms"):
        c.relative_to_absolute_chunk(poses["right"], random_actions(0, 24))  # type: ignore[arg-type]


def test_numpy_and_jax_agree_and_gradients_are_finite() -> None:
    def there_and_back(actions, hand):
        current, _ = c.chunk_to_poses(hand)
        return c.absolute_to_relative_chunk(current, *c.relative_to_absolute_chunk(current, actions))

    actions, hand = random_actions(0, 3, 24), random_actions(1, 3)
    compiled = jax.jit(jax.vmap(there_and_back))(jnp.asarray(actions, jnp.float32), jnp.asarray(hand, jnp.float32))
    assert compiled.dtype == jnp.float32
    np.testing.assert_allclose(there_and_back(actions, hand), actions, atol=1e-13)
    np.testing.assert_allclose(compiled, actions, atol=5e-6)
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(there_and_back(a, hand) ** 2)))(jnp.zeros((3, 24, 20)))
    assert np.isfinite(gradient).all()
