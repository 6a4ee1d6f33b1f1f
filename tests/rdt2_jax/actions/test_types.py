"""Observations and chunks: what they accept, what they refuse, and that nobody can change them afterwards."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.actions.types import ActionChunk, Observation, Policy, TcpChunk
from rdt2_jax.errors import DataError

CAPTURE_TIME_S = {"left_wrist": 10.000, "right_wrist": 10.012}
ANCHOR_TIME_S = {"left": 10.000, "right": 10.012}
IDENTITY_ARM = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.04]


def observation(**changes: Any) -> Observation:
    image = np.zeros((384, 384, 3), np.uint8)
    values: dict[str, Any] = {
        "images": {"left_wrist": image, "right_wrist": image + 1},
        "capture_time_s": CAPTURE_TIME_S,
        "instruction": "Pick up the apple.",
        "id": "42",
    }
    return Observation(**(values | changes))


def action_chunk(**changes: Any) -> ActionChunk:
    values: dict[str, Any] = {
        "actions": np.tile(np.float32(IDENTITY_ARM * 2), (24, 1)),
        "anchor_time_s": ANCHOR_TIME_S,
        "observation_id": "42",
        "capture_time_s": CAPTURE_TIME_S,
    }
    return ActionChunk(**(values | changes))


def tcp_chunk(**changes: Any) -> TcpChunk:
    values: dict[str, Any] = {
        "poses_anchor_tcp": {arm: np.tile(np.eye(4), (24, 1, 1)) for arm in ("right", "left")},
        "widths_m": {arm: np.full(24, 0.05) for arm in ("right", "left")},
        "anchor_time_s": ANCHOR_TIME_S,
        "observation_id": "42",
        "capture_time_s": CAPTURE_TIME_S,
    }
    return TcpChunk(**(values | changes))


def test_an_observation_keeps_what_it_was_given() -> None:
    made = observation(state=np.arange(20, dtype=np.float32))
    assert tuple(made.images) == ("left_wrist", "right_wrist")
    assert made.images["right_wrist"][0, 0, 0] == 1
    assert made.capture_time_s["right_wrist"] == 10.012
    assert made.state is not None
    assert made.state[19] == 19.0
    assert observation().state is None


def test_jax_arrays_are_brought_to_the_host() -> None:
    made = action_chunk(actions=jnp.tile(jnp.asarray(IDENTITY_ARM * 2, jnp.float32), (24, 1)))
    assert isinstance(made.actions, np.ndarray)
    assert isinstance(observation(state=jnp.zeros(20)).state, np.ndarray)


@pytest.mark.parametrize("make", [observation, action_chunk, tcp_chunk])
def test_records_are_frozen(make) -> None:
    with pytest.raises(FrozenInstanceError):
        make().capture_time_s = {}
    with pytest.raises(TypeError, match="does not support item assignment"):
        make().capture_time_s["left_wrist"] = 0.0


def test_arrays_are_read_only_copies() -> None:
    actions, state = np.tile(np.float32(IDENTITY_ARM * 2), (24, 1)), np.zeros(20, np.float32)
    image, widths = np.zeros((384, 384, 3), np.uint8), np.zeros(24)
    images = {"left_wrist": image, "right_wrist": image}
    seen = observation(images=images, state=state)
    chunk, converted = action_chunk(actions=actions), tcp_chunk(widths_m={"right": widths, "left": widths})
    actions[0, 0], state[0], image[0, 0, 0], widths[0] = 9, 9, 9, 9
    images["left_wrist"] = image
    kept = [chunk.actions, seen.state, seen.images["left_wrist"], converted.widths_m["left"]]
    kept.append(converted.poses_anchor_tcp["right"][..., 3, 0])
    for array in kept:
        assert array is not None
        assert array.flat[0] == 0
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1


@pytest.mark.parametrize("make", [observation, action_chunk, tcp_chunk])
def test_records_can_be_pickled_and_copied(make) -> None:
    for again in (pickle.loads(pickle.dumps(make())), copy.deepcopy(make())):
        assert type(again) is type(make())
        assert dict(again.capture_time_s) == CAPTURE_TIME_S
        with pytest.raises(TypeError, match="does not support item assignment"):
            again.capture_time_s["left_wrist"] = 0.0


def test_skew_is_reported_and_not_refused() -> None:
    assert observation().capture_skew_s == pytest.approx(0.012)
    assert not observation().skewed
    late = observation(capture_time_s={"left_wrist": 10.021, "right_wrist": 10.0})
    assert late.capture_skew_s == pytest.approx(0.021)
    assert late.skewed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {"left_wrist": np.zeros((384, 384, 3), np.uint8)}}, "images has the wrong keys"),
        ({"images": [np.zeros((384, 384, 3), np.uint8)] * 2}, "images has the wrong keys"),
        ({"capture_time_s": {"camera0": 0.0, "camera1": 0.0}}, "capture_time_s has the wrong keys"),
        ({"capture_time_s": CAPTURE_TIME_S | {"left_wrist": np.nan}}, r"capture_time_s\['left_wrist'\] must be finite"),
        ({"capture_time_s": CAPTURE_TIME_S | {"left_wrist": None}}, "must be a number"),
        ({"capture_time_s": CAPTURE_TIME_S | {"left_wrist": True}}, "must be a number"),
        ({"instruction": ""}, "instruction must be text"),
        ({"instruction": "  "}, "instruction must be text"),
        ({"instruction": b"Pick up the apple."}, "instruction must be text"),
        ({"id": 42}, "id must be text"),
        ({"state": np.zeros(20)}, r"state has the wrong type(.|\n)*float64"),
        ({"state": np.zeros(14, np.float32)}, "state has the wrong shape"),
        ({"state": np.full(20, np.nan, np.float32)}, "state must be finite"),
    ],
)
def test_bad_observations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        observation(**changes)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((384, 384, 3), np.float32), "wrong type"),
        (np.zeros((384, 768, 3), np.uint8), "wrong shape"),
        (np.zeros((3, 384, 384), np.uint8), "wrong shape"),
        (np.zeros((1, 384, 384, 3), np.uint8), "wrong shape"),
        ([[1, 2], [3]], "not an array"),
    ],
)
def test_bad_images_are_refused_by_name(image: Any, message: str) -> None:
    good = np.zeros((384, 384, 3), np.uint8)
    with pytest.raises(DataError, match=rf"images\['right_wrist'\].*{message}|right_wrist.*{message}"):
        observation(images={"left_wrist": good, "right_wrist": image})


def test_actions_are_due_one_period_apart_after_the_anchor() -> None:
    for chunk in (action_chunk(), tcp_chunk()):
        due = chunk.due_time_s("right")
        assert due.shape == (24,)
        np.testing.assert_allclose(due - 10.012, np.arange(1, 25) / 30.0, atol=1e-12)
        assert chunk.due_time_s("left")[0] == pytest.approx(10.0 + 1 / 30)
        np.testing.assert_allclose(due[-1] - 10.012, 0.8, atol=1e-12)
        with pytest.raises(DataError, match="unknown arm"):
            chunk.due_time_s("top")  # type: ignore[arg-type]
    np.testing.assert_allclose(np.diff(action_chunk(fps=15).due_time_s("left")), 1 / 15)


@pytest.mark.parametrize("make", [action_chunk, tcp_chunk])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor_time_s": {"right": 0.0}}, "anchor_time_s has the wrong keys"),
        ({"anchor_time_s": {"right": 0.0, "left": np.inf}}, r"anchor_time_s\['left'\] must be finite"),
        ({"capture_time_s": {}}, "capture_time_s has the wrong keys"),
        ({"observation_id": ""}, "observation_id must be text"),
        ({"fps": 0}, "fps must be positive"),
        ({"fps": -30.0}, "fps must be positive"),
        ({"fps": "30"}, "fps must be a number"),
    ],
)
def test_bad_timing_is_refused(make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)


def changed(index: Any, value: Any, dtype: Any = np.float32) -> np.ndarray:
    actions = np.tile(np.array(IDENTITY_ARM * 2, dtype), (24, 1))
    actions[index] = value
    return actions


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (changed(0, 0.0)[:, :19], "wrong shape"),
        (changed((), IDENTITY_ARM * 2)[:20], "wrong shape"),
        (np.tile(changed((), IDENTITY_ARM * 2), (2, 1, 1)), "no batch axis"),
        (changed((), IDENTITY_ARM * 2, np.float64), r"wrong type(.|\n)*convert it on purpose"),
        (changed((3, 4), np.nan), r"actions must be finite(.|\n)*observation '42'(.|\n)*index \[3, 4\]"),
        (changed((5, slice(13, 19)), 0.0), r"rotation of the left arm has a column without direction(.|\n)*\[5\]"),
    ],
)
def test_bad_actions_are_refused(actions: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        action_chunk(actions=actions)


def test_widths_beyond_the_policy_range_are_kept_as_they_are() -> None:
    actions = changed((slice(None), 9), np.linspace(-0.01, 0.1, 24))
    np.testing.assert_array_equal(action_chunk(actions=actions).actions, actions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"poses_anchor_tcp": {"right": np.tile(np.eye(4), (24, 1, 1))}}, "wrong keys"),
        ({"poses_anchor_tcp": dict.fromkeys(("right", "left"), np.eye(4))}, "wrong shape"),
        ({"poses_anchor_tcp": dict.fromkeys(("right", "left"), np.ones((24, 4, 4)))}, "wrong last row"),
        ({"poses_anchor_tcp": dict.fromkeys(("right", "left"), np.zeros((24, 4, 4), np.float32))}, "wrong type"),
        ({"widths_m": dict.fromkeys(("right", "left"), np.zeros(23))}, "wrong shape"),
        ({"widths_m": dict.fromkeys(("right", "left"), np.full(24, np.nan))}, "must be finite"),
    ],
)
def test_bad_tcp_chunks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tcp_chunk(**changes)


def test_the_policy_protocol_is_what_has_both_methods() -> None:
    class Still:
        def infer(self, observation: Observation) -> ActionChunk:
            return action_chunk(observation_id=observation.id, capture_time_s=observation.capture_time_s)

        def reset(self) -> None: ...

    policy: Policy = Still()
    assert isinstance(policy, Policy)
    assert not isinstance(object(), Policy)
    assert policy.infer(observation(id="7")).observation_id == "7"
