"""Reading checkpoints: stored leaves are compared with what is wanted before they are read, and checked after.

Orbax casts dtypes without a word; here the stored names, shapes and dtypes are compared with the target first, and
every difference is listed. After reading, the checksum of every array is compared with the one in the envelope.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding

from rdt2_jax.checkpoints.checksums import checksums
from rdt2_jax.checkpoints.envelope import (
    READ_FAILURES,
    DamagedCheckpointError,
    damaged,
    item_record,
    part_paths,
    read_envelope,
)
from rdt2_jax.checkpoints.writing import nested
from rdt2_jax.errors import CheckpointError
from rdt2_jax.params import PyTree, from_named_leaves, named_leaves, tree_bytes
from rdt2_jax.problems import Problems

_COLLECT_BYTES = 1 << 26
"""Orbax leaves what it read in reference cycles; after so much of it they are collected."""


@dataclasses.dataclass(frozen=True)
class PartialRestore:
    """Part of an item: the restored `tree`, and the dotted names of stored leaves that were `left_out`."""

    tree: PyTree
    left_out: tuple[str, ...]


def stored_metadata(directory: str | os.PathLike[str], item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted leaf name -> stored shape and dtype, without reading any array. PRNG keys are their uint32 key data.

    Raises:
        CheckpointError: there is no such checkpoint or item, or it is damaged.
    """
    return dict(_open_item(Path(directory), item).leaves)


def restore(directory: str | os.PathLike[str], item: str, target: PyTree, *, cast: bool = False) -> PyTree:
    """Reads an item into the structure, dtypes and shardings of `target`.

    Args:
        directory: the checkpoint.
        item: item name.
        target: tree whose leaves say what is wanted: `jax.ShapeDtypeStruct` (placed by its sharding, or on the
            default device without one), a jax array (placed like it), or a numpy array or Python number (stays on
            the host).
        cast: allow stored dtypes to differ from the target's; values are then converted.

    Returns:
        A tree like `target`.

    Raises:
        CheckpointError: stored and wanted leaves differ in name, shape or (without `cast`) dtype; lists them all.
        DamagedCheckpointError: files are missing, truncated or altered.
    """
    return _restore(Path(directory), item, target, cast=cast, partial=False).tree


def restore_partial(
    directory: str | os.PathLike[str], item: str, target: PyTree, *, cast: bool = False
) -> PartialRestore:
    """As `restore`, for a target that names only some of the stored leaves; names what it leaves out."""
    return _restore(Path(directory), item, target, cast=cast, partial=True)


def restore_streamed(
    directory: str | os.PathLike[str], item: str, target: PyTree, *, cast: bool = False
) -> Iterator[tuple[str, Any]]:
    """As `restore_partial`, one leaf after another: no more is held than the caller keeps.

    Everything is compared with `target` when this is called, before the first leaf is read.

    Returns:
        An iterator of dotted names and leaves, in the order of `target`.
    """
    stored, wanted = _compared(Path(directory), item, target, cast=cast, partial=True)
    return _one_by_one(stored, wanted)


class StoredLeaves:
    """An item, opened once, whose leaves are then read to the host one at a time.

    Attributes:
        abstract: dotted leaf name -> stored shape and dtype.

    Raises:
        CheckpointError: there is no such checkpoint or item, or it is damaged.
    """

    def __init__(self, directory: str | os.PathLike[str], item: str) -> None:
        self._stored = _open_item(Path(directory), item)
        self.abstract: Mapping[str, jax.ShapeDtypeStruct] = self._stored.leaves

    def read(self, name: str) -> np.ndarray:
        """One leaf as it is stored, verified. PRNG keys are their uint32 key data.

        Raises:
            DamagedCheckpointError: files are missing, truncated or altered.
        """
        leaf = self.abstract[name]
        return _read_leaves(self._stored, {name: _Wanted(tuple(leaf.shape), leaf.dtype, None)}, (name,))[name]


