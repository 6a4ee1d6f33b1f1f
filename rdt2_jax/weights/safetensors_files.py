"""Safetensors files: listed from their headers, read one tensor at a time.

Format (huggingface.co/docs/safetensors, "Format"): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}, "__metadata__": {text: text}}`, then the data, which the offsets must cover
without holes. A model may be spread over several files beside an index `{"weight_map": {name: file}}`.

Nothing in a header is believed before it is checked: all sizes are compared with the file's before any data is read.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from rdt2_jax.errors import CheckpointError, UnsafeFileError
from rdt2_jax.problems import Problems
from rdt2_jax.weights.sources import TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        name: np.dtype(dtype)
        for name, dtype in {
            "BOOL": np.bool_,
            "U8": np.uint8,
            "U16": np.uint16,
            "U32": np.uint32,
            "U64": np.uint64,
            "I8": np.int8,
            "I16": np.int16,
            "I32": np.int32,
            "I64": np.int64,
            "F16": np.float16,
            "BF16": ml_dtypes.bfloat16,
            "F32": np.float32,
            "F64": np.float64,
            "F8_E4M3": ml_dtypes.float8_e4m3fn,
            "F8_E5M2": ml_dtypes.float8_e5m2,
        }.items()
    }
)
"""The format's names of dtypes. Multi-byte numbers are little-endian, as on every machine jax runs on."""

METADATA_KEY = "__metadata__"
"""The header entry that is not a tensor."""

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

_MAX_DIMENSIONS = 64
"""The limit of numpy."""


class SafetensorsFiles:
    """The tensors of one file, or of several that belong together. A context manager.

    Arrays from `read` are read-only views of the mapped file and cost no anonymous memory.

    Args:
        path: a safetensors file, an index file, or a folder with `model.safetensors` or
            `model.safetensors.index.json` in it.

    Raises:
        CheckpointError: files are missing, truncated or contradict themselves or each other; names file and tensor.
        UnsafeFileError: an index that points outside its folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        files, weight_map = _find_files(self.path)
        self._shards = {file.name: _Shard(file) for file in files}
        self._file_of = _assign(self.path, self._shards, weight_map)
        self._tensors = {name: self._shards[file].tensors[name] for name, file in self._file_of.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in the order of the files."""
        return MappingProxyType(self._tensors)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of all headers together."""
        merged: dict[str, str] = {}
        for shard in self._shards.values():
            merged.update(shard.metadata)
        return MappingProxyType(merged)

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a read-only view of the file.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._file_of:
            raise CheckpointError("no such tensor", where=self.path, found=name)
        return self._shards[self._file_of[name]].read(name)

    def release(self, name: str) -> None:
        """Lets the operating system drop the tensor's pages; views stay valid and would read it again."""
        self._shards[self._file_of[name]].release(name)

    def close(self) -> None:
        """Forgets the files. Views that are still held keep their mapping alive."""
        self._shards.clear()
        self._file_of.clear()

    def __enter__(self) -> SafetensorsFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Shard:
    """One file: its verified header, and its data mapped when first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header, self._data_start, file_size = _read_header(path)
        metadata = header.pop(METADATA_KEY, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError("header metadata must be text", where=path, found=metadata)
        self.metadata: dict[str, str] = metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        self._map: mmap.mmap | None = None
        problems = Problems()
        for name, entry in header.items():
            problem = self._add_tensor(name, entry)
            if problem is not None:
                problems.add(f"tensor {name}: {problem}")
        if not problems.lines:
            _check_coverage(self._spans, file_size - self._data_start, problems)
        problems.raise_if_any(CheckpointError, "the header of a safetensors file is wrong", where=path)

    def read(self, name: str) -> np.ndarray:
        info, (start, end) = self.tensors[name], self._spans[name]
        if start == end:
            return np.empty(info.shape, info.dtype)
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(self._map, info.dtype, math.prod(info.shape), self._data_start + start)
        return flat.reshape(info.shape)

    def release(self, name: str) -> None:
        start, end = (self._data_start + offset for offset in self._spans[name])
        page_start = start - start % mmap.PAGESIZE
        if self._map is not None and end > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, page_start, end - page_start)

    def _add_tensor(self, name: str, entry: Any) -> str | None:
        """Checks one header entry; returns what is wrong with it."""
        try:
            code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            return f"entry without dtype, shape and two data_offsets: {entry!r}"
        if not isinstance(code, str) or code not in DTYPES:
            return f"unknown dtype {code!r}, known are {', '.join(DTYPES)}"
        if not isinstance(shape, list):
            return f"shape must be a list, found {shape!r}"
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            return f"shape {shape} and data_offsets {[start, end]} must be whole numbers, not negative"
        # numpy counts in 64 bits, dimensions of size 0 left out
        if len(shape) > _MAX_DIMENSIONS or math.prod(size or 1 for size in shape) * DTYPES[code].itemsize >= 2**63:
            return f"shape {shape[:_MAX_DIMENSIONS]} of {len(shape)} dimensions is larger than an array can be"
        needed = math.prod(shape) * DTYPES[code].itemsize
        if end - start != needed:
            return f"{code} {tuple(shape)} takes {needed} bytes, data_offsets {[start, end]} hold {end - start}"
        self.tensors[name] = TensorInfo(name, DTYPES[code], tuple(shape), str(self.path))
        self._spans[name] = (start, end)
        return None


def _find_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a model, and the weight map of its index if it has one."""
    if path.is_file():
        return ([path], None) if not path.name.endswith(".json") else _read_index(path)
    if not path.is_dir():
        raise CheckpointError("no such file or folder", where=path, expected="safetensors weights")
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointError(
            "two sets of weights in one folder", where=path, found=f"{SINGLE_FILE} and {INDEX_FILE}", fix="name one"
        )
    if index.is_file():
        return _read_index(index)
    if single.is_file():
        return [single], None
    others = sorted(file.name for file in path.glob("*.safetensors"))
    raise CheckpointError(
        "no weights in the folder",
        where=path,
        expected=f"{SINGLE_FILE} or {INDEX_FILE}",
        found=", ".join(others) or "no safetensors file",
        fix="name the file itself" if others else None,
    )


