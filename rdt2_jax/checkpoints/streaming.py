"""Writing an item whose leaves are made one after another and never exist together.

The leaves are announced first and gathered into groups of bounded size. Each group is read, written as a part of its
own and forgotten before the next one is read. Parts stand in numbered folders of the item; the envelope names them,
and `restore` puts them together again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rdt2_jax.checkpoints.checksums import checksums
from rdt2_jax.checkpoints.envelope import METADATA_ITEM, make_envelope, require_item_name
from rdt2_jax.checkpoints.writing import nested, require_free, write_failures
from rdt2_jax.errors import CheckpointError, DataError
from rdt2_jax.io.files import atomic_directory, make_folder
from rdt2_jax.params import tree_bytes
from rdt2_jax.problems import Problems

DEFAULT_GROUP_BYTES = 1 << 26
"""Small beside the largest leaf of a large model, and large beside what a write costs in itself."""

_CHUNK_BYTES = 1 << 23
"""Arrays are cut into chunks of at most this size: what is compressed and not yet on disk is a few of them."""

_NO_FILES: Mapping[str, bytes] = MappingProxyType({})

StreamProgress = Callable[[str, int, int], None]
"""Called as (leaf, bytes done, bytes in all) for every leaf that is on disk."""


@dataclasses.dataclass(frozen=True)
class StreamedSave:
    """What a streamed save wrote.

    Attributes:
        num_leaves: arrays.
        nbytes: of all arrays, before compression.
        num_parts: groups, each written on its own.
        largest_part_bytes: the most that was held at one time.
    """

    num_leaves: int
    nbytes: int
    num_parts: int
    largest_part_bytes: int


def save_streamed(
    directory: str | os.PathLike[str],
    item: str,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray | jax.Array],
    metadata: Mapping[str, Any],
    *,
    files: Mapping[str, bytes] = _NO_FILES,
    max_group_bytes: int = DEFAULT_GROUP_BYTES,
    overwrite: bool = False,
    progress: StreamProgress | None = None,
) -> StreamedSave:
    """Writes a checkpoint with one item, holding one group of its leaves at a time.

    It appears under its name only when it is complete, and is read like any other checkpoint. Host arrays should start
    at multiples of 64 bytes (`rdt2_jax.host_arrays.aligned_empty`): others are copied once more while they are written.

    Args:
        directory: where; missing parents are created.
        item: item name.
        leaves: dotted leaf name -> shape and dtype, in the order in which they are read.
        read: makes a leaf; called once for each. The array must not change afterwards.
        metadata: JSON values to keep with it.
        files: name -> content of small files to put beside the item, such as a configuration.
        max_group_bytes: leaves are gathered up to this size; a larger leaf is a group by itself.
        overwrite: allow an existing checkpoint to be replaced, and nothing else: see `writing.require_free`. It stays
            in place until the new one is complete.
        progress: called for every leaf once its group is written.

    Raises:
        CheckpointError: several processes, the directory exists (with `overwrite`: and is not a checkpoint with nothing
            else in it), a leaf or a file cannot be stored or is not what was announced, metadata is not JSON, or
            writing failed. Nothing of a failed attempt stays behind.
        Rdt2Error: the directory or its parents cannot be created.
    """
    path = Path(os.path.abspath(directory))
    if jax.process_count() > 1:
        raise CheckpointError(
            "a streamed save is the work of one process", where=path, expected=1, found=jax.process_count()
        )
    _check_announced(item, leaves, files)
    make_envelope(metadata, {})  # refuses metadata before anything is written
    require_free(path, overwrite=overwrite)
    groups = tuple(_groups(leaves, max_group_bytes))
    sizes = [sum(tree_bytes(leaves[name]) for name in group) for group in groups]
    make_folder(path.parent)
    with atomic_directory(path, overwrite=overwrite) as temporary:
        record = _write_groups(temporary / item, leaves, groups, read, progress)
        envelope = make_envelope(metadata, {item: record}, tuple(files))
        with write_failures(path):
            (temporary / METADATA_ITEM).mkdir()
            (temporary / METADATA_ITEM / METADATA_ITEM).write_text(json.dumps(envelope), encoding="utf-8")
            for name, content in files.items():
                (temporary / name).write_bytes(content)
        require_free(path, overwrite=overwrite)  # writing took its time: see `save`
    return StreamedSave(len(leaves), sum(sizes), len(groups), max(sizes))


def _check_announced(item: str, leaves: Mapping[str, jax.ShapeDtypeStruct], files: Mapping[str, bytes]) -> None:
    """Refuses what cannot be stored before anything is read."""
    require_item_name(item)
    if not leaves:
        raise CheckpointError("an item without arrays cannot be stored", where=item)
    nested(leaves)
    problems = Problems()
    for name, leaf in leaves.items():
        if 0 in leaf.shape:
            problems.add(f"{name}: no elements in shape {tuple(leaf.shape)}")
        try:
            checksums({name: np.zeros(1, leaf.dtype)})
        except (DataError, TypeError):
            problems.add(f"{name}: dtype {leaf.dtype}")
    for name in files:
        if Path(name).name != name or name in (item, METADATA_ITEM):
            problems.add(f"file {name!r}: not usable as the name of a file beside the items")
    problems.raise_if_any(
        CheckpointError,
        "an item cannot be stored",
        where=item,
        expected="arrays of booleans, integers or floats with at least one element",
    )


def _groups(leaves: Mapping[str, jax.ShapeDtypeStruct], max_bytes: int) -> Iterator[tuple[str, ...]]:
    """Leaves in order, gathered while they fit together."""
    group: list[str] = []
    size = 0
    for name, leaf in leaves.items():
        if group and size + tree_bytes(leaf) > max_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append(name)
        size += tree_bytes(leaf)
    yield tuple(group)


def _write_groups(
    path: Path,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    groups: tuple[tuple[str, ...], ...],
    read: Callable[[str], np.ndarray | jax.Array],
    progress: StreamProgress | None,
) -> dict[str, Any]:
    """Writes all parts of an item; returns its record in the envelope."""
    path.mkdir()
    total, done = tree_bytes(dict(leaves)), 0
    found: dict[str, int] = {}
    for part, group in enumerate(groups):
        found |= _write_group(path / str(part), leaves, group, read)
        # arrays that Orbax dropped but left in reference cycles, and buffers that jax has queued for release, go now
        gc.collect()
        for name in group:
            done += tree_bytes(leaves[name])
            if progress is not None:
                progress(name, done, total)
    return {"checksums": found, "keys": {}, "parts": [str(part) for part in range(len(groups))]}


def _write_group(
    path: Path,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    group: tuple[str, ...],
    read: Callable[[str], np.ndarray | jax.Array],
) -> dict[str, int]:
    """Reads and writes one part; returns its checksums."""
    arrays: dict[str, jax.Array | np.ndarray] = {}
    for name in group:
        arrays[name] = _as_announced(name, read(name), leaves[name])
    found = checksums(arrays)
    shared = nested({name: _shared(arrays.pop(name)) for name in group})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), shared)
    # one file per chunk: the single-file format keeps a whole compressed part in memory until it is complete
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with _quiet(), write_failures(path), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(epath.Path(path), args=ocp.args.PyTreeSave(shared, save_args=save_args))
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops the warning with which Orbax tells that there is no single-file format to finish."""

    def unexpected(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(unexpected)
    try:
        yield
    finally:
        logger.removeFilter(unexpected)


def _as_announced(name: str, array: np.ndarray | jax.Array, announced: jax.ShapeDtypeStruct) -> np.ndarray | jax.Array:
    if array.shape != tuple(announced.shape) or array.dtype != announced.dtype:
        raise CheckpointError(
            "a leaf is not what was announced",
            where=name,
            expected=f"{announced.dtype} {tuple(announced.shape)}",
            found=f"{array.dtype} {array.shape}",
        )
    return array


def _shared(array: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """A host array as a jax array over the same memory: Orbax would copy a numpy array once more.

    Stays numpy where jax cannot take it as it is: 64-bit numbers, or a jax without its CPU backend.
    """
    if isinstance(array, jax.Array) or jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return array
    return jax.device_put(array, cpu).block_until_ready()
