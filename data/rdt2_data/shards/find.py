"""Which shards a path stands for: a folder, a file, a pattern, an address; or several of them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

from rdt2_data.shards.numbering import ARRAY_RECORD_SUFFIX, TAR_SUFFIX
from rdt2_data.shards.storage import RemoteStorage, is_url
from rdt2_jax.errors import DataError

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]

_SUFFIXES = (TAR_SUFFIX, ARRAY_RECORD_SUFFIX)
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NAMES_SHOWN = 10


def find_shards(paths: Paths) -> list[str]:
    """Files that `paths` (see `source.open_source`) stand for: sorted within each, no file twice.

    Raises:
        DataError: one that stands for nothing; or a name out of `{000000..000041}` that does not exist.
    """
    if not isinstance(paths, (str, PathLike)) and not paths:
        raise DataError("there are no shards", where="paths", expected="at least one path", found="none")
    shards: list[str] = []
    for path in [paths] if isinstance(paths, (str, PathLike)) else paths:
        shards += _find(os.fspath(path))
    return list(dict.fromkeys(shards))


def _find(path: str) -> list[str]:
    names = _expand_braces(path)
    matches = _remote_matches(names) if is_url(path) else [_local_matches(name) for name in names]
    missing = [name for name, found in zip(names, matches, strict=True) if not found]
    if not names or len(missing) == len(names):
        expected = "a folder with .tar or .array_record files, a file, or a pattern that fits some"
        raise DataError("there are no shards", where=path, expected=expected)
    if missing:
        more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
        raise DataError(
            "shards that a pattern names are missing",
            where=path,
            expected=f"{len(names)} files",
            found=f"{len(missing)} missing: {', '.join(missing[:_NAMES_SHOWN])}{more}",
            fix="copy them, or write a pattern that names those which are there",
        )
    return [shard for found in matches for shard in found]


def _expand_braces(path: str) -> list[str]:
    match = _BRACES.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    head, tail = path[: match.start()], path[match.end() :]
    return [name for number in numbers for name in _expand_braces(f"{head}{number:0{len(first)}d}{tail}")]


def _local_matches(path: str) -> list[str]:
    if Path(path).is_dir():
        return sorted(str(p) for p in Path(path).iterdir() if p.suffix in _SUFFIXES and not p.name.startswith("."))
    if Path(path).is_file():
        return [path]
    if not glob.has_magic(path):
        return []
    # What exists under its literal name is no pattern: folders may have brackets in theirs.
    root = next(folder for folder in Path(path).parents if folder.is_dir() or folder == folder.parent)
    return sorted(str(root / name) for name in glob.glob(str(Path(path).relative_to(root)), root_dir=root))


def _remote_matches(names: Sequence[str]) -> list[list[str]]:
    storage = RemoteStorage(names[0].split("://", 1)[0]) if names else None
    if storage is None:
        return []
    storage.file_system()
    with ThreadPoolExecutor(storage.at_once) as pool:
        return list(pool.map(lambda name: find_remote(name, storage), names))


def find_remote(path: str, storage: RemoteStorage) -> list[str]:
    """Addresses of the files that a remote path stands for: itself, those in a folder, or those that fit its pattern.

    Raises:
        DataError: a store that cannot be asked.
    """
    root = path.split("://", 1)[1]
    files = storage.file_system()
    try:
        kind = storage.attempt(lambda: files.info(root)["type"])
    except FileNotFoundError:
        kind = "nothing"
    except Exception as error:
        raise _not_listed(path, error) from error
    if kind == "file":
        return [path]
    try:
        if kind == "directory":
            found = storage.attempt(lambda: files.ls(root, detail=False))
            names = [name for name in found if name.endswith(_SUFFIXES)]
        else:
            names = storage.attempt(lambda: files.glob(root)) if glob.has_magic(root) else []
    except Exception as error:
        raise _not_listed(path, error) from error
    return sorted(f"{storage.protocol}://{name.lstrip('/')}" for name in names)


def _not_listed(path: str, error: Exception) -> DataError:
    return DataError("the storage does not list its files", where=path, found=f"{type(error).__name__}: {error}")
