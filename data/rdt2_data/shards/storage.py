"""Bytes of archives, local or in an object store, read by ranges.

Local archives are read with `pread` on descriptors that all threads share. Anything with a scheme (`gs://`, `s3://`,
`memory://`) goes through fsspec: ranges that lie close together become one request, requests run together where the
file system can, and what fails is tried again with growing pauses.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from rdt2_data.problems import SampleError
from rdt2_data.shards.descriptors import DESCRIPTORS, Descriptor
from rdt2_data.shards.index import Stamp
from rdt2_jax.errors import DataError

MAX_GAP_BYTES = 256 * 1024
"""Unwanted bytes between two ranges that are cheaper to read than a second request (10 ms at 25 MB/s)."""

ATTEMPTS = 5
FIRST_PAUSE_S = 0.2
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Failures that come again however often one tries."""

_TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Range:
    """Bytes [start, stop) of a file."""

    path: str
    start: int
    stop: int


class Storage(Protocol):
    """Reads archives of one kind of place. Instances can be pickled and used by several threads."""

    at_once: int
    """Files that are worth opening at the same time."""

    def stamp(self, path: str) -> Stamp:
        """Size and version of a file.

        Raises:
            SampleError: "read-error" or "damaged-shard", for a file that is gone, may not be read, or is none.
            DataError: a storage that does not answer.
        """
        ...

    def use(self, path: str, action: Callable[[BinaryIO], T]) -> T:
        """What `action` makes of the file, seekable and at its start; it may be called again after a failure.

        Raises:
            SampleError: "read-error", for a file that is gone or cannot be read.
            DataError: a storage that does not answer, or too many open files.
        """
        ...

    def read(self, ranges: Sequence[Range], stamps: Sequence[Stamp]) -> list[bytes | Exception]:
        """The bytes of every range, or what went wrong with it, in the order asked for.

        Args:
            ranges: what to read.
            stamps: of the file of every range, as it was when its index was loaded.

        Raises:
            DataError: a local file that is no longer the one that the stamp was taken of, or too many open files.
        """
        ...


def is_url(path: str) -> bool:
    """Whether a path names a place that fsspec has to open."""
    return "://" in path


def storage_for(path: str) -> Storage:
    """What reads a path: local files directly, everything with a scheme through fsspec."""
    return RemoteStorage(path.split("://", 1)[0]) if is_url(path) else LocalStorage()


def shard_changed(path: str, expected: Stamp, found: Stamp) -> DataError:
    """The error for an archive that is no longer the one that was opened; nothing read from it can be relied upon."""
    return DataError(
        "a shard changed while it was read",
        where=path,
        expected=f"{expected.size} bytes, version {expected.version}",
        found=f"{found.size} bytes, version {found.version}",
        fix="start again, and leave the shards alone while they are read",
    )


def _unreadable(path: str, error: Exception, *, lasting: bool) -> DataError:
    """A SampleError, to be counted, for what is wrong with this shard; where others would fail too, one that stops."""
    found = f"{type(error).__name__}: {error}"
    if lasting:
        return SampleError("read-error", where=path, what="a shard cannot be opened", found=found)
    fix = "see to the storage, or to the limits of this process, and start again"
    return DataError("the storage does not open a shard now", where=path, found=found, fix=fix)


# ------------------------------------------------------------------------------------------------- local


class LocalStorage:
    """Files of this machine."""

    at_once = 1

    def stamp(self, path: str) -> Stamp:
        """See `Storage`."""
        return local_stamp(path)

    def use(self, path: str, action: Callable[[BinaryIO], T]) -> T:
        """See `Storage`."""
        try:
            with open(path, "rb") as stream:
                return action(stream)
        except OSError as error:
            raise _unreadable(path, error, lasting=error.errno not in _TOO_MANY_OPEN) from error

    def read(self, ranges: Sequence[Range], stamps: Sequence[Stamp]) -> list[bytes | Exception]:
        """See `Storage`."""
        return [self._read(range_, stamp) for range_, stamp in zip(ranges, stamps, strict=True)]

    def _read(self, range_: Range, stamp: Stamp) -> bytes | Exception:
        def check(descriptor: Descriptor) -> None:
            found = _stamp(os.fstat(descriptor.number))
            if found != stamp:
                raise shard_changed(range_.path, stamp, found)

        try:
            descriptor = DESCRIPTORS.get(range_.path, stamp, check)
            data = descriptor.read(range_.start, range_.stop)
            check(descriptor)  # afterwards: another program may have written into the open file, as `cp` does
        except OSError as error:
            if error.errno in _TOO_MANY_OPEN:
                raise _unreadable(range_.path, error, lasting=False) from error
            return error
        if len(data) < range_.stop - range_.start:
            return EOFError(f"the file ends after {range_.start + len(data)} of {range_.stop} bytes")
        return data


