"""The same samples in ArrayRecord files, Google's container for random access.

A record is the piece of a tar archive that holds one sample, headers included: what lies in a shard goes in and comes
out byte for byte, and one way of naming members serves both containers.

Source of the container: github.com/google/array_record.
"""

from __future__ import annotations

import io
import os
import secrets
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import RawSample
from rdt2_data.shards.index import Stamp
from rdt2_data.shards.numbering import ARRAY_RECORD_SUFFIX, fingerprint, locate
from rdt2_data.shards.storage import is_url, local_stamp, shard_changed
from rdt2_data.shards.writer import TEMPORARY_SUFFIX, require_sample, write_member
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import publish_file

_OPEN_FILES = 64

# The file format: a signature at the start, and a last block of 64 KiB near whose start a magic number lies, as a
# variable-length integer of protocol buffers. Source: array_record's cpp/layout.proto and Riegeli's records format.
_SIGNATURE = bytes.fromhex("83af70d10d884a3f")
_BLOCK_BYTES = 64 * 1024
_END_MAGIC = bytes.fromhex("dec0ebfe84cec3c971")
_END_SEARCHED = 256


@dataclass(frozen=True, slots=True)
class _File:
    """Path, state when it was opened, and number of records."""

    path: str
    stamp: Stamp
    count: int


