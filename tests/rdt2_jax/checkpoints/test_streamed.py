"""Items written leaf by leaf: restored like any other, bounded in memory, and never half there."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rdt2_jax.checkpoints import (
    DamagedCheckpointError,
    StreamedSave,
    host_target,
    read_metadata,
    restore,
    restore_partial,
    restore_streamed,
    save,
    save_streamed,
    stored_items,
    stored_metadata,
)
from rdt2_jax.errors import CheckpointError
from rdt2_jax.host_arrays import aligned_empty
from rdt2_jax.params import ParamSpec, abstract, named_leaves, stack
from rdt2_jax.sharding import DEFAULT_RULES, abstract_sharded, make_mesh, shardings

SPECS = {
    "embedding": ParamSpec((16, 8), ("vocab", "embed"), dtype=jnp.bfloat16),
    "layers": stack({"norm": ParamSpec((8,), ("embed",)), "up": ParamSpec((8, 16), ("embed", "mlp"))}, 3),
    "steps": ParamSpec((2,), (None,), dtype=jnp.int32),
}
LEAVES = named_leaves(abstract(SPECS))
SIZES = {name: leaf.size * leaf.dtype.itemsize for name, leaf in LEAVES.items()}


def value(name: str) -> np.ndarray:
    """Random bits for floats, NaNs among them: what is stored is bits, not numbers."""
    leaf = LEAVES[name]
    return np.frombuffer(np.random.default_rng(len(name)).bytes(SIZES[name]), leaf.dtype).reshape(leaf.shape)


def write(path: Path, **options: Any) -> StreamedSave:
    return save_streamed(path, "params", LEAVES, value, {"layers": 3}, **options)


def assert_same_bits(found: Any, names: Any = LEAVES) -> None:
    leaves = named_leaves(found)
    assert set(leaves) == set(names)
    for name, leaf in leaves.items():
        assert (leaf.dtype, leaf.shape) == (LEAVES[name].dtype, LEAVES[name].shape)
        assert np.asarray(leaf).tobytes() == value(name).tobytes(), name


def on_mesh(fsdp: int, tensor: int, devices: list[Any]) -> Any:
    mesh = make_mesh({"fsdp": fsdp, "tensor": tensor}, devices)
    return abstract_sharded(SPECS, shardings(SPECS, DEFAULT_RULES, mesh)[0])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One streamed checkpoint of several parts that tests only read."""
    path = tmp_path_factory.mktemp("streamed") / "one"
    assert write(path, max_group_bytes=600, files={"config.json": b"{}"}).num_parts == 3
    return path


