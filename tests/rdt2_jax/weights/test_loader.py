"""Published weights into parameters and back: checked first, then streamed, and exact both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import struct

from rdt2_jax.errors import CheckpointError, ConfigError
from rdt2_jax.params import ParamSpec, abstract, named_leaves
from rdt2_jax.sharding import DEFAULT_RULES, make_mesh, replicated, shardings
from rdt2_jax.weights.loader import export, load
from rdt2_jax.weights.ops import heads_in, heads_out, transpose
from rdt2_jax.weights.safetensors_files import SafetensorsFiles
from rdt2_jax.weights.sources import ArraySource
from rdt2_jax.weights.table import Constant, Ignored, Row, Table

LAYERS, EMBED, HEADS, HEAD_DIM, MLP, VOCAB = 3, 8, 4, 2, 16, 24


@struct.dataclass
class Layer:
    """One layer, or all of them stacked."""

    q: Any
    o: Any
    up: Any
    norm: Any


@struct.dataclass
class Model:
    """A toy transformer."""

    embedding: Any
    layers: Layer
    steps: Any
    cursor: Any


def model_specs(dtype: Any = jnp.float32) -> Model:
    return Model(
        embedding=ParamSpec((VOCAB, EMBED), ("vocab", "embed"), dtype=dtype),
        layers=Layer(
            q=ParamSpec((LAYERS, EMBED, HEADS, HEAD_DIM), ("layers", "embed", "heads", "head_dim"), dtype=dtype),
            o=ParamSpec((LAYERS, HEADS, HEAD_DIM, EMBED), ("layers", "heads", "head_dim", "embed"), dtype=dtype),
            up=ParamSpec((LAYERS, EMBED, MLP), ("layers", "embed", "mlp"), dtype=dtype),
            norm=ParamSpec((LAYERS, EMBED), ("layers", None), dtype=dtype),
        ),
        steps=ParamSpec((2,), (None,), dtype=jnp.int32),
        cursor=ParamSpec((), (), dtype=jnp.int32),
    )


TABLE = Table(
    "Toy",
    (
        Row(("model.embed.weight", "lm_head.weight"), "embedding"),
        Row("model.layers.{i}.q_proj.weight", "layers.q", heads_out(HEADS, HEAD_DIM)),
        Row("model.layers.{i}.o_proj.weight", "layers.o", heads_in(HEADS, HEAD_DIM)),
        Row("model.layers.{i}.up_proj.weight", "layers.up", transpose),
        Row("model.layers.{i}.norm.weight", "layers.norm"),
        Row("model.steps", "steps"),
    ),
    ignored=(Ignored("*.inv_freq", "computed from the configuration"),),
    constants=(Constant("cursor", 7, "not published"),),
    prefixes=(("model.language_model.", "model."),),
)


def published(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """All tensors under their published names; no two have equal values."""
    random = np.random.default_rng(0)
    shapes = {"model.embed.weight": (VOCAB, EMBED)}
    for i in range(LAYERS):
        shapes[f"model.layers.{i}.q_proj.weight"] = (HEADS * HEAD_DIM, EMBED)
        shapes[f"model.layers.{i}.o_proj.weight"] = (EMBED, HEADS * HEAD_DIM)
        shapes[f"model.layers.{i}.up_proj.weight"] = (MLP, EMBED)
        shapes[f"model.layers.{i}.norm.weight"] = (EMBED,)
    arrays = {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return {**arrays, "model.steps": np.array([3, -4], np.int32)}


def expected(arrays: dict[str, np.ndarray]) -> Model:
    """The same, written out by hand."""

    def layers(name: str, convert) -> np.ndarray:
        return np.stack([convert(arrays[f"model.layers.{i}.{name}.weight"]) for i in range(LAYERS)])

    return Model(
        embedding=arrays["model.embed.weight"],
        layers=Layer(
            q=layers("q_proj", lambda w: np.moveaxis(w.reshape(HEADS, HEAD_DIM, EMBED), 2, 0)),
            o=layers("o_proj", lambda w: w.T.reshape(HEADS, HEAD_DIM, EMBED)),
            up=layers("up_proj", np.transpose),
            norm=layers("norm", lambda w: w),
        ),
        steps=arrays["model.steps"],
        cursor=np.array(7, np.int32),
    )


class Unreadable(ArraySource):
    """Headers alone: reading any data is a failure of the test."""

    def read(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read")


def problems(arrays: dict[str, np.ndarray], specs: Any = None, **options: Any) -> list[str]:
    """What is reported, before any data is read."""
    with pytest.raises(CheckpointError, match="the weights are not those of a Toy") as error:
        load(TABLE, model_specs() if specs is None else specs, Unreadable(arrays, "toy.pt"), **options)
    assert error.value.where == "toy.pt"
    return [line.strip() for line in str(error.value.found).strip().splitlines()]


class TestLoad:
    def test_values(self):
        arrays = published()
        params, report = load(TABLE, model_specs(), ArraySource(arrays))
        chex.assert_trees_all_equal(params, expected(arrays))
        chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract(model_specs()))
        chex.assert_tree_all_finite(params)
        assert isinstance(params, Model)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
        assert report.num_tensors == len(arrays)
        assert report.nbytes == sum(array.nbytes for array in arrays.values()) + 4
        assert report.largest_leaf_bytes == LAYERS * EMBED * MLP * 4
        assert report.largest_tensor_bytes == VOCAB * EMBED * 4
        assert report.constants == {"cursor": "not published"}
        assert (report.ignored, report.aliases, report.duplicates, report.casts) == ({}, {}, {}, {})

    def test_a_file_and_a_folder_of_shards(self, tmp_path):
        arrays = published()
        safetensors.numpy.save_file(arrays, tmp_path / "toy.safetensors")
        one, _ = load(TABLE, model_specs(), tmp_path / "toy.safetensors")
        chex.assert_trees_all_equal(one, expected(arrays))
        (tmp_path / "shards").mkdir()
        export(TABLE, one, tmp_path / "shards", max_shard_bytes=1000)
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
        several, _ = load(TABLE, model_specs(), str(tmp_path / "shards"))
        chex.assert_trees_all_equal(several, one)

    def test_leaves_share_no_memory_with_buffers_or_source(self):
        """Leaves of equal size would meet in one buffer if it were reused; all are right after the last."""
        count = 6
        specs = {f"w{k}": ParamSpec((64, 64), (None, None)) for k in range(count)}
        arrays = {f"w{k}": np.full((64, 64), k, np.float32) for k in range(count)}
        params, _ = load(Table("Many", tuple(Row(name, name) for name in specs)), specs, ArraySource(arrays))
        for array in arrays.values():
            array[:] = -1
        np.full((count, 64, 64), -2, np.float32)  # would land in memory that was freed too early
        for k in range(count):
            np.testing.assert_array_equal(params[f"w{k}"], np.full((64, 64), k, np.float32))

    def test_leaves_outlive_the_file(self, tmp_path):
        arrays = published()
        path = tmp_path / "toy.safetensors"
        safetensors.numpy.save_file(arrays, path)
        params, _ = load(TABLE, model_specs(), path)
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
        chex.assert_trees_all_equal(params, expected(arrays))

    def test_progress(self):
        calls = []
        _, report = load(TABLE, model_specs(), ArraySource(published()), progress=lambda *call: calls.append(call))
        specs = named_leaves(model_specs())
        assert [name for name, _, _ in calls] == list(specs)
        sizes = [spec.nbytes for spec in specs.values()]
        assert [done for _, done, _ in calls] == np.cumsum(sizes).tolist()
        assert {total for _, _, total in calls} == {sum(sizes)} == {report.nbytes}

    def test_other_spellings_of_a_prefix(self):
        arrays = published()
        renamed = {name.replace("model.", "model.language_model.", 1): array for name, array in arrays.items()}
        params, report = load(TABLE, model_specs(), ArraySource(renamed))
        chex.assert_trees_all_equal(params, expected(arrays))
        assert report.aliases == {}

    def test_ignored_tensors_are_reported_with_their_reason(self):
        arrays = {**published(), "model.language_model.rotary.inv_freq": np.zeros(4, np.float32)}
        _, report = load(TABLE, model_specs(), ArraySource(arrays))
        assert report.ignored == {"model.language_model.rotary.inv_freq": "computed from the configuration"}


class TestAliases:
    def test_either_name(self):
        arrays = published()
        other = dict(arrays)
        other["lm_head.weight"] = other.pop("model.embed.weight")
        params, report = load(TABLE, model_specs(), ArraySource(other))
        chex.assert_trees_all_equal(params, expected(arrays))
        assert report.aliases == {"model.embed.weight": "lm_head.weight"}
        assert report.duplicates == {}

    def test_both_equal(self):
        arrays = published()
        arrays["model.embed.weight"][0, 0] = np.nan  # equal bits count, not equal numbers
        both = {**arrays, "lm_head.weight": arrays["model.embed.weight"].copy()}
        params, report = load(TABLE, model_specs(), ArraySource(both))
        np.testing.assert_array_equal(params.embedding, arrays["model.embed.weight"])
        assert report.duplicates == {"model.embed.weight": "lm_head.weight"}
        assert report.num_tensors == len(arrays)

    @pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
    def test_both_different(self, place):
        arrays = published()
        arrays["lm_head.weight"] = arrays["model.embed.weight"].copy()
        arrays["lm_head.weight"][place] += 1
        with pytest.raises(CheckpointError, match="contradict each other") as error:
            load(TABLE, model_specs(), ArraySource(arrays))
        assert "model.embed.weight and lm_head.weight are one tensor, but differ" in str(error.value)

    def test_equal_numbers_of_another_dtype_are_not_equal(self):
        arrays = published()
        arrays["model.embed.weight"][:] = 1
        arrays["lm_head.weight"] = arrays["model.embed.weight"].astype(np.float16)
        with pytest.raises(CheckpointError, match="contradict each other"):
            load(TABLE, model_specs(), ArraySource(arrays), dtype="specs")


class TestWhatDoesNotFit:
    def test_everything_is_reported_together_and_nothing_is_read(self):
        arrays = published()
        del arrays["model.layers.1.q_proj.weight"]
        del arrays["model.embed.weight"]
        arrays["model.layers.0.up_proj.weight"] = np.zeros((EMBED, MLP), np.float32)  # transposed already
        arrays["model.layers.2.norm.weight"] = np.zeros(EMBED, np.float16)
        arrays["model.steps"] = np.zeros(2, np.float32)
        arrays["model.layers.3.norm.weight"] = np.zeros(EMBED, np.float32)
        arrays["model.language_model.layers.0.norm.weight"] = np.zeros(EMBED, np.float32)
        lines = problems(arrays)
        advice = "; choose with dtype='specs', dtype='source' or a dtype"
        assert sorted(lines) == sorted(
            [
                "tensors model.layers.0.norm.weight and model.language_model.layers.0.norm.weight: "
                "two spellings of one name",
                "missing: model.embed.weight or lm_head.weight, (24, 8) for embedding",
                "missing: model.layers.1.q_proj.weight, (8, 8) for layers.q[1]",
                "shape: model.layers.0.up_proj.weight is (8, 16), (16, 8) is needed for layers.up",
                f"dtype: model.layers.2.norm.weight is float16, layers.norm would be float32{advice}",
                f"dtype: model.steps is float32, steps would be int32{advice}",
                "unexpected: model.layers.3.norm.weight, float32 (8,)",
            ]
        )

    def test_the_message_counts(self):
        with pytest.raises(CheckpointError, match=rf"of this configuration \({len(published())} problems\)"):
            load(TABLE, model_specs(), Unreadable({}))

    def test_a_table_that_does_not_fit_is_found_first(self, tmp_path):
        with pytest.raises(CheckpointError, match="leaf cursor: no row fills it"):
            load(Table("Toy", TABLE.rows), model_specs(), tmp_path / "there is no such file")

    def test_shardings_of_another_tree(self):
        mesh = make_mesh({"data": 1})
        with pytest.raises(ConfigError, match="leaves do not fit the tree"):
            load(TABLE, model_specs(), Unreadable(published()), shardings={"embedding": replicated(mesh)})

    def test_more_layers_in_the_file_than_in_the_model(self):
        specs = jax.tree.map(
            lambda s: s if s.axes[:1] != ("layers",) else ParamSpec((2, *s.shape[1:]), s.axes),
            model_specs(),
            is_leaf=lambda s: isinstance(s, ParamSpec),
        )
        lines = problems(published(), specs)
        assert len(lines) == 4
        assert all(line.startswith("unexpected: model.layers.2.") for line in lines)


class TestDtypes:
    def test_no_silent_cast(self):
        lines = problems(published(ml_dtypes.bfloat16))
        assert len(lines) == 5, "one a leaf, not one a tensor"
        assert all("is bfloat16" in line and "would be float32" in line for line in lines)

    def test_source_keeps_the_dtypes_of_the_file(self):
        arrays = published(ml_dtypes.bfloat16)
        params, report = load(TABLE, model_specs(), ArraySource(arrays), dtype="source")
        chex.assert_trees_all_equal(params, expected(arrays), strict=True)
        assert report.casts == {}
        assert report.largest_leaf_bytes == LAYERS * EMBED * MLP * 2

    def test_source_cannot_mix_within_a_leaf(self):
        arrays = published()
        arrays["model.layers.2.norm.weight"] = arrays["model.layers.2.norm.weight"].astype(np.float16)
        lines = problems(arrays, dtype="source")
        assert lines == ["dtype: model.layers.2.norm.weight is float16, layers.norm would be float32"]

    def test_specs_converts(self):
        arrays = published(ml_dtypes.bfloat16)
        params, report = load(TABLE, model_specs(), ArraySource(arrays), dtype="specs")
        wanted = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x, expected(arrays))
        chex.assert_trees_all_equal(params, wanted, strict=True)
        assert report.casts["layers.q"] == "bfloat16 -> float32"
        assert "steps" not in report.casts

    def test_a_dtype_converts_floating_leaves_alone(self):
        arrays = published()
        params, report = load(TABLE, model_specs(), ArraySource(arrays), dtype=jnp.bfloat16)
        wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x, expected(arrays))
        chex.assert_trees_all_equal(params, wanted, strict=True)
        assert params.steps.dtype == params.cursor.dtype == np.int32
        assert set(report.casts) == {"embedding", "layers.q", "layers.o", "layers.up", "layers.norm"}

    @pytest.mark.parametrize("policy", [None, "source", "specs", jnp.bfloat16])
    def test_floats_never_become_integers_nor_the_reverse(self, policy):
        arrays = published()
        arrays["model.embed.weight"] = np.zeros((VOCAB, EMBED), np.int8)
        arrays["model.steps"] = np.zeros(2, np.float32)
        lines = problems(arrays, dtype=policy)
        assert len(lines) == 2
        assert lines[0].startswith("dtype: model.embed.weight is int8, embedding would be ")
        assert lines[1].startswith("dtype: model.steps is float32, steps would be int32")

    @pytest.mark.parametrize("policy", [jnp.int8, "spec", "sauce", bool])
    def test_other_policies_are_refused(self, policy):
        with pytest.raises(CheckpointError, match="expected: None, 'source', 'specs' or a floating dtype"):
            load(TABLE, model_specs(), Unreadable(published()), dtype=policy)

    def test_jax_would_cut_64_bits(self):
        arrays = published(np.float64)
        lines = problems(arrays, dtype="source")
        assert "dtype: embedding would be float64, which jax cuts to 32 bits" in lines
        params, report = load(TABLE, model_specs(), ArraySource(arrays), dtype="specs")
        np.testing.assert_array_equal(params.embedding, arrays["model.embed.weight"].astype(np.float32))
        assert report.casts["embedding"] == "float64 -> float32"

    @pytest.mark.parametrize("value", [7e4, -7e4])
    def test_values_that_do_not_fit(self, value):
        arrays = published()
        arrays["model.layers.1.norm.weight"][3] = value
        with pytest.raises(CheckpointError, match="values do not fit the dtype") as error:
            load(TABLE, model_specs(), ArraySource(arrays), dtype=jnp.float16)
        assert error.value.where == "model.layers.1.norm.weight"

    def test_integers_that_do_not_fit(self):
        arrays = {**published(), "model.steps": np.array([1, 2**31], np.int64)}
        with pytest.raises(CheckpointError, match="values do not fit the dtype"):
            load(TABLE, model_specs(), ArraySource(arrays), dtype="specs")
        arrays["model.steps"][1] -= 1
        params, _ = load(TABLE, model_specs(), ArraySource(arrays), dtype="specs")
        assert params.steps.tolist() == [1, 2**31 - 1]

    def test_infinities_and_nan_stay(self):
        arrays = published()
        arrays["model.layers.1.norm.weight"][:3] = [np.inf, -np.inf, np.nan]
        params, _ = load(TABLE, model_specs(), ArraySource(arrays), dtype=jnp.float16)
        np.testing.assert_array_equal(params.layers.norm[1, :3], np.array([np.inf, -np.inf, np.nan], np.float16))


class TestSharded:
    def test_shards_are_placed_and_equal_the_unsharded(self, eight_devices):
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, eight_devices)
        places, _ = shardings(model_specs(), DEFAULT_RULES, mesh)
        arrays = published()
        whole, _ = load(TABLE, model_specs(), ArraySource(arrays))
        params, _ = load(TABLE, model_specs(), ArraySource(arrays), shardings=places)
        chex.assert_trees_all_equal(params, whole)
        leaves, wanted = named_leaves(params), named_leaves(places)
        for name, leaf in leaves.items():
            assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), name
            assert len(leaf.sharding.device_set) == 8
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(named_leaves(whole)[name])[shard.index])
        assert leaves["layers.q"].addressable_shards[0].data.shape == (LAYERS, EMBED // 2, HEADS // 2, HEAD_DIM)

    def test_one_sharding_for_all(self, eight_devices):
        everywhere = replicated(make_mesh({"data": 8}, eight_devices))
        params, _ = load(TABLE, model_specs(), ArraySource(published()), shardings=everywhere)
        assert all(leaf.sharding.is_equivalent_to(everywhere, leaf.ndim) for leaf in jax.tree.leaves(params))
        chex.assert_trees_all_equal(params, expected(published()))

    def test_export_of_sharded_parameters(self, eight_devices, tmp_path):
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, eight_devices)
        places, _ = shardings(model_specs(), DEFAULT_RULES, mesh)
        params, _ = load(TABLE, model_specs(), ArraySource(published()), shardings=places)
        export(TABLE, params, tmp_path / "toy.safetensors")
        assert_same_tensors(safetensors.numpy.load_file(tmp_path / "toy.safetensors"), published())


def assert_same_tensors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Same names, dtypes, shapes and bytes."""
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


