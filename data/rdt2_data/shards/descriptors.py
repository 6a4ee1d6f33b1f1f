"""Open files of this process: a bounded number, shared by its threads, and each still the file that was meant.

A descriptor is closed when nobody holds it any more. So a thread that reads keeps it open, whatever the cache does.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

MAX_DESCRIPTORS = 2048
MIN_DESCRIPTORS = 16


class Descriptor:
    """A file opened for reading."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop); fewer where the file ends before."""
        return os.pread(self.number, stop - start, start)


class DescriptorCache:
    """The files used last, open.

    Args:
        limit: how many; by default half of what this process may open, so that others have room.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit or _limit()
        self._open: OrderedDict[tuple[str, Hashable], Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: str, state: Hashable, check: Callable[[Descriptor], None]) -> Descriptor:
        """A descriptor of a file that was in this state when it was opened.

        Args:
            path: of the file.
            state: what the file must be; files in different states are different files.
            check: called with a newly opened file; raises where it is in another state.

        Raises:
            OSError: from the system, or what `check` raises.
        """
        key = path, state
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
                return found
        new = self._new(path)  # outside the lock: opening may take long
        check(new)
        with self._lock:
            self._open[key] = new
            while len(self._open) > self.limit:
                self._open.popitem(last=False)
        return new

    def clear(self) -> None:
        """Closes what nobody is reading."""
        with self._lock:
            self._open.clear()

    def _new(self, path: str) -> Descriptor:
        try:
            return Descriptor(path)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self.clear()  # others in this process need more files than was left to them
            return Descriptor(path)

    def renew_lock(self) -> None:
        """For a forked process: another thread of the old one may have held the lock."""
        self._lock = threading.Lock()


def _limit() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return MAX_DESCRIPTORS
    return max(MIN_DESCRIPTORS, min(MAX_DESCRIPTORS, allowed // 2))


DESCRIPTORS = DescriptorCache()
"""Of this process, for archives and indices alike."""
os.register_at_fork(after_in_child=DESCRIPTORS.renew_lock)
