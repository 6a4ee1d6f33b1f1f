"""Training state on disk: Orbax items, compared before they are restored and checked after.

A checkpoint is a directory with one Orbax item per pytree ("params", "lora", "optimizer", "data") and one JSON item
with the caller's metadata (configuration, step) and a checksum per array. Items are stored by dotted leaf name and
know nothing of Python classes, so what was saved on one mesh restores on another, and into any tree whose leaves
have the same names. Orbax casts dtypes without a word; here the stored names, shapes and dtypes are compared with
the target first, and every difference is listed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding

from rdt2_jax.checkpoints.checksums import checksums
from rdt2_jax.errors import CheckpointError, DataError
from rdt2_jax.io.files import atomic_directory
from rdt2_jax.params import PyTree, from_named_leaves, named_leaves
from rdt2_jax.problems import Problems

METADATA_ITEM = "metadata"
_RESERVED_ITEMS = (METADATA_ITEM, "metrics")
_FORMAT = "rdt2-jax checkpoint 1"

# What Orbax, tensorstore and json raise on missing, truncated or garbled files.
_READ_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError)


# What Orbax and tensorstore raise on a full disk, a lost folder or a refused permission.
_WRITE_FAILURES = (OSError, ValueError)


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are missing, truncated or altered, as opposed to one that is not the one wanted."""


@dataclasses.dataclass(frozen=True)
class PartialRestore:
    """Part of an item: the restored `tree`, and the dotted names of stored leaves that were `left_out`."""

    tree: PyTree
    left_out: tuple[str, ...]


def save(
    directory: str | os.PathLike[str],
    items: Mapping[str, PyTree],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that appears under its name only when it is complete.

    Args:
        directory: where; missing parents are created.
        items: item name -> pytree of jax arrays, numpy arrays, PRNG keys and Python numbers.
        metadata: JSON values to keep with it, such as the configuration and the step.
        overwrite: allow an existing checkpoint to be replaced. It stays in place until the new one is complete.

    Raises:
        CheckpointError: the directory exists (with `overwrite`: and is not a checkpoint), an item cannot be stored,
            metadata is not JSON, or writing failed; nothing of a failed attempt stays behind.
    """
    path = Path(os.path.abspath(directory))
    arguments = save_arguments(items, metadata)
    if not (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, arguments)
        return
    if not overwrite:
        raise CheckpointError("the checkpoint exists", where=path, fix="choose another name, or pass overwrite=True")
    if not (path / METADATA_ITEM).is_dir():
        raise CheckpointError(
            "only a checkpoint is ever overwritten, and this is none", where=path, fix="remove it by hand"
        )
    if jax.process_count() > 1:
        raise CheckpointError(
            "a checkpoint cannot be replaced by several processes", where=path, fix="choose a new directory"
        )
    with atomic_directory(path, overwrite=True) as temporary:
        _write(temporary, arguments)


def stored_items(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the pytrees in a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return tuple(_read_envelope(Path(directory))["items"])


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that was given to `save`.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return _read_envelope(Path(directory))["metadata"]


def stored_metadata(directory: str | os.PathLike[str], item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted leaf name -> stored shape and dtype, without reading any array. PRNG keys are their uint32 key data.

    Raises:
        CheckpointError: there is no such checkpoint or item, or it is damaged.
    """
    path = _item_path(Path(directory), item, _read_envelope(Path(directory)))
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named_leaves(tree).items()}
    except _READ_FAILURES as error:
        raise _damaged(path, error) from error


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


def _restore(directory: Path, item: str, target: PyTree, *, cast: bool, partial: bool) -> PartialRestore:
    envelope = _read_envelope(directory)
    stored = stored_metadata(directory, item)
    wanted = {name: _wanted(leaf, where=name) for name, leaf in named_leaves(target).items()}
    record = envelope["items"][item]
    _compare(directory, item, stored, wanted, record["keys"], cast=cast, partial=partial)
    path = directory / item
    arrays = _read_arrays(path, {name: stored[name] for name in wanted}, wanted)
    found = checksums(arrays)
    altered = [name for name in arrays if found[name] != record["checksums"].get(name)]
    if altered:
        raise DamagedCheckpointError("stored values differ from those that were saved", where=path, found=altered)
    leaves = {name: wanted[name].finish(array, record["keys"].get(name)) for name, array in arrays.items()}
    left_out = tuple(name for name in stored if name not in wanted)
    return PartialRestore(from_named_leaves(target, leaves), left_out)


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


