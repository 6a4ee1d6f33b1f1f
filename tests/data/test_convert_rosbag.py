"""Bags of ROS 1 and ROS 2 are read back exactly whatever types their topics have, and damage to them is named."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rdt2_data.converters.mappings import RosbagMapping
from rdt2_data.converters.options import Latencies
from rdt2_data.converters.recording import Recording
from rdt2_data.converters.rosbag import RosbagReader
from rdt2_data.problems import SampleError
from recorded_bags import (
    IMAGE_NS,
    IMAGES,
    KINDS,
    MAPPING,
    POSE_NS,
    POSES,
    RECORDED_LATER_NS,
    START_NS,
    WIDTH_NS,
    WIDTHS,
    Messages,
    number_of,
    write_bag,
)
from recorded_motion import coded_image, coded_number, good_images, matrices, motion
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import CompressionFormat, CompressionMode

from rdt2_jax.actions.chunks import PolicyFrames
from rdt2_jax.config import load_config
from rdt2_jax.errors import ConfigError, DataError


def reader_of(source: Path, mapping: str = MAPPING, latencies: Latencies | None = None) -> RosbagReader:
    path = source.parent / "mapping.yaml"
    path.write_text(mapping)
    return RosbagReader(source, path, latencies or Latencies())


def load_only(source: Path, mapping: str = MAPPING) -> Recording:
    reader = reader_of(source, mapping)
    (episode,) = reader.episodes()
    return reader.load(episode)


def read_everything(source: Path, mapping: str) -> None:
    for camera in load_only(source, mapping).cameras.values():
        list(good_images(camera.frames, range(IMAGES)))


def refused(source: Path, mapping: str = MAPPING) -> SampleError:
    """The SampleError that loading the only bag and reading all its images meets."""
    with pytest.raises(SampleError) as caught:
        read_everything(source, mapping)
    return caught.value


def seconds(stamp_ns: np.ndarray) -> np.ndarray:
    """Stamps relative to the bag's first message."""
    return (stamp_ns - (START_NS + RECORDED_LATER_NS)) / 1e9


# -------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("left_pose", "encoding"),
    [("geometry_msgs/msg/TransformStamped", "jpeg"), ("nav_msgs/msg/Odometry", "bgr8")],
)
def test_every_kind_of_bag_comes_back_exactly(tmp_path, kind, left_pose, encoding):
    make = Messages(kind, left_pose, encoding)
    (tmp_path / "bags").mkdir()
    paths = [write_bag(tmp_path / "bags" / f"bag_{index}", make, seed=10 * index) for index in (1, 0, 2)]
    reader = pickle.loads(pickle.dumps(reader_of(tmp_path / "bags")))
    episodes = reader.episodes()
    assert [episode.name for episode in episodes] == sorted(path.name for path in paths)
    for index, episode in enumerate(episodes):
        recording = pickle.loads(pickle.dumps(reader.load(episode)))
        for arm_index, arm in enumerate(("right", "left")):
            position_m, quaternion, _ = motion(POSES, 10 * index + arm_index)
            widths = motion(WIDTHS, 10 * index + arm_index)[2]
            np.testing.assert_allclose(
                recording.poses[arm].pose_world_policy, matrices(position_m, quaternion), atol=1e-12
            )
            stamps = START_NS + np.arange(POSES) * POSE_NS + arm_index
            np.testing.assert_array_equal(recording.poses[arm].time_s, seconds(stamps))
            expected = widths * 0.5 + 0.001 if arm == "right" else widths * 0.88
            np.testing.assert_allclose(recording.widths[arm].width, expected, atol=1e-15)
            # A Float64 has no header: the time of recording counts.
            stamps = START_NS + np.arange(WIDTHS) * WIDTH_NS + (RECORDED_LATER_NS if arm == "left" else 0)
            np.testing.assert_array_equal(recording.widths[arm].time_s, seconds(stamps))
            camera = recording.cameras[f"{arm}_wrist"]
            stamps = START_NS + np.arange(IMAGES) * IMAGE_NS + 7 * arm_index
            np.testing.assert_array_equal(camera.time_s, seconds(stamps))
            choices = (list(range(IMAGES)), [3], [0, 5, IMAGES - 1], [7, 8])
            for rows in choices if index == 0 else choices[2:3]:
                found = [coded_number(image) for image in camera.frames.read(rows)]
                assert found == [number_of(arm, row) for row in rows]
        assert recording.instructions == [(recording.cameras["right_wrist"].time_s[0], "Pick up the apple.")]


