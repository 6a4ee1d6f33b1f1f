"""Bytes of archives, local or in an object store, read by ranges.

Local archives are read with `pread` on descriptors that each thread opens when it first needs them. Anything with a
scheme (`gs://`, `s3://`, `memory://`) goes through fsspec: ranges that lie close together become one request, requests
run together where the file system can, and what fails is tried again with growing pauses.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rdt2_data.shards.index import Stamp
from rdt2_jax.errors import DataError

MAX_GAP_BYTES = 256 * 1024
"""Unwanted bytes between two ranges that are cheaper to read than a second request (10 ms at 25 MB/s)."""

ATTEMPTS = 5
FIRST_PAUSE_S = 0.2
_OPEN_FILES_PER_THREAD = 32


@dataclass(frozen=True, order=True)
class Range:
    """Bytes [start, stop) of a file."""

    path: str
    start: int
    stop: int


class Storage(Protocol):
    """Reads archives of one kind of place. Instances can be pickled and used by several threads."""

    def stamp(self, path: str) -> Stamp:
        """Size and version of a file. Raises DataError when there is none."""
        ...

    def open(self, path: str) -> BinaryIO:
        """The file from its start, seekable."""
        ...

    def read(self, ranges: Sequence[Range]) -> list[bytes | Exception]:
        """The bytes of every range, or what went wrong with it, in the order asked for."""
        ...


def is_url(path: str) -> bool:
    """Whether a path names a place that fsspec has to open."""
    return "://" in path


def storage_for(path: str) -> Storage:
    """What reads a path: local files directly, everything with a scheme through fsspec."""
    return RemoteStorage(path.split("://", 1)[0]) if is_url(path) else LocalStorage()


# ------------------------------------------------------------------------------------------------- local


class LocalStorage:
    """Files of this machine."""

    def __init__(self) -> None:
        self._files = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStorage, ()

    def stamp(self, path: str) -> Stamp:
        """See `Storage`."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError("a shard cannot be opened", where=path, found=error.strerror) from error
        return Stamp(status.st_size, str(status.st_mtime_ns))

    def open(self, path: str) -> BinaryIO:
        """See `Storage`."""
        return open(path, "rb")

    def read(self, ranges: Sequence[Range]) -> list[bytes | Exception]:
        """See `Storage`."""
        return [self._read(range_) for range_ in ranges]

    def _read(self, range_: Range) -> bytes | Exception:
        try:
            data = os.pread(self._descriptor(range_.path).number, range_.stop - range_.start, range_.start)
        except OSError as error:
            return error
        if len(data) < range_.stop - range_.start:
            return EOFError(f"the file ends after {range_.start + len(data)} of {range_.stop} bytes")
        return data

    def _descriptor(self, path: str) -> _Descriptor:
        """An open descriptor of this thread; the one used longest ago is closed when there are too many."""
        files: OrderedDict[str, _Descriptor] | None = getattr(self._files, "by_path", None)
        if files is None:
            files = self._files.by_path = OrderedDict()
        if path in files:
            files.move_to_end(path)
        else:
            files[path] = _Descriptor(path)
            if len(files) > _OPEN_FILES_PER_THREAD:
                files.popitem(last=False)
        return files[path]


class _Descriptor:
    """A file descriptor that is closed when nobody holds it any more, also at the end of its thread."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


# ------------------------------------------------------------------------------------------------ remote


class RemoteStorage:
    """Files of an fsspec file system.

    Args:
        protocol: scheme of its addresses.
        sleep: waits some seconds; tests pass their own.
    """

    def __init__(self, protocol: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self.protocol, self._sleep = protocol, sleep

    def _file_system(self) -> Any:
        return _file_system(self.protocol)  # fsspec keeps one per process

    def stamp(self, path: str) -> Stamp:
        """See `Storage`. The version is what the store has: generation, ETag, or time of the last change."""
        try:
            info = self._file_system().info(path)
        except OSError as error:
            raise DataError("a shard cannot be opened", where=path, found=f"{type(error).__name__}: {error}") from error
        names = ("generation", "ETag", "etag", "mtime", "LastModified", "last_modified", "created", "md5Hash")
        version = next((str(info[name]) for name in names if info.get(name) is not None), "")
        return Stamp(int(info["size"]), version)

    def open(self, path: str) -> BinaryIO:
        """See `Storage`."""
        return self._file_system().open(path, "rb", cache_type="readahead", block_size=2**20)

    def read(self, ranges: Sequence[Range]) -> list[bytes | Exception]:
        """See `Storage`."""
        merged = merge_ranges(ranges)
        found: dict[Range, bytes | Exception] = {}
        pause_s = FIRST_PAUSE_S
        for attempt in range(ATTEMPTS):
            missing = [range_ for range_ in merged if not isinstance(found.get(range_), bytes)]
            if not missing:
                break
            if attempt:
                self._sleep(pause_s)
                pause_s *= 2
            found.update(zip(missing, self._fetch(missing), strict=True))
        return [_part(range_, merged, found) for range_ in ranges]

    def _fetch(self, ranges: Sequence[Range]) -> list[bytes | Exception]:
        starts, stops = [r.start for r in ranges], [r.stop for r in ranges]
        try:
            answers = self._file_system().cat_ranges([r.path for r in ranges], starts, stops, on_error="return")
        except OSError as error:  # file systems that fail as a whole
            return [error] * len(ranges)
        return [_whole(range_, answer) for range_, answer in zip(ranges, answers, strict=True)]


def find_remote(path: str, suffixes: Sequence[str]) -> list[str]:
    """Addresses of the files that a remote path stands for: itself, those in a folder, or those that fit its `*`.

    Raises:
        DataError: a kind of storage that cannot be opened.
    """
    scheme, root = path.split("://", 1)
    files = _file_system(scheme)
    if "*" in root:
        names = files.glob(root)
    elif files.isdir(root):
        names = [name for name in files.ls(root, detail=False) if name.endswith(tuple(suffixes))]
    else:
        return [path]
    return sorted(f"{scheme}://{name.lstrip('/')}" for name in names)


def _file_system(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        raise DataError(
            "this kind of storage cannot be opened",
            where=f"{scheme}://",
            found=str(error),
            fix="install the fsspec driver that the message names, such as gcsfs or s3fs",
        ) from error


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
