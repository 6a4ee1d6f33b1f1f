"""Episode files: one recorded episode of an executor, a twin or a teleoperation, written and read.

The container is MCAP with JSON messages, which Foxglove and Rerun open as they are; what is in it is declared in
`rdt2_jax.actions.episode_schema`. The container's own stamps are the times of the messages in nanoseconds.

Source of the container format: the MCAP specification (mcap.dev/spec).
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from mcap.exceptions import EndOfFile, McapError
from mcap.records import Channel as ChannelRecord
from mcap.records import Chunk, Footer, McapRecord, Message, MessageIndex, Metadata
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.writer import Writer
from zstandard import ZstdError

from rdt2_jax.actions.episode_schema import (
    CHANNELS,
    Channel,
    EpisodeMetadata,
    MessageChecker,
    decode_message,
    encode_message,
    find_channel,
    json_schema,
)
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import publish_file

PARTIAL_SUFFIX = ".partial"
"""Added to the name while an episode is being written; it stays there when the recorder crashes."""

_METADATA, _END = "rdt2_episode", "rdt2_episode_end"
_CHUNK_BYTES = 64 * 1024
"""What a crash can lose: the last image or two, or about a second where no images are recorded."""

_MAX_RECORD_BYTES = 256 * 2**20
_DAMAGE = (McapError, ZstdError, struct.error, ValueError, OverflowError, RuntimeError, KeyError)


@dataclass(frozen=True)
class Series:
    """All messages of one topic, in order.

    Args:
        time_s: float64 (N,), seconds of the recorder's monotonic clock.
        values: field -> array (N, *shape) of the declared type, or a list of N texts or JPEG files.
    """

    time_s: np.ndarray
    values: dict[str, Any]


class EpisodeWriter:
    """Writes one episode; a context manager, entered once. Threads may append at the same time.

    Messages go to `<path>.partial`, which takes its final name only when the block ends without an exception. After
    an exception or a crash the partial file stays, and `EpisodeReader` opens it.

    Args:
        path: final name, ending in `.mcap`; neither this file nor its partial file may exist.
        metadata: what is known before the first message.

    Raises:
        DataError: on entering, for another suffix, a file that exists, or a missing folder.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: EpisodeMetadata) -> None:
        self.path = Path(path)
        self.partial_path = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self.metadata = metadata
        self._lock = threading.Lock()
        self._stream: BinaryIO | None = None
        self._checker = MessageChecker()
        self._counts = dict.fromkeys(CHANNELS, 0)

    def __enter__(self) -> EpisodeWriter:
        if self.path.suffix != ".mcap" or not self.path.parent.is_dir() or self.path.exists():
            expected = "a new name ending in .mcap, in an existing folder"
            raise DataError("an episode cannot be written there", where=self.path, expected=expected)
        try:
            self._stream = open(self.partial_path, "xb")  # closed in __exit__
        except FileExistsError as error:
            raise DataError(
                "an interrupted recording has this name",
                where=self.partial_path,
                fix="read it with EpisodeReader, then move or delete it, or choose another name",
            ) from error
        self._writer = Writer(self._stream, chunk_size=_CHUNK_BYTES)
        self._writer.start(profile=_METADATA, library="rdt2-jax")
        self._writer.add_metadata(_METADATA, {key: json.dumps(value) for key, value in asdict(self.metadata).items()})
        self._channel_ids = self._register_channels()
        self._stream.flush()
        return self

    def append(self, topic: str, time_s: float, **values: Any) -> None:
        """Adds one message.

        Args:
            topic: a key of `CHANNELS`.
            time_s: seconds of the monotonic clock; within a topic it never decreases.
            values: exactly the fields of the channel, in its types and shapes.

        Raises:
            DataError: an unknown topic, a writer that is not open, or a message that `MessageChecker` refuses. The
                message names the topic and the index, and nothing is written.
        """
        channel = find_channel(topic, self.path)
        with self._lock:
            if self._stream is None:
                raise DataError("the episode is not open for writing", where=self.path)
            index = self._counts[topic]
            message = self._checker.check(channel, time_s, values, f"{self.path}: {topic}, message {index}")
            stamp_ns = round(message["time_s"] * 1e9)
            data = encode_message(channel, message)
            self._writer.add_message(self._channel_ids[topic], stamp_ns, data, stamp_ns, index)
            self._stream.flush()  # a finished chunk leaves the process at once, so that a crash cannot take it along
            self._counts[topic] += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
            if stream is None:
                return
            with stream:
                self._writer.add_metadata(_END, {"reason": "closed" if kind is None else f"{kind.__name__}: {error}"})
                self._writer.finish()
            if kind is None:
                publish_file(self.partial_path, self.path)

    def _register_channels(self) -> dict[str, int]:
        ids, schemas = {}, {}
        for topic, channel in CHANNELS.items():
            if channel.schema not in schemas:
                schema = self._writer.register_schema(channel.schema, "jsonschema", json_schema(channel))
                schemas[channel.schema] = schema
            notes = {name: f"unit: {f.unit}; frame: {f.frame or 'none'}" for name, f in channel.fields.items()}
            ids[topic] = self._writer.register_channel(topic, "json", schemas[channel.schema], notes)
        return ids


