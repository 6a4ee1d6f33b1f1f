"""Messages of an episode file one at a time: all of some topics, or chosen ones of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdt2_jax.actions import episode
from rdt2_jax.actions.episode import EpisodeReader, EpisodeWriter
from rdt2_jax.actions.episode_schema import EpisodeMetadata
from rdt2_jax.errors import DataError

METADATA = EpisodeMetadata(
    robot="two_ur5e",
    config_hash="0f3a",
    source="twin",
    fps=30.0,
    start_time="2026-01-31T12:00:00.125+00:00",
    start_time_s=0.0,
)
POSE, IMAGE, OTHER = "/right/measured/pose", "/right_wrist/image", "/left_wrist/image"
IMAGES = 40


def jpeg(index: int) -> bytes:
    """No image, and large enough for a chunk of the file to hold three or four."""
    return b"\xff\xd8\xff\xe0" + np.random.default_rng(index).bytes(12_000)


def record(path: Path, stop: int | None = None) -> Path:
    """Poses from the first message on, images of one camera later than those of the other."""
    with EpisodeWriter(path, METADATA) as writer:
        for index in range(IMAGES):
            if index == stop:
                raise KeyboardInterrupt
            writer.append(POSE, 0.1 * index, pose_base_tcp=np.array([index, 0, 0, 1, 0, 0, 0], float))
            for topic, first in ((IMAGE, 0), (OTHER, 15)):
                if index >= first:
                    writer.append(topic, 0.1 * index, jpeg=jpeg(index - first), capture_time_s=0.1 * index)
    return path


def picked(reader: EpisodeReader, topic: str, indices: Any) -> list[bytes]:
    return [message["jpeg"] for message in reader.pick(topic, indices)]


def test_messages_come_in_the_order_of_recording(tmp_path: Path) -> None:
    reader = EpisodeReader(record(tmp_path / "e.mcap"))
    streamed = list(reader.messages(OTHER, POSE))
    assert [topic for topic, _ in streamed] == [POSE] * 15 + [POSE, OTHER] * 25
    assert [message["time_s"] for _, message in streamed] == sorted(message["time_s"] for _, message in streamed)
    assert [message["jpeg"] for topic, message in streamed if topic == OTHER] == reader.channel(OTHER).values["jpeg"]
    with pytest.raises(DataError, match="unknown topic"):
        reader.messages("/nothing")


def test_any_choice_of_messages_is_that_of_the_whole_topic(tmp_path: Path) -> None:
    reader = EpisodeReader(record(tmp_path / "e.mcap"))
    rng = np.random.default_rng(0)
    for topic, count in ((IMAGE, IMAGES), (OTHER, IMAGES - 15)):
        for size in (0, 1, 2, 7, count):
            indices = np.sort(rng.choice(count, size, replace=False))
            assert picked(reader, topic, indices) == [jpeg(index) for index in indices]
    with pytest.raises(DataError, match="at least 41 messages"):
        picked(reader, IMAGE, [3, 40])
    for indices in ([3, 3], [4, 2], [-1]):
        with pytest.raises(DataError, match="indices that increase"):
            reader.pick(IMAGE, indices)


def test_chunks_without_a_chosen_message_stay_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = EpisodeReader(record(tmp_path / "e.mcap"))
    unpacked = []
    whole = episode.breakup_chunk
    monkeypatch.setattr(episode, "breakup_chunk", lambda *a, **k: unpacked.append(1) or whole(*a, **k))
    list(reader.messages(IMAGE))
    everything = len(unpacked)
    assert everything > 10
    for topic, index in ((IMAGE, 20), (IMAGE, IMAGES - 1), (OTHER, 2)):
        unpacked.clear()
        assert picked(reader, topic, [index]) == [jpeg(index)]
        assert len(unpacked) <= 2  # the first chunk, which declares the topics, and its own
    unpacked.clear()
    assert picked(reader, IMAGE, [0, 1]) == [jpeg(0), jpeg(1)]
    assert len(unpacked) <= 2


def test_messages_of_a_file_cut_off_anywhere_are_picked_as_far_as_it_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "e.mcap", stop=20)
    content = (tmp_path / "e.mcap.partial").read_bytes()
    for size in np.linspace(20_000, len(content), 60, dtype=int):
        path = tmp_path / "cut.mcap.partial"
        path.write_bytes(content[:size])
        reader = EpisodeReader(path)
        images = reader.channel(IMAGE).values["jpeg"]
        for indices in (range(len(images)), range(max(0, len(images) - 1), len(images))):
            assert picked(reader, IMAGE, indices) == [images[index] for index in indices]


def test_a_damaged_message_is_named_and_those_before_it_are_read(tmp_path: Path) -> None:
    path = record(tmp_path / "e.mcap")
    content = path.read_bytes()
    position = len(content) // 2
    path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    reader, found = EpisodeReader(path), []
    with pytest.raises(DataError, match="damaged"):
        found.extend(message["jpeg"] for message in reader.pick(IMAGE, range(IMAGES)))
    assert found == [jpeg(index) for index in range(len(found))]
    assert len(found) > 5
