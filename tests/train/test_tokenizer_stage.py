"""The tokenizer stage: resuming changes nothing, a folder holds one run, wrong inputs say so, the stated quality."""

from __future__ import annotations

import json

import chex
import numpy as np
import pytest
from rdt2_data.synthetic import smooth_chunks
from rdt2_train import tokenizer as stage
from rdt2_train.tokenizer import ActionsConfig, SyntheticActions, TokenizerTrainingConfig, train_tokenizer

from rdt2_jax.action_tokenizer.checkpoint import load_tokenizer
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig, Levels
from rdt2_jax.action_tokenizer.report import examine, reconstruct
from rdt2_jax.config import load_config
from rdt2_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def config() -> TokenizerTrainingConfig:
    return TokenizerTrainingConfig(
        model=ActionTokenizerConfig(
            hidden_size=4,
            latent_size=8,
            embedding_dim=4,
            num_codes=16,
            levels=Levels(pos=2, rot=1, grip=1),
            restart_interval=3,
            commitment_cost=0.002,
        ),
        actions=ActionsConfig(synthetic=SyntheticActions(chunks=100, seed=0), held_out=20),
        batch_size=16,
        steps=12,
        learning_rate=1e-3,
        warmup_steps=2,
        continuous_steps=3,
        log_every=1,
        checkpoint_every=4,
    )


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    return out, train_tokenizer(config, out)


def logged_losses(out):
    return [json.loads(line)["total"] for line in (out / "log.jsonl").read_text().splitlines()]


class StoppedError(Exception):
    """Stands for a machine that goes away in the middle of a run."""


def test_resumed_run_equals_a_straight_one(config, straight, tmp_path, monkeypatch):
    out = tmp_path / "run"
    check = stage._stop_on_nan

    def stop_at_six(losses, step):
        check(losses, step)
        if step == 6:
            raise StoppedError

    monkeypatch.setattr(stage, "_stop_on_nan", stop_at_six)
    with pytest.raises(StoppedError):
        train_tokenizer(config, out)
    assert not (out / "checkpoint").exists()
    monkeypatch.setattr(stage, "_stop_on_nan", check)
    train_tokenizer(config, out)
    ours, theirs = load_tokenizer(out / "checkpoint"), load_tokenizer(straight[0] / "checkpoint")
    chex.assert_trees_all_equal(ours.params, theirs.params)
    resumed = logged_losses(out)
    # Steps 5 and 6 are done twice: once before the stop, once after continuing from step 4.
    assert resumed[:6] + resumed[8:] == logged_losses(straight[0])
    assert resumed[6:8] == resumed[4:6]


def test_finished_folder_is_complete_and_readable(config, straight):
    out, report = straight
    names = {path.name for path in (out / "checkpoint").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "normalizer.npz", "report.json", "report.png", "training.json"
    }  # fmt: skip
    written = json.loads((out / "checkpoint" / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert TokenizerTrainingConfig.model_validate_json((out / "checkpoint" / "training.json").read_text()) == config
    loaded = load_tokenizer(out / "checkpoint")
    held_out = smooth_chunks(120, 0)[-20:]
    again = examine(
        reconstruct(loaded.params, loaded.config, loaded.normalizer, held_out), loaded.config, loaded.normalizer
    )
    assert again.errors == report.errors


def test_training_an_already_finished_run_changes_nothing(config, straight):
    before = (straight[0] / "checkpoint" / "model.safetensors").read_bytes()
    train_tokenizer(config, straight[0])
    assert (straight[0] / "checkpoint" / "model.safetensors").read_bytes() == before


def test_a_folder_holds_one_run(config, straight):
    other = config.model_copy(update={"learning_rate": 5e-4, "steps": 13})
    with pytest.raises(ConfigError, match="different: learning_rate, steps"):
        train_tokenizer(other, straight[0])


def test_not_a_number_stops_the_run(config, tmp_path):
    with pytest.raises(DataError, match="not a number"):
        train_tokenizer(config.model_copy(update={"learning_rate": 1e30, "gradient_clip": 1e30}), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 128}, ConfigError, "fewer chunks than one batch"),
        ({"batch_size": 12}, ConfigError, "does not divide over the devices"),
        ({"actions": ActionsConfig(file="nowhere.npy")}, DataError, "nowhere.npy"),
    ],
)
def test_bad_input(config, tmp_path, eight_devices, changes, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(config.model_copy(update=changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_file_of_chunks(config, tmp_path):
    path = tmp_path / "chunks.npy"
    np.save(path, smooth_chunks(30, 3))
    train, held_out = stage.load_actions(ActionsConfig(file=str(path), held_out=10), config.model)
    assert (len(train), len(held_out)) == (20, 10)
    with pytest.raises(DataError, match="no chunks left to train on"):
        stage.load_actions(ActionsConfig(file=str(path), held_out=30), config.model)
    np.save(path, np.zeros((0, 24, 20), np.float32))
    with pytest.raises(DataError, match=r"chunks\.npy"):
        stage.load_actions(ActionsConfig(file=str(path), held_out=10), config.model)


def test_every_epoch_sees_every_chunk_once(config):
    trainer = stage._Trainer(config, np.arange(64, dtype=np.float32)[:, None, None] * np.ones((1, 24, 20), np.float32))
    batches = trainer._batches(0)
    epochs = [np.sort(np.concatenate([next(batches)[:, 0, 0] for _ in range(4)])) for _ in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(epoch, np.arange(64))
    later = trainer._batches(5)
    fresh = trainer._batches(0)
    for _ in range(5):
        next(fresh)
    np.testing.assert_array_equal(next(later), next(fresh))


def test_shipped_config_is_valid():
    config = load_config(TokenizerTrainingConfig, "train/tokenizer.yaml", ["steps=7", "warmup_steps=1"])
    assert config.steps == 7
    assert config.model.num_tokens == 27


@pytest.mark.slow
def test_stated_quality_from_scratch(tmp_path):
    """20,000 smooth chunks, the shipped config: the numbers that docs/tokenizer.md states, on held-out chunks."""
    config = load_config(TokenizerTrainingConfig, "train/tokenizer.yaml")
    assert config.actions.synthetic is not None
    assert config.actions.synthetic.chunks == 20_000
    report = train_tokenizer(config, tmp_path / "run")
    for arm in ("both", "right", "left"):
        assert report.errors["position_mm"][arm]["p50"] <= 2.0
        assert report.errors["rotation_deg"][arm]["p50"] <= 1.0
        assert report.errors["width_mm"][arm]["p50"] <= 1.0
    for levels in report.code_use.values():
        assert min(levels) >= 0.6