class EpisodeReader:
    """Reads one episode, complete or interrupted.

    Attributes:
        metadata: what was known before the first message.
        truncation: None for a complete episode; otherwise one sentence that says why it ends early.

    Args:
        path: a `.mcap` file, or the `.mcap.partial` that an interrupted recording left behind.

    Raises:
        DataError: a file that is missing, damaged, no episode, or of another schema version; or one that is cut off
            although its name says that it was completed.
    """

    metadata: EpisodeMetadata
    truncation: str | None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        found: dict[str, dict[str, str]] = {}
        self.truncation = "the file ends before the recording was closed"
        for record in self._records():
            if isinstance(record, Metadata):
                found[record.name] = record.metadata
            elif isinstance(record, Footer):
                reason = found.get(_END, {}).get("reason", "unknown")
                self.truncation = None if reason == "closed" else f"the recording was interrupted by {reason}"
        self.metadata = _parse_metadata(found.get(_METADATA), self.path)
        if self.truncation and not self.path.name.endswith(PARTIAL_SUFFIX):
            fix = "copy it again; a recording that was interrupted has a name ending in .partial"
            raise DataError("the episode is cut off", where=self.path, found=self.truncation, fix=fix)

    def read(self, *topics: str) -> dict[str, Series]:
        """The messages of some topics (default: all), in one pass over the file.

        Args:
            topics: keys of `CHANNELS`. Images stay compressed.

        Returns:
            topic -> `Series`, which is empty where nothing was recorded.

        Raises:
            DataError: an unknown topic, asked for or in the file, or a message that `MessageChecker` refuses; it names
                the topic and the index. Messages of other topics are not looked at.
        """
        names = topics or tuple(CHANNELS)
        rows: dict[str, list[dict[str, Any]]] = {topic: [] for topic in names}
        for topic, message in self.messages(*names):
            rows[topic].append(message)
        return {topic: _series(find_channel(topic, self.path), rows[topic]) for topic in names}

    def messages(self, *topics: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The messages of some topics, in the order of recording; one at a time, so that images need no memory.

        Args:
            topics: keys of `CHANNELS`.

        Returns:
            Iterator of (topic, {"time_s": ..., field: value}).

        Raises:
            DataError: as `read`, an unknown topic at once and the others where they are met.
        """
        return self._checked_messages({topic: find_channel(topic, self.path) for topic in topics})

    def pick(self, topic: str, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Some messages of one topic, in order; chunks that hold none of them stay packed, the end stays unread.

        Args:
            topic: a key of `CHANNELS`.
            indices: positions among the messages of the topic, strictly increasing.

        Returns:
            Iterator of {"time_s": ..., field: value}, one for each index.

        Raises:
            DataError: an unknown topic or indices that do not increase, at once; a message that `MessageChecker`
                refuses, or too few of them, where that is met.
        """
        channel, wanted = find_channel(topic, self.path), [int(index) for index in indices]
        if any(following <= index for index, following in pairwise([-1, *wanted])):
            where, expected = f"{self.path}: {topic}", "indices that increase, from 0"
            raise DataError("messages cannot be picked in this order", where=where, expected=expected, found=wanted)
        return self._picked_messages(channel, wanted)

    def channel(self, topic: str) -> Series:
        """The messages of one topic; see `read`."""
        return self.read(topic)[topic]

    def _checked_messages(self, channels: dict[str, Channel]) -> Iterator[tuple[str, dict[str, Any]]]:
        checker, counts, known = MessageChecker(), dict.fromkeys(channels, 0), {}
        for record in self._records():
            for topic, data in self._unpacked(record, known):
                if topic in channels:
                    where = f"{self.path}: {topic}, message {counts[topic]}"
                    time_s, values = decode_message(channels[topic], data, where)
                    yield topic, checker.check(channels[topic], time_s, values, where)
                    counts[topic] += 1

    def _picked_messages(self, channel: Channel, wanted: list[int]) -> Iterator[dict[str, Any]]:
        checker, known, position, done = MessageChecker(), {}, 0, 0
        for record, counts in self._counted_records():
            if done == len(wanted):
                return
            count = sum(number for channel_id, number in counts.items() if known.get(channel_id) == channel.topic)
            if counts and counts.keys() <= known.keys() and position + count <= wanted[done]:
                position += count
                continue
            for topic, data in self._unpacked(record, known):
                if topic != channel.topic:
                    continue
                if done < len(wanted) and position == wanted[done]:
                    where = f"{self.path}: {topic}, message {position}"
                    time_s, values = decode_message(channel, data, where)
                    yield checker.check(channel, time_s, values, where)
                    done += 1
                position += 1
        if done < len(wanted):
            where, expected = f"{self.path}: {channel.topic}", f"at least {wanted[-1] + 1} messages"
            raise DataError("the episode holds too few messages", where=where, expected=expected, found=position)

    def _unpacked(self, record: McapRecord, known: dict[int, str]) -> Iterator[tuple[str, bytes]]:
        """(topic, data) of each message in a record, checksums verified; adds channels to `known` (id -> topic)."""
        inner: list[McapRecord] = [record]
        if isinstance(record, Chunk):
            with _damage_named(self.path):
                inner = breakup_chunk(record, validate_crc=True)
        for item in inner:
            if isinstance(item, ChannelRecord):
                known[item.id] = find_channel(item.topic, self.path).topic
            elif isinstance(item, Message):
                if item.channel_id not in known:
                    raise DataError("a message has no channel", where=self.path, found=f"id {item.channel_id}")
                yield known[item.channel_id], item.data

    def _counted_records(self) -> Iterator[tuple[McapRecord, dict[int, int]]]:
        """Each record and, for a chunk, its messages by channel id as its index counts them; {} where that is unsure.

        The index follows the chunk. The last record of a file that is cut off may lack a part of its index.
        """
        last: McapRecord | None = None
        counts: dict[int, int] = {}
        for record in self._records():
            if isinstance(record, MessageIndex):
                counts[record.channel_id] = len(record.records)
                continue
            if last is not None:
                yield last, counts
            last, counts = record, {}
        if last is not None:
            yield last, {}

    def _records(self) -> Iterator[McapRecord]:
        """Records of the file, chunks whole, up to its end or to where it is cut off."""
        with _damage_named(self.path), open(self.path, "rb") as stream:
            exact: Any = _ExactStream(stream)
            reader = StreamReader(exact, emit_chunks=True, record_size_limit=_MAX_RECORD_BYTES)
            try:
                yield from reader.records
            except EndOfFile:
                return  # __init__ reports it: such a file has no footer


class _ExactStream:
    """Reads all bytes asked for or raises EndOfFile; the MCAP library takes fewer for the whole."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise EndOfFile
        return data


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns what the MCAP library raises into a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        fix = f"the recording was interrupted: read {partial}" if partial.exists() else "check the path"
        raise DataError("there is no such episode", where=path, fix=fix) from error
    except _DAMAGE as error:
        found = f"{type(error).__name__}: {error}"
        raise DataError("the episode file is damaged", where=path, found=found, fix="copy it again") from error


def _parse_metadata(stored: dict[str, str] | None, path: Path) -> EpisodeMetadata:
    names = [entry.name for entry in fields(EpisodeMetadata)]
    if stored is None or set(stored) != set(names):
        found = "none" if stored is None else ", ".join(stored)
        raise DataError("the file holds no episode", where=path, expected=f"metadata {', '.join(names)}", found=found)
    try:
        return EpisodeMetadata(**{name: json.loads(text) for name, text in stored.items()})
    except ValueError as error:
        raise DataError("the metadata of an episode cannot be read", where=path, found=str(error)) from error
    except DataError as error:
        where = f"{path}, {error.where}"
        raise DataError(error.what, where=where, expected=error.expected, found=error.found) from error


def _series(channel: Channel, rows: list[dict[str, Any]]) -> Series:
    values: dict[str, Any] = {}
    for name, declared in channel.fields.items():
        column = [row[name] for row in rows]
        if declared.kind in ("text", "jpeg"):
            values[name] = column
        else:
            empty_shape = (0, *(size or 0 for size in declared.shape))
            values[name] = np.stack(column) if column else np.empty(empty_shape, declared.kind)
    return Series(np.array([row["time_s"] for row in rows], np.float64), values)
