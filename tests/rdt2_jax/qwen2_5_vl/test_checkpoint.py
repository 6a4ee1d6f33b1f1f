"""Model folders: published weights to ours and back, exactly; loaded anywhere; clear words for what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from small_qwen import small_config

from rdt2_jax.checkpoints import is_checkpoint, read_metadata, save, stored_metadata
from rdt2_jax.errors import CheckpointError, ConfigError, Rdt2Error
from rdt2_jax.params import named_leaves
from rdt2_jax.qwen2_5_vl.checkpoint import LoadedModel, convert, export, load_params
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, read_config, to_published
from rdt2_jax.qwen2_5_vl.model import param_specs
from rdt2_jax.sharding import DEFAULT_RULES, make_mesh, replicated, shardings
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table
from rdt2_jax.weights.safetensors_files import SafetensorsFiles
from rdt2_jax.weights.safetensors_writer import write_safetensors
from rdt2_jax.weights.sources import TensorInfo
from rdt2_jax.weights.table import bind

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = small_config()
LAYERS = CONFIG.text.num_layers
SMALL_FILES = {"tokenizer.json": b'{"version": "1.0"}', "merges.txt": b"a b\n", "preprocessor_config.json": b"{}"}


def published_infos(config: Qwen25VLConfig) -> list[TensorInfo]:
    """Every published tensor of a model, under its older name, in bfloat16."""
    bindings = bind(qwen2_5_vl_table(config), param_specs(config)).bindings
    shapes = {slot.names[0]: binding.source_shape for binding in bindings for slot in binding.slots}
    return [TensorInfo(name, BF16, shape) for name, shape in shapes.items()]


def published_tensors() -> dict[str, np.ndarray]:
    """Every published tensor; the bits are random, and not all of them are finite numbers."""
    random = np.random.default_rng(0)
    return {
        info.name: np.frombuffer(random.bytes(info.nbytes), BF16).reshape(info.shape)
        for info in published_infos(CONFIG)
    }


def finite(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same names and shapes with ordinary values."""
    random = np.random.default_rng(1)
    return {name: random.standard_normal(array.shape, np.float32).astype(BF16) for name, array in tensors.items()}


