"""Folders of published models, written whole: safetensors beside small files; and what may be replaced by one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rdt2_jax.errors import CheckpointError, Rdt2Error
from rdt2_jax.io.files import atomic_directory, make_folder
from rdt2_jax.weights.safetensors_files import INDEX_FILE, SINGLE_FILE

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@contextmanager
def published_folder(
    folder: str | os.PathLike[str],
    files: Mapping[str, bytes],
    *,
    read_config: Callable[[Path], object],
    known: Collection[str] = (),
    overwrite: bool = False,
) -> Iterator[tuple[Path, Path]]:
    """Builds a model's folder; it appears only when it is complete.

    Args:
        folder: the new folder; missing parents are created.
        files: name -> content of small files to put into it.
        read_config: reads the configuration in such a folder, and raises Rdt2Error for that of another kind of model.
        known: names of other small files that such folders have.
        overwrite: allow the folder of such a model to be replaced if there is nothing else in it.

    Yields:
        The temporary folder to put the weights into, and where it will be.

    Raises:
        CheckpointError: `folder` exists, see `require_replaceable`: looked at before, and again when all is written.
        Rdt2Error: `folder` cannot be created.
    """
    target = Path(os.path.abspath(folder))
    require_replaceable(target, overwrite, {*known, *files}, read_config)
    make_folder(target.parent)
    with atomic_directory(target, overwrite=overwrite) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        yield temporary, target
        require_replaceable(
            target, overwrite, {*known, *files}, read_config
        )  # what came in meanwhile is nobody's to delete


def require_replaceable(
    target: Path, overwrite: bool, known: Collection[str], read_config: Callable[[Path], object]
) -> None:
    """Refuses to write where something is that is not a folder of such a model, or may not be overwritten.

    Args:
        target: where a folder is to be written.
        overwrite: whether one that is there may be replaced.
        known: names of the small files that it may have beside safetensors.
        read_config: as in `published_folder`.

    Raises:
        CheckpointError: something is there, and without `overwrite`, or it is no folder with safetensors, or that of
            another kind of model, or other files or folders lie in it; names them.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(
            "the target exists", where=target, fix="choose another name, or pass overwrite=True (--overwrite)"
        )
    if not any((target / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(
            "only a folder with safetensors is overwritten, and this is none", where=target, fix="remove it by hand"
        )
    try:
        read_config(target)
    except Rdt2Error as error:
        raise CheckpointError(
            "only a model of the same kind is overwritten, and this is another",
            where=target,
            found=error.what,
            fix="choose another name, or remove it by hand",
        ) from error
    strangers = [
        entry.name + ("/" if entry.is_dir() else "")
        for entry in sorted(target.iterdir())
        if entry.is_dir() or not (entry.name in known or _WEIGHTS.fullmatch(entry.name))
    ]
    if strangers:
        raise CheckpointError(
            "the model's folder has other things in it, which overwriting would delete",
            where=target,
            expected="safetensors and the small files of such a model alone",
            found=", ".join(strangers),
            fix="move them elsewhere, or choose another name",
        )
