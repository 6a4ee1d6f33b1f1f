"""The guard against numbers that are not: what it keeps, what it says, and when it stays silent."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdt2_train.guard import not_finite, save_offending_batch, stop_on_nonfinite

from rdt2_jax.errors import DataError


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    return {
        "actions": random.standard_normal((4, 24, 20)).astype(np.float32),
        "image/left": random.integers(0, 256, (4, 6, 6, 3), np.uint8),
        "file": np.array(["a.tar", "b.tar"]),
        "valid": np.array([True, False]),
    }


GOOD = {"loss": 1.5, "grad_norm": 2.0, "finite": True}


def test_a_batch_comes_back_bit_for_bit(tmp_path, batch):
    path = save_offending_batch(tmp_path / "bad", 12, batch, GOOD)
    assert path == tmp_path / "bad" / "step_00000012_process_0.npz"
    with np.load(path, allow_pickle=False) as found:
        assert set(found.files) == set(batch)
        for name, values in batch.items():
            np.testing.assert_array_equal(found[name], values)
            assert found[name].dtype == values.dtype


def test_the_description_tells_what_is_wrong(tmp_path, batch):
    batch["actions"][1, 2, 3], batch["actions"][2, 0, 0] = np.nan, np.inf
    report = {"loss": np.float32("nan"), "grad_norm": float("inf"), "finite": np.False_}
    path = save_offending_batch(tmp_path, 7, batch, report, process=3)
    assert path.name == "step_00000007_process_3.npz"
    described = json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert described["report"] == {"loss": "nan", "grad_norm": "inf", "finite": False}
    assert (described["step"], described["process"], described["left_out"]) == (7, 3, {})
    actions = described["arrays"]["actions"]
    assert (actions["shape"], actions["dtype"], actions["not_finite"]) == ([4, 24, 20], "float32", 2)
    assert np.isfinite([actions["smallest"], actions["largest"]]).all()
    assert described["arrays"]["image/left"]["not_finite"] == 0


def test_sixteen_bit_floats_keep_their_values(tmp_path):
    values = np.asarray(jnp.asarray([1.0, -3.140625, jnp.nan], jnp.bfloat16))
    path = save_offending_batch(tmp_path, 0, {"x": values}, GOOD)
    with np.load(path, allow_pickle=False) as found:
        np.testing.assert_array_equal(found["x"], values.astype(np.float32))
    described = json.loads(path.with_suffix(".json").read_text())["arrays"]["x"]
    assert (described["dtype"], described["written_as"], described["not_finite"]) == ("bfloat16", "float32", 1)


def test_what_only_pickle_could_write_is_left_out_and_said(tmp_path, batch):
    path = save_offending_batch(tmp_path, 0, {**batch, "texts": np.array([{}, None])}, GOOD)
    with np.load(path, allow_pickle=False) as found:
        assert set(found.files) == set(batch)
    assert json.loads(path.with_suffix(".json").read_text())["left_out"] == {"texts": "object"}


def test_nothing_but_the_two_files_is_left(tmp_path, batch):
    for _ in range(2):  # the second replaces the first
        save_offending_batch(tmp_path, 5, batch, GOOD)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".npz"]


def test_finite_numbers_pass_and_leave_nothing(tmp_path, batch):
    stop_on_nonfinite(3, {**GOOD, "lr": np.float32(0)}, batch, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("wrong", [{"loss": float("nan")}, {"grad_norm": np.float32("-inf")}, {"finite": np.False_}])
def test_the_message_names_everything(tmp_path, batch, wrong):
    with pytest.raises(DataError) as caught:
        stop_on_nonfinite(41, {**GOOD, **wrong}, batch, tmp_path, last_checkpoint=40)
    message = str(caught.value)
    assert "step 41" in message
    assert f"{next(iter(wrong))} = " in message
    assert str(tmp_path / "step_00000041_process_0.npz") in message
    assert "batch itself is finite" in message
    assert "resume from the checkpoint of step 40 with a lower learning rate" in message
    assert (tmp_path / "step_00000041_process_0.npz").is_file()


def test_a_spoilt_batch_is_told_from_a_spoilt_run(tmp_path, batch):
    batch["actions"][0] = np.nan
    with pytest.raises(DataError, match=r"(?s)in the batch itself: actions.*leave out the examples.*start again"):
        stop_on_nonfinite(1, {"loss": float("nan")}, batch, tmp_path)


def test_a_batch_that_cannot_be_kept_does_not_hide_the_reason(tmp_path, batch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"(?s)not finite.*step 9.*could not be kept.*loss = nan"):
        stop_on_nonfinite(9, {"loss": float("nan")}, batch, tmp_path / "file")


@given(st.dictionaries(st.text(min_size=1), st.floats(), max_size=5))
def test_exactly_what_is_not_finite_is_named(report):
    report = {name: value for name, value in report.items() if name != "finite"}
    assert not_finite(report) == [name for name, value in report.items() if not np.isfinite(value)]
