"""LeRobot datasets of all published layouts are read back exactly, and damage to them is named."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from lerobot_datasets import (
    CAMERAS,
    FPS,
    LENGTHS,
    MAPPING,
    STARTS,
    TASKS,
    Dataset,
    change_json,
    episode_images,
    image_cell,
    number_of,
    rewrite_table,
    write_dataset,
)
from rdt2_data.converters.lerobot import LeRobotReader
from rdt2_data.converters.options import Latencies
from rdt2_data.problems import SampleError
from recorded_motion import coded_number, encode_video, good_images, matrices

from rdt2_jax.actions.chunks import PolicyFrames
from rdt2_jax.config import load_config
from rdt2_jax.errors import ConfigError, DataError


def read_everything(reader: LeRobotReader, episode: int) -> None:
    for camera in reader.load(reader.episodes()[episode]).cameras.values():
        for image in good_images(camera.frames, range(LENGTHS[episode])):
            coded_number(image)


def refused(dataset: Dataset, episode: int = 0, mapping: str = MAPPING) -> SampleError:
    """The SampleError that loading an episode and reading all its images meets."""
    reader = dataset.reader(mapping)
    with pytest.raises(SampleError) as caught:
        read_everything(reader, episode)
    return caught.value


# -------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    ("version", "images", "codec"),
    [
        ("v2.1", False, "mpeg4"),
        ("v2.1", False, "libx264"),
        ("v2.1", True, ""),
        ("v3.0", False, "libx264"),
        ("v3.0", False, "libsvtav1"),  # what LeRobot records with by default
        ("v3.0", True, ""),
    ],
)
def test_every_layout_comes_back_exactly(tmp_path, version, images, codec):
    dataset = write_dataset(tmp_path, version, images, codec)
    reader = pickle.loads(pickle.dumps(dataset.reader()))
    episodes = reader.episodes()
    assert [episode.name for episode in episodes] == ["episode_000000", "episode_000001", "episode_000002"]
    for number, episode in enumerate(episodes):
        recording = pickle.loads(pickle.dumps(reader.load(episode)))
        state, time_s = dataset.states[number].astype(np.float64), dataset.times[number].astype(np.float64)
        for arm, start in STARTS.items():
            expected = matrices(state[:, start : start + 3], state[:, start + 3 : start + 7])
            np.testing.assert_allclose(recording.poses[arm].pose_world_policy, expected, atol=1e-12)
            np.testing.assert_array_equal(recording.widths[arm].width, state[:, start + 7])
            assert recording.widths[arm].valid.all()
            np.testing.assert_array_equal(recording.poses[arm].time_s, time_s)
            np.testing.assert_array_equal(recording.widths[arm].time_s, time_s)
        for camera, name in enumerate(CAMERAS):
            track = recording.cameras[name]
            np.testing.assert_array_equal(track.time_s, time_s)
            found = [coded_number(image) for image in track.frames.read(range(LENGTHS[number]))]
            assert found == [number_of(camera, number, row) for row in range(LENGTHS[number])]
            for some in ([0], [1, 2, 11, LENGTHS[number] - 1]):
                found = [coded_number(image) for image in track.frames.read(some)]
                assert found == [number_of(camera, number, row) for row in some]
    assert [list(reader.load(episode).instructions) for episode in episodes] == [
        [(0.0, TASKS[0])],
        [(0.0, TASKS[0]), (float(np.float32(0.9)), TASKS[1])],
        [(0.0, TASKS[1])],
    ]


def test_latencies_are_taken_off_each_for_its_own_kind(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    reader = dataset.reader(latencies=Latencies(camera_s=0.07, pose_s=0.01, gripper_s=0.02))
    recording, time_s = reader.load(reader.episodes()[1]), dataset.times[1].astype(np.float64)
    np.testing.assert_array_equal(recording.poses["left"].time_s, time_s - 0.01)
    np.testing.assert_array_equal(recording.widths["right"].time_s, time_s - 0.02)
    np.testing.assert_array_equal(recording.cameras["left_wrist"].time_s, time_s - 0.07)
    # A task begins with the image of its first row, whose time has moved.
    assert [start for start, _ in recording.instructions] == [time_s[0] - 0.07, time_s[9] - 0.07]


def test_frames_units_missing_widths_and_a_fixed_sentence(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    mapping = MAPPING.replace("frame: policy", "frame: tcp\nrobot: ur5e\ninstruction: Pick up the cup.")
    mapping = mapping.replace('"observation.state[15]", unit: policy', "null")
    mapping = mapping.replace('"observation.state[7]", unit: policy', '"observation.state[7]", unit: real_m')
    recording = (reader := dataset.reader(mapping)).load(reader.episodes()[0])
    state = dataset.states[0].astype(np.float64)
    expected = matrices(state[:, :3], state[:, 3:7]) @ PolicyFrames.published("ur5e").pose_tcp_policy("right")
    np.testing.assert_allclose(recording.poses["right"].pose_world_policy, expected, atol=1e-12)
    np.testing.assert_allclose(recording.widths["right"].width, state[:, 7] * 0.88)
    assert not recording.widths["left"].valid.any()
    assert recording.instructions == [(0.0, "Pick up the cup.")]


def test_columns_of_single_numbers_are_put_side_by_side(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    mapping = MAPPING.replace('position: "observation.state[0:3]"', 'position: [timestamp, "observation.state[1:3]"]')
    recording = (reader := dataset.reader(mapping)).load(reader.episodes()[0])
    position_m = recording.poses["right"].pose_world_policy[:, :3, 3]
    np.testing.assert_array_equal(position_m[:, 0], dataset.times[0])
    np.testing.assert_array_equal(position_m[:, 1:], dataset.states[0][:, 1:3])


def test_the_fingerprint_follows_the_files_of_the_dataset_and_nothing_else(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    first = dataset.reader().fingerprint()
    (dataset.root / "README.md").write_text("written later")
    (dataset.root / ".cache").mkdir()
    (dataset.root / ".cache" / "lock").write_text("")
    assert dataset.reader().fingerprint() == first
    assert dataset.reader(latencies=Latencies(pose_s=0.1)).fingerprint() == first
    os.utime(dataset.root / "data" / "chunk-000" / "episode_000001.parquet", ns=(1, 1))
    assert dataset.reader().fingerprint() != first


def test_the_settings_name_mapping_and_latencies(tmp_path):
    dataset = Dataset(tmp_path / "dataset", [])
    settings = dataset.reader(MAPPING + "instruction: Wipe the table.\n", Latencies(pose_s=0.1)).settings()
    assert settings["mapping"]["instruction"] == "Wipe the table."
    assert settings["latencies"]["pose_s"] == 0.1
    assert json.loads(json.dumps(settings)) == settings


def test_the_description_of_a_dataset_is_read_once(tmp_path, monkeypatch):
    from rdt2_data.converters import lerobot

    dataset, reads = write_dataset(tmp_path, "v2.1", images=True), []
    whole = lerobot.read_metadata
    monkeypatch.setattr(lerobot, "read_metadata", lambda source: reads.append(1) or whole(source))
    reader = dataset.reader()
    for episode in reader.episodes():
        pickle.loads(pickle.dumps(reader)).load(episode)
    assert len(reads) == 1
    monkeypatch.setattr(lerobot, "_SENT_EPISODES", 2)
    copy = pickle.loads(pickle.dumps(reader))
    for episode in reader.episodes():
        copy.load(episode)
    assert len(reads) == 2


def test_the_example_mapping_fits_its_model():
    from rdt2_data.converters.mappings import LeRobotMapping

    assert load_config(LeRobotMapping, "data/lerobot_example.yaml").instruction == "task"


# ----------------------------------------------------------------------------------------- mappings that do not fit


def test_everything_wrong_with_a_mapping_is_told_at_once_with_what_is_there(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    mapping = MAPPING.replace("observation.state[0:3]", "observation.stat[0:3]")
    mapping = mapping.replace("observation.state[15]", "observation.state[16]")
    mapping = mapping.replace("observation.state[11:15]", "observation.state[11:14]")
    mapping = mapping.replace("left_wrist: observation.images.left", "left_wrist: observation.images.lef")
    with pytest.raises(ConfigError) as caught:
        dataset.reader(mapping).episodes()
    text = str(caught.value)
    assert "4 problems" in text
    assert "right.position: no column 'observation.stat'" in text
    assert "left.width: 'observation.state' has 16 numbers, not 17" in text
    assert "left.rotation: must be 4 numbers, not 3" in text
    assert "no images 'observation.images.lef'; there are: observation.images.left, observation.images.right" in text
    assert "observation.state [16]" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("unit: policy}", "unit: policy, scal: 2}", "did you mean 'scale'"),
        (', unit: policy}\nleft', "}\nleft", "must say policy or real_m"),
        ("quat_xyzw", "quaternion", "rot6d_columns"),
        ("observation.state[7]", "observation.state[7:7]", "to a later one"),
        ("observation.state[7]", "observation.state[-1]", "must look like"),
        ("cameras:", "instruction: tasks\ncameras:", "a sentence"),
        ("observation.state[8:11]", "observation.state[0:3]", "'position' of right and left come from the same place"),
        ("observation.state[11:15]", "observation.state[3:7]", "'rotation' of right and left"),
        ("observation.state[15]", "observation.state[7]", "'width' of right and left"),
        ("images.left,", "images.right,", "'cameras' of right and left"),
    ],
)  # fmt: skip
def test_a_mapping_with_mistakes_is_refused(tmp_path, old, new, message):
    assert old in MAPPING
    with pytest.raises(ConfigError, match=message):
        Dataset(tmp_path / "dataset", []).reader(MAPPING.replace(old, new))


def test_a_dataset_without_mapping_is_refused_with_the_example():
    with pytest.raises(ConfigError, match="lerobot_example"):
        LeRobotReader(Path("somewhere"), None, Latencies())


# ------------------------------------------------------------------------------------------------------ bad data


def test_times_that_do_not_increase_are_refused_with_their_column(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    time_s = dataset.times[0].copy()
    time_s[7] = time_s[6]
    rewrite_table(dataset.root / "data/chunk-000/episode_000000.parquet", timestamp=time_s)
    error = refused(dataset)
    assert error.reason == "bad-time"
    assert "column timestamp" in str(error)
    assert "row 7" in str(error)
    assert dataset.reader().load(dataset.reader().episodes()[1]).name == "episode_000001"


def test_wrong_rows_are_refused(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    path = dataset.root / "data/chunk-000/episode_000000.parquet"
    states = dataset.states[0].copy()
    states[3, 4] = np.nan
    rewrite_table(path, **{"observation.state": list(states)})
    assert (error := refused(dataset)).reason == "not-finite"
    assert "row 3" in str(error)
    rewrite_table(path, **{"observation.state": [*dataset.states[0][:-1], dataset.states[0][-1, :15]]})
    assert (error := refused(dataset)).reason == "wrong-shape"
    assert "column observation.state" in str(error)
    rewrite_table(path, **{"observation.state": list(dataset.states[0]), "task_index": np.full(LENGTHS[0], 9)})
    assert refused(dataset).reason == "unknown-instruction"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path, partitioning=None).slice(0, 20), path)
    assert "23 rows" in str(refused(dataset))


def test_an_image_that_is_damaged_is_named_and_others_are_read(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    cells = [image_cell(0, 0, row) for row in range(LENGTHS[0])]
    cells[4]["bytes"] = cells[4]["bytes"][:60]
    cells[5]["bytes"] = None
    rewrite_table(dataset.root / "data/chunk-000/episode_000000.parquet", **{CAMERAS["left_wrist"]: cells})
    frames = (reader := dataset.reader()).load(reader.episodes()[0]).cameras["left_wrist"].frames
    found = list(frames.read([3, 4, 5, 6]))
    for image, reason, row in ((found[1], "corrupt-jpeg", 4), (found[2], "bad-recording", 5)):
        assert isinstance(image, SampleError)
        assert image.reason == reason
        assert f"row {row}" in str(image)
    assert [coded_number(found[0]), coded_number(found[3])] == [number_of(0, 0, 3), number_of(0, 0, 6)]


def test_files_of_every_kind_may_be_damaged_and_are_named(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1")
    video = dataset.root / "videos/chunk-000" / CAMERAS["left_wrist"] / "episode_000000.mp4"
    table = dataset.root / "data/chunk-000/episode_000000.parquet"
    for path, change in (
        (video, lambda content: content[:-400]),  # the index is at the end
        (video, lambda content: content[:100] + bytes(len(content) - 1500) + content[-1400:]),
        (video, lambda content: content[:1500] + b"damaged!" + content[1508:]),  # inside of one picture
        (video, lambda content: b""),
        (table, lambda content: content[:-40]),
        (table, lambda content: b"PAR1" + bytes(200) + content[204:]),
    ):
        content = path.read_bytes()
        path.write_bytes(change(content))
        error = refused(dataset)
        assert error.reason == "bad-recording"
        assert path.name in str(error)
        path.write_bytes(content)
    video.unlink()
    assert "a video is missing" in str(error := refused(dataset))
    assert "episode_000001.mp4" in str(error)
    table.unlink()
    assert table.name in str(refused(dataset))


def test_descriptions_may_be_damaged_and_are_named(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    meta = dataset.root / "meta"
    for name, text, message in (
        ("info.json", "{", "not a readable JSON file"),
        ("info.json", json.dumps({"codebase_version": "v1.6"}), "another version"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 23}\n{"episode_index":', "line 2"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 23}\n{"episode_index": 0, "length": 23}', "twice"),
        ("episodes.jsonl", '{"episode_index": "0", "length": 23}', "episode_index"),
        ("tasks.jsonl", '{"task_index": 0, "task": 5}', "sentence"),
    ):
        content = (meta / name).read_text()
        (meta / name).write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            dataset.reader().episodes()
        assert name in str(caught.value)
        (meta / name).write_text(content)
    change_json(meta / "info.json", data_path="../{episode_index}.parquet")
    with pytest.raises(DataError, match="leads out of the dataset"):
        dataset.reader().episodes()
    with pytest.raises(DataError, match=r"meta/info.json"):
        Dataset(tmp_path / "elsewhere", []).reader().episodes()


def test_a_sentence_may_hold_characters_that_end_lines_elsewhere(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    sentence = "Pick up\u2028the \u00e4pple\x85."
    lines = [json.dumps({"task_index": index, "task": sentence}, ensure_ascii=False) for index in (0, 1)]
    (dataset.root / "meta" / "tasks.jsonl").write_bytes("\r\n".join([*lines, ""]).encode())
    reader = dataset.reader()
    assert reader.load(reader.episodes()[0]).instructions == [(0.0, sentence)]


def test_lists_of_version_3_may_lack_columns_and_are_named(tmp_path):
    dataset = write_dataset(tmp_path, "v3.0")
    path = dataset.root / "meta/episodes/chunk-000/file-001.parquet"
    name = f"videos/{CAMERAS['left_wrist']}/to_timestamp"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path, partitioning=None).drop_columns([name]), path)
    with pytest.raises(DataError, match=name) as caught:
        dataset.reader().episodes()
    assert "file-001.parquet" in str(caught.value)


# --------------------------------------------------------------------------------------------------------- videos


def test_a_video_that_ends_early_is_named_and_what_it_holds_is_read(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1")
    path = dataset.root / "videos/chunk-000" / CAMERAS["right_wrist"] / "episode_000000.mp4"
    encode_video(path, episode_images(1, 0)[:15], FPS)
    frames = (reader := dataset.reader()).load(reader.episodes()[0]).cameras["right_wrist"].frames
    found = list(frames.read(range(LENGTHS[0])))
    assert [coded_number(image) for image in found[:15]] == [number_of(1, 0, row) for row in range(15)]
    for row, problem in enumerate(found[15:], start=15):
        assert isinstance(problem, SampleError)
        assert problem.reason == "bad-recording"
        assert f"image {row}" in str(problem)


def test_an_episode_never_takes_frames_of_the_next_one(tmp_path):
    dataset = write_dataset(tmp_path, "v3.0")
    rewrite_table(dataset.root / "data/chunk-000/file-000.parquet",
                  timestamp=np.concatenate([dataset.times[0] + np.float32(0.1), dataset.times[1]]))  # fmt: skip
    error = refused(dataset)
    assert error.reason == "bad-recording"
    assert "out of the episode's part" in str(error)
