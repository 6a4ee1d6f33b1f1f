"""The arrays of a UMI replay buffer, zarr of version 2 in a zip file or a folder: rows and images, none made up.

zarr reads a chunk that is missing as zeros. Chunks are missing after an incomplete copy, so here that is damage.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdt2_data.converters.damage import damage_named
from rdt2_data.converters.frames import OrderedFrames, image_or_problem
from rdt2_data.problems import SampleError
from rdt2_jax.errors import DataError, missing_extra

_DECODING = (RuntimeError, ValueError, OSError, KeyError, zipfile.BadZipFile, zlib.error)
"""What zarr and its codecs raise for a chunk that is damaged."""


class ReplayBuffer:
    """A replay buffer, which is opened when it is first needed and then stays open. A pickled copy opens it anew.

    Args:
        path: `.zarr.zip` file, or folder.

    Raises:
        DataError: when it is opened, for what is missing or no zarr.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._group: Any = None
        self._arrays: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_group": None, "_arrays": {}}

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def array(self, name: str) -> Any:
        """An array, which is read where it is indexed: see `rows`, which makes up nothing."""
        array = self._find(name)
        if array is None:
            raise DataError("the replay buffer lacks an array", where=self.path, expected=name)
        return array

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of an array, in its own type (stop - start, ...).

        Raises:
            DataError: there is no such array.
            SampleError: too few rows, or a chunk that is missing or cannot be decoded.
        """
        array = self.array(name)
        where = f"{self.path}, {name}"
        if array.ndim == 0 or array.shape[0] < stop:
            raise SampleError("wrong-shape", where=where, expected=f"at least {stop} rows", found=array.shape)
        self._require_chunks(array, start, stop, where)
        with damage_named("rows cannot be decoded", f"{where}, rows {start} to {stop}", *_DECODING):
            return np.asarray(array[start:stop])

    def numbers(self, name: str, start: int, stop: int, shape: tuple[int, ...]) -> np.ndarray:
        """`rows` as float64 (stop - start, *shape), or SampleError for another shape."""
        found = self.array(name).shape
        if found[1:] != shape:
            where, expected = f"{self.path}, {name}", f"(rows, {', '.join(map(str, shape))})"
            raise SampleError("wrong-shape", where=where, expected=expected, found=found)
        return self.rows(name, start, stop).astype(np.float64)

    def _require_chunks(self, array: Any, start: int, stop: int, where: str) -> None:
        """Raises SampleError unless every chunk that holds a part of the rows is stored."""
        from zarr.core.sync import sync

        first, last = start // array.chunks[0], (stop - 1) // array.chunks[0]
        others = [range(-(-size // chunk)) for size, chunk in zip(array.shape[1:], array.chunks[1:], strict=True)]
        for place in itertools.product(range(first, last + 1), *others):
            key = array.metadata.encode_chunk_key(place)
            if not sync(array.store.exists(f"{array.path}/{key}")):
                raise SampleError(
                    "bad-recording",
                    what="a chunk of an array is missing",
                    where=where,
                    expected=f"chunk {key}, with rows {place[0] * array.chunks[0]} and following",
                    found="no such file",
                    fix="copy the buffer again; if zeros are meant, write them (zarr: write_empty_chunks=True)",
                )

    def _find(self, name: str) -> Any:
        if self._group is None:
            self._group = _open_group(self.path)
        if name not in self._arrays:
            self._arrays[name] = self._group.get(name)
        return self._arrays[name]


@dataclass(frozen=True, eq=False)
class ZarrFrames(OrderedFrames):
    """Images in an array (T, rows, columns, 3) of a replay buffer.

    Attributes:
        buffer: the replay buffer.
        name: of the array.
        first, count: row of the episode's first image, and how many there are.
    """

    buffer: ReplayBuffer
    name: str
    first: int
    count: int

    def _count(self) -> int:
        return self.count

    def _where(self) -> str:
        return f"{self.buffer.path}, {self.name}"

    def _read(self, indices: list[int]) -> Iterator[np.ndarray | SampleError]:
        for index in indices:
            yield image_or_problem(self._image, self.first + index)

    def _image(self, row: int) -> np.ndarray:
        return self.buffer.rows(self.name, row, row + 1)[0]


def _open_group(path: Path) -> Any:
    try:
        import zarr
        from zarr.errors import GroupNotFoundError
        from zarr.storage import ZipStore
    except ModuleNotFoundError as error:
        raise missing_extra("zarr", "convert", "reading UMI replay buffers") from error
    try:
        from imagecodecs.numcodecs import register_codecs
    except ModuleNotFoundError as error:
        raise missing_extra("imagecodecs", "convert", "reading UMI replay buffers") from error
    register_codecs(verbose=False)
    try:
        store = ZipStore(path, mode="r") if path.is_file() else path
        return zarr.open_group(store, mode="r", zarr_format=2)
    except (*_DECODING, GroupNotFoundError) as error:
        found = f"{type(error).__name__}: {error}"
        raise DataError("not a replay buffer", where=path, expected="zarr of version 2", found=found) from error
