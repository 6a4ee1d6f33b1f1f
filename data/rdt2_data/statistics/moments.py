"""Count, extremes, mean and standard deviation of many channels, in one pass.

Parts are merged by the pairwise update of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances" (1979), in float64: no difference of two large sums is ever taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rdt2_jax.errors import DataError


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of C channels.

    Attributes:
        count: values seen per channel.
        minimum, maximum: (C,), in the type of the values (float64 for none).
        mean: float64 (C,).
        squares: float64 (C,), sum of squared distances from the mean.
    """

    count: int
    minimum: np.ndarray
    maximum: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def none(cls, channels: int) -> Moments:
        """Of no value at all."""
        infinity = np.full(channels, np.inf)
        return cls(0, infinity, -infinity, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Of values (N, C), which must be finite."""
        if not len(values):
            return cls.none(values.shape[1])
        exact = values.astype(np.float64)
        mean = exact.mean(axis=0)
        away = exact - mean
        # the mean is rounded; what that leaves behind is put right to first order
        rest = away.mean(axis=0)
        squares = np.square(away).sum(axis=0) - len(values) * rest**2
        return cls(len(values), values.min(axis=0), values.max(axis=0), mean + rest, np.maximum(squares, 0.0))

    def merged(self, other: Moments) -> Moments:
        """Of the values of both."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart**2 * (self.count * (other.count / count)),
        )

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation, float64 (C,).

        Raises:
            DataError: there are no values.
        """
        if not self.count:
            raise DataError("there are no values", where="moments", expected="at least one frame")
        return np.sqrt(self.squares / self.count)
