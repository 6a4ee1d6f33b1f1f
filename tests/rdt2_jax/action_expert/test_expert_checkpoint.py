"""Published expert folders: both kinds of weights, the way back, and refusals with names."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from rdt2_jax.action_expert.checkpoint import LoadedExpert, load_expert, save_expert
from rdt2_jax.action_expert.config import preset
from rdt2_jax.action_expert.model import unstacked
from rdt2_jax.commands.convert import convert
from rdt2_jax.errors import CheckpointError, Rdt2Error
from rdt2_jax.weights.action_expert import unused_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "rdt_tiny"
UNUSED = ("cond_norm.weight", "cross_attn.wkv.weight", "cross_attn.norm_k.weight")


@pytest.fixture
def folder(golden_expert_folder: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(golden_expert_folder, tmp_path / "copy"))


def change(folder: Path, changes: dict) -> None:
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")


def test_torch_file_gives_the_same(folder: Path, golden_expert: LoadedExpert) -> None:
    (folder / "model.safetensors").unlink()
    shutil.copy(GOLDEN / "pytorch_model.bin", folder)
    chex.assert_trees_all_equal(load_expert(folder).params, golden_expert.params)


def test_every_published_tensor_is_used_or_known_not_to_be(golden_expert: LoadedExpert) -> None:
    report = golden_expert.report
    assert report is not None
    published = load_file(GOLDEN / "model.safetensors")
    assert set(report.ignored) == {name for name in published if name.endswith(UNUSED)}
    assert report.num_tensors + len(report.ignored) == len(published)


def test_round_trip(golden_expert: LoadedExpert, tmp_path: Path) -> None:
    """Everything comes back bit for bit but what nothing reads, which is there in its shape."""
    save_expert(golden_expert, tmp_path / "new")
    chex.assert_trees_all_equal(load_expert(tmp_path / "new").params, golden_expert.params)
    ours, theirs = load_file(tmp_path / "new" / "model.safetensors"), load_file(GOLDEN / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype)
        if not name.endswith(UNUSED):
            np.testing.assert_array_equal(ours[name], value)
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == json.loads(
        (GOLDEN / "config.json").read_text()
    )


def test_dtypes(folder: Path, golden_expert: LoadedExpert, tmp_path: Path) -> None:
    half = load_expert(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    save_expert(half, tmp_path / "half")
    again = load_expert(tmp_path / "half")
    chex.assert_trees_all_equal(again.params, half.params)
    assert golden_expert.params.registers.dtype == jnp.float32


def test_names_shapes_and_missing_tensors_are_reported_together(folder: Path) -> None:
    spoilt = {
        "model.blocks.2.attn.wq.weight": None,
        "model.register_tokens": np.zeros((1, 3, 64), np.float32),
        "model.extra": np.zeros(1, np.float32),
    }
    change(folder, spoilt)
    with pytest.raises(CheckpointError) as error:
        load_expert(folder)
    for name in spoilt:
        assert name in str(error.value)


def test_another_shape_than_the_configuration_says(folder: Path) -> None:
    config = preset("tiny").model_copy(update={"num_layers": 3, "condition_layers": (0, 1, 2)})
    with pytest.raises(CheckpointError, match=r"model\.blocks\.3"):
        load_expert(folder, config)


def test_safetensors_go_before_the_torch_file(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text("never read")
    assert load_expert(folder).config == preset("tiny")
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights in the folder"):
        load_expert(folder)


@pytest.mark.parametrize(
    "has", [("model.safetensors",), ("pytorch_model.bin",), ("model.safetensors", "pytorch_model.bin")]
)
def test_an_expert_on_the_hub(
    has: tuple[str, ...], golden_expert: LoadedExpert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published repository has a torch file, which is fetched only where there is nothing better."""

    def snapshot_download(repository: str, **options: Any) -> str:
        assert repository == "organisation/expert"
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for name in ("config.json", *has):
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in options["allow_patterns"])
            if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in options["ignore_patterns"]):
                shutil.copy(GOLDEN / name, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = load_expert("organisation/expert")
    chex.assert_trees_all_equal(found.params, golden_expert.params)
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {"config.json", has[0]}


def test_a_torch_file_that_would_run_code_is_refused(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"x": Payload()}, protocol=2))
        archive.writestr("m/version", "3\n")
        archive.writestr("m/byteorder", "little")
    with pytest.raises(Rdt2Error):
        load_expert(folder)
    assert not (tmp_path / "executed").exists()


def test_saving_never_deletes_what_is_not_its_own(golden_expert: LoadedExpert, tmp_path: Path) -> None:
    target = tmp_path / "expert"
    assert save_expert(golden_expert, target).files == (target / "model.safetensors",)
    with pytest.raises(CheckpointError, match="exists"):
        save_expert(golden_expert, target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        save_expert(golden_expert, target, overwrite=True)
    (target / "notes.txt").unlink()
    save_expert(golden_expert, target, overwrite=True)
    (target / "config.json").write_text('{"model_type": "something_else"}')
    with pytest.raises(CheckpointError, match="model of the same kind"):
        save_expert(golden_expert, target, overwrite=True)
    assert (target / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="must be stacked"):
        save_expert(dataclasses.replace(golden_expert, params=unstacked(golden_expert.params)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_command(folder: Path, golden_expert: LoadedExpert, tmp_path: Path) -> None:
    """`rdt2 convert expert`: from the torch file to safetensors, with what was done."""
    (folder / "model.safetensors").unlink()
    shutil.copy(GOLDEN / "pytorch_model.bin", folder)
    arguments = ["expert", str(folder), str(tmp_path / "new")]
    result = CliRunner().invoke(convert, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["files"] == ["config.json", "model.safetensors"]
    assert (document["tensors"], len(document["ignored"]), document["casts"]) == (102, 12, {})
    chex.assert_trees_all_equal(load_expert(tmp_path / "new").params, golden_expert.params)
    assert isinstance(CliRunner().invoke(convert, arguments).exception, CheckpointError)
    again = CliRunner().invoke(convert, [*arguments, "--overwrite", "--dtype", "bfloat16"])
    assert "102 tensors" in again.output
    assert "converted to another dtype" in again.output
    assert load_expert(tmp_path / "new").params.registers.dtype == jnp.bfloat16


def test_unused_tensors_are_as_in_a_fresh_model() -> None:
    unused = unused_tensors(preset("tiny"))
    published = load_file(GOLDEN / "model.safetensors")
    assert {name: value.shape for name, value in unused.items()} == {
        name: value.shape for name, value in published.items() if name.endswith(UNUSED)
    }
