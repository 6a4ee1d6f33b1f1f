"""Batches of one size, so that a compiled function compiles once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def padded_batches(rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (batch, count): `batch` always has the same number of rows, of which the first `count` are real.

    The last batch is filled up with its last row. With fewer rows than `batch_size` there is one batch of them all.
    """
    batch_size = min(batch_size, len(rows))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        yield np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)]), len(batch)
