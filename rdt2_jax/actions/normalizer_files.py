"""How a normalizer lies on disk: a published torch file, or our own `.npz` and `.json`.

All three hold one tree: field -> scale, offset, input_stats -> min, max, mean, std. No format can run code:
`.pt` goes through `rdt2_jax.io.torch_archive`, and numpy is not allowed to unpickle.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rdt2_jax.errors import CheckpointError, DataError
from rdt2_jax.io.files import atomic_write
from rdt2_jax.io.torch_archive import read_torch_archive

FORMAT, FORMAT_VERSION = "rdt2_linear_normalizer", 1
MAX_FILE_BYTES = 64 * 2**20
"""A normalizer of 24 steps and 20 channels takes 12 kB."""


def read_normalizer_file(path: Path) -> Any:
    """The tree of a `.pt`, `.npz` or `.json` file; its fields and arrays are not yet checked.

    Raises:
        DataError: another suffix, or a missing or damaged `.npz` or `.json` file.
        UnsafeFileError, CheckpointError: a `.pt` file that is refused, missing or damaged.
    """
    suffix = path.suffix.lower()
    if suffix not in (".pt", ".npz", ".json"):
        raise _wrong_suffix(path, ".pt, .npz or .json")
    if not path.exists():
        kind = CheckpointError if suffix == ".pt" else DataError
        raise kind("the normalizer file does not exist", where=path, fix="check the path")
    try:
        if suffix == ".pt":
            return read_torch_archive(path, max_bytes=MAX_FILE_BYTES)
        return _read_npz(path) if suffix == ".npz" else _read_json(path)
    except CheckpointError as error:  # says "checkpoint", of which there are several beside a normalizer
        raise CheckpointError(
            f"the normalizer file cannot be read: {error.what}",
            where=error.where,
            expected=error.expected,
            found=error.found,
            fix=error.fix,
        ) from error
    except (OSError, ValueError, EOFError, RecursionError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DataError(
            "the normalizer file cannot be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            fix="fetch or save the file again",
        ) from error


def write_normalizer_file(path: Path, tree: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes a tree of float32 arrays to a `.npz` or `.json` file, without loss and atomically.

    Raises:
        DataError: another suffix.
        Rdt2Error: the folder does not exist.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".json"):
        raise _wrong_suffix(path, ".npz or .json")
    with atomic_write(path) as stream:
        if suffix == ".npz":
            arrays = {f"{name}/{key}": array for name, entry in tree.items() for key, array in _flat(entry)}
            np.savez(stream, allow_pickle=False, **arrays)
        else:
            # A float32 is exact in float64, and Python prints a float64 so that it reads back the same.
            document = {"format": FORMAT, "version": FORMAT_VERSION, "fields": tree}
            stream.write(json.dumps(document, default=np.ndarray.tolist, allow_nan=False, indent=1).encode())


def _wrong_suffix(path: Path, expected: str) -> DataError:
    return DataError(
        "a normalizer file needs a known suffix", where=path, expected=expected, found=path.suffix or "none"
    )


def _flat(entry: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    statistics = [(f"input_stats/{key}", array) for key, array in entry["input_stats"].items()]
    return [("scale", entry["scale"]), ("offset", entry["offset"]), *statistics]


def _read_npz(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        _require_small(sum(info.file_size for info in archive.infolist()))
    tree: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            name, _, rest = key.partition("/")
            entry = tree.setdefault(name, {"input_stats": {}})
            statistic = rest.removeprefix("input_stats/")
            (entry if statistic == rest else entry["input_stats"])[statistic] = arrays[key]
    return tree


def _read_json(path: Path) -> Any:
    _require_small(path.stat().st_size)
    document = json.loads(path.read_text(encoding="utf-8"))
    known = isinstance(document, dict) and set(document) == {"format", "version", "fields"}
    if not known or (document["format"], document["version"]) != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"expected format {FORMAT!r}, version {FORMAT_VERSION}, and fields")
    return _lists_to_arrays(document["fields"])


def _require_small(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes are too many for a normalizer (at most {MAX_FILE_BYTES})")


def _lists_to_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_arrays(item) for key, item in value.items()}
    array = np.asarray(value)
    if array.dtype.kind not in "if":
        raise ValueError(f"expected lists of numbers, found {array.dtype}")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
        return array.astype(np.float32)
