"""The files of a source, told apart from what they were before by sizes and times."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path


def files_fingerprint(root: Path, paths: Iterable[Path]) -> str:
    """A hash of the names relative to `root`, sizes and times of change of files, and of which of them are missing.

    Symbolic links are followed. The content of files is not read: sources are large.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        name = path.name if path == root else Path(os.path.relpath(path, root)).as_posix()
        try:
            status = path.stat()
        except FileNotFoundError:
            digest.update(json.dumps([name, None]).encode())
            continue
        digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


def files_below(*folders: Path) -> list[Path]:
    """All files in folders and their sub-folders; a folder that is missing has none."""
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def names_shown(names: Iterable[str], limit: int = 20) -> str:
    """Names for a message, the first few of many."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
