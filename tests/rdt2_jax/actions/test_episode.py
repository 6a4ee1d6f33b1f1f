"""An episode comes back as it was recorded, and what cannot be used says where it is."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mcap.reader import make_reader
from mcap.writer import Writer

from rdt2_jax.actions.episode import EpisodeReader, EpisodeWriter
from rdt2_jax.actions.episode_schema import CHANNELS, EpisodeMetadata
from rdt2_jax.errors import DataError, Rdt2Error

METADATA = EpisodeMetadata(
    robot="two_ur5e",
    config_hash="0f3a",
    source="twin",
    fps=30.0,
    start_time="2026-01-31T12:00:00.125+00:00",
    start_time_s=1 / 3,
)
POSE = "/right/measured/pose"
JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256)) + b"\xff\xd9"


def random_value(kind: str, shape: tuple[int | None, ...], is_pose: bool, rng: np.random.Generator) -> Any:
    if kind == "text":
        return f'Pick up the {rng.integers(1000)} apples: \u00e4\u82f9 "quoted"\n'
    if kind == "jpeg":
        return JPEG + rng.bytes(50)
    value = rng.normal(size=[6 if size is None else size for size in shape]).astype(kind)
    if is_pose:
        value[..., 3:] /= np.linalg.norm(value[..., 3:], axis=-1, keepdims=True)
    return value


def random_message(topic: str, rng: np.random.Generator) -> dict[str, Any]:
    fields = CHANNELS[topic].fields.items()
    message = {name: random_value(f.kind, f.shape, f.is_pose, rng) for name, f in fields}
    return message | ({"capture_time_s": rng.uniform()} if "capture_time_s" in message else {})


def pose(x: float = 0.0) -> np.ndarray:
    return np.array([x, 0, 0, 1, 0, 0, 0], np.float64)


def record(path: Path, poses: int = 3) -> Path:
    with EpisodeWriter(path, METADATA) as writer:
        for i in range(poses):
            writer.append(POSE, 0.1 * i, pose_base_tcp=pose(i))
    return path


def write_raw(path: Path, messages: list[tuple[str, Any]], metadata: dict[str, str] | None = None) -> Path:
    """A well-formed MCAP file with messages that our writer would refuse."""
    known = {key: json.dumps(getattr(METADATA, key)) for key in METADATA.__dataclass_fields__}
    with path.open("wb") as stream:
        writer = Writer(stream)
        writer.start()
        writer.add_metadata("rdt2_episode", known | (metadata or {}))
        writer.add_metadata("rdt2_episode_end", {"reason": "closed"})
        ids: dict[str, int] = {}
        for topic, document in messages:
            if topic not in ids:
                ids[topic] = writer.register_channel(topic, "json", 0)
            data = document if isinstance(document, bytes) else json.dumps(document).encode()
            writer.add_message(ids[topic], 0, data, 0)
        writer.finish()
    return path


# --- round trip


def test_every_channel_comes_back_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0, 0.1, size=5)) + 1e5 / 3
    recorded = {topic: [random_message(topic, rng) for _ in times] for topic in CHANNELS}
    with EpisodeWriter(tmp_path / "e.mcap", METADATA) as writer:
        for i, time_s in enumerate(times):
            for topic, messages in recorded.items():
                writer.append(topic, time_s, **messages[i])
        assert not (tmp_path / "e.mcap").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["e.mcap"]

    reader = EpisodeReader(tmp_path / "e.mcap")
    assert reader.metadata == METADATA
    assert reader.truncation is None
    series = reader.read()
    assert list(series) == list(CHANNELS)
    for topic, messages in recorded.items():
        np.testing.assert_array_equal(series[topic].time_s, times, strict=True)
        for name, field in CHANNELS[topic].fields.items():
            column = [message[name] for message in messages]
            if field.kind in ("text", "jpeg"):
                assert series[topic].values[name] == column
            else:
                expected = np.stack(column).astype(field.kind)
                np.testing.assert_array_equal(series[topic].values[name], expected, strict=True)


def test_awkward_floats_survive(tmp_path: Path) -> None:
    values = [5e-324, -0.0, 0.1, 1 / 3, 1.7976931348623157e308, 2.0**-1074]
    with EpisodeWriter(tmp_path / "e.mcap", METADATA) as writer:
        writer.append("/left/measured/joints", 0.1 + 0.2, joint_positions_rad=values)
        writer.append("/left/measured/joints", 0.1 + 0.2, joint_positions_rad=np.zeros(6))
    joints = EpisodeReader(tmp_path / "e.mcap").channel("/left/measured/joints")
    assert joints.values["joint_positions_rad"][0].tobytes() == np.array(values).tobytes()
    assert joints.time_s[0] == 0.1 + 0.2


def test_what_was_not_recorded_is_empty_with_its_shape(tmp_path: Path) -> None:
    series = EpisodeReader(record(tmp_path / "e.mcap")).read()
    assert series["/policy/chunk"].values["actions"].shape == (0, 24, 20)
    assert series["/policy/chunk"].values["actions"].dtype == np.float32
    assert series["/events"].values["text"] == []
    assert series["/right/measured/gripper"].time_s.shape == (0,)
    assert EpisodeReader(record(tmp_path / "none.mcap", poses=0)).channel(POSE).time_s.shape == (0,)


def test_other_mcap_readers_find_schemas_and_images(tmp_path: Path) -> None:
    with EpisodeWriter(tmp_path / "e.mcap", METADATA) as writer:
        writer.append("/left_wrist/image", 2.5, jpeg=JPEG, capture_time_s=2.25)
        writer.append(POSE, 2.0, pose_base_tcp=pose())
    with (tmp_path / "e.mcap").open("rb") as stream:
        found = {channel.topic: (schema, channel, m) for schema, channel, m in make_reader(stream).iter_messages()}
    schema, channel, message = found["/left_wrist/image"]
    assert schema is not None
    assert (schema.name, schema.encoding, channel.message_encoding) == (
        "foxglove.CompressedImage",
        "jsonschema",
        "json",
    )
    document = json.loads(message.data)
    assert document["timestamp"] == {"sec": 2, "nsec": 250_000_000}
    assert (document["format"], document["frame_id"]) == ("jpeg", "left_wrist")
    assert base64.b64decode(document["data"]) == JPEG
    assert message.log_time == 2_500_000_000
    schema, channel, message = found[POSE]
    assert schema is not None
    declared = json.loads(schema.data)
    assert declared["properties"]["pose_base_tcp"] | {"items": None} == {
        "type": "array",
        "items": None,
        "minItems": 7,
        "maxItems": 7,
    }
    assert set(declared["required"]) == set(json.loads(message.data))
    assert "frame: right base" in channel.metadata["pose_base_tcp"]


def test_threads_may_record_at_the_same_time(tmp_path: Path) -> None:
    with EpisodeWriter(tmp_path / "e.mcap", METADATA) as writer:

        def run(topic: str) -> None:
            for i in range(200):
                writer.append(topic, 0.01 * i, width_m=0.001 * i)

        threads = [threading.Thread(target=run, args=(f"/{arm}/measured/gripper",)) for arm in ("right", "left")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    series = EpisodeReader(tmp_path / "e.mcap").read()
    for arm in ("right", "left"):
        np.testing.assert_array_equal(series[f"/{arm}/measured/gripper"].values["width_m"], 0.001 * np.arange(200))


# --- interruption


CRASH = """
import os, sys
sys.path.insert(0, sys.argv[2])
from test_episode import EpisodeWriter, METADATA, JPEG
writer = EpisodeWriter(sys.argv[1], METADATA).__enter__()
for i in range(30):
    writer.append("/left_wrist/image", 0.1 * i, jpeg=JPEG + os.urandom(30_000), capture_time_s=0.1 * i)
