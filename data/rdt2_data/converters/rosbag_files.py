"""Bags on disk: ROS 1 `.bag` files, ROS 2 folders and single `.db3` or `.mcap` files, opened with one library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rdt2_data.converters.damage import damage_named
from rdt2_data.converters.source_files import files_below, names_shown
from rdt2_data.problems import SampleError
from rdt2_jax.errors import DataError

_BAG_FILES = (".bag", ".db3", ".mcap")
_UNFINISHED = ".bag.active"
_METADATA = "metadata.yaml"


def find_bags(source: Path) -> list[Path]:
    """The bags of a source, by name: the source itself, or those that lie in it at any depth.

    A folder with the storage files of a bag and without `metadata.yaml`, and a file that ROS 1 had not finished
    (`.bag.active`), are bags too: opening them tells what is wrong, instead of nobody.

    Raises:
        DataError: there is no bag.
    """
    if _is_bag(source):
        return [source]
    if not source.is_dir():
        raise DataError("no such bag", where=source, expected="a .bag, .db3 or .mcap file, or a folder of bags")
    bags = sorted(_bags_below(source))
    if not bags:
        expected = f"{', '.join(_BAG_FILES)} files, or folders with {_METADATA}"
        found = names_shown(path.name for path in source.iterdir())
        raise DataError("a folder without bags", where=source, expected=expected, found=found)
    return bags


def bag_files(bags: Sequence[Path]) -> list[Path]:
    """All files that belong to bags."""
    return [file for bag in bags for file in (files_below(bag) if bag.is_dir() else [bag])]


@contextmanager
def open_bag(path: Path, typestore: str) -> Iterator[Any]:
    """Opens a bag.

    Args:
        path: as found by `find_bags`.
        typestore: name of the message definitions used where the bag carries none, for example "ros2_humble".

    Yields:
        `rosbags.highlevel.AnyReader`.

    Raises:
        SampleError: "bad-recording", for a bag that is unfinished or damaged.
    """
    from rosbags.highlevel import AnyReader
    from rosbags.typesys import Stores, get_typestore

    if path.name.endswith(_UNFINISHED):
        what, fix = "a bag that was not finished", "repair it with 'rosbag reindex'"
        raise SampleError("bad-recording", what=what, where=path, fix=fix)
    if path.is_dir() and not (path / _METADATA).is_file():
        what, fix = f"a bag without {_METADATA}", "repair it with 'ros2 bag reindex'"
        raise SampleError("bad-recording", what=what, where=path, found=names_shown(_storage_files(path)), fix=fix)
    with errors_named(path):
        reader = AnyReader([path], default_typestore=get_typestore(Stores(typestore)))
        reader.open()
    try:
        yield reader
    finally:
        reader.close()


def errors_named(path: Path) -> AbstractContextManager[None]:
    """Errors of the bag library as a SampleError that names the file.

    Damage surfaces as whatever the parser stumbled over (its own errors, and those of databases, decompressors,
    `struct` and indexing), so every exception inside is taken for damage: only calls of the library belong inside.
    """
    return damage_named("the bag cannot be read", path, Exception)


def _bags_below(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if _is_bag(path) or (path.is_dir() and _is_unfinished(path)):
            yield path
        elif path.is_dir():
            yield from _bags_below(path)


def _is_bag(path: Path) -> bool:
    if path.is_dir():
        return (path / _METADATA).is_file()
    return path.is_file() and (path.suffix in _BAG_FILES or path.name.endswith(_UNFINISHED))


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder without `metadata.yaml` is one bag: its files are named after it, NAME_0.mcap and so on."""
    names = _storage_files(folder)
    return bool(names) and all(re.fullmatch(rf"{re.escape(folder.name)}(_\d+)?\.\w+", name) for name in names)


def _storage_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix in (".db3", ".mcap")]
