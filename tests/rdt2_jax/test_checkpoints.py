"""Training state on disk: exact round trips over meshes, differences refused, damage noticed and survived."""

from __future__ import annotations

import gc
import json
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.checkpoints import (
    Checkpoints,
    DamagedCheckpointError,
    DamagedCheckpointWarning,
    read_metadata,
    restore,
    restore_partial,
    save,
    stored_items,
    stored_metadata,
)
from rdt2_jax.errors import CheckpointError
from rdt2_jax.params import ParamSpec, initialize, named_leaves, normal, stack
from rdt2_jax.sharding import DEFAULT_RULES, abstract_sharded, make_mesh, shardings


@flax.struct.dataclass
class Layer:
    kernel: Any
    scale: Any


@flax.struct.dataclass
class State:
    layers: Layer
    key: Any
    seen: Any
    frozen: Any
    step: Any = 0
    rate: Any = 0.0
    done: Any = False
    history: Any = ()
    name: str = flax.struct.field(pytree_node=False, default="state")


def state() -> State:
    return State(
        layers=Layer(
            kernel=jnp.linspace(-3.0, 3.0, 24, dtype=jnp.float32).reshape(4, 6),
            scale=jnp.array([1.0, 1e-30, -3e38, 0.1], jnp.bfloat16),
        ),
        key=jax.random.key(11),
        seen=np.array([2**40, -1], np.int64),
        frozen=jnp.array([True, False, True]),
        step=7,
        rate=0.1,
        done=True,
        history=(jnp.int32(5), jnp.array([-128, 127], jnp.int8)),
    )


