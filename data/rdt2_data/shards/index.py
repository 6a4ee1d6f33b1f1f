"""Where every member of a tar shard lies: scanned once, kept in a small file, read by memory map.

The index of `x.tar` is `x.tar.idx`, beside it where the folder can be written to, otherwise in a folder of this host.
It is trusted only while size and modification time of the archive are those it was made from. Twelve bytes a member:
for the four members of a published sample 48 bytes, or 48 GB for 10^9 samples, which stay on disk.

Layout: eight bytes of magic, a little-endian uint32 with the length of a JSON header, the header, padding to a multiple
of 16, then the records: for each sample and extension an uint64 offset and an uint32 size (both 0: absent).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rdt2_data.problems import SampleError
from rdt2_jax.io.files import atomic_write

INDEX_SUFFIX = ".idx"
TAR_BLOCK = 512
MAX_EXTENSIONS = 16
MAX_MEMBER_BYTES = 2**32 - 1

_MAGIC = b"RDT2IDX1"
_HEADER_LENGTH = struct.Struct("<I")
_ALIGNMENT = 16
_RECORD_NUMBERS = struct.Struct("<QI")
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4")])


@dataclass(frozen=True)
class Stamp:
    """What tells one state of an archive from another.

    Attributes:
        size: bytes.
        version: modification time in nanoseconds, or what an object store has in its place.
    """

    size: int
    version: str


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The members of one archive.

    Attributes:
        extensions: of the members, in the order in which they were first met.
        records: `RECORD` (N, len(extensions)); memory-mapped when read from a file.
        problems: what was wrong with the archive; samples that cannot be told apart or are cut off are not in
            `records`.
        stamp: of the archive when it was scanned.
    """

    extensions: tuple[str, ...]
    records: np.ndarray
    problems: tuple[SampleError, ...]
    stamp: Stamp

    def __len__(self) -> int:
        return len(self.records)

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> first byte and end of that member in the archive."""
        record = self.records[sample]
        numbers = _RECORD_NUMBERS.iter_unpack(record.tobytes())
        places = zip(self.extensions, numbers, strict=True)
        return {extension: (offset, offset + size) for extension, (offset, size) in places if size}


def index_path(shard: str, folder: Path | None = None) -> Path:
    """Where the index of an archive lies: beside it, or under a name of its own in `folder`."""
    if folder is None:
        return Path(shard + INDEX_SUFFIX)
    place = shard if "://" in shard else os.path.abspath(shard)
    digest = hashlib.sha256(place.encode()).hexdigest()[:24]
    return folder / f"{Path(shard).name}.{digest}{INDEX_SUFFIX}"


# ----------------------------------------------------------------------------------------------- scanning


def scan_shard(stream: BinaryIO, shard: str, stamp: Stamp) -> ShardIndex:
    """Reads the headers of an archive from first to last.

    Members whose names agree up to the first dot of the file name make one sample, as in the webdataset library. A
    sample that appears twice counts once. The last sample of an archive that is cut off is left out.

    Args:
        stream: the archive, seekable.
        shard: its name, for messages.
        stamp: its state, kept in the index.
    """
    scan = _Scan(shard)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            try:
                for member in archive:
                    if member.isfile():
                        scan.add(member)
            except (tarfile.TarError, EOFError) as error:
                scan.cut_off(str(error))
            else:
                scan.check_end(stream, archive.offset, stamp)
    except (tarfile.TarError, EOFError) as error:
        reason = "empty-shard" if stamp.size == 0 else "damaged-shard"
        scan.report(reason, expected="a tar archive", found=f"{stamp.size} bytes: {error}")
    if not scan.groups and not scan.problems:
        scan.report("empty-shard", expected="at least one sample")
    samples = [members for members in scan.groups.values() if members]
    return ShardIndex(*_table(samples, shard), tuple(scan.problems), stamp)


class _Scan:
    """Members of one archive, grouped into samples as they come."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.groups: dict[str, dict[str, tuple[int, int]]] = {}  # key -> extension -> offset, size
        self.problems: list[SampleError] = []
        self._current: str | None = None
        self._repeated = False

    def add(self, member: tarfile.TarInfo) -> None:
        folder, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not dot or not stem:
            return  # no member of a sample: the webdataset library passes such files over, too
        key = f"{folder}/{stem}" if folder else stem
        if key != self._current:
            self._current, self._repeated = key, key in self.groups
            if self._repeated:
                self.report("duplicate-key", key, found="the sample comes again; the first is kept")
            else:
                self.groups[key] = {}
        if self._repeated:
            return
        if extension in self.groups[key]:
            self.report("duplicate-key", key, found=f"{extension} comes twice; the first is kept")
        elif not 0 < member.size <= MAX_MEMBER_BYTES:
            self.report("damaged-shard", key, found=f"{extension} has {member.size} bytes")
        else:
            self.groups[key][extension] = (member.offset_data, member.size)

    def check_end(self, stream: BinaryIO, offset: int, stamp: Stamp) -> None:
        """An archive ends with blocks of zeros; what ends otherwise was cut off between two members, or damaged."""
        stream.seek(offset)
        block = stream.read(TAR_BLOCK)
        if len(block) < TAR_BLOCK:
            self.cut_off("no end mark")
        elif any(block):
            self._drop_last()
            expected, found = "a header or the end mark", f"neither at byte {offset} of {stamp.size}"
            self.report("damaged-shard", expected=expected, found=found)

    def cut_off(self, found: str) -> None:
        """The last sample goes, because nobody knows whether it is whole."""
        self.report("truncated-shard", self._drop_last(), found=found, fix="copy the archive again")

    def report(self, reason: str, key: str | None = None, **details: str) -> None:
        where = self.shard if key is None else f"{self.shard}, sample {key}"
        self.problems.append(SampleError(reason, where=where, **details))  # type: ignore[arg-type]

    def _drop_last(self) -> str | None:
        if self._current is not None and not self._repeated:
            self.groups.pop(self._current, None)
        return self._current


