"""Where tensors come from: anything that lists them without reading, and reads one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from rdt2_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What is known about a tensor before it is read. `where` names its file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    where: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class TensorSource(Protocol):
    """A set of named tensors. `SafetensorsFiles` and `ArraySource` are two."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only, valid until `release`."""
        ...

    def release(self, name: str) -> None:
        """Tells the source that the tensor's memory is no longer needed."""
        ...


class ArraySource:
    """Tensors that are in memory already, such as those of a torch archive.

    Raises:
        CheckpointError: a value is not a numpy array.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str = "memory") -> None:
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise CheckpointError(
                    "not a tensor", where=f"{where}: {name}", expected="a numpy array", found=type(array).__name__
                )
        self._arrays = dict(arrays)
        self._tensors = {n: TensorInfo(n, array.dtype, array.shape, where) for n, array in arrays.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        return MappingProxyType(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._arrays[name]

    def release(self, name: str) -> None:
        """Nothing to do: the caller owns the arrays."""
