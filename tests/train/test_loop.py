"""The loop: every stage from folders, taken up where it was left, stopped where numbers are not finite."""

from __future__ import annotations

import dataclasses

import chex
import jax
import numpy as np
import pytest
from rdt2_train.metrics_log import read_log
from train_runs import STAGES, run_stage, write_models


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def losses(out):
    return [(line["step"], line["loss"]) for line in read_log(out / "log.jsonl")]


def bits(state):
    return jax.device_get(dataclasses.replace(state, key=jax.random.key_data(state.key)))


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage == "fm" else pytest.mark.slow) for stage in STAGES]
)
def test_resumed_equals_straight(root, tmp_path, stage):
    """Six steps at once, and three runs of two: the same losses and parameters to the bit."""
    whole = run_stage(root, tmp_path / "whole", stage, 6)
    for steps in (2, 4, 6):
        part = run_stage(root, tmp_path / "parts", stage, steps)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert [step for step, _ in losses(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    assert np.isfinite([loss for _, loss in losses(tmp_path / "whole")]).all()
    chex.assert_trees_all_equal(bits(whole), bits(part))