def _compare(
    directory: Path,
    item: str,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    wanted: Mapping[str, _Wanted],
    keys: Mapping[str, str],
    *,
    cast: bool,
    partial: bool,
) -> None:
    problems = Problems()
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
        where=directory / item,
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
    request = ocp.args.PyTreeRestore(item=_nested(stored), restore_args=_nested(arguments), partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return named_leaves(checkpointer.restore(epath.Path(path), args=request))
    except _READ_FAILURES as error:
        raise _damaged(path, error) from error


def save_arguments(items: Mapping[str, PyTree], metadata: Mapping[str, Any]) -> ocp.args.Composite:
    """Orbax's arguments for all items and for the JSON envelope that describes them, for those who drive Orbax.

    Raises:
        CheckpointError: as `save`.
    """
    arguments: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for item, tree in items.items():
        if item in _RESERVED_ITEMS or not item.isidentifier():
            raise CheckpointError(
                "not usable as the name of an item", expected=f"an identifier, not {_RESERVED_ITEMS}", found=item
            )
        leaves = named_leaves(tree)
        if not leaves:
            raise CheckpointError("an item without arrays cannot be stored", where=item, fix="leave it out")
        arrays = {name: _storable(leaf, f"{item}: {name}") for name, leaf in leaves.items()}
        keys = {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)}
        try:
            records[item] = {"checksums": checksums(arrays), "keys": keys}
        except DataError as error:
            raise CheckpointError("an item cannot be stored", where=item, found=error.found) from error
        arguments[item] = ocp.args.PyTreeSave(_nested(arrays))
    envelope = {"format": _FORMAT, "metadata": _json_only(metadata), "items": records}
    envelope["crc32"] = _envelope_crc32(envelope)
    return ocp.args.Composite(**arguments, **{METADATA_ITEM: ocp.args.JsonSave(envelope)})


def _storable(leaf: Any, where: str) -> jax.Array | np.ndarray:
    array = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if isinstance(array, (np.generic, bool, int, float)):
        array = np.asarray(array)
    if not isinstance(array, (jax.Array, np.ndarray)) or array.size == 0:
        raise CheckpointError(
            "a leaf cannot be stored",
            where=where,
            expected="an array with at least one element, a PRNG key or a number",
            found=f"shape {array.shape}" if hasattr(array, "shape") else type(leaf).__name__,
            fix="strings and other JSON values belong into the metadata",
        )
    return array


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _json_only(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, if JSON gives it back unchanged."""
    try:
        copy = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError("metadata cannot be written as JSON", found=str(error)) from error
    if copy != metadata:
        changed = [key for key in metadata if copy.get(key) != metadata[key]]
        raise CheckpointError(
            "metadata would come back different from JSON", where=changed, fix="use lists, and strings as keys"
        )
    return copy


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names -> nested dictionaries, the structure that Orbax stores."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CheckpointError("a leaf's name continues that of another leaf", where=name)
        if last in node:
            raise CheckpointError("a leaf's name is the beginning of another leaf's", where=name)
        node[last] = leaf
    return tree


def _write(path: Path, arguments: ocp.args.Composite) -> None:
    try:
        with write_failures(path), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(epath.Path(path), args=arguments, force=True)
    except BaseException:
        # Orbax leaves what it had written beside the target; of several processes, others may still be writing there
        if jax.process_count() == 1:
            for unfinished in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)  # the failure that led here is the one to report
        raise


@contextlib.contextmanager
def write_failures(where: Path) -> Iterator[None]:
    """Turns what Orbax raises when a checkpoint cannot be written into CheckpointError."""
    try:
        yield
    except _WRITE_FAILURES as error:
        raise CheckpointError(
            "a checkpoint could not be written",
            where=where,
            found=f"{type(error).__name__}: {error}",
            fix="check free space and permissions, then save again",
        ) from error


def _read_envelope(directory: Path) -> dict[str, Any]:
    """The JSON item, with its own checksum verified."""
    if not directory.is_dir():
        raise CheckpointError("no checkpoint", where=directory)
    path = directory / METADATA_ITEM / METADATA_ITEM
    try:
        envelope = json.loads(path.read_bytes())
        stored_crc32 = envelope.pop("crc32")
        intact = envelope["format"] == _FORMAT and stored_crc32 == _envelope_crc32(envelope)
    except _READ_FAILURES as error:
        raise _damaged(path, error) from error
    if not intact:
        raise DamagedCheckpointError(
            "not the metadata that was saved", where=path, expected=_FORMAT, found=envelope["format"]
        )
    return envelope


def _envelope_crc32(envelope: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(envelope, sort_keys=True).encode())


def _item_path(directory: Path, item: str, envelope: Mapping[str, Any]) -> Path:
    if item not in envelope["items"]:
        known = ", ".join(envelope["items"])
        raise CheckpointError("the checkpoint has no such item", where=directory, expected=known, found=item)
    return directory / item


def _damaged(path: Path, error: BaseException) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        "a checkpoint is damaged or incomplete", where=path, found=f"{type(error).__name__}: {error}"
    )
