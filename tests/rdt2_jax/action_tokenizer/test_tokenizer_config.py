"""Published configurations: read, written, and refused with the file and key in the message."""

from __future__ import annotations

import json

import pytest

from rdt2_jax.action_tokenizer.config import (
    ActionTokenizerConfig,
    Levels,
    read_published_config,
    write_published_config,
)
from rdt2_jax.action_tokenizer.tokenizer import param_specs
from rdt2_jax.errors import CheckpointError, ConfigError
from rdt2_jax.params import count_parameters

PUBLISHED = {
    "cnn_config": {"hidden_size": 64, "output_size": 64, "dropout": 0.0},
    "embedding_dim": 8,
    "num_embeddings": 1024,
    "n_codebooks": {"grip": 1, "pos": 6, "rot": 2},
}


def write(tmp_path, **changes):
    values = {key: value for key, value in (PUBLISHED | changes).items() if value is not None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def test_round_trip(tmp_path):
    config = ActionTokenizerConfig(
        hidden_size=24, latent_size=40, embedding_dim=12, num_codes=77, levels=Levels(pos=5, rot=3, grip=1)
    )
    write_published_config(config, tmp_path / "config.json")
    assert read_published_config(tmp_path / "config.json") == config


def test_token_layout():
    config = ActionTokenizerConfig(hidden_size=8, latent_size=8, embedding_dim=4)
    assert config.num_tokens == 27
    assert [config.token_slice(group) for group in ("pos", "rot", "grip")] == [
        slice(0, 18),
        slice(18, 24),
        slice(24, 27),
    ]


def test_other_split_and_length():
    config = ActionTokenizerConfig(
        hidden_size=8, latent_size=8, embedding_dim=4, levels=Levels(pos=5, rot=3, grip=1), chunk_length=40
    )
    assert config.num_tokens == 5 * 9
    assert config.token_slice("rot") == slice(25, 40)


def test_parameter_counts():
    """27,331,292 elements are recorded for hidden 64; the published file has 435M at hidden 256."""
    real = ActionTokenizerConfig(hidden_size=64, latent_size=64, embedding_dim=8)
    codebooks = 9 * 1024 * 8
    assert count_parameters(param_specs(real).networks) + codebooks == 27_331_292
    published = ActionTokenizerConfig(hidden_size=256, latent_size=256, embedding_dim=32)
    assert round(count_parameters(param_specs(published).networks) / 1e6) == 435


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeding_dim": 8}, "unknown key 'embeding_dim', did you mean 'embedding_dim'"),
        ({"cnn_config": {"hidden_size": 64, "output_size": 64, "drop": 0}}, "unknown key 'cnn_config.drop'"),
        ({"embedding_dim": None}, "missing key 'embedding_dim'"),
        ({"num_embeddings": 0}, "'num_embeddings'.*found 0"),
        ({"n_codebooks": [6, 2, 1]}, "'n_codebooks'"),
        ({"input_dim": {"pos": 7, "rot": 12, "grip": 2}}, "input_dim"),
        ({"action_horizon": 20}, "multiple of 8"),
    ],
)
def test_bad_values_name_file_and_key(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        read_published_config(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer configuration"):
        read_published_config(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_not_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_published_config(tmp_path / "config.json")
