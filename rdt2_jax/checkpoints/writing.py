"""Writing checkpoints: a directory with one Orbax item per pytree ("params", "lora", "optimizer", "data").

Beside the items stands the envelope with the caller's metadata (configuration, step) and a checksum per array. Items
are stored by dotted leaf name and know nothing of Python classes, so what was saved on one mesh restores on another,
and into any tree whose leaves have the same names.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rdt2_jax.checkpoints.checksums import checksums
from rdt2_jax.checkpoints.envelope import (
    METADATA_ITEM,
    foreign_entries,
    is_checkpoint,
    make_envelope,
    read_envelope,
    require_item_name,
)
from rdt2_jax.errors import CheckpointError, DataError
from rdt2_jax.io.files import atomic_directory, make_folder
from rdt2_jax.params import PyTree, named_leaves

_WRITE_FAILURES = (OSError, ValueError)
"""What Orbax and tensorstore raise on a full disk, a lost folder or a refused permission."""


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
        overwrite: allow an existing checkpoint to be replaced, and nothing else: see `require_free`. It stays in place
            until the new one is complete.

    Raises:
        CheckpointError: the directory exists (with `overwrite`: and is not a checkpoint with nothing else in it), an
            item cannot be stored, metadata is not JSON, or writing failed; nothing of a failed attempt stays behind.
        Rdt2Error: the parents cannot be created.
    """
    path = Path(os.path.abspath(directory))
    arguments = save_arguments(items, metadata)
    if not require_free(path, overwrite=overwrite):
        make_folder(path.parent)
        _write(path, arguments)
        return
    if jax.process_count() > 1:
        raise CheckpointError(
            "a checkpoint cannot be replaced by several processes", where=path, fix="choose a new directory"
        )
    with atomic_directory(path, overwrite=True) as temporary:
        _write(temporary, arguments)
        require_free(path, overwrite=True)  # writing took its time, and what came in meanwhile is nobody's to delete


def require_free(path: Path, *, overwrite: bool) -> bool:
    """Whether a checkpoint stands at `path` that may be replaced; False where nothing, or an empty folder, is.

    Raises:
        CheckpointError: something is there, and without `overwrite`, or it is no checkpoint, its envelope is damaged
            (then nobody knows what would be deleted), or other files lie in its folder; names them.
    """
    if not (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        return False
    if not overwrite:
        raise CheckpointError("the checkpoint exists", where=path, fix="choose another name, or pass overwrite=True")
    if not is_checkpoint(path):
        raise CheckpointError(
            "only a checkpoint is ever overwritten, and this is none", where=path, fix="remove it by hand"
        )
    try:
        strangers = foreign_entries(path, read_envelope(path))
    except CheckpointError as error:
        raise CheckpointError(
            "only a checkpoint is ever overwritten, and this is none, or a damaged one",
            where=path,
            found=f"{error.what}: {error.found}",
            fix="remove it by hand",
        ) from error
    if strangers:
        raise CheckpointError(
            "the folder of the checkpoint has other things in it, which overwriting would delete",
            where=path,
            found=", ".join(strangers),
            fix="move them elsewhere, or choose another name",
        )
    return True


def save_arguments(items: Mapping[str, PyTree], metadata: Mapping[str, Any]) -> ocp.args.Composite:
    """Orbax's arguments for all items and for the envelope that describes them, for those who drive Orbax.

    Raises:
        CheckpointError: as `save`.
    """
    arguments: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for item, tree in items.items():
        require_item_name(item)
        leaves = named_leaves(tree)
        if not leaves:
            raise CheckpointError("an item without arrays cannot be stored", where=item, fix="leave it out")
        arrays = {name: _storable(leaf, f"{item}: {name}") for name, leaf in leaves.items()}
        keys = {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)}
        try:
            records[item] = {"checksums": checksums(arrays), "keys": keys}
        except DataError as error:
            raise CheckpointError("an item cannot be stored", where=item, found=error.found) from error
        arguments[item] = ocp.args.PyTreeSave(nested(arrays))
    return ocp.args.Composite(**arguments, **{METADATA_ITEM: ocp.args.JsonSave(make_envelope(metadata, records))})


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names -> nested dictionaries, the structure that Orbax stores.

    Raises:
        CheckpointError: one name is the beginning of another.
    """
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
