"""What the images of all formats share: they are asked for in order, and a bad one does not end the reading."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec

import numpy as np

from rdt2_data.problems import SampleError
from rdt2_jax.errors import DataError

P = ParamSpec("P")


class OrderedFrames(ABC):
    """Base of the classes that implement `rdt2_data.converters.recording.Frames`; it checks what is asked for."""

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray | SampleError]:
        """Reads images.

        Args:
            indices: strictly increasing.

        Returns:
            Iterator with one entry for each index: uint8 RGB (height, width, 3), or why there is none.

        Raises:
            SampleError: "bad-recording", from the iterator, for a file that cannot be read any further.
            DataError: at once, for indices that do not increase, or are outside of 0 to N - 1.
        """
        require_increasing_indices(indices, self._count(), self._where())
        return self._read([int(index) for index in indices]) if len(indices) else iter(())

    @abstractmethod
    def _count(self) -> int:
        """N, how many images there are."""

    @abstractmethod
    def _where(self) -> str:
        """File, and camera, for messages."""

    @abstractmethod
    def _read(self, indices: list[int]) -> Iterator[np.ndarray | SampleError]:
        """`read`, for at least one index."""


def require_increasing_indices(indices: Sequence[int], count: int, where: str) -> None:
    """Raises DataError unless indices lie in [0, count) and strictly increase."""
    array = np.asarray(indices, np.int64)
    if array.size and (array.min() < 0 or array.max() >= count or (np.diff(array) <= 0).any()):
        expected = f"indices that increase, from 0 to {count - 1}"
        raise DataError("images cannot be read in this order", where=where, expected=expected, found=array.tolist())


def image_or_problem(make: Callable[P, np.ndarray], *args: P.args, **kwargs: P.kwargs) -> np.ndarray | SampleError:
    """What a function makes, or the SampleError that it raises."""
    try:
        return make(*args, **kwargs)
    except SampleError as problem:
        return problem
