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
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import RawSample
from rdt2_data.shards.numbering import ARRAY_RECORD_SUFFIX, fingerprint, locate
from rdt2_data.shards.storage import is_url
from rdt2_data.shards.writer import TEMPORARY_SUFFIX, write_member
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import publish_file

_OPEN_FILES = 64


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
        if key in self._keys or not members:
            expected = "a key once in a file, and members"
            raise DataError("a sample cannot be written", where=self.path, expected=expected, found=repr(key))
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

    Raises:
        DataError: no files, a file elsewhere.
        SampleError: a damaged file, when the tally is strict.
    """

    def __init__(self, files: Sequence[str], *, tally: Tally | None = None) -> None:
        self.tally = tally or Tally()
        self._files: list[tuple[str, int]] = []
        self._reset()
        for file in files:
            if is_url(file):
                fix = "copy the files, or use tar shards, which are read from object stores"
                raise DataError("ArrayRecord files are read from this machine's disks", where=file, fix=fix)
            try:
                self._files.append((file, _open(file).num_records()))
            except SampleError as problem:
                self.tally.add(problem)
                self._files.append((file, 0))
        self._starts = np.concatenate([[0], np.cumsum([count for _, count in self._files])]).astype(np.int64)

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
        file, row = locate(self._starts, index, repr(self))
        return self._files[file][0], row

    def fingerprint(self) -> str:
        """See `SampleSource`."""
        return fingerprint([(Path(file).name, os.stat(file).st_size, count) for file, count in self._files])

    def read(self, indices: Sequence[int], members: Sequence[str] | None = None) -> list[RawSample | SampleError]:
        """See `SampleSource`. A record is read as a whole, whatever `members` says."""
        raws = [self._read(*self.locate(index)) for index in indices]
        return raws if members is None else [_only(raw, members) for raw in raws]

    def _read(self, file: str, row: int) -> RawSample | SampleError:
        try:
            with self._lock:
                reader = self._readers.get(file)
                if reader is None:
                    reader = self._readers[file] = _open(file)
                    if len(self._readers) > _OPEN_FILES:
                        self._readers.popitem(last=False)
                self._readers.move_to_end(file)
            return unpack_record(reader.read([row])[0], file, row)
        except SampleError as problem:
            return problem
        except (ValueError, IndexError, RuntimeError) as error:
            found = f"{type(error).__name__}: {error}"
            return SampleError("read-error", where=f"{file}, record {row}", found=found)


def _only(raw: RawSample | SampleError, members: Sequence[str]) -> RawSample | SampleError:
    if isinstance(raw, SampleError):
        return raw
    return RawSample(raw.key, raw.shard, {name: raw.members[name] for name in members if name in raw.members})


def _library() -> Any:
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    return array_record_module


def _open(file: str) -> Any:
    size = os.stat(file).st_size if Path(file).is_file() else -1
    if size < 0:
        raise DataError("there is no such file of records", where=file)
    try:
        reader = _library().ArrayRecordReader(file, "readahead_buffer_size:0")
        count = reader.num_records()
    except (ValueError, RuntimeError) as error:
        raise SampleError("damaged-shard", where=file, expected="an ArrayRecord file", found=str(error)) from error
    if not count:
        raise SampleError("empty-shard", where=file, found=f"{size} bytes")
    return reader
