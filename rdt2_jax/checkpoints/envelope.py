"""The envelope of a checkpoint: a JSON file that says what is stored beside it, with a checksum of its own.

It holds the caller's metadata and one record per item: a checksum per array, the implementation of every PRNG key,
and, for an item that was written in several parts, the names of the parts' folders. Small files that were written
beside the items are named too, so that whoever replaces a checkpoint knows what else has come to lie in its folder.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdt2_jax.errors import CheckpointError

METADATA_ITEM = "metadata"
_RESERVED_ITEMS = (METADATA_ITEM, "metrics")
_ORBAX_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax itself puts into the folder of a checkpoint; the second one, into every folder that it wrote."""

_FORMAT = "rdt2-jax checkpoint 1"

READ_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError)
"""What Orbax, tensorstore and json raise on missing, truncated or garbled files."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are missing, truncated or altered, as opposed to one that is not the one wanted."""


def damaged(path: Path, error: BaseException) -> DamagedCheckpointError:
    """The error for files that a library could not read."""
    return DamagedCheckpointError(
        "a checkpoint is damaged or incomplete", where=path, found=f"{type(error).__name__}: {error}"
    )


def stored_items(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the pytrees in a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return tuple(read_envelope(Path(directory))["items"])


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that was given to `save`.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return read_envelope(Path(directory))["metadata"]


def is_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a checkpoint, intact or not."""
    return (Path(directory) / METADATA_ITEM).is_dir()


def require_item_name(item: str) -> None:
    """Refuses names that cannot be those of items.

    Raises:
        CheckpointError: not an identifier, or a name that the checkpoint needs itself.
    """
    if item in _RESERVED_ITEMS or not item.isidentifier():
        raise CheckpointError(
            "not usable as the name of an item", expected=f"an identifier, not {_RESERVED_ITEMS}", found=item
        )


def make_envelope(metadata: Mapping[str, Any], records: Mapping[str, Any], files: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON document for a checkpoint.

    Args:
        metadata: the caller's JSON values.
        records: item name -> {"checksums": {leaf: int}, "keys": {leaf: implementation}, "parts": [folder] or absent}.
        files: names of the files that are written beside the items.

    Raises:
        CheckpointError: JSON would not give the metadata back unchanged.
    """
    envelope = {"format": _FORMAT, "metadata": json_only(metadata), "items": dict(records)}
    if files:
        envelope["files"] = sorted(files)
    return {**envelope, "crc32": _crc32(envelope)}


def read_envelope(directory: Path) -> dict[str, Any]:
    """The JSON document of a checkpoint, with its own checksum verified.

    Raises:
        CheckpointError: there is no checkpoint.
        DamagedCheckpointError: it cannot be read, or was altered.
    """
    if not directory.is_dir():
        raise CheckpointError("no checkpoint", where=directory)
    path = directory / METADATA_ITEM / METADATA_ITEM
    try:
        envelope = json.loads(path.read_bytes())
        stored_crc32 = envelope.pop("crc32")
        intact = envelope["format"] == _FORMAT and stored_crc32 == _crc32(envelope)
    except READ_FAILURES as error:
        raise damaged(path, error) from error
    if not intact:
        raise DamagedCheckpointError(
            "not the metadata that was saved", where=path, expected=_FORMAT, found=envelope["format"]
        )
    return envelope


def item_record(directory: Path, item: str, envelope: Mapping[str, Any]) -> dict[str, Any]:
    """What the envelope says of one item.

    Raises:
        CheckpointError: it has no such item; names those it has.
    """
    if item not in envelope["items"]:
        known = ", ".join(envelope["items"])
        raise CheckpointError("the checkpoint has no such item", where=directory, expected=known, found=item)
    return envelope["items"][item]


def part_paths(directory: Path, item: str, record: Mapping[str, Any]) -> tuple[Path, ...]:
    """The folders that Orbax wrote for an item: its own, or one per part."""
    parts = record.get("parts")
    return (directory / item,) if parts is None else tuple(directory / item / part for part in parts)


def foreign_entries(directory: Path, envelope: Mapping[str, Any]) -> list[str]:
    """What lies in a checkpoint's folder and was not written with the checkpoint, as paths relative to the folder.

    The folders that Orbax wrote for arrays are not looked into.
    """
    known = {
        "": {*_RESERVED_ITEMS, *_ORBAX_FILES, *envelope["items"], *envelope.get("files", ())},
        METADATA_ITEM: {METADATA_ITEM, *_ORBAX_FILES},
    }
    known |= {item: set(record["parts"]) for item, record in envelope["items"].items() if record.get("parts")}
    return [
        str(entry.relative_to(directory))
        for folder, names in known.items()
        if (directory / folder).is_dir()
        for entry in sorted((directory / folder).iterdir())
        if entry.name not in names
    ]


def json_only(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, if JSON gives it back unchanged.

    Raises:
        CheckpointError: it does not; names what would change.
    """
    try:
        copy = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError("metadata cannot be written as JSON", found=str(error)) from error
    if copy != metadata:
        changed = [key for key in metadata if copy.get(key) != metadata[key]]
        raise CheckpointError(
            "metadata would come back different from JSON", where=changed, fix="use lists, and strings as keys"
        )
    return copy


def _crc32(envelope: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(envelope, sort_keys=True).encode())
