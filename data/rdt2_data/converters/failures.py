"""What goes wrong with the work itself, as opposed to the recordings: full disks, jobs that fail, workers that die."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rdt2_jax.errors import DataError

_ROOM = "make room, then start the same command again"
_FIXES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: "make the place writable, or choose another one, then start the same command again",
    errno.EIO: "look at the disk or its connection, then start the same command again",
}
IN_A_ROW = 3
"""As many jobs that fail one after the other end a run: what is wrong is not theirs."""

_SHOWN = 10


class StoppedError(DataError):
    """An error that all further work would meet as well."""


def stopping_error(error: BaseException, path: Path) -> StoppedError | None:
    """The error that ends a run, if `error` is, or was caused by, one of a disk; otherwise None.

    Args:
        error: whatever was raised.
        path: what was being written, for errors that name no file.
    """
    if isinstance(error, StoppedError):
        return error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FIXES:
            where = cause.filename or path
            return StoppedError("the disk refuses", where=where, found=cause.strerror, fix=_FIXES[cause.errno])
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def disk_errors_stop(path: Path) -> Iterator[None]:
    """Turns errors of a disk inside the block into a StoppedError."""
    try:
        yield
    except Exception as error:
        stop = stopping_error(error, path)
        if stop is None or stop is error:
            raise
        raise stop from error


class Failures:
    """Jobs that failed, until there are too many in a row.

    Args:
        total: number of jobs of the whole conversion.
        finished: how many of them were finished before.
    """

    def __init__(self, total: int, finished: int) -> None:
        self.total, self.finished = total, finished
        self._errors: dict[str, BaseException] = {}
        self._in_a_row = 0

    def __len__(self) -> int:
        return len(self._errors)

    def success(self) -> None:
        """One job is finished."""
        self.finished += 1
        self._in_a_row = 0

    def failure(self, name: str, error: BaseException) -> None:
        """One job failed.

        Raises:
            StoppedError: the error itself, if further jobs would meet it.
            DataError: the last `IN_A_ROW` jobs failed, and others are left.
        """
        self._errors[name] = error
        self._in_a_row += 1
        if isinstance(error, StoppedError):
            raise error
        if self._in_a_row >= IN_A_ROW and self.finished + len(self) < self.total:
            self.stop()

    def stop(self) -> None:
        """Raises DataError with everything that failed, if anything did."""
        if not self._errors:
            return
        left = self.total - self.finished - len(self)
        what = f"{len(self)} of {self.total} shards could not be made"
        rest = f"stopped after {IN_A_ROW} in a row, {left} more are not made" if left else "the others are finished"
        fix = "remove the cause, then start the same command again: it makes only what is missing"
        raise DataError(f"{what}; {rest}", found=self._text(), fix=fix) from next(iter(self._errors.values()))

    def _text(self) -> str:
        """One paragraph for each message, with the jobs that it came from."""
        names: dict[str, list[str]] = {}
        for name, error in sorted(self._errors.items()):
            names.setdefault(f"{type(error).__name__}: {error}", []).append(name)
        lines = []
        for message, jobs in names.items():
            more = f" and {len(jobs) - _SHOWN} more" if len(jobs) > _SHOWN else ""
            lines.append(f"\n    {', '.join(jobs[:_SHOWN])}{more}: {message}")
        return "".join(lines)