def blank(tree: Any) -> Any:
    """Other values of the same kinds, so that nothing can come back right by staying what it was."""

    def other(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else type(leaf)(0)

    return jax.tree.map(other, tree)


def small(value: float = 0.0) -> dict[str, Any]:
    return {"w": jnp.arange(6, dtype=jnp.float32) + value, "count": np.array([3, 4], np.int32)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint that tests only read."""
    directory = tmp_path_factory.mktemp("checkpoint") / "one"
    save(directory, {"params": small(), "optimizer": {"mu": jnp.ones(3)}}, {"step": 3})
    return directory


@pytest.fixture
def copy(stored: Path, tmp_path: Path) -> Path:
    """The same checkpoint, to be damaged."""
    return Path(shutil.copytree(stored, tmp_path / "copy"))


# round trips


def test_dataclass_tree_comes_back_exactly(tmp_path: Path) -> None:
    original = state()
    save(tmp_path / "c", {"params": original}, {})
    back = restore(tmp_path / "c", "params", blank(original))
    assert isinstance(back, State)
    assert isinstance(back.layers, Layer)
    assert back.name == "state"
    assert jnp.issubdtype(back.key.dtype, jax.dtypes.prng_key)
    chex.assert_trees_all_equal(back.replace(key=0), original.replace(key=0), strict=True)
    np.testing.assert_array_equal(jax.random.normal(back.key, (4,)), jax.random.normal(original.key, (4,)))
    assert (type(back.step), type(back.rate), type(back.done)) == (int, float, bool)
    assert isinstance(back.seen, np.ndarray)
    assert back.seen.dtype == np.int64
    assert isinstance(back.layers.scale, jax.Array)
    assert back.layers.scale.dtype == jnp.bfloat16


def test_non_finite_values_and_batches_of_keys_survive(tmp_path: Path) -> None:
    tree = {
        "special": jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0, 1e-45]),
        "keys": jax.random.split(jax.random.key(0), 3),
        "rbg": jax.random.key(5, impl="rbg"),
    }
    save(tmp_path / "c", {"data": tree}, {})
    back = restore(tmp_path / "c", "data", blank(tree))
    np.testing.assert_array_equal(
        np.asarray(back["special"]).view(np.uint32), np.asarray(tree["special"]).view(np.uint32)
    )
    for name in ("keys", "rbg"):
        assert back[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(jax.random.key_data(back[name]), jax.random.key_data(tree[name]))


def test_stored_items_names_shapes_and_dtypes_without_reading(stored: Path, tmp_path: Path) -> None:
    assert sorted(stored_items(stored)) == ["optimizer", "params"]
    found = {name: (leaf.shape, leaf.dtype) for name, leaf in stored_metadata(stored, "params").items()}
    assert found == {"w": ((6,), jnp.float32), "count": ((2,), jnp.int32)}
    with pytest.raises(CheckpointError, match=r"no such item(.|\n)*params(.|\n)*found: lora"):
        stored_metadata(stored, "lora")
    with pytest.raises(CheckpointError, match="no such item"):
        restore(stored, "lora", small())
    with pytest.raises(CheckpointError, match="no checkpoint"):
        stored_items(tmp_path / "nowhere")


def test_metadata_comes_back_as_it_was_given(tmp_path: Path) -> None:
    metadata = {"step": 12, "rate": 0.1, "config": {"layers": [1, 2], "name": "größe", "none": None}, "flag": True}
    save(tmp_path / "c", {"params": small()}, metadata)
    back = read_metadata(tmp_path / "c")
    assert back == metadata
    assert type(back["flag"]) is bool
    assert type(back["step"]) is int


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"path": Path("x")}, "cannot be written as JSON"),
        ({"loss": float("nan")}, "cannot be written as JSON"),
        ({"shape": (1, 2)}, r"would come back different(.|\n)*shape"),
        ({"by_step": {1: 2}}, r"would come back different(.|\n)*by_step"),
    ],
)
def test_metadata_that_json_would_change_is_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "c", {"params": small()}, metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"metadata": small()}, "not usable as the name"),
        ({"a/b": small()}, "not usable as the name"),
        ({"params": {}}, "without arrays"),
        ({"params": {"layer": {"name": "text"}}}, r"params: layer.name(.|\n)*found: str"),
        ({"params": {"w": jnp.zeros((0, 3))}}, r"params: w(.|\n)*shape \(0, 3\)"),
        ({"params": {"w": jnp.zeros(2, jnp.complex64)}}, r"cannot be stored(.|\n)*complex64"),
        ({"params": {"a": jnp.ones(1), "a.b": jnp.ones(1)}}, "name"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, items: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "c", items, {})
    assert list(tmp_path.iterdir()) == []


# meshes


def test_saved_on_one_mesh_restores_on_another_and_on_one_device(tmp_path: Path, eight_devices: list[Any]) -> None:
    specs = {
        "embedding": ParamSpec((8, 4), ("vocab", "embed"), normal(1.0)),
        "layers": stack({"w": ParamSpec((4, 8), ("embed", "mlp"), normal(1.0), jnp.bfloat16)}, 3),
    }

    def target(fsdp: int, tensor: int) -> Any:
        mesh = make_mesh({"fsdp": fsdp, "tensor": tensor}, eight_devices)
        return abstract_sharded(specs, shardings(specs, DEFAULT_RULES, mesh)[0])

    source_layout = jax.tree.map(lambda leaf: leaf.sharding, target(4, 2))
    saved = initialize(specs, jax.random.key(0), source_layout)
    assert saved["embedding"].addressable_shards[0].data.shape == (4, 1)
    save(tmp_path / "c", {"params": saved}, {})
    expected = jax.device_get(saved)
    for wanted in (target(2, 4), target(1, 1), target(4, 2)):
        back = restore(tmp_path / "c", "params", wanted)
        chex.assert_trees_all_equal(jax.device_get(back), expected, strict=True)
        for name, leaf in named_leaves(back).items():
            assert leaf.sharding == named_leaves(wanted)[name].sharding
    assert restore(tmp_path / "c", "params", target(2, 4))["embedding"].addressable_shards[0].data.shape == (2, 2)
    # without shardings: the default device; with an array: like the array; with numpy: the host
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)
    assert restore(tmp_path / "c", "params", plain)["embedding"].devices() == {eight_devices[0]}
    like = jax.device_put(jax.tree.map(jnp.zeros_like, expected), eight_devices[5])
    assert restore(tmp_path / "c", "params", like)["layers"]["w"].devices() == {eight_devices[5]}
    host = restore(tmp_path / "c", "params", jax.tree.map(np.zeros_like, expected))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(host))
    chex.assert_trees_all_equal(host, expected, strict=True)


# what does not fit the target


def test_another_dtype_is_refused_unless_cast(stored: Path) -> None:
    target = {"w": jax.ShapeDtypeStruct((6,), jnp.bfloat16), "count": np.zeros(2, np.int32)}
    with pytest.raises(CheckpointError, match=r"w: stored dtype float32, wanted bfloat16(.|\n)*cast=True"):
        restore(stored, "params", target)
    back = restore(stored, "params", target, cast=True)
    assert back["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(back["w"], np.arange(6))
    assert back["count"].dtype == np.int32


def test_all_differences_are_collected_in_one_error(tmp_path: Path) -> None:
    tree = {"same": jnp.ones(2), "shape": jnp.ones((2, 3)), "dtype": jnp.ones(2), "old": jnp.ones(2), "n": 3}
    save(tmp_path / "c", {"params": tree}, {})
    target = {
        "same": jax.ShapeDtypeStruct((2,), jnp.float32),
        "shape": jax.ShapeDtypeStruct((3, 2), jnp.float32),
        "dtype": jax.ShapeDtypeStruct((2,), jnp.int32),
        "new": {"deep": jax.ShapeDtypeStruct((5,), jnp.bfloat16)},
        "n": 1.5,
    }
    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path / "c", "params", target)
    assert not isinstance(caught.value, DamagedCheckpointError)
    message = str(caught.value)
    assert "(5 problems)" in message
    assert "shape: stored shape (2, 3), wanted (3, 2)" in message
    assert "dtype: stored dtype float32, wanted int32" in message
    assert "new.deep: not in the checkpoint (wanted bfloat16 (5,))" in message
    assert "n: stored dtype int64, wanted float64" in message
    assert "old: in the checkpoint, not in the target" in message
    assert "same:" not in message


def test_keys_and_arrays_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    key = jax.random.key(0)
    save(
        tmp_path / "c",
        {"data": {"key": key, "raw": jax.random.key_data(key), "rbg": jax.random.key(0, impl="rbg")}},
        {},
    )
    target = {
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
        "raw": jax.eval_shape(lambda: key),
        "rbg": jax.eval_shape(lambda: key),
    }
    for cast in (False, True):
        with pytest.raises(CheckpointError) as caught:
            restore(tmp_path / "c", "data", target, cast=cast)
        message = str(caught.value)
        assert "key: stored a threefry2x32 key, wanted uint32" in message
        assert "raw: stored an array, wanted key<fry>" in message
        assert "rbg: stored a rbg key, wanted key<fry>" in message


def test_a_64_bit_value_is_not_cut_on_its_way_to_a_device(tmp_path: Path) -> None:
    save(tmp_path / "c", {"data": {"n": np.array([2**40])}}, {})
    target = {"n": jax.ShapeDtypeStruct((1,), jnp.int32)}
    with pytest.raises(CheckpointError, match="would cut the stored int64"):
        restore(tmp_path / "c", "data", target, cast=True)


def test_a_target_that_is_no_target_is_named(stored: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a restore target(.|\n)*where: count(.|\n)*found: str"):
        restore(stored, "params", {"w": jnp.ones(6), "count": "two"})


def test_partial_restore_names_what_it_leaves_out(tmp_path: Path) -> None:
    original = state()
    save(tmp_path / "c", {"params": original}, {})
    part = restore_partial(tmp_path / "c", "params", {"layers": {"scale": original.layers.scale}, "step": 0})
    assert part.tree["step"] == 7
    np.testing.assert_array_equal(part.tree["layers"]["scale"], original.layers.scale)
    left_out = {name for name in named_leaves(original)} - {"layers.scale", "step"}
    assert set(part.left_out) == left_out
    assert len(part.left_out) == len(left_out)
    with pytest.raises(CheckpointError, match=r"layers.bias: not in the checkpoint"):
        restore_partial(tmp_path / "c", "params", {"layers": {"bias": original.layers.scale}})
    with pytest.raises(CheckpointError, match=r"step: stored dtype int64, wanted float64"):
        restore_partial(tmp_path / "c", "params", {"step": 0.0})


# replacing and failing


def test_overwriting_has_to_be_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "c", {"params": small(1), "lora": small()}, {"step": 1})
    with pytest.raises(CheckpointError, match=r"the checkpoint exists(.|\n)*overwrite=True"):
        save(tmp_path / "c", {"params": small(2)}, {"step": 2})
    assert read_metadata(tmp_path / "c") == {"step": 1}
    save(tmp_path / "c", {"params": small(2)}, {"step": 2}, overwrite=True)
    assert read_metadata(tmp_path / "c") == {"step": 2}
    assert stored_items(tmp_path / "c") == ("params",)
    chex.assert_trees_all_equal(restore(tmp_path / "c", "params", small()), small(2))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_file_in_the_way_is_refused_and_an_empty_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        save(tmp_path / "file", {"params": small()}, {})
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", {"params": small(4)}, {})
    chex.assert_trees_all_equal(restore(tmp_path / "empty", "params", small()), small(4))


@pytest.fixture
def full_disk() -> Iterator[Callable[[bool], None]]:
    """`full_disk(True)`: from then on no file may grow beyond 64 KiB, which the system enforces."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def switch(full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if full else soft, hard))

    yield switch
    switch(False)


def large(value: float = 0.0) -> dict[str, np.ndarray]:
    """512 KiB that do not compress."""
    return {"w": np.random.default_rng(0).standard_normal(1 << 16) + value}


def test_a_failure_leaves_nothing_behind_and_can_be_repeated(tmp_path: Path, full_disk: Callable[[bool], None]) -> None:
    full_disk(True)
    with pytest.raises(CheckpointError, match=r"could not be written(.|\n)*Failed writing"):
        save(tmp_path / "c", {"params": large()}, {})
    full_disk(False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="no checkpoint"):
        restore(tmp_path / "c", "params", large())
    save(tmp_path / "c", {"params": large(5)}, {})
    chex.assert_trees_all_equal(restore(tmp_path / "c", "params", large()), large(5))


def test_a_failure_while_overwriting_leaves_the_old_checkpoint(copy: Path, full_disk: Callable[[bool], None]) -> None:
    full_disk(True)
    with pytest.raises(CheckpointError, match="could not be written"):
        save(copy, {"params": large()}, {"step": 9}, overwrite=True)
    full_disk(False)
    chex.assert_trees_all_equal(restore(copy, "params", small()), small())
    assert read_metadata(copy) == {"step": 3}
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_what_is_no_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")
    for path in (tmp_path / "work", tmp_path / "work" / "notes.txt"):
        with pytest.raises(CheckpointError, match="only a checkpoint is ever overwritten"):
            save(path, {"params": small()}, {}, overwrite=True)
    assert (tmp_path / "work" / "notes.txt").read_text() == "mine"


# damage


@pytest.fixture
def abandoned_reads() -> Iterator[None]:
    """When one of several reads fails, Orbax closes its event loop and abandons the others. Here they come to their
    end, so that what Python has to say about them is not put down to a later test."""
    yield
    time.sleep(0.05)
    gc.collect()


def damaging(test: Callable[..., None]) -> Callable[..., None]:
    """For tests in which Orbax meets damaged files; see `abandoned_reads`."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("abandoned_reads")(ignored(test))


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "flipped": flip,
}


@damaging
def test_damage_to_any_file_is_noticed_or_harmless(copy: Path) -> None:
    noticed = 0
    for path in sorted(path for path in copy.rglob("*") if path.is_file() and "optimizer" not in path.parts):
        intact = path.read_bytes()
        for kind, change in DAMAGES.items():
            damaged = change(intact)
            path.unlink() if damaged is None else path.write_bytes(damaged)
            try:
                back = restore(copy, "params", small())
            except DamagedCheckpointError:
                noticed += 1
            else:
                chex.assert_trees_all_equal(back, small(), custom_message=f"{path}: {kind}")
        path.write_bytes(intact)
    assert noticed > 10
    chex.assert_trees_all_equal(restore(copy, "params", small()), small())


@damaging
def test_every_flipped_letter_in_the_layout_files_counts_as_damage_or_nothing(copy: Path) -> None:
    path = copy / "params" / "_sharding"
    intact = path.read_bytes()
    noticed = 0
    for position in range(0, len(intact), 7):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 2]) + intact[position + 1 :])
        try:
            restore(copy, "params", small())
        except DamagedCheckpointError:
            noticed += 1
    assert noticed > 0


def test_altered_metadata_is_noticed(copy: Path) -> None:
    path = copy / "metadata" / "metadata"
    envelope = json.loads(path.read_text())
    envelope["metadata"]["step"] = 4
    path.write_text(json.dumps(envelope))
    with pytest.raises(DamagedCheckpointError, match="not the metadata that was saved"):
        read_metadata(copy)


@damaging
def test_arrays_of_another_checkpoint_are_noticed(copy: Path, tmp_path: Path) -> None:
    # what no storage layer can see: every file is intact, and the values are not those of this checkpoint
    save(tmp_path / "other", {"params": small(0.25)}, {"step": 3})
    shutil.rmtree(copy / "params")
    shutil.copytree(tmp_path / "other" / "params", copy / "params")
    with pytest.raises(DamagedCheckpointError, match=r"stored values differ(.|\n)*\['w'\]"):
        restore(copy, "params", small())


# series


def array_file(directory: Path) -> Path:
    """The largest file of the item `params`: array data."""
    return max((directory / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)


def fill(root: Path, steps: tuple[int, ...], keep_last: int = 9) -> None:
    with Checkpoints(root, keep_last=keep_last) as series:
        for step in steps:
            series.save(step, {"params": small(step)}, {"loss": step / 2})


def test_a_series_resumes_from_the_latest(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "run", keep_last=2) as series:
        assert series.restore_latest({"params": small()}) is None
        assert series.steps() == ()
    fill(tmp_path / "run", (1, 5))
    with Checkpoints(tmp_path / "run", keep_last=2) as series:
        resumed = series.restore_latest({"params": small()})
        assert resumed is not None
        assert (resumed.step, resumed.metadata) == (5, {"loss": 2.5})
        chex.assert_trees_all_equal(resumed.items["params"], small(5))
        chex.assert_trees_all_equal(restore(series.directory(1), "params", small()), small(1))


def test_keep_last_removes_the_oldest(tmp_path: Path) -> None:
    fill(tmp_path, (1, 2, 3), keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_the_best_stays_beside_the_last(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_last=1, keep_best=1, best_metric="loss") as series:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.7), (4, 0.6)):
            series.save(step, {"params": small(step)}, metrics={"loss": loss})
        assert series.best_step() == 2
        assert series.steps() == (2, 4)
        with pytest.raises(CheckpointError, match=r"metrics must be exactly(.|\n)*expected: \['loss'\]"):
            series.save(5, {"params": small()}, metrics={"acc": 1.0})
    with Checkpoints(tmp_path / "none", keep_last=1) as series, pytest.raises(CheckpointError, match="no best metric"):
        series.best_step()


def test_a_step_that_is_not_new_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, (4,))
    with Checkpoints(tmp_path, keep_last=2) as series:
        for step in (3, 4):
            with pytest.raises(CheckpointError, match=rf"expected: a step after 4\n  found: {step}"):
                series.save(step, {"params": small()})
        assert series.steps() == (4,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep_last": 0},
        {"keep_last": 1, "keep_best": -1},
        {"keep_last": 1, "keep_best": 1},
        {"keep_last": 1, "best_metric": "loss"},
        {"keep_last": 1, "keep_best": 1, "best_metric": "loss", "best_mode": "least"},
    ],
)
def test_contradictory_series_are_refused(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be kept|belong together"):
        Checkpoints(tmp_path, **arguments)


@damaging
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_latest_falls_back_to_the_one_before(tmp_path: Path, kind: str) -> None:
    fill(tmp_path, (1, 2))
    path = array_file(tmp_path / "2")
    damaged = DAMAGES[kind](path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with Checkpoints(tmp_path, keep_last=3) as series:
        with pytest.warns(DamagedCheckpointWarning, match="damaged-2"):
            resumed = series.restore_latest({"params": small()})
        assert resumed is not None
        assert (resumed.step, resumed.metadata) == (1, {"loss": 0.5})
        chex.assert_trees_all_equal(resumed.items["params"], small(1))
        # the run goes on, and comes by the same step again
        series.save(2, {"params": small(20)})
        again = series.restore_latest({"params": small()})
        assert again is not None
        chex.assert_trees_all_equal(again.items["params"], small(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "damaged-2"]


def test_no_intact_checkpoint_is_an_error_and_nothing_is_deleted(tmp_path: Path) -> None:
    fill(tmp_path, (1, 2))
    for step in ("1", "2"):
        (tmp_path / step / "metadata" / "metadata").write_text("{")
    with (
        Checkpoints(tmp_path, keep_last=3) as series,
        pytest.warns(DamagedCheckpointWarning),
        pytest.raises(DamagedCheckpointError, match=r"no checkpoint is intact(.|\n)*step 2(.|\n)*step 1"),
    ):
        series.restore_latest({"params": small()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-1", "damaged-2"]


def test_a_latest_that_does_not_fit_is_an_error_not_a_reason_to_go_back(tmp_path: Path) -> None:
    fill(tmp_path, (1, 2))
    with Checkpoints(tmp_path, keep_last=3) as series, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="w: stored shape") as caught:
            series.restore_latest({"params": {**small(), "w": jnp.ones(7)}})
        assert not isinstance(caught.value, DamagedCheckpointError)
        with pytest.raises(CheckpointError, match="no such item"):
            series.restore_latest({"params": small(), "lora": small()})
        assert series.steps() == (1, 2)


def test_a_save_that_fails_is_never_seen_and_can_be_repeated(tmp_path: Path, full_disk: Callable[[bool], None]) -> None:
    with Checkpoints(tmp_path, keep_last=3) as series:
        series.save(1, {"params": large(1)})
        full_disk(True)
        with pytest.raises(CheckpointError, match=r"could not be written(.|\n)*Failed writing"):
            series.save(2, {"params": large(2)})
        full_disk(False)
        assert not (tmp_path / "2").exists()
    with Checkpoints(tmp_path, keep_last=3) as later:
        assert later.steps() == (1,)
        resumed = later.restore_latest({"params": large()})
        assert resumed is not None
        assert resumed.step == 1
        later.save(2, {"params": large(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_failed_background_save_is_reported_by_the_next_wait(
    tmp_path: Path, full_disk: Callable[[bool], None]
) -> None:
    series = Checkpoints(tmp_path, keep_last=3, asynchronous=True)
    series.save(1, {"params": large(1)})
    series.wait()
    full_disk(True)
    series.save(2, {"params": large(2)})
    with pytest.raises(CheckpointError, match="could not be written"):
        series.wait()
    full_disk(False)
    assert series.steps() == (1,)
    series.close()


def test_a_background_save_keeps_the_values_of_its_moment(tmp_path: Path) -> None:
    counter = np.zeros(1 << 16, np.int32)
    with Checkpoints(tmp_path, keep_last=2, asynchronous=True) as series:
        series.save(1, {"data": {"counter": counter}})
        counter += 1  # the run does not wait for the disk
        series.wait()
        resumed = series.restore_latest({"data": {"counter": np.ones_like(counter)}})
    assert resumed is not None
    np.testing.assert_array_equal(resumed.items["data"]["counter"], np.zeros(1 << 16))
