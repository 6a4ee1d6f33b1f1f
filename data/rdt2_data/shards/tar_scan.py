"""Reading the headers of a tar shard from first to last: which samples it holds, and what is wrong with it."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from rdt2_data.shards.index import RECORD, IndexHeader, ShardIndex, ShardProblem, Stamp, tail_checksum

TAR_BLOCK = 512
MAX_EXTENSIONS = 16
MAX_MEMBER_BYTES = 2**32 - 1
_CHUNK_BYTES = 2**20


def scan_shard(stream: BinaryIO, stamp: Stamp) -> ShardIndex:
    """Finds the samples of an archive.

    Members whose names agree up to the first dot of the file name make one sample, as in the webdataset library. A
    sample that appears twice counts once. The last sample of an archive that is cut off is left out. What follows the
    end mark is not read, but reported.

    Args:
        stream: the archive, seekable.
        stamp: its state, kept in the index.
    """
    scan = _Scan()
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            try:
                for member in archive:
                    if member.isfile():
                        scan.add(member)
            except (tarfile.TarError, EOFError) as error:
                scan.cut_off(str(error))
            else:
                scan.check_end(stream, archive.offset, stamp)
    except (tarfile.TarError, EOFError) as error:
        reason = "empty-shard" if stamp.size == 0 else "damaged-shard"
        scan.report(reason, expected="a tar archive", found=f"{stamp.size} bytes: {error}")
    if not scan.groups and not scan.problems:
        scan.report("empty-shard", expected="at least one sample")
    samples = [members for members in scan.groups.values() if members]
    extensions = tuple(dict.fromkeys(extension for members in samples for extension in members))
    if len(extensions) > MAX_EXTENSIONS:
        scan.refuse(samples)
        samples, extensions = [], ()
    header = IndexHeader(extensions, len(samples), stamp, tail_checksum(stream, stamp.size), tuple(scan.problems))
    return ShardIndex(header, _table(samples, extensions).tobytes())


class _Scan:
    """Members of one archive, grouped into samples as they come."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, tuple[int, int]]] = {}  # key -> extension -> offset, size
        self.problems: list[ShardProblem] = []
        self._current: str | None = None
        self._repeated = False

    def add(self, member: tarfile.TarInfo) -> None:
        folder, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not dot or not stem:
            return  # no member of a sample: the webdataset library passes such files over, too
        key = f"{folder}/{stem}" if folder else stem
        if key != self._current:
            self._current, self._repeated = key, key in self.groups
            if self._repeated:
                self.report("duplicate-key", key, found="the sample comes again; the first is kept")
            else:
                self.groups[key] = {}
        if self._repeated:
            return
        if extension in self.groups[key]:
            self.report("duplicate-key", key, found=f"{extension} comes twice; the first is kept")
        elif not 0 < member.size <= MAX_MEMBER_BYTES:
            self.report("damaged-shard", key, found=f"{extension} has {member.size} bytes")
        else:
            self.groups[key][extension] = (member.offset_data, member.size)

    def check_end(self, stream: BinaryIO, offset: int, stamp: Stamp) -> None:
        """An archive ends with blocks of zeros; what ends otherwise was cut off between two members, or damaged."""
        stream.seek(offset)
        block = stream.read(TAR_BLOCK)
        if len(block) < TAR_BLOCK:
            self.cut_off("no end mark")
        elif any(block):
            self._drop_last()
            expected, found = "a header or the end mark", f"neither at byte {offset} of {stamp.size}"
            self.report("damaged-shard", expected=expected, found=found)
        elif (extra := _first_byte(stream)) is not None:
            self.report(
                "damaged-shard",
                what="the archive goes on after its end mark",
                expected="zeros",
                found=f"{stamp.size - extra} bytes that are not read, from byte {extra} on",
                fix="write the shards anew; archives cannot be joined by appending one to another",
            )

    def cut_off(self, found: str) -> None:
        """The last sample goes, because nobody knows whether it is whole."""
        self.report("truncated-shard", self._drop_last(), found=found, fix="copy the archive again")

    def refuse(self, samples: Sequence[Mapping[str, object]]) -> None:
        """An archive with members of very many kinds is something else: not one of its files is taken for a sample."""
        kinds = Counter(extension for members in samples for extension in members)
        found = f"{len(kinds)}: {', '.join(name for name, _ in kinds.most_common(20))} ..."
        expected = f"at most {MAX_EXTENSIONS} kinds of members"
        self.report("damaged-shard", what="no shard of samples", expected=expected, found=found)

    def report(
        self,
        reason: str,
        key: str | None = None,
        *,
        what: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problems.append(ShardProblem(reason, key, what, expected, found, fix))

    def _drop_last(self) -> str | None:
        if self._current is not None and not self._repeated:
            self.groups.pop(self._current, None)
        return self._current


def _first_byte(stream: BinaryIO) -> int | None:
    """Place of the first byte from here on that is not zero."""
    while block := stream.read(_CHUNK_BYTES):
        rest = block.lstrip(b"\0")
        if rest:
            return stream.tell() - len(rest)
    return None


def _table(samples: Sequence[Mapping[str, tuple[int, int]]], extensions: Sequence[str]) -> np.ndarray:
    records = np.zeros((len(samples), len(extensions)), RECORD)
    column = {extension: position for position, extension in enumerate(extensions)}
    for row, members in enumerate(samples):
        for extension, place in members.items():
            records[row, column[extension]] = place
    return records
