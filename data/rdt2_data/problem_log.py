"""Every problem of a pass in a file of its own, as a tally keeps only the first few of each kind."""

from __future__ import annotations

import json
import threading
from typing import BinaryIO

from rdt2_data.problems import SampleError, Tally


class ProblemLog(Tally):
    """A tally that also writes each problem, as one line of JSON, when it is added.

    The object of a line has "reason", "where" and "what", and "expected", "found" and "fix" where they are known: text.

    Args:
        file: takes the lines (UTF-8); stays open.
        strict: raise the first problem, after it was written.
    """

    def __init__(self, file: BinaryIO, *, strict: bool = False) -> None:
        super().__init__(strict=strict)
        self._file, self._file_lock = file, threading.Lock()

    def add(self, problem: SampleError) -> None:
        """See `Tally.add`."""
        names = ("reason", "where", "what", "expected", "found", "fix")
        values = {name: getattr(problem, name) for name in names}
        document = {name: str(value) for name, value in values.items() if value is not None}
        line = json.dumps(document, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._file_lock:
            self._file.write(line)
        super().add(problem)
