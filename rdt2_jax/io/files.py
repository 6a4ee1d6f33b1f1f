"""Files and directories that appear whole or not at all.

`atomic_write` and `atomic_directory` build under a temporary name beside the target, force the bytes to disk, and only
then rename: a reader, or a machine that lost power, sees the old content or the new one and never a half of either.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rdt2_jax.errors import Rdt2Error


def make_folder(path: Path) -> None:
    """Creates a folder with its parents; one that exists is left as it is.

    Raises:
        Rdt2Error: the system does not allow it; says what it said.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_created(path, error) from error


def sync_to_disk(path: Path) -> None:
    """Blocks until the content of a file, or the entries of a directory, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_file(temporary: Path, path: Path) -> None:
    """Moves a finished file to its final name, durably.

    Args:
        temporary: a closed file on the same file system as `path`.
        path: final name; a file already there is replaced.
    """
    sync_to_disk(temporary)
    os.replace(temporary, path)
    sync_to_disk(path.parent)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Writes a file that replaces `path` only once it is complete and on disk.

    A symbolic link is followed: the file it points to is replaced. An existing file hands its permission bits
    to the new one. Any exception in the block removes the temporary and leaves the old file untouched.

    Args:
        path: final name; its folder must exist.

    Yields:
        A binary file object open for writing (and reading and seeking).

    Raises:
        Rdt2Error: the folder is missing, or `path` is a directory.
    """
    target = _target(path)
    if target.is_dir():
        raise Rdt2Error("a file cannot replace a directory", where=target, expected="a file name", found="a directory")
    temporary = _sibling(target, "tmp")
    try:
        with open(temporary, "x+b") as file:
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o777)
            yield file
        publish_file(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Builds a directory that takes the name `path` only once it is complete and on disk.

    With `overwrite`, the old directory is renamed aside (`.<name>.<random>.old`), the new one takes its name,
    and only then is the old one removed. Between these two renames `path` does not exist, and a machine
    that stops just there leaves the old content under the `.old` name. Any exception in the block removes the
    temporary and leaves the old directory untouched.

    Args:
        path: final name; its parent must exist.
        overwrite: allow a non-empty directory to be replaced.

    Yields:
        The temporary directory to fill.

    Raises:
        Rdt2Error: the parent is missing or cannot be written to, `path` is a file, or `path` is a non-empty
            directory and `overwrite` is False. This is checked before the block runs and once more before the rename.
    """
    target = _target(path)
    _require_replaceable(target, overwrite)
    temporary = _sibling(target, "tmp")
    try:
        temporary.mkdir()
    except OSError as error:
        raise _not_created(target, error) from error
    try:
        yield temporary
        _sync_tree(temporary)
        _require_replaceable(target, overwrite)
        _swap_in(temporary, target)
    except BaseException:
        if temporary.exists():
            shutil.rmtree(temporary)
        raise


def _not_created(path: Path, error: OSError) -> Rdt2Error:
    return Rdt2Error(
        "a folder cannot be created",
        where=path,
        found=f"{type(error).__name__}: {error.strerror}",
        fix="choose a place on a disk that you may write to",
    )


def _target(path: str | os.PathLike[str]) -> Path:
    """The place to replace, with symbolic links followed; its parent is known to exist."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise Rdt2Error(
            "the folder to write into does not exist",
            where=target,
            expected=f"an existing folder {target.parent}",
            fix="create the folder first",
        )
    return target


def _sibling(target: Path, suffix: str) -> Path:
    """A hidden, unused name on the same file system."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{suffix}")


def _require_replaceable(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        if overwrite or not any(target.iterdir()):
            return
        raise Rdt2Error(
            "the directory exists and is not empty",
            where=target,
            expected="no directory, or an empty one",
            fix="choose another name, or pass overwrite=True to replace it",
        )
    if target.exists():
        raise Rdt2Error("a directory cannot replace a file", where=target, expected="a directory name", found="a file")


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                sync_to_disk(file)
        sync_to_disk(Path(folder))


def _swap_in(temporary: Path, target: Path) -> None:
    """Gives the temporary directory its final name; an old directory is removed only after that."""
    if not target.exists():
        os.rename(temporary, target)
        sync_to_disk(target.parent)
        return
    aside = _sibling(target, "old")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    sync_to_disk(target.parent)
    shutil.rmtree(aside)