def test_latencies_stamps_and_spoken_instructions(tmp_path):
    source = write_bag(tmp_path / "one", Messages("mcap", encoding="png"))
    mapping = MAPPING.replace("instruction: Pick up the apple.", "instruction: /say\nstamps: bag")
    mapping = mapping.replace("{topic: /right/pose}", "{topic: /right/pose, stamps: header}")
    reader = reader_of(source, mapping, Latencies(camera_s=0.07, pose_s=0.01, gripper_s=0.02))
    recording = reader.load(reader.episodes()[0])
    stamps = START_NS + np.arange(POSES) * POSE_NS
    np.testing.assert_array_equal(recording.poses["right"].time_s, seconds(stamps) - 0.01)
    np.testing.assert_array_equal(recording.poses["left"].time_s, seconds(stamps + 1 + RECORDED_LATER_NS) - 0.01)
    stamps = START_NS + np.arange(WIDTHS) * WIDTH_NS + RECORDED_LATER_NS
    np.testing.assert_array_equal(recording.widths["right"].time_s, seconds(stamps) - 0.02)
    stamps = START_NS + np.arange(IMAGES) * IMAGE_NS + RECORDED_LATER_NS
    np.testing.assert_array_equal(recording.cameras["right_wrist"].time_s, seconds(stamps) - 0.07)
    assert recording.instructions == [(0.0, "Pick up the cup."), (0.2, "Put down the cup.")]
    images = list(recording.cameras["left_wrist"].frames.read([4]))
    np.testing.assert_array_equal(images[0], coded_image(number_of("left", 4)))


def test_poses_of_a_tcp_and_grippers_without_widths(tmp_path):
    source = write_bag(tmp_path / "one", Messages("sqlite3"))
    mapping = MAPPING.replace("frame: policy", "frame: tcp\nrobot: ur5e")
    mapping = mapping.replace("{topic: /left/width, unit: real_m}", "{topic: null}")
    recording = load_only(source, mapping)
    position_m, quaternion, _ = motion(POSES, 1)
    expected = matrices(position_m, quaternion) @ PolicyFrames.published("ur5e").pose_tcp_policy("left")
    np.testing.assert_allclose(recording.poses["left"].pose_world_policy, expected, atol=1e-12)
    assert not recording.widths["left"].valid.any()
    assert recording.widths["right"].valid.all()


@pytest.mark.parametrize("encoding", ["rgb8", "mono8"])
def test_raw_images_of_other_encodings(tmp_path, encoding):
    recording = load_only(write_bag(tmp_path / "one", Messages("ros1", encoding=encoding)))
    for row, image in enumerate(recording.cameras["right_wrist"].frames.read(range(IMAGES))):
        expected = coded_image(number_of("right", row))
        expected = np.repeat(expected[:, :, :1], 3, axis=2) if encoding == "mono8" else expected
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(
    ("kind", "compression"),
    [
        ("ros1", (Writer1.CompressionFormat.BZ2,)),
        ("ros1", (Writer1.CompressionFormat.LZ4,)),
        ("sqlite3", (CompressionMode.FILE, CompressionFormat.ZSTD)),
        ("sqlite3", (CompressionMode.MESSAGE, CompressionFormat.ZSTD)),
        ("mcap", (CompressionMode.STORAGE, CompressionFormat.ZSTD)),
    ],
)
def test_compressed_bags_are_read_like_others(tmp_path, kind, compression):
    plain = load_only(write_bag(tmp_path / "plain", Messages(kind)))
    packed = load_only(write_bag(tmp_path / "packed", Messages(kind), compression=compression))
    for arm in ("right", "left"):
        np.testing.assert_array_equal(packed.poses[arm].pose_world_policy, plain.poses[arm].pose_world_policy)
    images = packed.cameras["left_wrist"].frames.read(range(IMAGES))
    assert [coded_number(image) for image in images] == [number_of("left", row) for row in range(IMAGES)]


def test_a_single_storage_file_is_a_bag_whose_fingerprint_follows_the_file(tmp_path):
    (path,) = write_bag(tmp_path / "one", Messages("mcap")).glob("*.mcap")
    reader = reader_of(path)
    assert len(reader.load(reader.episodes()[0]).poses["left"].time_s) == POSES
    first = reader.fingerprint()
    assert reader_of(path).fingerprint() == first
    other = reader_of(path, MAPPING + "stamps: bag\n", Latencies(camera_s=0.1))
    assert other.fingerprint() == first
    assert (other.settings()["mapping"]["stamps"], other.settings()["latencies"]["camera_s"]) == ("bag", 0.1)
    path.write_bytes(path.read_bytes() + b" ")
    assert reader_of(path).fingerprint() != first


