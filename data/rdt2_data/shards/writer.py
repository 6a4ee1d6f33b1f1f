"""Writing the published tar shards: whole or not at all, and the same bytes for the same samples."""

from __future__ import annotations

import io
import os
import secrets
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

from rdt2_data.shards.index import INDEX_SUFFIX, Stamp, write_index
from rdt2_data.shards.tar_scan import scan_shard
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import publish_file

TEMPORARY_SUFFIX = ".tmp"


class ShardWriter:
    """Writes one shard; a context manager, entered once.

    The archive takes its name when the block ends without an exception, and its index follows. Times and owners in the
    archive are zero, so that its bytes depend on the samples alone.

    Args:
        path: ends in `.tar`; its folder must exist. A file already there is replaced.

    Raises:
        DataError: another suffix or a missing folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.suffix != ".tar" or not self.path.parent.is_dir():
            expected = "a name ending in .tar, in an existing folder"
            raise DataError("a shard cannot be written there", where=self.path, expected=expected)
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
        self._keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        self._archive = tarfile.open(self._temporary, "x:", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends one sample.

        Args:
            key: name of the sample; no dot and no slash in it.
            members: extension (such as "image.jpg") -> bytes.

        Raises:
            DataError: a key that is taken or cannot be used, no members, or an empty member.
        """
        require_sample(self.path, self._keys, key, members)
        self._keys.add(key)
        for extension, data in members.items():
            write_member(self._archive, f"{key}.{extension}", data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._archive.close()
            if kind is None:
                publish_file(self._temporary, self.path)
                write_shard_index(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def require_sample(path: Path, taken: Collection[str], key: str, members: Mapping[str, bytes]) -> None:
    """What both containers ask of a sample, so that each can be packed into the other.

    Raises:
        DataError: a key that is taken or cannot be used, no members, or an empty member.
    """
    if not key or any(character in key for character in "./\\") or key in taken:
        expected = "a name without dots and slashes, once in a shard"
        raise DataError("a sample cannot have this key", where=path, expected=expected, found=repr(key))
    if not members or not all(members.values()):
        found = ", ".join(name for name, data in members.items() if not data) or "none"
        raise DataError("a sample needs members that are not empty", where=f"{path}, sample {key}", found=found)


def write_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds one member whose header holds nothing but name and size."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o444
    archive.addfile(header, io.BytesIO(data))


def write_shard_index(path: Path) -> None:
    """Makes the index beside a local shard."""
    status = path.stat()
    with open(path, "rb") as stream:
        index = scan_shard(stream, Stamp(status.st_size, str(status.st_mtime_ns)))
    write_index(path.with_name(path.name + INDEX_SUFFIX), index)