def host_target(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """A restore target of this shape and dtype that stays on the host, and takes no memory itself."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _one_by_one(stored: _StoredItem, wanted: Mapping[str, _Wanted]) -> Iterator[tuple[str, Any]]:
    unreleased = 0
    for name in wanted:
        if unreleased > _COLLECT_BYTES:
            gc.collect()
            unreleased = 0
        unreleased += tree_bytes(stored.leaves[name])
        yield name, _read_leaves(stored, wanted, (name,))[name]  # no local variable: it would keep the leaf


def _restore(directory: Path, item: str, target: PyTree, *, cast: bool, partial: bool) -> PartialRestore:
    stored, wanted = _compared(directory, item, target, cast=cast, partial=partial)
    leaves: dict[str, Any] = {}
    for part in stored.parts:
        leaves |= _read_leaves(stored, wanted, [name for name in wanted if stored.part_of[name] == part])
    left_out = tuple(name for name in stored.leaves if name not in wanted)
    return PartialRestore(from_named_leaves(target, leaves), left_out)


@dataclasses.dataclass(frozen=True)
class _StoredItem:
    """An item on disk: its leaves, the folder that each is in, checksums, and the implementations of PRNG keys."""

    path: Path
    parts: tuple[Path, ...]
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    part_of: Mapping[str, Path]
    checksums: Mapping[str, int]
    keys: Mapping[str, str]


def _open_item(directory: Path, item: str) -> _StoredItem:
    """Reads names, shapes and dtypes."""
    record = item_record(directory, item, read_envelope(directory))
    parts = part_paths(directory, item, record)
    leaves: dict[str, jax.ShapeDtypeStruct] = {}
    part_of: dict[str, Path] = {}
    for path in parts:
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree
            found = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named_leaves(tree).items()}
        except READ_FAILURES as error:
            raise damaged(path, error) from error
        leaves |= found
        part_of |= dict.fromkeys(found, path)
    if set(leaves) != set(record["checksums"]):
        differing = sorted(set(leaves) ^ set(record["checksums"]))
        raise DamagedCheckpointError(
            "the leaves on disk are not those that were saved", where=directory / item, found=differing
        )
    return _StoredItem(directory / item, parts, leaves, part_of, record["checksums"], record["keys"])


def _compared(
    directory: Path, item: str, target: PyTree, *, cast: bool, partial: bool
) -> tuple[_StoredItem, dict[str, _Wanted]]:
    """What is stored and what is wanted, known to fit together."""
    stored = _open_item(directory, item)
    wanted = {name: _wanted(leaf, where=name) for name, leaf in named_leaves(target).items()}
    _compare(stored, wanted, cast=cast, partial=partial)
    return stored, wanted


def _read_leaves(stored: _StoredItem, wanted: Mapping[str, _Wanted], names: Sequence[str]) -> dict[str, Any]:
    """Leaves that are in one part, verified, as they are wanted."""
    if not names:
        return {}
    arrays = _read_arrays(stored.part_of[names[0]], {name: stored.leaves[name] for name in names}, wanted)
    found = checksums(arrays)
    altered = [name for name in arrays if found[name] != stored.checksums[name]]
    if altered:
        raise DamagedCheckpointError(
            "stored values differ from those that were saved", where=stored.path, found=altered
        )
    return {name: wanted[name].finish(array, stored.keys.get(name)) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a leaf of a restore target asks for. `sharding` is None for leaves that stay on the host."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: Sharding | None
    python_type: type | None = None

    @property
    def is_key(self) -> bool:
        return jnp.issubdtype(self.dtype, jax.dtypes.prng_key)

    @property
    def stored(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype on disk."""
        abstract = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return jax.eval_shape(jax.random.key_data, abstract) if self.is_key else abstract

    def finish(self, array: Any, key_implementation: str | None) -> Any:
        """A restored array as the leaf that was asked for."""
        if self.is_key:
            return jax.random.wrap_key_data(array, impl=key_implementation)
        if array.dtype != self.dtype:
            array = array.astype(self.dtype)
        return array if self.python_type is None else self.python_type(array[()])


def _wanted(leaf: Any, where: str) -> _Wanted:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        place = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
        return _Wanted(tuple(leaf.shape), leaf.dtype, place)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return _Wanted(leaf.shape, leaf.dtype, None)
    if isinstance(leaf, (bool, int, float)):
        return _Wanted((), np.asarray(leaf).dtype, None, type(leaf))
    raise CheckpointError(
        "not a restore target",
        where=where,
        expected="jax.ShapeDtypeStruct, an array or a number",
        found=type(leaf).__name__,
    )


def _compare(item: _StoredItem, wanted: Mapping[str, _Wanted], *, cast: bool, partial: bool) -> None:
    problems = Problems()
    stored, keys = item.leaves, item.keys
    for name, want in wanted.items():
        if name not in stored:
            problems.add(f"{name}: not in the checkpoint (wanted {want.dtype} {want.shape})")
            continue
        have, need = stored[name], want.stored
        if tuple(have.shape) != tuple(need.shape):
            problems.add(f"{name}: stored shape {tuple(have.shape)}, wanted {tuple(need.shape)}")
        if (name in keys) != want.is_key or (want.is_key and _key_dtype(keys[name], have) != want.dtype):
            problems.add(f"{name}: stored {_kind(keys.get(name))}, wanted {want.dtype}")
        elif have.dtype != need.dtype and not cast:
            problems.add(f"{name}: stored dtype {have.dtype}, wanted {need.dtype}")
        if want.sharding is not None and jax.dtypes.canonicalize_dtype(have.dtype) != have.dtype:
            problems.add(f"{name}: jax would cut the stored {have.dtype} to 32 bits; ask for a numpy array instead")
    if not partial:
        for name in stored:
            if name not in wanted:
                problems.add(f"{name}: in the checkpoint, not in the target ({stored[name].dtype})")
    problems.raise_if_any(
        CheckpointError,
        "the stored item is not what the target asks for",
        where=item.path,
        fix="cast=True permits other dtypes, restore_partial a target with fewer leaves",
    )


def _kind(key_implementation: str | None) -> str:
    return "an array" if key_implementation is None else f"a {key_implementation} key"


def _key_dtype(implementation: str, data: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(lambda d: jax.random.wrap_key_data(d, impl=implementation), data).dtype


def _read_arrays(
    path: Path, stored: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, _Wanted]
) -> dict[str, jax.Array | np.ndarray]:
    """The named leaves in their stored dtypes, where the target wants them."""
    arguments = {}
    for name, leaf in stored.items():
        sharding = wanted[name].sharding
        if sharding is None:
            arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        else:
            arguments[name] = ocp.ArrayRestoreArgs(
                restore_type=jax.Array, dtype=leaf.dtype, sharding=sharding, global_shape=leaf.shape
            )
    request = ocp.args.PyTreeRestore(item=nested(stored), restore_args=nested(arguments), partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return named_leaves(checkpointer.restore(epath.Path(path), args=request))
    except READ_FAILURES as error:
        raise damaged(path, error) from error