os._exit(9)
"""


def test_a_crash_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "e.mcap"
    crashed = subprocess.run([sys.executable, "-c", CRASH, path, Path(__file__).parent], check=False)
    assert crashed.returncode == 9
    assert [entry.name for entry in tmp_path.iterdir()] == ["e.mcap.partial"]

    reader = EpisodeReader(tmp_path / "e.mcap.partial")
    assert reader.metadata == METADATA
    assert reader.truncation == "the file ends before the recording was closed"
    images = reader.channel("/left_wrist/image")
    assert len(images.time_s) >= 27, "at most one chunk may be lost"
    np.testing.assert_array_equal(images.time_s, 0.1 * np.arange(len(images.time_s)))

    with pytest.raises(DataError, match=r"no such episode(.|\n)*e\.mcap\.partial"):
        EpisodeReader(path)
    with pytest.raises(DataError, match="interrupted recording has this name"), EpisodeWriter(path, METADATA):
        pytest.fail("the block must not run")
    assert EpisodeReader(tmp_path / "e.mcap.partial").channel("/left_wrist/image").time_s.size


def test_an_exception_keeps_everything_recorded_and_its_reason(tmp_path: Path) -> None:
    def run() -> None:
        with EpisodeWriter(tmp_path / "e.mcap", METADATA) as writer:
            writer.append(POSE, 1.0, pose_base_tcp=pose())
            raise RuntimeError("protective stop")

    with pytest.raises(RuntimeError, match="protective stop"):
        run()
    assert [entry.name for entry in tmp_path.iterdir()] == ["e.mcap.partial"]
    reader = EpisodeReader(tmp_path / "e.mcap.partial")
    assert reader.truncation == "the recording was interrupted by RuntimeError: protective stop"
    np.testing.assert_array_equal(reader.channel(POSE).time_s, [1.0])


def test_every_truncation_is_read_or_refused(tmp_path: Path) -> None:
    whole = record(tmp_path / "e.mcap", poses=40).read_bytes()
    partial, final = tmp_path / "cut.mcap.partial", tmp_path / "cut.mcap"
    counts = []
    for length in range(0, len(whole), 97):
        partial.write_bytes(whole[:length])
        final.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut off|holds no episode"):
            EpisodeReader(final)
        try:
            reader = EpisodeReader(partial)
        except DataError as error:
            counts.append(-1)
            message = str(error)
            continue
        assert reader.truncation is not None
        counts.append(len(reader.channel(POSE).time_s))
    assert "holds no episode" in message
    assert counts == sorted(counts)
    assert set(counts) == {-1, 0, 40}


def test_a_flipped_byte_in_the_data_is_noticed(tmp_path: Path) -> None:
    path = record(tmp_path / "e.mcap", poses=40)
    whole = bytearray(path.read_bytes())
    frame = whole.index(b"\x28\xb5\x2f\xfd")  # start of the compressed messages
    for position in range(frame, frame + 200, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            EpisodeReader(path).read()


# --- what is refused


@pytest.mark.parametrize(
    ("topic", "time_s", "values", "message"),
    [
        ("/right/pose", 1.0, {"pose_base_tcp": pose()}, r"unknown topic(.|\n)*/right/measured/pose(.|\n)*/right/pose"),
        (POSE, 1.0, {}, r"wrong fields(.|\n)*pose, message 1(.|\n)*pose_base_tcp"),
        (POSE, 1.0, {"pose_base_tcp": pose(), "x": 1}, "wrong fields"),
        (POSE, 1.0, {"pose_base_tcp": pose()[:6]}, r"pose, message 1, pose_base_tcp(.|\n)*\(7,\)(.|\n)*\(6,\)"),
        (POSE, 1.0, {"pose_base_tcp": pose()[None]}, "wrong type or shape"),
        (POSE, 1.0, {"pose_base_tcp": ["0"] * 7}, "wrong type or shape"),
        (POSE, 1.0, {"pose_base_tcp": [True] * 7}, "wrong type or shape"),
        (POSE, 1.0, {"pose_base_tcp": [[0], [1, 2]]}, "no array"),
        (POSE, 1.0, {"pose_base_tcp": pose(np.nan)}, r"not finite(.|\n)*nan at index \[0\]"),
        (POSE, 1.0, {"pose_base_tcp": pose(np.inf)}, "not finite"),
        (POSE, 1.0, {"pose_base_tcp": pose() * 1.01}, r"unit quaternion(.|\n)*1.01"),
        (POSE, 0.4, {"pose_base_tcp": pose()}, r"time goes backwards(.|\n)*message 1(.|\n)*0.5 s(.|\n)*0.4 s"),
        (POSE, np.nan, {"pose_base_tcp": pose()}, "time is not in seconds"),
        (POSE, -1.0, {"pose_base_tcp": pose()}, "time is not in seconds"),
        (POSE, 1.7e18, {"pose_base_tcp": pose()}, "time is not in seconds"),
        (POSE, "1", {"pose_base_tcp": pose()}, "time is not in seconds"),
        (
            "/right/measured/joints",
            1.0,
            {"joint_positions_rad": np.zeros(7)},
            r"shape changed(.|\n)*\(6,\)(.|\n)*\(7,\)",
        ),
        ("/left_wrist/image", 1.0, {"jpeg": b"\x89PNG", "capture_time_s": 1.0}, "bytes of a JPEG"),
        ("/left_wrist/image", 1.0, {"jpeg": "text", "capture_time_s": 1.0}, "bytes of a JPEG"),
        ("/left_wrist/image", 1.0, {"jpeg": JPEG, "capture_time_s": -0.1}, "capture time is not in seconds"),
        ("/instruction", 1.0, {"instruction": b"bytes"}, "must be text"),
    ],
)
def test_bad_messages_are_refused_and_not_written(
    tmp_path: Path, topic: str, time_s: Any, values: dict[str, Any], message: str
) -> None:
    with EpisodeWriter(tmp_path / "e.mcap", METADATA) as writer:
        writer.append(POSE, 0.5, pose_base_tcp=pose())
        writer.append("/right/measured/joints", 0.5, joint_positions_rad=np.zeros(6))
        with pytest.raises(DataError, match=message):
            writer.append(topic, time_s, **values)
        writer.append(POSE, 0.5, pose_base_tcp=pose(2))
    series = EpisodeReader(tmp_path / "e.mcap").read()
    assert sum(len(entry.time_s) for entry in series.values()) == 3


def test_float32_channels_refuse_what_they_would_round(tmp_path: Path) -> None:
    chunk = random_message("/policy/chunk", np.random.default_rng(0))
    with EpisodeWriter(tmp_path / "e.mcap", METADATA) as writer:
        writer.append("/policy/chunk", 0.0, **chunk | {"actions": chunk["actions"].astype(np.float64)})
        for value in (0.1, 1e39):
            with pytest.raises(DataError, match="does not fit into float32"):
                writer.append("/policy/chunk", 0.0, **chunk | {"actions": np.full((24, 20), value)})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([("/surprise", {"time_s": 0})], r"unknown topic(.|\n)*'/surprise'"),
        ([(POSE, {"time_s": 0, "pose_base_tcp": [1, 2]})], r"wrong type or shape(.|\n)*pose, message 0"),
        (
            [(POSE, {"time_s": t, "pose_base_tcp": pose().tolist()}) for t in (0.0, 0.2, 0.1)],
            r"time goes backwards(.|\n)*pose, message 2",
        ),
        (
            [(POSE, {"time_s": i, "pose_base_tcp": pose(x).tolist()}) for i, x in enumerate((0, np.nan))],
            r"not finite(.|\n)*pose, message 1",
        ),
        ([(POSE, {"pose_base_tcp": pose().tolist()})], r"cannot be decoded(.|\n)*time_s"),
        ([(POSE, [1, 2])], "cannot be decoded"),
        ([(POSE, b"{")], "cannot be decoded"),
        ([(POSE, b"[" * 100_000)], "cannot be decoded"),
        ([("/left_wrist/image", {"time_s": 0, "format": "png"})], "no JPEG"),
        (
            [("/left_wrist/image", {"time_s": 0, "format": "jpeg", "data": "!", "timestamp": 0, "frame_id": ""})],
            "cannot be decoded",
        ),
    ],
)
def test_bad_files_name_topic_and_index(tmp_path: Path, messages: list[tuple[str, Any]], message: str) -> None:
    reader = EpisodeReader(write_raw(tmp_path / "e.mcap", messages))
    with pytest.raises(DataError, match=message) as error:
        reader.read()
    assert "e.mcap" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": "2"}, r"e.mcap, schema_version(.|\n)*expected: 1(.|\n)*found: 2"),
        ({"fps": "0"}, "a rate in Hz"),
        ({"source": '"me"'}, "executor or twin or teleoperation"),
        ({"start_time": '"2026-01-31T12:00:00"'}, "start_time"),
        ({"start_time_s": "NaN"}, "start_time_s"),
        ({"robot": '" "'}, "robot"),
        ({"robot": "{"}, "metadata of an episode cannot be read"),
        ({"surprise": "1"}, r"holds no episode(.|\n)*surprise"),
    ],
)
def test_bad_metadata_is_named(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        EpisodeReader(write_raw(tmp_path / "e.mcap", [], changes))


def test_files_that_are_no_episodes(tmp_path: Path) -> None:
    (tmp_path / "e.mcap").write_bytes(b"not an mcap file")
    with pytest.raises(DataError, match=r"damaged(.|\n)*magic"):
        EpisodeReader(tmp_path / "e.mcap")
    with pytest.raises(DataError, match="no such episode"):
        EpisodeReader(tmp_path / "none.mcap")


def test_the_writer_takes_only_new_mcap_names(tmp_path: Path) -> None:
    record(tmp_path / "e.mcap")
    for path in (tmp_path / "e.mcap", tmp_path / "e.bag", tmp_path / "missing" / "e.mcap"):
        with pytest.raises(Rdt2Error, match=r"new name ending in \.mcap"), EpisodeWriter(path, METADATA):
            pytest.fail("the block must not run")
    assert EpisodeReader(tmp_path / "e.mcap").channel(POSE).time_s.size == 3


def test_a_closed_writer_refuses_messages(tmp_path: Path) -> None:
    writer = EpisodeWriter(tmp_path / "e.mcap", METADATA)
    with pytest.raises(DataError, match="not open"):
        writer.append(POSE, 0.0, pose_base_tcp=pose())
    with writer:
        pass
    with pytest.raises(DataError, match="not open"):
        writer.append(POSE, 0.0, pose_base_tcp=pose())


def test_asking_for_an_unknown_topic_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown topic(.|\n)*/policy/chunk"):
        EpisodeReader(record(tmp_path / "e.mcap")).channel("/policy")


def test_neither_jax_nor_hardware_is_imported() -> None:
    code = (
        "import sys, rdt2_jax.actions.episode; "
        "sys.exit(any(name in sys.modules for name in ('jax', 'mujoco', 'rdt2_hardware')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