def newer_names(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def write_folder(
    folder: Path, tensors: dict[str, np.ndarray], shard_bytes: int | None = None, config: Any = CONFIG
) -> Path:
    """A published model folder."""
    folder.mkdir(parents=True)
    infos = [TensorInfo(name, array.dtype, array.shape) for name, array in tensors.items()]
    path = folder / "model.safetensors" if shard_bytes is None else folder
    write_safetensors(path, infos, tensors.__getitem__, metadata={"format": "pt"}, max_shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps(to_published(config, "bfloat16")))
    for name, content in SMALL_FILES.items():
        (folder / name).write_bytes(content)
    return folder


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    with SafetensorsFiles(folder) as files:
        return {name: np.array(files.read(name)) for name in files.tensors}


def assert_same_tensors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def assert_same_params(found: Any, wanted: Any) -> None:
    assert_same_tensors(
        {name: np.asarray(leaf) for name, leaf in named_leaves(found).items()},
        {name: np.asarray(leaf) for name, leaf in named_leaves(wanted).items()},
    )


@dataclasses.dataclass(frozen=True)
class Folders:
    """One model in all its forms; `whole` is what loading the published files gives."""

    tensors: dict[str, np.ndarray]
    sharded: Path
    newer: Path
    converted: Path
    whole: LoadedModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("folders")
    tensors = published_tensors()
    sharded = write_folder(root / "sharded", tensors, 200_000)
    newer = write_folder(root / "newer", {newer_names(name): array for name, array in tensors.items()})
    convert(sharded, root / "converted")
    return Folders(tensors, sharded, newer, root / "converted", load_params(sharded))


@pytest.fixture
def copy(folders: Folders, tmp_path: Path) -> Path:
    """The sharded published folder, to be damaged."""
    return Path(shutil.copytree(folders.sharded, tmp_path / "copy"))


class TestConvert:
    def test_bits_are_kept_and_small_files_come_along(self, folders):
        assert {leaf.dtype for leaf in stored_metadata(folders.converted, "params").values()} == {BF16}
        assert_same_params(load_params(folders.converted).params, folders.whole.params)
        for name, content in SMALL_FILES.items():
            assert (folders.converted / name).read_bytes() == content
        assert read_config(folders.converted) == CONFIG
        assert not list(folders.converted.glob("*.safetensors*"))

    def test_both_namings_give_the_same(self, folders, tmp_path):
        report = convert(folders.newer, tmp_path / "c")
        assert report.loaded.num_tensors == len(folders.tensors)
        assert (report.loaded.ignored, report.loaded.casts) == ({}, {})
        assert report.saved.nbytes == sum(array.nbytes for array in folders.tensors.values())
        assert set(report.files) == {*SMALL_FILES, "config.json"}
        assert_same_params(load_params(tmp_path / "c").params, folders.whole.params)

    def test_progress_counts_every_tensor(self, folders, tmp_path):
        calls: list[tuple[str, int, int]] = []
        report = convert(folders.sharded, tmp_path / "c", progress=lambda *call: calls.append(call))
        assert {name for name, _, _ in calls} == set(folders.tensors)
        assert len(calls) == len(folders.tensors)
        assert calls[-1][1] == calls[-1][2] == report.saved.nbytes

    def test_first_layers(self, folders, tmp_path):
        report = convert(folders.sharded, tmp_path / "c", num_layers=3)
        beyond = [name for name in folders.tensors if name.startswith("model.layers.3.")]
        assert set(report.loaded.ignored) == {*beyond, "model.norm.weight", "lm_head.weight"}
        assert report.loaded.ignored["model.layers.3.mlp.up_proj.weight"] == "only the first 3 layers are wanted"
        assert read_metadata(tmp_path / "c") == {
            "model": "qwen2_5_vl",
            "num_layers": 3,
            "with_head": False,
            "vision": True,
        }
        loaded = load_params(tmp_path / "c")
        assert loaded.config.text.num_layers == 3
        assert (loaded.params.text.norm, loaded.params.text.head) == (None, None)
        assert_same_params(loaded.params, load_params(folders.sharded, num_layers=3).params)

    def test_without_vision(self, folders, tmp_path):
        convert(folders.sharded, tmp_path / "c", vision=False)
        with pytest.raises(CheckpointError, match=r"less of the model(.|\n)*found: 4 layers, norm and head, no vision"):
            load_params(tmp_path / "c")
        params = load_params(tmp_path / "c", vision=False).params
        assert params.vision is None
        assert_same_params(params.text, folders.whole.params.text)

    def test_to_another_dtype(self, tmp_path, folders):
        source = write_folder(tmp_path / "finite", finite(folders.tensors))
        report = convert(source, tmp_path / "c", dtype="float32", num_layers=1, vision=False)
        assert set(report.loaded.casts.values()) == {"bfloat16 -> float32"}
        assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == "float32"
        wide = load_params(tmp_path / "c", vision=False)
        narrow = load_params(tmp_path / "c", vision=False, dtype="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(wide.params)} == {jnp.dtype(jnp.float32)}
        assert set(narrow.report.casts.values()) == {"float32 -> bfloat16"}
        assert narrow.report.nbytes * 2 == wide.report.nbytes
        assert_same_params(narrow.params, load_params(source, num_layers=1, vision=False).params)

    def test_tied_embeddings(self, folders, tmp_path):
        tied = CONFIG.model_copy(update={"text": CONFIG.text.model_copy(update={"tie_embeddings": True})})
        tensors = {name: array for name, array in folders.tensors.items() if name != "lm_head.weight"}
        source = write_folder(tmp_path / "tied", tensors, config=tied)
        convert(source, tmp_path / "c")
        loaded = load_params(tmp_path / "c")
        assert loaded.config == tied
        assert loaded.params.text.head is None
        assert loaded.params.text.norm is not None
        export(tmp_path / "c", tmp_path / "e")
        assert_same_tensors(read_folder(tmp_path / "e"), tensors)

    def test_overwriting(self, folders, tmp_path):
        convert(folders.sharded, tmp_path / "c")
        with pytest.raises(CheckpointError, match=r"the checkpoint exists(.|\n)*overwrite=True"):
            convert(folders.sharded, tmp_path / "c")
        convert(folders.sharded, tmp_path / "c", num_layers=1, overwrite=True)
        assert load_params(tmp_path / "c").config.text.num_layers == 1
        with pytest.raises(CheckpointError, match="only a checkpoint is ever overwritten"):
            convert(folders.sharded, write_folder(tmp_path / "other", folders.tensors), overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "other"]

    def test_only_what_was_converted_is_replaced(self, folders, tmp_path):
        convert(folders.sharded, tmp_path / "c")
        (tmp_path / "c" / "checkpoint-500").mkdir()
        (tmp_path / "c" / "notes.txt").write_text("mine")
        with pytest.raises(CheckpointError, match=r"other things in it(.|\n)*found: checkpoint-500, notes.txt"):
            convert(folders.sharded, tmp_path / "c", num_layers=1, overwrite=True)
        assert (tmp_path / "c" / "notes.txt").read_text() == "mine"
        assert load_params(tmp_path / "c").config.text.num_layers == LAYERS

    def test_converted_weights_are_not_converted_again(self, folders, tmp_path):
        with pytest.raises(CheckpointError, match="converted already"):
            convert(folders.converted, tmp_path / "c")

    @pytest.mark.parametrize("num_layers", [0, -1, LAYERS + 1])
    def test_impossible_layers(self, folders, tmp_path, num_layers):
        with pytest.raises(ConfigError, match=r"cannot have so many layers(.|\n)*expected: 1 to 4"):
            convert(folders.sharded, tmp_path / "c", num_layers=num_layers)
        for folder in (folders.sharded, folders.converted):
            with pytest.raises((ConfigError, CheckpointError), match=r"so many layers|less of the model"):
                load_params(folder, num_layers=num_layers)
        assert list(tmp_path.iterdir()) == []


class TestTwoFolders:
    """A model never goes over its own source, into it or around it, under whichever name."""

    @pytest.mark.parametrize("way", ["convert", "export"])
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize(
        "place", ["itself", "inside", "deep inside", "around", "far around", "a link", "in a link"]
    )
    def test_source_and_target_are_apart(self, folders, tmp_path, way, overwrite, place):
        root = tmp_path / "work" / "models"
        source = Path(shutil.copytree(folders.sharded if way == "convert" else folders.converted, root / "source"))
        (tmp_path / "link").symlink_to(source, target_is_directory=True)
        target = {
            "itself": source / ".." / "source",
            "inside": source / "converted",
            "deep inside": source / "deep" / "converted",
            "around": root,
            "far around": root.parent,
            "a link": tmp_path / "link",
            "in a link": tmp_path / "link" / "converted",
        }[place]
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match=r"over its own source|into its own source, nor over"):
            (convert if way == "convert" else export)(source, target, overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before

    def test_names_that_begin_alike_are_two_folders(self, folders, tmp_path):
        source = Path(shutil.copytree(folders.sharded, tmp_path / "model"))
        convert(source, tmp_path / "model-converted")
        assert_same_params(load_params(tmp_path / "model-converted").params, folders.whole.params)

    @pytest.mark.parametrize("place", ["/proc/model", "/proc/new/model"])
    def test_a_place_where_no_folder_can_be(self, folders, place):
        for way, source in ((convert, folders.sharded), (export, folders.converted)):
            with pytest.raises(Rdt2Error, match=r"a folder cannot be created(.|\n)*that you may write to"):
                way(source, place)


def cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 100)


def reshape(folder: Path) -> None:
    tensors = read_folder(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].T
    infos = [TensorInfo(name, array.dtype, array.shape) for name, array in tensors.items()]
    write_safetensors(folder, infos, tensors.__getitem__, max_shard_bytes=200_000)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


WRONG: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "a missing shard": (
        lambda folder: sorted(folder.glob("*.safetensors"))[2].unlink(),
        CheckpointError,
        r"files of a model are missing(.|\n)*model-00003-of",
    ),
    "a file cut off": (cut, CheckpointError, r"header of a safetensors file is wrong(.|\n)*the file has"),
    "another shape": (
        reshape,
        CheckpointError,
        r"model.layers.2.mlp.up_proj.weight is \(64, 128\), \(128, 64\) is needed",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        CheckpointError,
        r"files of a model are missing(.|\n)*config.json",
    ),
    "another model": (
        lambda folder: edit_config(folder, model_type="llama"),
        ConfigError,
        r"not the configuration of a Qwen2.5-VL(.|\n)*found: llama",
    ),
    "no weights": (
        lambda folder: [file.unlink() for file in folder.glob("*.safetensors*")],
        CheckpointError,
        r"no weights in the folder(.|\n)*model.safetensors(.|\n)*found: config.json",
    ),
    "pickles alone": (
        lambda folder: [
            *[file.unlink() for file in folder.glob("*.safetensors*")],
            (folder / "pytorch_model.bin").write_bytes(b"x"),
        ],
        CheckpointError,
        r"no weights in the folder(.|\n)*pytorch_model.bin",
    ),
    "two sets of weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
        CheckpointError,
        "two sets of weights in one folder",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_source_is_said(copy, tmp_path, kind):
    damage, error, message = WRONG[kind]
    damage(copy)
    with pytest.raises(error, match=message):
        convert(copy, tmp_path / "c")
    with pytest.raises(error, match=message):
        load_params(copy)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


class TestLoad:
    @pytest.mark.parametrize("kind", ["sharded", "converted"])
    @pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
    def test_shards_go_straight_to_a_mesh(self, folders, eight_devices, kind, axes):
        mesh = make_mesh(axes, eight_devices)
        places: list[Any] = []

        def place(specs: Any) -> Any:
            places.append(shardings(specs, DEFAULT_RULES, mesh)[0])
            return places[0]

        loaded = load_params(getattr(folders, kind), shardings=place)
        assert_same_params(loaded.params, folders.whole.params)
        for name, leaf in named_leaves(loaded.params).items():
            assert leaf.sharding == named_leaves(places[0])[name], name
        embedding = loaded.params.text.embedding.addressable_shards[0].data
        assert embedding.shape == (512 // mesh.shape["tensor"], 64 // mesh.shape["fsdp"])

    @pytest.mark.parametrize("kind", ["sharded", "converted"])
    def test_one_sharding_for_all(self, folders, eight_devices, kind):
        everywhere = replicated(make_mesh({"data": 8}, eight_devices))
        params = load_params(getattr(folders, kind), shardings=everywhere, num_layers=2).params
        assert all(leaf.sharding.is_equivalent_to(everywhere, leaf.ndim) for leaf in jax.tree.leaves(params))

    def test_first_layers_of_a_whole_conversion(self, folders, eight_devices):
        mesh = make_mesh({"fsdp": 4, "tensor": 2}, eight_devices)
        loaded = load_params(
            folders.converted, num_layers=2, shardings=lambda specs: shardings(specs, DEFAULT_RULES, mesh)[0]
        )
        published = load_params(folders.sharded, num_layers=2)
        assert loaded.config == published.config == CONFIG.with_layers(2)
        assert_same_params(loaded.params, published.params)
        layers = named_leaves(loaded.params.text.layers).values()
        assert all(len(leaf.sharding.device_set) == 8 and leaf.shape[0] == 2 for leaf in layers)
        assert any(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in layers)
        wide = load_params(
            folders.converted,
            num_layers=2,
            vision=False,
            dtype=jnp.float32,
            shardings=lambda specs: shardings(specs, DEFAULT_RULES, mesh)[0],
        )
        for name, leaf in named_leaves(wide.params.text).items():
            assert leaf.dtype == jnp.float32
            assert leaf.sharding == named_leaves(loaded.params.text)[name].sharding
        assert loaded.report.ignored == {"text.norm": "not asked for", "text.head": "not asked for"}

    def test_progress_and_report(self, folders):
        calls: list[tuple[str, int, int]] = []
        report = load_params(folders.converted, progress=lambda *call: calls.append(call)).report
        assert report.nbytes == folders.whole.report.nbytes == calls[-1][1] == calls[-1][2]
        assert [name for name, _, _ in calls] == sorted(named_leaves(folders.whole.params))
        assert (report.ignored, report.casts) == ({}, {})
        assert report.largest_leaf_bytes == max(leaf.nbytes for leaf in jax.tree.leaves(folders.whole.params))

    def test_more_than_there_is(self, folders, tmp_path):
        convert(folders.sharded, tmp_path / "c", num_layers=2)
        with pytest.raises(CheckpointError, match=r"less of the model(.|\n)*expected: 3 layers(.|\n)*found: 2 layers"):
            load_params(tmp_path / "c", num_layers=3)

    def test_a_configuration_of_another_model(self, folders):
        text = CONFIG.text.model_copy(update={"intermediate_size": 256})
        with pytest.raises(CheckpointError, match=r"3 problems(.|\n)*text.layers.mlp.down.\w+: stored shape \(4, "):
            load_params(folders.converted, CONFIG.model_copy(update={"text": text}))
        with pytest.raises(CheckpointError, match=r"more layers than its configuration(.|\n)*at most 3"):
            load_params(folders.converted, CONFIG.with_layers(3))

    def test_a_checkpoint_of_something_else(self, tmp_path):
        save(tmp_path / "c", {"params": {"w": jnp.ones(2)}}, {})
        with pytest.raises(CheckpointError, match=r"files of a model are missing(.|\n)*config.json"):
            load_params(tmp_path / "c")
        (tmp_path / "c" / "config.json").write_text(json.dumps(to_published(CONFIG)))
        with pytest.raises(CheckpointError, match="not the parameters of a Qwen2"):
            load_params(tmp_path / "c")

    def test_two_kinds_of_weights_in_one_folder(self, folders, tmp_path):
        both = Path(shutil.copytree(folders.converted, tmp_path / "both"))
        shutil.copy(folders.newer / "model.safetensors", both)
        with pytest.raises(CheckpointError, match=r"two sets of weights(.|\n)*model.safetensors and Orbax items"):
            load_params(both)

    @pytest.mark.parametrize("kind", ["sharded", "converted"])
    def test_dtypes_that_are_none(self, folders, kind):
        for dtype in ("int8", "source", "half a float"):
            with pytest.raises(CheckpointError, match=r"only floating leaves"):
                load_params(getattr(folders, kind), dtype=dtype)

    def test_values_that_a_dtype_cannot_hold(self, folders, tmp_path):
        tensors = {name: np.full_like(array, 1e5) for name, array in folders.tensors.items()}
        source = write_folder(tmp_path / "large", tensors)
        convert(source, tmp_path / "c")
        for folder in (source, tmp_path / "c"):
            with pytest.raises(CheckpointError, match=r"values do not fit the dtype(.|\n)*float16"):
                load_params(folder, dtype="float16", num_layers=1, vision=False)


class TestExport:
    def test_published_tensors_come_back(self, folders, tmp_path):
        report = export(folders.converted, tmp_path / "single")
        assert_same_tensors(read_folder(tmp_path / "single"), folders.tensors)
        assert report.files == (tmp_path / "single" / "model.safetensors",)
        for name, content in SMALL_FILES.items():
            assert (tmp_path / "single" / name).read_bytes() == content
        config = (folders.sharded / "config.json").read_bytes()
        assert (tmp_path / "single" / "config.json").read_bytes() == config
        assert not is_checkpoint(tmp_path / "single")

    def test_in_shards(self, folders, tmp_path):
        report = export(folders.converted, tmp_path / "shards", max_shard_bytes=200_000)
        assert report.files[0].name.startswith("model-00001-of-0000")
        assert report.files[-1].name == "model.safetensors.index.json"
        assert all(path.parent == tmp_path / "shards" and path.is_file() for path in report.files)
        assert_same_tensors(read_folder(tmp_path / "shards"), folders.tensors)

    def test_overwriting(self, folders, tmp_path):
        target = write_folder(tmp_path / "target", {"x": np.zeros(2, np.float32)})
        with pytest.raises(CheckpointError, match=r"the target exists(.|\n)*overwrite=True"):
            export(folders.converted, target)
        export(folders.converted, target, overwrite=True)
        assert_same_tensors(read_folder(target), folders.tensors)
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "notes").write_text("mine")
        with pytest.raises(CheckpointError, match="only a folder with safetensors is overwritten"):
            export(folders.converted, tmp_path / "work", overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "work"]

    @pytest.mark.parametrize("name", ["checkpoint-500/", "episode.bin", "notes.txt", "adapter.safetensors", ".cache/"])
    def test_only_a_published_model_is_replaced(self, folders, tmp_path, name):
        target = write_folder(tmp_path / "target", {"x": np.zeros(2, np.float32)})
        stranger = target / name
        if name.endswith("/"):
            stranger.mkdir()
        else:
            stranger.write_bytes(b"mine")
        before = sorted(target.iterdir())
        with pytest.raises(CheckpointError, match=rf"other things in it(.|\n)*found: {name}\n"):
            export(folders.converted, target, overwrite=True)
        assert sorted(target.iterdir()) == before
        assert set(read_folder(target)) == {"x"}

    def test_small_files_of_its_own_do_not_hinder_a_model(self, folders, tmp_path):
        source = write_folder(tmp_path / "source", folders.tensors)
        (source / "args.json").write_text("{}")
        convert(source, tmp_path / "c")
        for _ in range(2):
            export(tmp_path / "c", tmp_path / "e", overwrite=True)
        assert (tmp_path / "e" / "args.json").is_file()

    def test_part_of_a_model(self, folders, tmp_path):
        convert(folders.sharded, tmp_path / "c", num_layers=LAYERS)
        with pytest.raises(CheckpointError, match=r"less of the model(.|\n)*found: 4 layers, no norm, no head, a vis"):
            export(tmp_path / "c", tmp_path / "e")

    def test_published_weights(self, folders, tmp_path):
        with pytest.raises(CheckpointError, match="published ones already"):
            export(folders.sharded, tmp_path / "e")


@pytest.mark.torch_peer
class TestPeer:
    """transformers writes, and reads what comes back."""

    def test_transformers_loads_the_export_and_computes_the_same(self, tmp_path):
        import torch
        from tiny_qwen import make_peer, make_prompts, peer_stages, save_peer
        from transformers import Qwen2_5_VLForConditionalGeneration

        peer = make_peer().to(torch.bfloat16)
        save_peer(peer, tmp_path / "old", max_shard_size="200KB")
        save_peer(peer, tmp_path / "new", newer_names=True)
        for naming in ("old", "new"):
            convert(tmp_path / naming, tmp_path / f"converted-{naming}")
        old, new = (load_params(tmp_path / f"converted-{naming}").params for naming in ("old", "new"))
        assert_same_params(old, new)
        export(tmp_path / "converted-new", tmp_path / "back", max_shard_bytes=300_000)
        models = {}
        for folder in ("old", "back"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                models[folder], info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                    tmp_path / folder, output_loading_info=True, local_files_only=True
                )
            assert not any(info.values()), info
        theirs, ours = (dict(model.named_parameters()) for model in models.values())
        assert theirs.keys() == ours.keys() == dict(peer.named_parameters()).keys()
        for name, parameter in peer.named_parameters():
            assert ours[name].dtype == torch.bfloat16
            assert torch.equal(parameter.view(torch.int16), ours[name].view(torch.int16)), name
        prompts = make_prompts((1, 4, 4))
        before, after = (peer_stages(model.eval(), prompts)["logits"] for model in models.values())
        assert np.abs(before).max() > 1
        np.testing.assert_array_equal(after, before)


MIB = 2**20
SLACK = 100 * MIB
"""For compressed chunks on their way to or from the disk, and what the libraries need once. Less than the largest leaf,
so that one more leaf is noticed."""


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, int]]]:
    """`measure(way)`: what conversion_memory.py finds for a model of 430 MB whose three large leaves are 128 MiB each.

    In processes of their own, with one allocation arena for all threads: what threads have freed would otherwise stay
    with the process and be counted, though nothing holds it.
    """
    root = tmp_path_factory.mktemp("memory")
    text = {"vocab_size": 512, "hidden_size": 512, "num_layers": 16, "intermediate_size": 8192}
    vision = CONFIG.vision.model_copy(update={"out_hidden_size": 512})
    text = CONFIG.text.model_copy(update={**text, "mrope_sections": (16, 24, 24)})
    config = CONFIG.model_copy(update={"text": text, "vision": vision})
    random = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        return np.frombuffer(random.bytes(infos[name].nbytes), BF16).reshape(infos[name].shape)

    infos = {info.name: info for info in published_infos(config)}
    (root / "published").mkdir()
    write_safetensors(root / "published", list(infos.values()), read, max_shard_bytes=100_000_000)
    (root / "published" / "config.json").write_text(json.dumps(to_published(config, "bfloat16")))

    @functools.cache
    def run(way: str) -> dict[str, int]:
        result = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "conversion_memory.py"), str(root), way],
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    yield run
    shutil.rmtree(root)


def assert_bounded(measured: dict[str, int], bound: int, control: dict[str, int]) -> None:
    """Fails unless the growth is within the bound, and that of the control is not."""
    growth, bound, too_much = (round(number / MIB) for number in (measured["growth"], bound + SLACK, control["growth"]))
    assert growth <= bound, f"grew by {growth} MiB, the bound is {bound} MiB"
    assert too_much > bound, f"what holds too much grew by {too_much} MiB, and the bound of {bound} MiB lets it pass"


def test_converting_holds_one_group_and_one_tensor(measure):
    converting = measure("convert")
    assert converting["nbytes"] > 400 * MIB
    assert SLACK < converting["part"] == converting["leaf"] == 128 * MIB
    assert_bounded(converting, converting["part"] + converting["tensor"], measure("convert at once"))


@pytest.mark.slow
def test_exporting_holds_one_leaf_and_its_compressed_form(measure):
    leaf = measure("convert")["leaf"]
    assert_bounded(measure("export"), 2 * leaf, measure("load at once"))


@pytest.mark.slow
def test_loading_holds_the_model_and_one_compressed_leaf(measure):
    leaf, loading = measure("convert")["leaf"], measure("load")
    assert_bounded(loading, loading["nbytes"] + leaf, measure("load at once"))