class TestExport:
    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
    def test_the_published_file_comes_back(self, tmp_path, dtype):
        arrays = published(dtype)
        path = tmp_path / "toy.safetensors"
        params, _ = load(TABLE, model_specs(dtype), ArraySource(arrays))
        report = export(TABLE, params, path)
        assert_same_tensors(safetensors.numpy.load_file(path), arrays)
        assert report.files == (path,)
        assert report.num_tensors == len(arrays)
        assert report.nbytes == sum(array.nbytes for array in arrays.values())
        assert report.left_out == {"cursor": "not published"}

    def test_names_of_a_tensor_are_recorded(self, tmp_path):
        params, _ = load(TABLE, model_specs(), ArraySource(published()))
        export(TABLE, params, tmp_path / "toy.safetensors", metadata={"step": "3"})
        with SafetensorsFiles(tmp_path / "toy.safetensors") as files:
            assert files.metadata == {"step": "3", "lm_head.weight": "model.embed.weight"}

    def test_without_metadata_it_is_a_torch_file(self, tmp_path):
        params, _ = load(TABLE, model_specs(), ArraySource(published()))
        export(TABLE, params, tmp_path / "toy.safetensors")
        with safetensors.safe_open(tmp_path / "toy.safetensors", "numpy") as file:
            assert file.metadata()["format"] == "pt"

    def test_numpy_trees(self, tmp_path):
        export(TABLE, expected(published()), tmp_path / "toy.safetensors")
        assert_same_tensors(safetensors.numpy.load_file(tmp_path / "toy.safetensors"), published())

    def test_progress(self, tmp_path):
        calls = []
        params = expected(published())
        report = export(TABLE, params, tmp_path / "toy.safetensors", progress=lambda *call: calls.append(call))
        names = [name for name, _, _ in calls]
        assert sorted(names) == sorted(set(named_leaves(params)) - {"cursor"})
        sizes = [named_leaves(params)[name].nbytes for name in names]
        assert [done for _, done, _ in calls] == np.cumsum(sizes).tolist()
        assert calls[-1][1] == calls[-1][2] == report.nbytes

    def test_parameters_of_another_shape_are_refused(self, tmp_path):
        params = expected(published())
        params = params.replace(layers=params.layers.replace(q=np.zeros((LAYERS, EMBED, HEAD_DIM, HEADS), np.float32)))
        with pytest.raises(CheckpointError, match=r"layers\.q: dimensions cannot be merged, expected \(4, 2\)"):
            export(TABLE, params, tmp_path / "toy.safetensors")
        assert list(tmp_path.iterdir()) == []


