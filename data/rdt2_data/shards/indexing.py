"""The indices of many shards: found, fetched or made, each trusted only for the archive it was made from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from rdt2_data.problems import SampleError
from rdt2_data.shards.index import (
    INDEX_SUFFIX,
    IndexFile,
    IndexHeader,
    ShardIndex,
    Stamp,
    adopt_index,
    index_path,
    read_index,
    tail_checksum,
    write_index,
)
from rdt2_data.shards.index_processes import index_in_processes
from rdt2_data.shards.storage import Storage, host_index_folder, is_url
from rdt2_data.shards.tar_scan import scan_shard
from rdt2_jax.errors import Rdt2Error
from rdt2_jax.progress import progress_bar

SHARDS_PER_PROCESS = 16
"""Starting a process takes about as long as scanning this many small shards."""


class IndexNotKeptWarning(UserWarning):
    """An index could be written nowhere; it is held in memory, and made again by the next process."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What stays in memory of an archive.

    Attributes:
        path: of the archive.
        stamp: its state when its index was loaded.
        extensions: of its members.
        count: samples.
        records: the file with one record a sample, or the records themselves where no place would take a file.
    """

    path: str
    stamp: Stamp
    extensions: tuple[str, ...]
    count: int
    records: IndexFile | bytes


Loaded = tuple[Shard, list[SampleError]]
"""An archive, and what is wrong with it."""
L = TypeVar("L")


def load_shard(path: str, storage: Storage, folder: Path | None) -> Loaded:
    """An archive with its index, made if there is none that fits; and what is wrong with the archive.

    Args:
        path: of the archive.
        storage: that reads it.
        folder: where indices lie; None: see `index_places`.

    Raises:
        SampleError: "read-error" or "damaged-shard", for an archive that cannot be opened.
    """
    stamp = storage.stamp(path)
    found = _existing(path, stamp, folder)
    if found is not None:
        return found
    index = _fetch(path, storage, stamp) or storage.use(path, lambda stream: scan_shard(stream, stamp))
    return _loaded(path, index.header, _keep(path, index, folder))


def load_shards(paths: Sequence[str], storage: Storage, folder: Path | None, workers: int | None) -> list[Loaded]:
    """`load_shard` of many; one that cannot be opened has no samples, and its error is among the problems.

    Args:
        paths, storage, folder: see `load_shard`.
        workers: processes that make missing indices of local archives; all cores by default.
    """

    def existing(path: str) -> Loaded | None:
        return _or_reported(path, lambda: _existing(path, storage.stamp(path), folder))

    def load(path: str) -> Loaded:
        return _or_reported(path, lambda: load_shard(path, storage, folder))

    with ThreadPoolExecutor(storage.at_once) as pool:
        loaded = dict(zip(paths, pool.map(existing, paths), strict=True))
        missing = [path for path, found in loaded.items() if found is None]
        with progress_bar("indexing", len(missing), "shards") as advance:
            made = [load(path) for path in missing[:1]]
            rest = missing[1:]
            processes = min(workers or os.cpu_count() or 1, -(-len(rest) // SHARDS_PER_PROCESS))
            # Where its index found no place, those of others would not either, and processes would work for nothing.
            shared = processes > 1 and not is_url(rest[0]) and not _in_memory(made[0][0])
            if shared:
                index_in_processes(rest, folder, processes, advance)
            for found in pool.map(load, rest):
                made.append(found)
                if not shared:
                    advance()
    loaded |= dict(zip(missing, made, strict=True))
    shards = [found for path in paths if (found := loaded[path]) is not None]
    _warn_about_memory([shard for shard, _ in shards])
    return shards


def _or_reported(path: str, load: Callable[[], L]) -> L | Loaded:
    """What `load` returns, or an archive without samples and why it has none."""
    try:
        return load()
    except SampleError as problem:
        return Shard(path, Stamp(0, ""), (), 0, b""), [problem]


def _existing(path: str, stamp: Stamp, folder: Path | None) -> Loaded | None:
    found = (read_index(place, stamp) for place in index_places(path, folder))
    return next((_loaded(path, *both) for both in found if both is not None), None)


def _fetch(path: str, storage: Storage, stamp: Stamp) -> ShardIndex | None:
    """The index that was copied into an object store with its archive; None where there is none that fits."""
    if not is_url(path):
        return None
    try:
        data = storage.use(path + INDEX_SUFFIX, lambda stream: stream.read())
    except SampleError:
        return None  # none there, as is usual; what hinders reading it will hinder reading the archive, and is reported
    return adopt_index(data, stamp, storage.use(path, lambda stream: tail_checksum(stream, stamp.size)))


def _keep(path: str, index: ShardIndex, folder: Path | None) -> IndexFile | bytes:
    """Writes an index to the first place that takes it; its records themselves where none does."""
    for place in index_places(path, folder):
        if folder is None and place == index_path(path) and not os.access(place.parent, os.W_OK):
            continue
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            return write_index(place, index)
        except (OSError, Rdt2Error):
            continue  # a full disk, or a folder that cannot be written to: the caller warns once
    return index.records


def _loaded(path: str, header: IndexHeader, records: IndexFile | bytes) -> Loaded:
    shard = Shard(path, header.stamp, _one_of(header.extensions), header.count, records)
    return shard, [problem.error(path) for problem in header.problems]


@lru_cache(maxsize=256)
def _one_of(extensions: tuple[str, ...]) -> tuple[str, ...]:
    """The same object for equal ones: nearly all shards have the same members."""
    return extensions


def _in_memory(shard: Shard) -> bool:
    return isinstance(shard.records, bytes) and shard.count > 0


def _warn_about_memory(shards: Sequence[Shard]) -> None:
    kept = [shard for shard in shards if _in_memory(shard)]
    if kept:
        megabytes = sum(len(shard.records) for shard in kept if isinstance(shard.records, bytes)) / 1e6
        text = f"the indices of {len(kept)} shards cannot be written and are held in memory ({megabytes:.1f} MB), "
        text += f"that of {kept[0].path} for one; name a folder with space that may be written to in XDG_CACHE_HOME"
        warnings.warn(text, IndexNotKeptWarning, stacklevel=4)


def index_places(shard: str, folder: Path | None) -> list[Path]:
    """Where the index of an archive may lie, the best place first."""
    if folder is not None:
        return [index_path(shard, folder)]
    on_host = index_path(shard, host_index_folder())
    return [on_host] if is_url(shard) else [index_path(shard), on_host]