def _table(groups: Sequence[Mapping[str, tuple[int, int]]], shard: str) -> tuple[tuple[str, ...], np.ndarray]:
    extensions = tuple(dict.fromkeys(extension for group in groups for extension in group))
    if len(extensions) > MAX_EXTENSIONS:
        common = Counter(extension for group in groups for extension in group)
        found = f"{len(extensions)}: {', '.join(name for name, _ in common.most_common(20))} ..."
        expected = f"at most {MAX_EXTENSIONS} kinds of members"
        raise SampleError("damaged-shard", where=shard, what="no shard of samples", expected=expected, found=found)
    records = np.zeros((len(groups), len(extensions)), RECORD)
    column = {extension: position for position, extension in enumerate(extensions)}
    for row, group in enumerate(groups):
        for extension, place in group.items():
            records[row, column[extension]] = place
    return extensions, records


# -------------------------------------------------------------------------------------------- index files


def write_index(path: Path, index: ShardIndex) -> None:
    """Writes an index under a temporary name and renames it."""
    header = {
        "extensions": list(index.extensions),
        "count": len(index),
        "size": index.stamp.size,
        "version": index.stamp.version,
        "problems": [
            {
                "reason": problem.reason,
                "where": str(problem.where),
                **{key: str(value) for key in ("what", "expected", "found") if (value := getattr(problem, key))},
            }
            for problem in index.problems
        ],
    }
    text = json.dumps(header).encode()
    start = len(_MAGIC) + _HEADER_LENGTH.size
    text += b" " * (-(start + len(text)) % _ALIGNMENT)
    with atomic_write(path) as file:
        file.write(_MAGIC + _HEADER_LENGTH.pack(len(text)) + text + index.records.tobytes())


def read_index(path: Path, stamp: Stamp) -> ShardIndex | None:
    """The index at `path`, memory-mapped, or None when it is missing, damaged, or of another state of the archive."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_MAGIC) + _HEADER_LENGTH.size)
            if start[: len(_MAGIC)] != _MAGIC or len(start) != len(_MAGIC) + _HEADER_LENGTH.size:
                return None
            (length,) = _HEADER_LENGTH.unpack(start[len(_MAGIC) :])
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError):
        return None
    return _parse_index(path, header, len(start) + length, size, stamp)


def _parse_index(path: Path, header: Any, start: int, size: int, stamp: Stamp) -> ShardIndex | None:
    try:
        shape = (int(header["count"]), len(header["extensions"]))
        found = Stamp(header["size"], header["version"])
        problems = tuple(_problem(entry) for entry in header["problems"])
        extensions = tuple(str(extension) for extension in header["extensions"])
    except (KeyError, TypeError, ValueError):
        return None
    if found != stamp or size != start + RECORD.itemsize * shape[0] * shape[1]:
        return None
    empty = shape[0] * shape[1] == 0
    records = np.zeros(shape, RECORD) if empty else np.memmap(path, RECORD, "r", offset=start, shape=shape)
    return ShardIndex(extensions, records, problems, found)


def _problem(entry: Mapping[str, str]) -> SampleError:
    optional = {key: entry[key] for key in ("what", "expected", "found") if key in entry}
    return SampleError(entry["reason"], where=entry["where"], **optional)
