"""Random access to the samples of many shards, as Grain asks for it.

Nothing of a sample stays in memory: an archive's index is a memory map, of which the ones used last are kept open. What
is resident is a name and a count per shard.
"""

from __future__ import annotations

import glob
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import RawSample
from rdt2_data.shards.index import TAR_BLOCK, ShardIndex, Stamp, index_path, read_index, scan_shard, write_index
from rdt2_data.shards.numbering import ARRAY_RECORD_SUFFIX, TAR_SUFFIX, fingerprint, locate
from rdt2_data.shards.storage import Range, Storage, find_remote, host_index_folder, is_url, storage_for
from rdt2_jax.errors import DataError
from rdt2_jax.progress import progress_bar

_OPEN_INDICES = 64
"""Each keeps a descriptor open."""
_SHARDS_PER_PROCESS = 16
"""Starting a process takes about as long as scanning this many small shards."""

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]


class SampleSource(Protocol):
    """Samples by number, whatever container they lie in."""

    tally: Tally

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], members: Sequence[str] | None = None) -> list[RawSample | SampleError]:
        """The samples of these numbers, or why one cannot be had. Safe to call from several threads.

        Args:
            indices: of the samples.
            members: extensions to read; None for all. Absent ones are simply not in the sample.
        """
        ...

    def locate(self, index: int) -> tuple[str, int]:
        """Shard and position in it of a sample."""
        ...

    def fingerprint(self) -> str:
        """The same on every host for the same samples in the same order."""
        ...


@dataclass(frozen=True)
class _Shard:
    path: str
    count: int
    size: int