def test_the_example_mapping_fits_its_model():
    assert load_config(RosbagMapping, "data/rosbag_example.yaml").stamps == "header"


# ------------------------------------------------------------------------------------------------------ bad data


@pytest.mark.parametrize("kind", KINDS)
def test_stamps_that_do_not_increase_are_refused_with_their_topic(tmp_path, kind):
    def repeat(topic: str, row: int, stamp_ns: int) -> int:
        return stamp_ns - POSE_NS if topic == "/left/pose" and row == 9 else stamp_ns

    error = refused(write_bag(tmp_path / "one", Messages(kind), change=repeat))
    assert error.reason == "bad-time"
    assert "topic /left/pose" in str(error)
    assert "row 9" in str(error)


def test_stamps_that_were_never_set_are_refused_with_what_to_write(tmp_path):
    source = write_bag(tmp_path / "one", Messages("mcap"), change=lambda topic, row, ns: 0 if "image" in topic else ns)
    error = refused(source)
    assert error.reason == "bad-time"
    assert "stamps: bag" in str(error)
    assert load_only(source, MAPPING.replace("/image}", "/image, stamps: bag}")).name == "one"


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("/left/pose", "/left/psoe", ["no such topic", "/left/psoe", "/left/pose (geometry_msgs/msg/Transform"]),
        ("/left/pose", "/left/width", ["another type", "PoseStamped", "std_msgs/msg/Float64"]),
        ("joint: gripper", "joint: griper", ["/right/joints", "joint 'griper'"]),
        ("joint: gripper, ", "", ["/right/joints", "elbow", "name the gripper's 'joint'"]),
    ],
)  # fmt: skip
def test_a_mapping_that_does_not_fit_is_told_what_is_there(tmp_path, old, new, messages):
    first_elbow = lambda topic, row, ns: None if topic == "/right/joints" and row == 0 else ns  # noqa: E731
    source = write_bag(tmp_path / "one", Messages("mcap"), change=first_elbow)
    assert old in MAPPING
    error = refused(source, MAPPING.replace(old, new))
    assert error.reason == "bad-recording"
    assert [message for message in messages if message not in str(error)] == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("joint: gripper", "jont: gripper", "did you mean 'joint'"),
        (", unit: real_m", "", "must say policy or real_m"),
        ("Pick up the apple.", "say", "a sentence"),
        ("frame: policy", "frame: camera", "'policy' or 'tcp'"),
        ("/left/pose", "/right/pose", "'pose' of right and left come from the same place"),
        ("/left/image", "/right/image", "'cameras' of right and left"),
        ("topic: /left/width", "topic: /right/joints, joint: gripper", "'width' of right and left"),
    ],
)
def test_a_mapping_with_mistakes_is_refused(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        reader_of(tmp_path / "one", MAPPING.replace(old, new))


def test_images_that_cannot_be_read_are_named(tmp_path):
    error = refused(write_bag(tmp_path / "one", Messages("mcap", encoding="16UC1")))
    assert error.reason == "wrong-image"
    assert "16UC1" in str(error)
    make = Messages("mcap")
    whole = make.image

    def cut_short(stamp_ns: int, image: np.ndarray) -> Any:
        message = whole(stamp_ns, image)
        if coded_number(image) == number_of("left", 3):
            message.data = message.data[:200]
        return message

    make.image = cut_short
    found = list(load_only(write_bag(tmp_path / "two", make)).cameras["left_wrist"].frames.read([2, 3, 4]))
    assert [coded_number(found[0]), coded_number(found[2])] == [number_of("left", 2), number_of("left", 4)]
    assert isinstance(found[1], SampleError)
    assert found[1].reason == "corrupt-jpeg"
    assert "topic /left/image, image 3" in str(found[1])


def test_a_world_that_changes_within_a_bag_is_refused(tmp_path):
    make, whole = Messages("mcap"), Messages.pose
    make.pose = lambda kind, ns, n, frame: whole(make, kind, ns, n, "map" if ns > START_NS + 10**8 else frame)
    error = refused(write_bag(tmp_path / "one", make))
    assert "more than one frame" in str(error)
    assert "map" in str(error)


def test_a_bag_that_changes_between_its_stamps_and_its_images_is_noticed(tmp_path):
    source = write_bag(tmp_path / "one", Messages("ros1"))
    frames = load_only(source).cameras["left_wrist"].frames
    source.unlink()
    write_bag(tmp_path / "one", Messages("ros1"), change=lambda topic, row, ns: ns + 1 if row == 2 else ns)
    found = list(frames.read([1, 2, 3]))
    assert [coded_number(found[0]), coded_number(found[2])] == [number_of("left", 1), number_of("left", 3)]
    assert "not what it was" in str(found[1])
    source.unlink()
    write_bag(tmp_path / "one", Messages("ros1"), change=lambda topic, row, ns: None if row in (2, 3) else ns)
    assert len(list(good_images(frames, [0, 1]))) == 2
    with pytest.raises(SampleError, match="fewer images"):
        list(frames.read([0, IMAGES - 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_bags_of_every_kind_may_be_damaged_and_are_named(tmp_path, kind):
    source = write_bag(tmp_path / "one", Messages(kind))
    path = source if kind == "ros1" else next(source.glob(f"*.{'db3' if kind == 'sqlite3' else 'mcap'}"))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for damaged in (b"", content[:1000], content[: len(content) // 2], bytes(len(content)),
                    content[:3000] + rng.bytes(len(content) // 2) + content[3000 + len(content) // 2:]):  # fmt: skip
        path.write_bytes(damaged)
        error = refused(source)
        assert error.reason == "bad-recording"
        assert source.name in str(error)
    path.write_bytes(content)
    assert load_only(source).name == source.name


def test_unfinished_bags_are_episodes_that_say_what_is_wrong(tmp_path):
    folder = tmp_path / "bags"
    folder.mkdir()
    good = write_bag(folder / "a", Messages("sqlite3"))
    write_bag(folder / "b", Messages("mcap")).joinpath("metadata.yaml").unlink()
    write_bag(folder / "c", Messages("ros1")).rename(folder / "c.bag.active")
    (folder / "notes.txt").write_text("not a bag")
    reader = reader_of(folder)
    episodes = reader.episodes()
    assert [episode.name for episode in episodes] == [good.name, "b", "c.bag.active"]
    assert reader.load(episodes[0]).name == "a"
    for episode in episodes[1:]:
        with pytest.raises(SampleError, match="reindex") as caught:
            reader.load(episode)
        assert caught.value.reason == "bad-recording"


def test_bags_are_found_at_any_depth_and_looked_for_once(tmp_path, monkeypatch):
    folder = tmp_path / "bags"
    for name, kind in (("monday/left/a", "mcap"), ("monday/b", "ros1"), ("c", "sqlite3")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bag(folder / name, Messages(kind))
    write_bag(folder / "tuesday", Messages("mcap"))
    single = folder / "tuesday" / "run.mcap"  # files of other names in a folder are bags of their own
    (folder / "tuesday" / "tuesday.mcap").rename(single)
    (folder / "tuesday" / "metadata.yaml").unlink()
    reader = reader_of(folder)
    episodes = reader.episodes()
    assert [episode.name for episode in episodes] == ["c", "monday/b.bag", "monday/left/a", "tuesday/run.mcap"]
    monkeypatch.setattr(Path, "iterdir", lambda path: pytest.fail("looked for again"))
    copy = pickle.loads(pickle.dumps(reader))
    for episode in (episodes[1], episodes[3]):
        assert copy.load(episode).name == episode.name
    assert copy.episodes() == episodes


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_of_a_bag_is_read_than_lies_between_the_images_asked_for(tmp_path, monkeypatch, kind):
    from rosbags.highlevel import AnyReader

    frames = load_only(write_bag(tmp_path / "one", Messages(kind))).cameras["left_wrist"].frames
    whole, read = AnyReader.messages, []

    def counted(*args: Any, **options: Any) -> Any:
        for item in whole(*args, **options):
            read.append(item[1])
            yield item

    monkeypatch.setattr(AnyReader, "messages", counted)
    assert [coded_number(image) for image in frames.read([5, 7])] == [number_of("left", 5), number_of("left", 7)]
    assert len(read) == 3


def test_a_source_without_bags_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"notes\.txt"):
        reader_of(tmp_path / "empty").episodes()
    with pytest.raises(DataError, match="no such bag"):
        reader_of(tmp_path / "absent").episodes()