def local_stamp(path: str) -> Stamp:
    """Size and modification time of a file of this machine.

    Raises:
        SampleError: "read-error" or "damaged-shard", for what is absent or no file.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error, lasting=True) from error
    if not stat.S_ISREG(status.st_mode):
        raise SampleError("damaged-shard", where=path, expected="a file", found="a folder or a device")
    return _stamp(status)


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, str(status.st_mtime_ns))


# ------------------------------------------------------------------------------------------------ remote


class RemoteStorage:
    """Files of an fsspec file system.

    Args:
        protocol: scheme of its addresses.
        sleep: waits some seconds; tests pass their own.
    """

    at_once = 16

    def __init__(self, protocol: str, sleep: Callable[[float], None] | None = None) -> None:
        self.protocol, self._sleep = protocol, sleep

    def file_system(self) -> Any:
        """Of this process. Raises DataError for a scheme without a driver."""
        import fsspec

        try:
            return fsspec.filesystem(self.protocol)  # fsspec keeps one per process
        except (ImportError, ValueError) as error:
            raise DataError(
                "this kind of storage cannot be opened",
                where=f"{self.protocol}://",
                found=str(error),
                fix="install the fsspec driver that the message names, such as gcsfs or s3fs",
            ) from error

    def attempt(self, action: Callable[[], T]) -> T:
        """What `action` returns; tried again after a failure that may pass, and the last failure otherwise."""
        for number in range(ATTEMPTS - 1):
            try:
                return action()
            except (DataError, *PERMANENT):
                raise
            except Exception:  # noqa: BLE001  drivers raise whatever their libraries raise
                self._pause(number)
        return action()

    def stamp(self, path: str) -> Stamp:
        """See `Storage`. The version is what the store has: generation, ETag, or time of the last change."""
        files = self.file_system()
        try:
            info = self.attempt(lambda: files.info(path))
        except Exception as error:
            raise _unreadable(path, error, lasting=isinstance(error, PERMANENT)) from error
        names = ("generation", "ETag", "etag", "mtime", "LastModified", "last_modified", "created", "md5Hash")
        version = next((str(info[name]) for name in names if info.get(name) is not None), "")
        return Stamp(int(info["size"]), version)

    def use(self, path: str, action: Callable[[BinaryIO], T]) -> T:
        """See `Storage`."""
        files = self.file_system()

        def once() -> T:
            with files.open(path, "rb", cache_type="readahead", block_size=2**20) as stream:
                return action(stream)

        try:
            return self.attempt(once)
        except DataError:
            raise
        except Exception as error:
            raise _unreadable(path, error, lasting=isinstance(error, PERMANENT)) from error

    def read(self, ranges: Sequence[Range], stamps: Sequence[Stamp]) -> list[bytes | Exception]:
        """See `Storage`. Of a store's file only the length is checked."""
        merged = merge_ranges(ranges)
        found: dict[Range, bytes | Exception] = {}
        for number in range(ATTEMPTS):
            missing = [range_ for range_ in merged if not isinstance(found.get(range_), (bytes, *PERMANENT))]
            if not missing:
                break
            if number:
                self._pause(number - 1)
            found.update(zip(missing, self._fetch(missing), strict=True))
        return [_part(range_, merged, found) for range_ in ranges]

    def _fetch(self, ranges: Sequence[Range]) -> list[bytes | Exception]:
        starts, stops = [r.start for r in ranges], [r.stop for r in ranges]
        files = self.file_system()
        try:
            answers = files.cat_ranges([r.path for r in ranges], starts, stops, on_error="return")
        except Exception as error:  # noqa: BLE001  file systems that fail as a whole, with whatever error
            return [error] * len(ranges)
        return [_whole(range_, answer) for range_, answer in zip(ranges, answers, strict=True)]

    def _pause(self, number: int) -> None:
        (self._sleep or time.sleep)(FIRST_PAUSE_S * 2**number)


def merge_ranges(ranges: Sequence[Range], max_gap: int = MAX_GAP_BYTES) -> list[Range]:
    """The fewest ranges that cover all of `ranges` without reading more than `max_gap` bytes in vain between two."""
    merged: list[Range] = []
    for range_ in sorted(set(ranges)):
        last = merged[-1] if merged else None
        if last is not None and last.path == range_.path and range_.start <= last.stop + max_gap:
            merged[-1] = Range(last.path, last.start, max(last.stop, range_.stop))
        else:
            merged.append(range_)
    return merged


def _whole(range_: Range, answer: Any) -> bytes | Exception:
    if isinstance(answer, Exception):
        return answer
    if len(answer) < range_.stop - range_.start:
        return EOFError(f"the file ends after {range_.start + len(answer)} of {range_.stop} bytes")
    return bytes(answer)


def _part(range_: Range, merged: Sequence[Range], found: dict[Range, bytes | Exception]) -> bytes | Exception:
    around = next(m for m in merged if m.path == range_.path and m.start <= range_.start and range_.stop <= m.stop)
    data = found[around]
    return data if isinstance(data, Exception) else data[range_.start - around.start : range_.stop - around.start]


def host_index_folder() -> Path:
    """Where this host keeps indices of archives whose own folder cannot be written to."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache, "rdt2", "index")
