"""Where every member of a tar shard lies: found once by `tar_scan`, kept in a small file, read a sample at a time.

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
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rdt2_data.problems import SampleError
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import atomic_write

INDEX_SUFFIX = ".idx"
TAIL_BYTES = 64 * 1024
"""End of an archive whose checksum binds a copied index to a copied archive."""

_MAGIC = b"RDT2IDX2"
_HEADER_LENGTH = struct.Struct("<I")
_ALIGNMENT = 16
_RECORD_NUMBERS = struct.Struct("<QI")
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4")])


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells one state of an archive from another.

    Attributes:
        size: bytes.
        version: modification time in nanoseconds, or what an object store has in its place.
    """

    size: int
    version: str


@dataclass(frozen=True)
class ShardProblem:
    """What is wrong with an archive, without the place where the archive lies: an index may be copied with it.

    Attributes:
        reason, what, expected, found, fix: see `SampleError`.
        key: of the sample, or None for the archive as a whole.
    """

    reason: str
    key: str | None = None
    what: str | None = None
    expected: str | None = None
    found: str | None = None
    fix: str | None = None

    def error(self, shard: str) -> SampleError:
        """The problem of the archive at this path."""
        where = shard if self.key is None else f"{shard}, sample {self.key}"
        return SampleError(
            self.reason, where=where, what=self.what, expected=self.expected, found=self.found, fix=self.fix
        )


@dataclass(frozen=True)
class IndexHeader:
    """What an index says before its records.

    Attributes:
        extensions: of the members, in the order in which they were first met.
        count: samples.
        stamp: of the archive when it was scanned.
        tail: CRC-32 of the last `TAIL_BYTES` of the archive.
        problems: what was wrong with the archive; samples that cannot be told apart or are cut off have no record.
    """

    extensions: tuple[str, ...]
    count: int
    stamp: Stamp
    tail: int
    problems: tuple[ShardProblem, ...]

    @property
    def record_bytes(self) -> int:
        """Size of the record of one sample."""
        return RECORD.itemsize * len(self.extensions)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The members of one archive: a header, and `RECORD` (count, len(extensions)) as bytes, row after row."""

    header: IndexHeader
    records: bytes

    def __len__(self) -> int:
        return self.header.count


@dataclass(frozen=True, slots=True)
class IndexFile:
    """A valid index on this machine's disk.

    Attributes:
        path: of the index.
        start: where its records begin.
        check: CRC-32 of everything before them, by which the file is known again.
    """

    path: str
    start: int
    check: int


def index_path(shard: str, folder: Path | None = None) -> Path:
    """Where the index of an archive lies: beside it, or under a name of its own in `folder`."""
    if folder is None:
        return Path(shard + INDEX_SUFFIX)
    place = shard if "://" in shard else os.path.abspath(shard)
    digest = hashlib.sha256(place.encode()).hexdigest()[:24]
    return folder / f"{Path(shard).name}.{digest}{INDEX_SUFFIX}"


def member_places(extensions: Sequence[str], record: bytes) -> dict[str, tuple[int, int]]:
    """Extension -> first byte and end of that member in the archive, from the record of one sample."""
    places = zip(extensions, _RECORD_NUMBERS.iter_unpack(record), strict=True)
    return {extension: (offset, offset + size) for extension, (offset, size) in places if size}


def tail_checksum(stream: BinaryIO, size: int) -> int:
    """CRC-32 of the last `TAIL_BYTES` of a stream of `size` bytes."""
    stream.seek(max(0, size - TAIL_BYTES))
    return zlib.crc32(stream.read(TAIL_BYTES))


# -------------------------------------------------------------------------------------------- index files


def write_index(path: Path, index: ShardIndex) -> IndexFile:
    """Writes an index under a temporary name and renames it."""
    start = encode_header(index.header)
    with atomic_write(path) as file:
        file.write(start + index.records)
    return IndexFile(str(path), len(start), zlib.crc32(start))


def encode_header(header: IndexHeader) -> bytes:
    """Everything before the records."""
    document = {
        "extensions": list(header.extensions),
        "count": header.count,
        "size": header.stamp.size,
        "version": header.stamp.version,
        "tail": header.tail,
        "problems": [
            {name: value for name, value in asdict(problem).items() if value is not None} for problem in header.problems
        ],
    }
    text = json.dumps(document).encode()
    text += b" " * (-(len(_MAGIC) + _HEADER_LENGTH.size + len(text)) % _ALIGNMENT)
    return _MAGIC + _HEADER_LENGTH.pack(len(text)) + text


def read_index(path: Path, stamp: Stamp) -> tuple[IndexHeader, IndexFile] | None:
    """What the index at `path` says, or None when it is missing, damaged, or of another state of the archive.

    Raises:
        DataError: the system does not let it be read, for example because too many files are open.
    """
    fixed = len(_MAGIC) + _HEADER_LENGTH.size
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
            length = _text_length(start)
            if length is None:
                return None
            start += file.read(max(0, fixed + length - len(start)))
            size = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return None  # none that this user could use; one is made elsewhere
    except OSError as error:
        raise DataError("an index cannot be read", where=path, found=f"{type(error).__name__}: {error}") from error
    header = _parse_header(start[fixed : fixed + length])
    whole = fixed + length
    if header is None or header.stamp != stamp or size != whole + header.count * header.record_bytes:
        return None
    return header, IndexFile(str(path), whole, zlib.crc32(start[:whole]))


def adopt_index(data: bytes, stamp: Stamp, tail: int) -> ShardIndex | None:
    """A copied index as that of the archive it was copied with; None when it is of another one.

    Modification times do not survive copying to an object store, so size and checksum of the end bind the two here.

    Args:
        data: the whole index file.
        stamp: of the archive; the index takes its version.
        tail: `tail_checksum` of the archive.
    """
    fixed = len(_MAGIC) + _HEADER_LENGTH.size
    length = _text_length(data)
    header = None if length is None else _parse_header(data[fixed : fixed + length])
    if length is None or header is None or (header.stamp.size, header.tail) != (stamp.size, tail):
        return None
    records = data[fixed + length :]
    if len(records) != header.count * header.record_bytes:
        return None
    return ShardIndex(replace(header, stamp=stamp), records)


def _text_length(start: bytes) -> int | None:
    fixed = len(_MAGIC) + _HEADER_LENGTH.size
    if start[: len(_MAGIC)] != _MAGIC or len(start) < fixed:
        return None
    return _HEADER_LENGTH.unpack(start[len(_MAGIC) : fixed])[0]


def _parse_header(text: bytes) -> IndexHeader | None:
    try:
        document: Mapping[str, Any] = json.loads(text)
        return IndexHeader(
            tuple(sys.intern(str(extension)) for extension in document["extensions"]),
            int(document["count"]),
            Stamp(int(document["size"]), str(document["version"])),
            int(document["tail"]),
            tuple(ShardProblem(**entry) for entry in document["problems"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
