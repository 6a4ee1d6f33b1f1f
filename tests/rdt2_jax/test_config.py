"""Typed configurations: found anywhere, overridden by key, refused with file and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from rdt2_jax import config as config_module
from rdt2_jax.config import FrozenConfig, dump_config, find_config, load_config, parse_config
from rdt2_jax.errors import ConfigError


class Optimizer(FrozenConfig):
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


class Run(FrozenConfig):
    steps: int = Field(ge=1)
    optimizer: Optimizer = Optimizer()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_reads_nested_values(tmp_path):
    run = load_config(Run, write(tmp_path, "steps: 5\noptimizer: {learning_rate: 1e-4, betas: [0.8, 0.9]}\n"))
    assert run == Run(steps=5, optimizer=Optimizer(learning_rate=1e-4, betas=(0.8, 0.9)))
    assert hash(run) == hash(load_config(Run, tmp_path / "run.yaml"))
    with pytest.raises(ValueError, match="frozen"):
        run.steps = 6  # pyright: ignore


def test_overrides_win(tmp_path):
    path = write(tmp_path, "steps: 5\n")
    run = load_config(Run, path, ["steps=7", "optimizer.learning_rate=3e-4"])
    assert (run.steps, run.optimizer.learning_rate) == (7, 3e-4)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("steps: 5\noptimiser: {}\n", [], r"unknown key 'optimiser', did you mean 'optimizer'"),
        ("steps: 5\noptimizer: {lr: 1}\n", [], r"unknown key 'optimizer\.lr', known keys: betas, learning_rate"),
        ("optimizer: {}\n", [], "missing key 'steps'"),
        ("steps: 0\n", [], "'steps'.*found 0"),
        ("steps: many\n", [], "'steps'.*found 'many'"),
        ("steps: .nan\n", [], "'steps'"),
        ("steps: 5\nsteps: 6\n", [], "duplicate key 'steps'"),
        ("steps: [\n", [], "not a readable YAML"),
        ("? [a, b]\n: 5\n", [], "a key must be a word"),
        ("- 5\n", [], "must be a mapping"),
        ("steps: 5\n", ["steps"], r"key\.sub=value"),
        ("steps: 5\n", ["steps.more=1"], "has no keys"),
        ("steps: 5\n", ["steps=["], "not YAML"),
        ("", [], "missing key 'steps'"),
    ],
)
def test_problems_name_the_key(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Run, write(tmp_path, text), overrides)


def test_all_problems_come_at_once_with_the_file(tmp_path):
    path = write(tmp_path, "steps: 0\noptimizer: {lr: 1}\n")
    with pytest.raises(ConfigError, match="2 problems") as caught:
        load_config(Run, path)
    assert str(path) in str(caught.value)


def test_find_config_by_path_name_and_packaged_copy(tmp_path, monkeypatch):
    assert find_config(write(tmp_path, "steps: 1\n")) == tmp_path / "run.yaml"
    by_name = find_config("train/tokenizer.yaml")
    assert find_config("configs/train/tokenizer.yaml").samefile(by_name)
    packaged = tmp_path / "packaged"
    (packaged / "train").mkdir(parents=True)
    (packaged / "train" / "tokenizer.yaml").write_text("steps: 1\n")
    monkeypatch.setattr(config_module, "_REPOSITORY", tmp_path / "absent")
    monkeypatch.setattr(config_module, "_PACKAGED_CONFIGS", packaged)
    monkeypatch.chdir(tmp_path)
    assert find_config("train/tokenizer.yaml") == packaged / "train" / "tokenizer.yaml"


def test_unknown_config_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"did you mean train/tokenizer\.yaml"):
        find_config("train/tokeniser.yaml")


def test_dump_round_trips():
    run = Run(steps=3, optimizer=Optimizer(learning_rate=2e-5))
    assert Run.model_validate_json(dump_config(run)) == run


def test_parse_reports_the_origin_it_is_given():
    with pytest.raises(ConfigError, match="where: request 7"):
        parse_config(Run, {}, where="request 7")
