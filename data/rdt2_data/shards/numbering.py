"""What both containers share: numbering samples through, and telling one set of files from another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from rdt2_jax.errors import DataError

TAR_SUFFIX, ARRAY_RECORD_SUFFIX = ".tar", ".array_record"


def locate(starts: np.ndarray, index: int, what: str) -> tuple[int, int]:
    """File and row of sample `index`, where file i holds the samples starts[i] to starts[i + 1].

    Raises:
        DataError: an index outside [0, starts[-1]).
    """
    if not 0 <= index < starts[-1]:
        raise DataError("there is no such sample", where=what, expected=f"0 to {int(starts[-1]) - 1}", found=index)
    file = int(np.searchsorted(starts, index, side="right")) - 1
    return file, int(index - starts[file])


def fingerprint(entries: Sequence[tuple[str, int, int | str]]) -> str:
    """Of (name, bytes, samples or version) of every file, in their order."""
    return hashlib.sha256(repr(list(entries)).encode()).hexdigest()[:32]
