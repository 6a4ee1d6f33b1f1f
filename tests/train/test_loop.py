"""The loop: every stage from folders, taken up where it was left, stopped where numbers are not finite."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from click.testing import CliRunner
from rdt2_data.augment.config import AugmentConfig
from rdt2_train.commands import train as train_command
from rdt2_train.fm import FmConfig
from rdt2_train.metrics_log import read_log
from rdt2_train.one_step import OneStepConfig
from rdt2_train.optimizer import learning_rate
from rdt2_train.vq import VqConfig
from train_runs import STAGES, run_config, run_stage, write_models

from rdt2_jax.config import dump_config, load_config
from rdt2_jax.errors import ConfigError, Rdt2Error


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def losses(out):
    return [(line["step"], line["loss"]) for line in read_log(out / "log.jsonl")]


def bits(state):
    return jax.device_get(dataclasses.replace(state, key=jax.random.key_data(state.key)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_straight(root, tmp_path, stage):
    """Six steps at once, and three runs of two: the same losses and parameters to the bit."""
    whole = run_stage(root, tmp_path / "whole", stage, 6)
    for steps in (2, 4, 6):
        part = run_stage(root, tmp_path / "parts", stage, steps)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert [step for step, _ in losses(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    assert np.isfinite([loss for _, loss in losses(tmp_path / "whole")]).all()
    chex.assert_trees_all_equal(bits(whole), bits(part))


def test_the_command_trains_and_goes_on(root, tmp_path):
    """From a configuration file; a second call goes on, another configuration is refused."""
    config = tmp_path / "fm.yaml"
    config.write_text(dump_config(run_config(root, "fm", 4)))
    out = tmp_path / "run"

    def call(*arguments):
        command = ["fm", "--config", str(config), "--out", str(out), "--json", *arguments]
        return CliRunner().invoke(train_command, command, catch_exceptions=False)

    first = call()
    assert first.exit_code == 0
    assert json.loads(first.stdout) == {"stage": "fm", "steps": 4, "out": str(out)}
    again = call()  # nothing is left to do
    assert json.loads(again.stdout)["steps"] == 4
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="another configuration"):
        call("seed=3")


@pytest.mark.parametrize("name", ["vq", "vq_finetune", "vq_lora", "fm", "fm_finetune", "fm_full", "one_step"])
def test_configurations_of_the_paper(name):
    config_class = {"v": VqConfig, "f": FmConfig, "o": OneStepConfig}[name[0]]
    config = load_config(config_class, f"train/{name}.yaml")
    assert config.data.augment == AugmentConfig()
    rate = learning_rate(config.optimizer.schedule, config.loop.steps)
    assert float(rate(config.optimizer.schedule.warmup_steps)) == pytest.approx(
        config.optimizer.schedule.peak, rel=1e-3
    )
    assert float(rate(0)) < config.optimizer.schedule.peak


def test_the_schedule_of_the_paper():
    """Cosine, and exponential over the last 8,000 of 128,000 steps: a straight line on a logarithmic scale."""
    config = load_config(VqConfig, "train/vq.yaml")
    assert (config.batch_size, config.loop.steps) == (5376, 128_000)
    rate = learning_rate(config.optimizer.schedule, config.loop.steps)
    logs = np.log([float(rate(step)) for step in range(119_999, 128_000, 1000)])
    np.testing.assert_allclose(np.diff(logs), np.diff(logs)[0], rtol=1e-3)
    assert float(rate(127_999)) == pytest.approx(1e-6, rel=1e-3)
    middle = [float(rate(step)) for step in (1000, 60_500, 119_999)]
    assert middle[0] == pytest.approx(1e-4, rel=1e-3)
    assert middle[1] == pytest.approx(5.5e-5, rel=1e-2)
    assert middle[2] == pytest.approx(1e-5, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "does not divide"),
        ({"mesh": {"data": 3, "fsdp": 1}}, "does not fit the devices"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "does not fit the devices"),
        ({"data": {"dataset": "no.yaml"}}, "no such configuration"),
        ({"expert": "no/folder"}, "no/folder"),
    ],
)
def test_mistakes_are_named(root, tmp_path, changes, message):
    with pytest.raises(Rdt2Error, match=message):
        run_stage(root, tmp_path, "fm", 2, **({"mesh": {"devices": 2}} | changes))