class TestReading:
    """`restore` and the others do not care how an item was written."""

    def test_what_is_stored(self, stored):
        assert stored_items(stored) == ("params",)
        assert read_metadata(stored) == {"layers": 3}
        assert {n: (s.shape, s.dtype) for n, s in stored_metadata(stored, "params").items()} == {
            n: (s.shape, s.dtype) for n, s in LEAVES.items()
        }
        assert (stored / "config.json").read_bytes() == b"{}"

    @pytest.mark.parametrize(("fsdp", "tensor"), [(4, 2), (2, 4), (1, 1)])
    def test_on_any_mesh(self, stored, eight_devices, fsdp, tensor):
        target = on_mesh(fsdp, tensor, eight_devices)
        back = restore(stored, "params", target)
        assert_same_bits(back)
        for name, leaf in named_leaves(back).items():
            assert leaf.sharding == named_leaves(target)[name].sharding
        assert back["layers"]["up"].addressable_shards[0].data.shape == (3, 8 // fsdp, 16 // tensor)

    def test_on_the_host(self, stored):
        back = restore(stored, "params", jax.tree.map(host_target, abstract(SPECS)))
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(back))
        assert_same_bits(back)

    def test_partly(self, stored):
        part = restore_partial(stored, "params", {"layers": {"norm": LEAVES["layers.norm"]}})
        assert_same_bits(part.tree, ["layers.norm"])
        assert set(part.left_out) == set(LEAVES) - {"layers.norm"}

    def test_leaf_by_leaf(self, stored, eight_devices):
        target = on_mesh(4, 2, eight_devices)
        pairs = list(restore_streamed(stored, "params", target))
        assert [name for name, _ in pairs] == list(named_leaves(target))
        assert_same_bits(dict(pairs))
        assert len(pairs[0][1].sharding.device_set) == 8

    def test_leaf_by_leaf_compares_before_it_reads(self, stored):
        target = {"steps": LEAVES["steps"], "embedding": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
        with pytest.raises(CheckpointError, match=r"\(2 problems\)(.|\n)*embedding: stored shape \(16, 8\)"):
            restore_streamed(stored, "params", target)

    def test_leaf_by_leaf_from_an_ordinary_item(self, tmp_path):
        save(tmp_path / "c", {"params": {"a": jnp.arange(3), "b": jnp.ones(2)}}, {})
        ((name, leaf),) = restore_streamed(tmp_path / "c", "params", {"b": jax.ShapeDtypeStruct((2,), jnp.float32)})
        assert name == "b"
        np.testing.assert_array_equal(leaf, [1, 1])

    def test_all_differences_are_listed(self, stored):
        with pytest.raises(CheckpointError, match=r"\(3 problems\)") as error:
            restore(stored, "params", {**abstract(SPECS), "steps": LEAVES["embedding"], "new": LEAVES["steps"]})
        assert "steps: stored shape (2,), wanted (16, 8)" in str(error.value)
        assert "new: not in the checkpoint" in str(error.value)


class TestWriting:
    def test_groups_are_bounded(self, tmp_path):
        report = write(tmp_path / "c", max_group_bytes=400)
        sizes = list(SIZES.values())
        assert sizes == [256, 96, 1536, 8]
        assert report == StreamedSave(num_leaves=4, nbytes=1896, num_parts=3, largest_part_bytes=1536)
        assert sorted(path.name for path in (tmp_path / "c" / "params").iterdir()) == ["0", "1", "2"]
        assert write(tmp_path / "d").num_parts == 1

    def test_a_group_is_on_disk_and_forgotten_before_the_next_is_read(self, tmp_path):
        alive: list[weakref.ref[np.ndarray]] = []
        held: list[int] = []
        parts: list[int] = []

        def read(name: str) -> np.ndarray:
            held.append(sum(reference() is not None for reference in alive))
            parts.append(len(list(tmp_path.glob(".c.*.tmp/params/?"))))
            array = aligned_empty(LEAVES[name].shape, LEAVES[name].dtype)
            array[...] = value(name)
            alive.append(weakref.ref(array))
            return array

        save_streamed(tmp_path / "c", "params", LEAVES, read, {}, max_group_bytes=400)
        assert held == [0, 1, 0, 0]  # the second leaf shares a group with the first
        assert parts == [0, 0, 1, 2]
        assert_same_bits(restore(tmp_path / "c", "params", abstract(SPECS)))

    def test_progress_tells_of_what_is_written(self, tmp_path):
        calls: list[tuple[str, int, int]] = []
        write(tmp_path / "c", max_group_bytes=1, progress=lambda *call: calls.append(call))
        assert calls == list(zip(LEAVES, np.cumsum(list(SIZES.values())).tolist(), [1896] * 4, strict=True))

    @pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float16, ml_dtypes.float8_e4m3fn, np.uint8])
    def test_dtypes(self, tmp_path, dtype):
        array = np.arange(6).reshape(2, 3).astype(dtype)
        save_streamed(tmp_path / "c", "x", {"a": jax.ShapeDtypeStruct((2, 3), array.dtype)}, lambda _: array, {})
        back = restore(tmp_path / "c", "x", {"a": array})["a"]
        assert back.dtype == array.dtype
        assert back.tobytes() == array.tobytes()

    def test_arrays_of_devices(self, tmp_path, eight_devices):
        places = named_leaves(on_mesh(4, 2, eight_devices))
        save_streamed(
            tmp_path / "c", "params", LEAVES, lambda n: jax.device_put(value(n), places[n].sharding), {"layers": 3}
        )
        assert_same_bits(restore(tmp_path / "c", "params", abstract(SPECS)))

    def test_a_streamed_checkpoint_is_overwritten_only_when_asked_for(self, tmp_path):
        write(tmp_path / "c")
        with pytest.raises(CheckpointError, match="the checkpoint exists"):
            write(tmp_path / "c")
        save(tmp_path / "c", {"lora": {"a": jnp.ones(2)}}, {}, overwrite=True)
        write(tmp_path / "c", overwrite=True)
        assert stored_items(tmp_path / "c") == ("params",)
        assert [path.name for path in tmp_path.iterdir()] == ["c"]

    def test_what_is_no_checkpoint_is_never_overwritten(self, tmp_path):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "notes.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="only a checkpoint is ever overwritten"):
            write(tmp_path / "c", overwrite=True)
        assert (tmp_path / "c" / "notes.txt").read_text() == "mine"

    def test_a_failure_leaves_the_old_checkpoint_and_nothing_else(self, tmp_path):
        write(tmp_path / "c")

        def read(name: str) -> np.ndarray:
            if name == "layers.up":
                raise CheckpointError("the source is damaged")
            return np.zeros_like(value(name))

        with pytest.raises(CheckpointError, match="the source is damaged"):
            save_streamed(tmp_path / "c", "params", LEAVES, read, {}, max_group_bytes=1, overwrite=True)
        with pytest.raises(CheckpointError, match="the source is damaged"):
            save_streamed(tmp_path / "new", "params", LEAVES, read, {}, max_group_bytes=1)
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
        assert_same_bits(restore(tmp_path / "c", "params", abstract(SPECS)))


