"""`rdt2 convert weights`: there and back, a summary for people and one for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from small_qwen import small_config, small_params

from rdt2_jax.commands.convert import convert
from rdt2_jax.errors import CheckpointError, Rdt2Error
from rdt2_jax.qwen2_5_vl.checkpoint import load_params
from rdt2_jax.qwen2_5_vl.flax_module import Qwen25VL
from rdt2_jax.weights.safetensors_files import SafetensorsFiles

CONFIG = small_config().with_layers(2)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small float32 model."""
    folder = tmp_path_factory.mktemp("folders") / "published"
    Qwen25VL(CONFIG, small_params(CONFIG)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(convert, ["weights", *map(str, arguments)])


def document(*arguments: Any) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_there_and_back(published, tmp_path):
    there = document(published, tmp_path / "c")
    assert there["files"] == ["config.json", "tokenizer.json"]
    assert (there["ignored"], there["casts"], there["parts"]) == ({}, {}, 1)
    back = document(tmp_path / "c", tmp_path / "back", "--to-safetensors")
    assert (back["tensors"], back["bytes"]) == (there["tensors"], there["bytes"])
    assert back["files"] == ["model.safetensors"]
    assert back["seconds"] >= 0
    with SafetensorsFiles(published) as old, SafetensorsFiles(tmp_path / "back") as new:
        assert set(old.tensors) == set(new.tensors)
        for name in old.tensors:
            np.testing.assert_array_equal(new.read(name), old.read(name))


def test_shards(published, tmp_path):
    document(published, tmp_path / "c")
    back = document(tmp_path / "c", tmp_path / "back", "--to-safetensors", "--max-shard-gb", "2e-4")
    assert len(back["files"]) > 2
    assert sorted(path.name for path in (tmp_path / "back").glob("*.safetensors*")) == sorted(back["files"])


def test_part_of_a_model_in_another_dtype(published, tmp_path):
    result = run(published, tmp_path / "c", "--num-layers", 1, "--no-vision", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'c'}: 13 tensors" in result.output
    assert "12 tensors ignored: only the first 1 layers are wanted" in result.output
    assert "2 tensors ignored: only keys and values are wanted" in result.output
    assert "tensors ignored: the vision tower is not wanted" in result.output
    assert "13 of 13 leaves converted to another dtype" in result.output
    assert "config.json, tokenizer.json" in result.output
    params = load_params(tmp_path / "c", vision=False).params
    assert params.text.embedding.dtype == jnp.bfloat16
    assert params.text.layers.mlp_norm.shape == (1, 64)


def test_overwriting_has_to_be_asked_for(published, tmp_path):
    document(published, tmp_path / "c")
    refused = run(published, tmp_path / "c")
    assert isinstance(refused.exception, CheckpointError)
    assert "the checkpoint exists" in str(refused.exception)
    document(published, tmp_path / "c", "--overwrite")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to-safetensors", "--num-layers", "1"], "belong to the way in"),
        (["--to-safetensors", "--dtype", "float32"], "belong to the way in"),
        (["--max-shard-gb", "1"], "--max-shard-gb belongs to --to-safetensors"),
        (["--num-layers", "0"], "0 is not in the range"),
        (["--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_options_that_make_no_sense(published, tmp_path, options, message):
    result = run(published, tmp_path / "c", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_nowhere(tmp_path):
    result = run("./nowhere", tmp_path / "c")
    assert isinstance(result.exception, CheckpointError)
    assert "not a model folder, and not a name on the hub" in str(result.exception)


def test_a_place_where_nothing_can_be_written(published):
    result = run(published, "/proc/model")
    assert isinstance(result.exception, Rdt2Error)
    assert "a folder cannot be created" in str(result.exception)
    assert "where: /proc/model" in str(result.exception)