def _read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        weight_map = _parse_json(path.read_bytes())["weight_map"]
        if not all(isinstance(text, str) for item in weight_map.items() for text in item):
            raise ValueError("weight_map must map text to text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("not an index of safetensors files", where=path, found=str(error)) from error
    names = list(dict.fromkeys(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise UnsafeFileError("an index points outside its folder", where=path, found=outside)
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError("files of a model are missing", where=path, found=missing, fix="download them again")
    return [path.parent / name for name in names], weight_map


def _assign(path: Path, shards: Mapping[str, _Shard], weight_map: Mapping[str, str] | None) -> dict[str, str]:
    """Tensor name -> file name; every tensor in one file, and in the file that the index says."""
    problems = Problems()
    owners: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in owners:
                problems.add(f"tensor {name}: in {owners[name]} and in {file}")
            elif weight_map is not None and weight_map.get(name) != file:
                problems.add(f"tensor {name}: in {file}, the index says {weight_map.get(name, 'nothing of it')}")
            owners[name] = file
    for name, file in (weight_map or {}).items():
        if name not in owners:
            problems.add(f"tensor {name}: the index says {file}, which does not have it")
    problems.raise_if_any(CheckpointError, "the files of a model contradict each other", where=path)
    return owners


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the data starts, size of the file)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                "not a safetensors file, or cut off in its header",
                where=path,
                expected=f"a header of at most {max(size - 8, 0)} bytes",
                found=f"{length} bytes announced, the file has {size}",
            )
        text = file.read(length)
    try:
        header = _parse_json(text)
    except ValueError as error:
        raise CheckpointError("the header of a safetensors file is not JSON", where=path, found=str(error)) from error
    if not isinstance(header, dict):
        raise CheckpointError("the header of a safetensors file must be a JSON object", where=path, found=header)
    return header, 8 + length, size


def _parse_json(text: bytes) -> Any:
    """JSON that names nothing twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"named twice: {sorted({name for name in names if names.count(name) > 1})}")
        return seen

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _check_coverage(spans: Mapping[str, tuple[int, int]], data_bytes: int, problems: Problems) -> None:
    """The tensors must cover the data without holes and without overlap."""
    position = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != position:
            kind = "a hole" if start > position else "an overlap"
            problems.add(f"tensor {name}: {kind} before it, data_offsets start at {start} instead of {position}")
        position = max(position, end)
    if position != data_bytes:
        problems.add(f"the tensors take {position} bytes of data, the file has {data_bytes}")