class TestRefusals:
    """All but the last before anything is read or written."""

    @pytest.mark.parametrize(
        ("leaves", "options", "message"),
        [
            ({}, {}, "without arrays"),
            ({"a": jax.ShapeDtypeStruct((0, 2), jnp.float32)}, {}, r"a: no elements in shape \(0, 2\)"),
            ({"a": jax.ShapeDtypeStruct((2,), jnp.complex64)}, {}, "a: dtype complex64"),
            ({"a": jax.eval_shape(lambda: jax.random.key(0))}, {}, "a: dtype key<fry>"),
            ({"a": LEAVES["steps"], "a.b": LEAVES["steps"]}, {}, "continues that of another leaf"),
            (LEAVES, {"files": {"../x": b""}}, r"'\.\./x': not usable"),
            (LEAVES, {"files": {"params": b""}}, "'params': not usable"),
            (LEAVES, {"files": {"metadata": b""}}, "'metadata': not usable"),
        ],
    )
    def test_what_cannot_be_stored(self, tmp_path, leaves, options, message):
        def read(name: str) -> np.ndarray:
            raise AssertionError(f"{name} was read")

        with pytest.raises(CheckpointError, match=message):
            save_streamed(tmp_path / "c", "params", leaves, read, {}, **options)
        assert list(tmp_path.iterdir()) == []

    def test_names_and_metadata(self, tmp_path):
        with pytest.raises(CheckpointError, match="not usable as the name of an item"):
            save_streamed(tmp_path / "c", "metadata", LEAVES, value, {})
        with pytest.raises(CheckpointError, match="come back different from JSON"):
            save_streamed(tmp_path / "c", "params", LEAVES, value, {"shape": (1, 2)})
        assert list(tmp_path.iterdir()) == []

    def test_several_processes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(CheckpointError, match="the work of one process"):
            write(tmp_path / "c")

    @pytest.mark.parametrize("array", [np.zeros((2,), np.int16), np.zeros((3,), np.int32)])
    def test_a_leaf_that_is_not_what_was_announced(self, tmp_path, array):
        with pytest.raises(CheckpointError, match=r"not what was announced(.|\n)*where: steps(.|\n)*int32 \(2,\)"):
            save_streamed(tmp_path / "c", "params", LEAVES, lambda n: array if n == "steps" else value(n), {})
        assert list(tmp_path.iterdir()) == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a part is gone": lambda item: shutil.rmtree(item / "1"),
    "an array is gone": lambda item: shutil.rmtree(item / "1" / "layers.up"),
    "parts were exchanged": lambda item: [
        shutil.move(item / a, item / b) for a, b in (("0", "x"), ("1", "0"), ("x", "1"))
    ],
    "a part of another model": lambda item: (
        shutil.rmtree(item / "2"),
        save_streamed(item / "y", "q", {"steps": LEAVES["steps"]}, lambda _: np.array([7, 8], np.int32), {}),
        shutil.move(item / "y" / "q" / "0", item / "2"),
    ),
}


class TestDamage:
    @pytest.mark.parametrize("kind", DAMAGES)
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_damage_is_noticed_or_harmless(self, stored, tmp_path, kind):
        copy = Path(shutil.copytree(stored, tmp_path / "copy"))
        DAMAGES[kind](copy / "params")
        try:
            back = restore(copy, "params", abstract(SPECS))
        except DamagedCheckpointError:
            assert kind != "parts were exchanged"
        else:  # every leaf is found where it is, and verified by name
            assert kind == "parts were exchanged"
            assert_same_bits(back)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_flipped_bit_is_noticed(self, stored, tmp_path):
        copy = Path(shutil.copytree(stored, tmp_path / "copy"))
        chunk = next(path for path in (copy / "params" / "1" / "layers.up").iterdir() if path.name[0].isdigit())
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 0x10
        chunk.write_bytes(data)
        with pytest.raises(DamagedCheckpointError):
            restore(copy, "params", abstract(SPECS))
        part = restore_partial(copy, "params", {"steps": LEAVES["steps"]})
        chex.assert_trees_all_equal(part.tree["steps"], value("steps"))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("shape", [(5, 1001), (1 << 16,), (), (0, 3)])
def test_jax_shares_aligned_memory(dtype, shape):
    array = aligned_empty(shape, dtype)
    assert (array.shape, array.dtype) == (shape, dtype)
    assert array.flags["C_CONTIGUOUS"]
    if array.size:
        shared = jax.device_put(array, jax.devices("cpu")[0])
        assert shared.unsafe_buffer_pointer() == array.ctypes.data
