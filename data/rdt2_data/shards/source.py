"""Random access to the samples of many shards, as Grain asks for it.

Nothing of a sample stays in memory: where its members lie is read from the archive's index when it is wanted. What is
resident is a name, a state and a count per shard.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import RawSample
from rdt2_data.shards.descriptors import DESCRIPTORS, Descriptor
from rdt2_data.shards.find import Paths, find_shards
from rdt2_data.shards.index import RECORD, IndexFile, Stamp, member_places
from rdt2_data.shards.indexing import Shard, load_shard, load_shards
from rdt2_data.shards.numbering import ARRAY_RECORD_SUFFIX, TAR_SUFFIX, fingerprint, locate
from rdt2_data.shards.storage import Range, is_url, shard_changed, storage_for
from rdt2_data.shards.tar_scan import TAR_BLOCK
from rdt2_jax.errors import DataError

__all__ = ["Paths", "SampleSource", "TarShards", "find_shards", "open_source"]


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
        """The same on every host for the same samples in the same order: names, sizes and counts of the files."""
        ...

    def state(self) -> str:
        """Another one when a file was replaced: names, sizes and modification times of the files."""
        ...


class TarShards:
    """The samples of tar archives, numbered through in the order of the archives.

    Indices are made where there are none or where they are stale. What is wrong with an archive is counted in `tally`;
    its other samples are there, and so are those of the other archives. An archive must stay as it is while a source is
    open: reading a local one that changed raises DataError.

    Args:
        shards: paths or addresses.
        index_folder: where indices lie; by default beside the archives, or in the cache of this host where that
            folder cannot be written to.
        tally: takes the problems; a strict one raises the first.
        workers: processes that make missing indices of local archives; all cores by default.

    Raises:
        DataError: no shards, or several kinds of storage.
        SampleError: a shard that is damaged or cannot be opened, when the tally is strict.
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
        self._shards: list[Shard] = []
        for shard, problems in load_shards(shards, self._storage, index_folder, workers):
            self._shards.append(shard)
            for problem in problems:
                self.tally.add(problem)
        self._starts = np.concatenate([[0], np.cumsum([shard.count for shard in self._shards])]).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tally"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.tally = Tally()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"TarShards({len(self._shards)} shards, {len(self)} samples)"

    def locate(self, index: int) -> tuple[str, int]:
        """See `SampleSource`."""
        shard, row = self._locate(index)
        return self._shards[shard].path, row

    def fingerprint(self) -> str:
        """See `SampleSource`."""
        return fingerprint([(Path(shard.path).name, shard.stamp.size, shard.count) for shard in self._shards])

    def state(self) -> str:
        """See `SampleSource`. Of files in an object store it holds what the store has in place of a time."""
        return fingerprint([(Path(shard.path).name, shard.stamp.size, shard.stamp.version) for shard in self._shards])

    def read(self, indices: Sequence[int], members: Sequence[str] | None = None) -> list[RawSample | SampleError]:
        """See `SampleSource`. One range is read per sample: its members lie side by side.

        Raises:
            DataError: an index outside [0, len), or a shard that is no longer the one that was opened.
        """
        found: list[RawSample | SampleError | None] = [None] * len(indices)
        wanted: list[tuple[int, int, dict[str, tuple[int, int]]]] = []  # position in `indices`, row, places
        ranges: list[Range] = []
        stamps: list[Stamp] = []
        for position, index in enumerate(indices):
            number, row = self._locate(index)
            try:
                places = self._places(number, row)
            except SampleError as problem:
                found[position] = problem
                continue
            if members is not None:
                places = {extension: places[extension] for extension in members if extension in places}
            start = min((first for first, _ in places.values()), default=TAR_BLOCK) - TAR_BLOCK
            stop = max((end for _, end in places.values()), default=TAR_BLOCK)
            wanted.append((position, row, places))
            ranges.append(Range(self._shards[number].path, start, stop))
            stamps.append(self._shards[number].stamp)
        blocks = self._storage.read(ranges, stamps)
        for (position, row, places), range_, block in zip(wanted, ranges, blocks, strict=True):
            found[position] = _split(row, places, range_, block)
        return [sample for sample in found if sample is not None]

    def _locate(self, index: int) -> tuple[int, int]:
        return locate(self._starts, index, repr(self))

    def _places(self, number: int, row: int) -> dict[str, tuple[int, int]]:
        """Where the members of a sample lie; an index file that is gone is made again."""
        shard = self._shards[number]
        size = RECORD.itemsize * len(shard.extensions)
        try:
            record = _read_records(shard.records, row * size, (row + 1) * size)
        except OSError:
            shard = self._shards[number] = self._load_again(shard)
            record = _read_records(shard.records, row * size, (row + 1) * size)
        return member_places(shard.extensions, record)

    def _load_again(self, shard: Shard) -> Shard:
        again, _ = load_shard(shard.path, self._storage, self._index_folder)
        if (again.stamp, again.count, again.extensions) != (shard.stamp, shard.count, shard.extensions):
            raise shard_changed(shard.path, shard.stamp, again.stamp)
        return again


def _read_records(records: IndexFile | bytes, start: int, stop: int) -> bytes:
    """Raises OSError where the index file is gone, or is no longer the one that was trusted."""
    if isinstance(records, bytes):
        return records[start:stop]

    def check(descriptor: Descriptor) -> None:
        if zlib.crc32(descriptor.read(0, records.start)) != records.check:
            raise FileNotFoundError(f"{records.path} is another index now")

    descriptor = DESCRIPTORS.get(records.path, records.check, check)
    found = descriptor.read(records.start + start, records.start + stop)
    if len(found) != stop - start:
        raise FileNotFoundError(f"{records.path} is shorter now")
    return found


def open_source(
    paths: Paths, *, index_folder: Path | None = None, tally: Tally | None = None, workers: int | None = None
) -> SampleSource:
    """The samples at `paths`.

    Args:
        paths: a folder with shards; a file; a pattern with `*`, `?` or `[0-9]`; names from `{000000..000041}`, all of
            which must exist; or several of these. Local, or an address that fsspec knows. All tar, or all ArrayRecord.
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


# ------------------------------------------------------------------------------------------------- details


def _split(
    row: int, places: Mapping[str, tuple[int, int]], range_: Range, block: bytes | Exception
) -> RawSample | SampleError:
    if isinstance(block, Exception):
        found = f"{type(block).__name__}: {block}"
        return SampleError("read-error", where=f"{range_.path}, sample number {row} of this shard", found=found)
    key = _key(block, min(places, key=lambda name: places[name])) if places else None
    members = {name: block[first - range_.start : end - range_.start] for name, (first, end) in places.items()}
    return RawSample(key or f"number {row} of this shard", range_.path, members)


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
