"""Quantiles of many channels in one pass and constant memory, the same in every run.

A pile of compactors: values of weight 1 come in at the bottom; a full level is sorted, every other value moves up with
twice the weight, and the rest is forgotten. Sources: Munro and Paterson 1980, Manku, Rajagopalan and Lindsay 1998, and
Karnin, Lang and Liberty 2016, who choose between odd and even places at random. Here they take turns: one
compaction of values of weight w moves no rank by more than w, so the error is bounded, whatever the data, and runs
agree.

Why not a library: of `datasketches` 5.2, the t-digest interpolates between values (on widths that are mostly quite open
or quite closed its ranks were off by 0.6), and the KLL sketch draws random numbers without a seed, so that two runs
over the same data would write different normalizers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rdt2_jax.errors import DataError

CAPACITY = 8192
"""Values of a level. The bound on the rank error is about log2(n / CAPACITY) / CAPACITY: 0.25% for 10^10 values."""


class QuantileSketch:
    """Quantiles of C channels, each of which gets the same number of values.

    Args:
        channels: C.
        capacity: values a level may hold; even.
    """

    def __init__(self, channels: int, capacity: int = CAPACITY) -> None:
        if channels < 1 or capacity < 2 or capacity % 2:
            found = f"{channels} channels, capacity {capacity}"
            raise DataError("a sketch needs channels and an even capacity", where="QuantileSketch", found=found)
        self.channels, self.capacity, self.count = channels, capacity, 0
        self._levels = [np.empty((channels, 0), np.float32)]
        self._takes_odd = [False]
        self._lost_rank = 0

    def update(self, values: np.ndarray) -> None:
        """Takes values (N, C) in; they are kept as float32 and must be finite."""
        if values.ndim != 2 or values.shape[1] != self.channels:
            raise DataError("wrong values for a sketch", expected=f"(N, {self.channels})", found=str(values.shape))
        self.count += len(values)
        self._put(0, values.T.astype(np.float32))
        self._compact()

    def merge(self, other: QuantileSketch) -> None:
        """Takes over what another sketch has seen.

        Raises:
            DataError: another number of channels, or another capacity.
        """
        if (other.channels, other.capacity) != (self.channels, self.capacity):
            expected, found = (
                f"{self.channels} channels, capacity {self.capacity}",
                f"{other.channels}, {other.capacity}",
            )
            raise DataError("these sketches do not fit each other", expected=expected, found=found)
        self.count += other.count
        self._lost_rank += other._lost_rank
        for level, values in enumerate(other._levels):
            self._put(level, values)
        self._compact()

    @property
    def rank_error(self) -> float:
        """No rank that this sketch tells is further off than this, as a share of all values."""
        return self._lost_rank / self.count if self.count else 0.0

    def quantiles(self, shares: Sequence[float]) -> np.ndarray:
        """Values below or at which given shares of all values lie.

        Args:
            shares: in [0, 1].

        Returns:
            float32 (len(shares), C); every number is one of the values that came in.

        Raises:
            DataError: a share outside [0, 1], or a sketch without values.
        """
        if not self.count or not all(0 <= share <= 1 for share in shares):
            found = f"{list(shares)} of {self.count} values"
            raise DataError("these quantiles do not exist", expected="shares in [0, 1] of some values", found=found)
        result = np.empty((len(shares), self.channels), np.float32)
        values, weights = self._weighted()
        for channel in range(self.channels):
            order = np.argsort(values[channel], kind="stable")
            reached = np.cumsum(weights[order])
            places = np.searchsorted(reached, np.asarray(shares) * self.count, side="left")
            result[:, channel] = values[channel][order[np.minimum(places, len(order) - 1)]]
        return result

    def share_below(self, bounds: np.ndarray, *, inclusive: bool) -> np.ndarray:
        """Share of each channel's values below bounds (C,), or also at them; float64 (C,).

        Raises:
            DataError: a sketch without values.
        """
        if not self.count:
            raise DataError("there are no values", where="QuantileSketch", expected="at least one frame")
        values, weights = self._weighted()
        bounds = np.asarray(bounds, np.float32)[:, None]
        below = values <= bounds if inclusive else values < bounds
        return (below * weights).sum(axis=1) / self.count

    def _weighted(self) -> tuple[np.ndarray, np.ndarray]:
        """All values kept, (C, M), and what each stands for, (M,) int64."""
        weights = [np.full(values.shape[1], 1 << level, np.int64) for level, values in enumerate(self._levels)]
        return np.concatenate(self._levels, axis=1), np.concatenate(weights)

    def _put(self, level: int, values: np.ndarray) -> None:
        while len(self._levels) <= level:
            self._levels.append(np.empty((self.channels, 0), np.float32))
            self._takes_odd.append(False)
        self._levels[level] = np.concatenate([self._levels[level], values], axis=1)

    def _compact(self) -> None:
        level = 0
        while level < len(self._levels):
            values = self._levels[level]
            if values.shape[1] >= self.capacity:
                even = values.shape[1] - values.shape[1] % 2
                ordered = np.sort(values[:, :even], axis=1)
                self._levels[level] = values[:, even:].copy()
                first = int(self._takes_odd[level])
                self._takes_odd[level] = not self._takes_odd[level]
                self._lost_rank += 1 << level
                self._put(level + 1, ordered[:, first::2])
            level += 1