def pack_record(key: str, members: Mapping[str, bytes]) -> bytes:
    """One sample as the bytes of a record."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
        for extension, data in members.items():
            write_member(archive, f"{key}.{extension}", data)
        end = archive.offset
    return stream.getvalue()[:end]


def unpack_record(record: bytes, file: str, number: int) -> RawSample:
    """Inverse of `pack_record`.

    Raises:
        SampleError: "damaged-shard", for a record that holds no sample.
    """
    where = f"{file}, record {number}"
    members: dict[str, bytes] = {}
    keys: list[str] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(record), mode="r:") as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                keys.append(key)
                members[extension] = record[member.offset_data : member.offset_data + member.size]
    except tarfile.TarError as error:
        raise SampleError("damaged-shard", where=where, expected="one sample", found=str(error)) from error
    if len(set(keys)) != 1 or len(members) != len(keys):
        raise SampleError("damaged-shard", where=where, expected="one sample", found=f"keys {keys}")
    return RawSample(keys[0], file, members)


class ArrayRecordWriter:
    """Writes one file; a context manager, entered once, with the manners of `ShardWriter`.

    Args:
        path: ends in `.array_record`; its folder must exist. A file already there is replaced.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.suffix != ARRAY_RECORD_SUFFIX or not self.path.parent.is_dir():
            expected = f"a name ending in {ARRAY_RECORD_SUFFIX}, in an existing folder"
            raise DataError("a file of records cannot be written there", where=self.path, expected=expected)
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
        self._keys: set[str] = set()

    def __enter__(self) -> ArrayRecordWriter:
        # Every record on its own: reading one does not unpack its neighbours. JPEG files do not compress.
        self._writer = _library().ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends one sample; see `ShardWriter.add`."""
        require_sample(self.path, self._keys, key, members)
        self._keys.add(key)
        self._writer.write(pack_record(key, members))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.close()
            if kind is None:
                publish_file(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


class ArrayRecordShards:
    """The samples of ArrayRecord files, numbered through in the order of the files.

    Args:
        files: paths on this machine.
        tally: takes the problems; a strict one raises the first.

    Files must stay as they are while a source is open, see `TarShards`.

    Raises:
        DataError: a file elsewhere.
        SampleError: a file that is damaged or cannot be opened, when the tally is strict.
    """

    def __init__(self, files: Sequence[str], *, tally: Tally | None = None) -> None:
        self.tally = tally or Tally()
        self._files: list[_File] = []
        self._reset()
        for file in files:
            if is_url(file):
                fix = "copy the files, or use tar shards, which are read from object stores"
                raise DataError("ArrayRecord files are read from this machine's disks", where=file, fix=fix)
            try:
                stamp = local_stamp(file)
                self._files.append(_File(file, stamp, _open(file, stamp).num_records()))
            except SampleError as problem:
                self.tally.add(problem)
                self._files.append(_File(file, Stamp(0, ""), 0))
        self._starts = np.concatenate([[0], np.cumsum([file.count for file in self._files])]).astype(np.int64)

    def _reset(self) -> None:
        self._readers: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_readers", "_lock", "tally")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.tally = Tally()
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"ArrayRecordShards({len(self._files)} files, {len(self)} samples)"

    def locate(self, index: int) -> tuple[str, int]:
        """See `SampleSource`."""
        number, row = locate(self._starts, index, repr(self))
        return self._files[number].path, row

    def fingerprint(self) -> str:
        """See `SampleSource`."""
        return fingerprint([(Path(file.path).name, file.stamp.size, file.count) for file in self._files])

    def state(self) -> str:
        """See `SampleSource`."""
        return fingerprint([(Path(file.path).name, file.stamp.size, file.stamp.version) for file in self._files])

    def read(self, indices: Sequence[int], members: Sequence[str] | None = None) -> list[RawSample | SampleError]:
        """See `SampleSource`. A record is read as a whole, whatever `members` says.

        Raises:
            DataError: an index outside [0, len), or a file that is no longer the one that was opened.
        """
        places = [locate(self._starts, index, repr(self)) for index in indices]
        raws = [self._read(self._files[number], row) for number, row in places]
        return raws if members is None else [_only(raw, members) for raw in raws]

    def _read(self, file: _File, row: int) -> RawSample | SampleError:
        try:
            return unpack_record(self._reader(file).read([row])[0], file.path, row)
        except SampleError as problem:
            return problem
        except (ValueError, IndexError, RuntimeError) as error:
            found = f"{type(error).__name__}: {error}"
            return SampleError("read-error", where=f"{file.path}, record {row}", found=found)

    def _reader(self, file: _File) -> Any:
        with self._lock:
            reader = self._readers.get(file.path)
            if reader is not None:
                self._readers.move_to_end(file.path)
                return reader
        found = local_stamp(file.path)
        if found != file.stamp:
            raise shard_changed(file.path, file.stamp, found)
        reader = _open(file.path, file.stamp)
        with self._lock:
            self._readers[file.path] = reader
            if len(self._readers) > _OPEN_FILES:
                self._readers.popitem(last=False)
        return reader


def _only(raw: RawSample | SampleError, members: Sequence[str]) -> RawSample | SampleError:
    if isinstance(raw, SampleError):
        return raw
    return RawSample(raw.key, raw.shard, {name: raw.members[name] for name in members if name in raw.members})


def _library() -> Any:
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    return array_record_module


def _open(path: str, stamp: Stamp) -> Any:
    try:
        reader = _library().ArrayRecordReader(path, "readahead_buffer_size:0")
        count = reader.num_records()
    except (ValueError, RuntimeError) as error:
        raise SampleError("damaged-shard", where=path, expected="an ArrayRecord file", found=str(error)) from error
    if not count:
        raise _without_records(path, stamp)
    return reader


def _without_records(path: str, stamp: Stamp) -> SampleError:
    """Why the library finds no record: it says so of empty files, of cut ones, and of any other file, alike."""
    try:
        with open(path, "rb") as stream:
            begin = stream.read(len(_SIGNATURE))
            stream.seek(max(0, stamp.size - _BLOCK_BYTES))
            end = stream.read(len(_END_MAGIC) + _END_SEARCHED)
    except OSError as error:
        return SampleError("read-error", where=path, found=f"{type(error).__name__}: {error}")
    found = f"{stamp.size} bytes"
    if stamp.size % _BLOCK_BYTES == 0 and (_END_MAGIC in end or not stamp.size):
        return SampleError("empty-shard", where=path, found=found)
    if begin and _SIGNATURE.startswith(begin):
        expected = "the block that ends an ArrayRecord file"
        return SampleError("truncated-shard", where=path, expected=expected, found=found, fix="copy the file again")
    return SampleError("damaged-shard", where=path, expected="an ArrayRecord file", found=found)
