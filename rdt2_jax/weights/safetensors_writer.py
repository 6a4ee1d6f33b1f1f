"""Writing safetensors files one tensor at a time; the format is described in `safetensors_files`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rdt2_jax.errors import CheckpointError
from rdt2_jax.io.files import atomic_write
from rdt2_jax.problems import Problems
from rdt2_jax.weights.safetensors_files import DTYPES, INDEX_FILE, METADATA_KEY
from rdt2_jax.weights.sources import TensorInfo

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Sequence[TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Writes tensors one at a time; nothing half-written ever bears the final name.

    Tensors stand in the file by falling element size, so that each is aligned, and otherwise in the order given.

    Args:
        path: a file; with `max_shard_bytes`, an existing folder without weights. (To replace a folder of shards, build
            a new one in `rdt2_jax.io.files.atomic_directory`.)
        tensors: name, dtype and shape of each; `where` is not used.
        read: gives the values of a tensor by name; called once for each, in the order of the file.
        metadata: text for the header of every file.
        max_shard_bytes: largest amount of data in one file; a larger tensor gets a file to itself.
        overwrite: allow an existing file to be replaced.

    Returns:
        The files that were written, an index last.

    Raises:
        CheckpointError: files exist, two tensors have one name, a dtype that the format lacks, or `read` gives
            something else than announced.
    """
    path = Path(path)
    ordered = sorted(tensors, key=lambda info: -info.dtype.itemsize)
    _check_announced(path, ordered)
    if max_shard_bytes is None:
        if path.exists() and not overwrite:
            raise CheckpointError("the file exists", where=path, fix="choose another name, or pass overwrite=True")
        _write_file(path, ordered, read, metadata)
        return (path,)
    return _write_shards(path, ordered, read, metadata, max_shard_bytes)


def _check_announced(path: Path, tensors: Iterable[TensorInfo]) -> None:
    problems = Problems()
    seen: set[str] = set()
    for info in tensors:
        if info.name in seen or info.name == METADATA_KEY:
            problems.add(f"tensor {info.name}: named twice, or the name of the metadata")
        if info.dtype not in _CODES:
            problems.add(f"tensor {info.name}: the format has no {info.dtype}")
        seen.add(info.name)
    problems.raise_if_any(CheckpointError, "tensors that cannot be written", where=path)


def _write_file(
    path: Path,
    tensors: Sequence[TensorInfo],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None,
) -> None:
    header: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    position = 0
    for info in tensors:
        span = [position, position + info.nbytes]
        header[info.name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info in tensors:
            _write_tensor(file, info, read(info.name), path)


def _write_tensor(file: BinaryIO, info: TensorInfo, array: np.ndarray, path: Path) -> None:
    if array.dtype != info.dtype or array.shape != info.shape:
        raise CheckpointError(
            "a tensor is not what was announced",
            where=f"{path}: {info.name}",
            expected=f"{info.dtype} {info.shape}",
            found=f"{array.dtype} {array.shape}",
        )
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_shards(
    folder: Path,
    tensors: Sequence[TensorInfo],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None,
    max_shard_bytes: int,
) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise CheckpointError("shards are written into an existing folder", where=folder)
    present = sorted(file.name for file in folder.glob("*.safetensors*"))
    if present:
        raise CheckpointError("the folder has weights already", where=folder, found=present, fix="use a new folder")
    shards: list[list[TensorInfo]] = [[]]
    for info in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + info.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(info)
    files = [folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write_file(file, shard, read, metadata)
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in tensors)},
        "weight_map": {info.name: file.name for file, shard in zip(files, shards, strict=True) for info in shard},
    }
    with atomic_write(folder / INDEX_FILE) as output:
        output.write((json.dumps(index, indent=2) + "\n").encode())
    return (*files, folder / INDEX_FILE)