MIB = 2**20
SLACK = 24 * MIB
"""For what is not the weights': allocator bookkeeping, python objects, the poller."""


class TestMemory:
    """Measured in processes of their own, by polling the anonymous memory of `loading_memory.py`."""

    WAYS = ("one device", "eight devices", "everything at once")

    @staticmethod
    def measure(path: Path, way: str) -> dict[str, int]:
        result = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "loading_memory.py"), str(path), way],
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def test_streaming_needs_one_leaf_and_one_tensor_beside_the_parameters(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        try:
            measured = {way: self.measure(path, way) for way in self.WAYS}
        finally:
            path.unlink(missing_ok=True)
        one = measured["one device"]
        assert one["nbytes"] > 300e6
        bound = one["nbytes"] + one["largest_leaf_bytes"] + one["largest_tensor_bytes"] + SLACK
        for way in ("one device", "eight devices"):
            growth = measured[way]["growth"]
            # less the slack: a process reuses memory that it had freed before the measurement began
            assert growth >= one["nbytes"] - SLACK, f"{way}: the measure does not see the parameters themselves"
            assert growth <= bound, f"{way}: grew by {growth / MIB:.0f} MiB, the bound is {bound / MIB:.0f} MiB"
        # the control: a load of everything at once exceeds the bound, so the bound means something
        assert measured["everything at once"]["growth"] > bound + 100 * MIB
