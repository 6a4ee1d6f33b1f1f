"""Histograms of many channels in one pass, without knowing their ranges beforehand.

Bins are powers of two wide and begin at multiples of their width. When values no longer fit, neighbouring bins are
joined in pairs, which loses nothing but resolution: the counts are exact, and do not depend on the order of the values.

Values from `LARGEST` on are no action's and are only counted: one of them would leave a single bin for all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rdt2_jax.errors import DataError

MAX_BINS = 256
_FINEST = -24
"""Bins are at least 2^-24 wide, 0.06 micrometres for a position."""

LARGEST = 2.0**29
"""Smaller magnitudes, in units of the finest bin, are whole numbers below 2^53: float64 tells all of them apart."""


@dataclass(frozen=True, eq=False)
class Bins:
    """The histogram of one channel.

    Attributes:
        edges: float64 (B + 1,).
        counts: int64 (B,), values with edges[i] <= x < edges[i + 1].
        out_of_range: values of magnitude `LARGEST` or more, which are in no bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    out_of_range: int


class Histograms:
    """Histograms of C channels."""

    def __init__(self, channels: int) -> None:
        self._channels = [_Channel() for _ in range(channels)]

    def update(self, values: np.ndarray) -> None:
        """Counts values (N, C), which must be finite."""
        if values.ndim != 2 or values.shape[1] != len(self._channels):
            raise DataError("wrong values", expected=f"(N, {len(self._channels)})", found=str(values.shape))
        for channel, column in zip(self._channels, values.T.astype(np.float64), strict=True):
            channel.add(column)

    def channel(self, number: int) -> Bins:
        """The histogram of one channel, from its first to its last occupied bin; empty without values."""
        channel = self._channels[number]
        edges = (channel.first + np.arange(len(channel.counts) + 1)) * 2.0**channel.exponent
        return Bins(edges, channel.counts.copy(), channel.out_of_range)


class _Channel:
    """Counts of the bins `first`, `first + 1`, ..., each 2^exponent wide."""

    def __init__(self) -> None:
        self.exponent, self.first, self.counts = _FINEST, 0, np.zeros(0, np.int64)
        self.out_of_range = 0

    def add(self, values: np.ndarray) -> None:
        inside = values[np.abs(values) < LARGEST]
        self.out_of_range += len(values) - len(inside)
        if inside.size:
            self._count(inside)

    def _count(self, values: np.ndarray) -> None:
        low, high = values.min(), values.max()
        while True:
            first, last = (int(np.floor(np.ldexp(value, -self.exponent))) for value in (low, high))
            if self.counts.size:
                first, last = min(first, self.first), max(last, self.first + len(self.counts) - 1)
            if last - first < MAX_BINS:
                break
            self._join_pairs()
        counts = np.zeros(last - first + 1, np.int64)
        if self.counts.size:
            counts[self.first - first : self.first - first + len(self.counts)] = self.counts
        places = np.floor(np.ldexp(values, -self.exponent)).astype(np.int64) - first
        self.first, self.counts = first, counts + np.bincount(places, minlength=len(counts))

    def _join_pairs(self) -> None:
        padded = np.pad(self.counts, (self.first % 2, (self.first % 2 + len(self.counts)) % 2))
        self.exponent, self.first = self.exponent + 1, self.first // 2
        self.counts = padded.reshape(-1, 2).sum(axis=1)