class TarShards:
    """The samples of tar archives, numbered through in the order of the archives.

    Indices are made where there are none or where they are stale. What is wrong with an archive is counted in `tally`;
    its other samples are there.

    Args:
        shards: paths or addresses.
        index_folder: where indices lie; by default beside the archives, or in the cache of this host where that
            folder cannot be written to.
        tally: takes the problems; a strict one raises the first.
        workers: processes that make missing indices; all cores by default.

    Raises:
        DataError: no shards, or one that cannot be opened.
        SampleError: a damaged shard, when the tally is strict.
    """

    def __init__(
        self,
        shards: Sequence[str],
        *,
        index_folder: Path | None = None,
        tally: Tally | None = None,
        workers: int | None = None,
    ) -> None:
        _require_shards(shards)
        self.tally = tally or Tally()
        self._storage = storage_for(shards[0])
        self._index_folder = index_folder
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()
        self._shards: list[_Shard] = []
        for path, (count, size, problems) in zip(shards, self._make_indices(shards, workers), strict=True):
            self._shards.append(_Shard(path, count, size))
            for problem in problems:
                self.tally.add(problem)
        self._starts = np.concatenate([[0], np.cumsum([shard.count for shard in self._shards])]).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_indices": OrderedDict()}
        del state["_lock"], state["tally"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock, self.tally = threading.Lock(), Tally()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"TarShards({len(self._shards)} shards, {len(self)} samples)"

    def locate(self, index: int) -> tuple[str, int]:
        """See `SampleSource`."""
        shard, row = self._locate(index)
        return self._shards[shard].path, row

    def fingerprint(self) -> str:
        """See `SampleSource`: names, sizes and counts of the archives, not where they lie."""
        return fingerprint([(Path(shard.path).name, shard.size, shard.count) for shard in self._shards])

    def read(self, indices: Sequence[int], members: Sequence[str] | None = None) -> list[RawSample | SampleError]:
        """See `SampleSource`. One range is read per sample: its members lie side by side.

        Raises:
            DataError: an index outside [0, len).
        """
        places: list[dict[str, tuple[int, int]]] = []
        ranges: list[Range] = []
        for index in indices:
            shard, row = self._locate(index)
            place = self._index(shard).members(row)
            if members is not None:
                place = {extension: place[extension] for extension in members if extension in place}
            start = min((first for first, _ in place.values()), default=TAR_BLOCK) - TAR_BLOCK
            stop = max((end for _, end in place.values()), default=TAR_BLOCK)
            places.append(place)
            ranges.append(Range(self._shards[shard].path, start, stop))
        blocks = self._storage.read(ranges)
        return [_split(*of_sample) for of_sample in zip(indices, places, ranges, blocks, strict=True)]

    def _locate(self, index: int) -> tuple[int, int]:
        return locate(self._starts, index, repr(self))

    def _index(self, shard: int) -> ShardIndex:
        with self._lock:
            index = self._indices.get(shard)
            if index is None:
                path = self._shards[shard].path
                index, _ = _load_index(path, self._storage, self._index_folder)
                if len(index) != self._shards[shard].count:
                    found = f"{len(index)} samples, not {self._shards[shard].count}"
                    raise DataError("a shard changed while it was read", where=path, found=found, fix="start again")
                self._indices[shard] = index
                if len(self._indices) > _OPEN_INDICES:
                    self._indices.popitem(last=False)
            else:
                self._indices.move_to_end(shard)
            return index

    def _make_indices(
        self, shards: Sequence[str], workers: int | None
    ) -> list[tuple[int, int, tuple[SampleError, ...]]]:
        """(count, bytes, problems) of every archive; missing indices are made, in several processes when many."""
        arguments = [(path, self._storage, self._index_folder) for path in shards]
        stale = [i for i, argument in enumerate(arguments) if not _is_indexed(*argument)]
        processes = min(workers or os.cpu_count() or 1, -(-len(stale) // _SHARDS_PER_PROCESS))
        with progress_bar("indexing", len(stale), "shards") as advance:
            if processes > 1:
                with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                    for _ in pool.map(_summary, [arguments[i] for i in stale], chunksize=4):
                        advance()
            else:
                for i in stale:
                    _summary(arguments[i])
                    advance()
        return [_summary(argument) for argument in arguments]


def open_source(
    paths: Paths, *, index_folder: Path | None = None, tally: Tally | None = None, workers: int | None = None
) -> SampleSource:
    """The samples at `paths`.

    Args:
        paths: a folder with shards; a file; a pattern with `*` or `{000000..000041}`; or several of these. Local, or an
            address that fsspec knows. All tar, or all ArrayRecord.
        index_folder, tally, workers: see `TarShards`.

    Raises:
        DataError: nothing there, or several kinds of shards.
        SampleError: a damaged shard, when the tally is strict.
    """
    shards = find_shards(paths)
    suffixes = {Path(shard).suffix for shard in shards}
    if suffixes == {TAR_SUFFIX}:
        return TarShards(shards, index_folder=index_folder, tally=tally, workers=workers)
    if suffixes == {ARRAY_RECORD_SUFFIX}:
        from rdt2_data.shards.array_record import ArrayRecordShards

        return ArrayRecordShards(shards, tally=tally)
    raise DataError(
        "these are no shards of one kind", where=shards[0], expected=".tar, or .array_record", found=sorted(suffixes)
    )


_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find_shards(paths: Paths) -> list[str]:
    """Files that `paths` (see `open_source`) stand for: sorted within each, no file twice.

    Raises:
        DataError: one that stands for nothing.
    """
    if not isinstance(paths, (str, PathLike)) and not paths:
        raise DataError("there are no shards", where="paths", expected="at least one path", found="none")
    shards: list[str] = []
    for path in [paths] if isinstance(paths, (str, PathLike)) else paths:
        found = [shard for name in _expand_braces(os.fspath(path)) for shard in _matches(name)]
        if not found:
            expected = "a folder with .tar or .array_record files, a file, or a pattern that fits some"
            raise DataError("there are no shards", where=path, expected=expected)
        shards += found
    return list(dict.fromkeys(shards))


def _expand_braces(path: str) -> list[str]:
    match = _BRACES.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    head, tail = path[: match.start()], path[match.end() :]
    return [name for number in numbers for name in _expand_braces(f"{head}{number:0{len(first)}d}{tail}")]


def _matches(path: str) -> list[str]:
    suffixes = (TAR_SUFFIX, ARRAY_RECORD_SUFFIX)
    if is_url(path):
        return find_remote(path, suffixes)
    if Path(path).is_dir():
        return sorted(str(p) for p in Path(path).iterdir() if p.suffix in suffixes and not p.name.startswith("."))
    return sorted(glob.glob(path)) if "*" in path else [path] if Path(path).is_file() else []


# ------------------------------------------------------------------------------------------------- details


def _index_paths(shard: str, folder: Path | None) -> list[Path]:
    """Where the index of an archive may lie, the best place first."""
    if folder is not None:
        return [index_path(shard, folder)]
    on_host = index_path(shard, host_index_folder())
    return [on_host] if is_url(shard) else [index_path(shard), on_host]


def _find_index(shard: str, stamp: Stamp, folder: Path | None) -> ShardIndex | None:
    found = (read_index(path, stamp) for path in _index_paths(shard, folder))
    return next((index for index in found if index is not None), None)


def _load_index(shard: str, storage: Storage, folder: Path | None) -> tuple[ShardIndex, int]:
    """The index of an archive, made if there is none that fits; and the size of the archive."""
    stamp = storage.stamp(shard)
    index = _find_index(shard, stamp, folder)
    if index is None:
        with storage.open(shard) as stream:
            index = scan_shard(stream, shard, stamp)
        for path in _index_paths(shard, folder):
            if os.access(path.parent, os.W_OK) or path.parent == host_index_folder() or folder is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_index(path, index)
                break
    return index, stamp.size


def _is_indexed(shard: str, storage: Storage, folder: Path | None) -> bool:
    return _find_index(shard, storage.stamp(shard), folder) is not None


def _summary(argument: tuple[str, Storage, Path | None]) -> tuple[int, int, tuple[SampleError, ...]]:
    index, size = _load_index(*argument)
    return len(index), size, index.problems


def _split(
    number: int, places: Mapping[str, tuple[int, int]], range_: Range, block: bytes | Exception
) -> RawSample | SampleError:
    if isinstance(block, Exception):
        found = f"{type(block).__name__}: {block}"
        return SampleError("read-error", where=f"{range_.path}, sample number {number}", found=found)
    key = _key(block, min(places, key=lambda name: places[name])) if places else None
    members = {name: block[first - range_.start : end - range_.start] for name, (first, end) in places.items()}
    return RawSample(key or f"number {number}", range_.path, members)


def _key(block: bytes, extension: str) -> str | None:
    """Name of the sample from the tar header that its bytes begin with; None where a long name hides it."""
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:262] == b"ustar" else b""
    text = (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")
    return text.removesuffix(f".{extension}") if len(block) >= TAR_BLOCK and text.endswith(extension) else None


def _require_shards(shards: Sequence[str]) -> None:
    kinds = {shard.split("://", 1)[0] if is_url(shard) else "" for shard in shards}
    if len(kinds) != 1:
        raise DataError(
            "shards of one source lie in one kind of storage", expected="one", found=sorted(kinds) or "none"
        )
