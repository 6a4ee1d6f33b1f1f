"""The files of a source, told apart from what they were before by sizes and times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from rdt2_jax.config import FrozenConfig


def files_fingerprint(root: Path, paths: Iterable[Path], *settings: FrozenConfig) -> str:
    """A hash of the names below `root`, sizes and times of change of files, and of the settings they are read with.

    Symbolic links are followed. The content of files is not read: sources are large.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        status = path.stat()
        name = path.name if path == root else path.relative_to(root).as_posix()
        digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    for setting in settings:
        digest.update(json.dumps(setting.model_dump(mode="json"), sort_keys=True).encode())
    return digest.hexdigest()


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def names_shown(names: Iterable[str], limit: int = 20) -> str:
    """Names for a message, the first few of many."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
