"""LeRobot datasets of all published layouts are read back exactly, and damage to them is named.

The datasets are written here, file by file, in the layouts that LeRobot documents; images say which one they are, so
that a frame taken for its neighbour fails.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from rdt2_data.converters.lerobot import LeRobotReader
from rdt2_data.converters.options import Latencies
from rdt2_data.converters.video import VideoFrames
from rdt2_data.problems import SampleError
from recorded_motion import coded_image, coded_number, encode_video, matrices, motion

from rdt2_jax.actions.chunks import PolicyFrames
from rdt2_jax.config import load_config
from rdt2_jax.errors import ConfigError, DataError

FPS = 10
LENGTHS = (23, 17, 20)
CAMERAS = {"left_wrist": "observation.images.left", "right_wrist": "observation.images.right"}
TASKS = ["Pick up the apple.", "Wipe the table."]
STARTS = {"right": 0, "left": 8}

MAPPING = """
frame: policy
right:
  position: "observation.state[0:3]"
  rotation: {columns: "observation.state[3:7]", format: quat_xyzw}
  width: {column: "observation.state[7]", unit: policy}
left:
  position: "observation.state[8:11]"
  rotation: {columns: "observation.state[11:15]", format: quat_xyzw}
  width: {column: "observation.state[15]", unit: policy}
cameras: {left_wrist: observation.images.left, right_wrist: observation.images.right}
"""


@dataclass
class Dataset:
    """What `write_dataset` wrote: the folder, and for every episode its state (T, 16), times and task numbers."""

    root: Path
    states: list[np.ndarray]
    times: list[np.ndarray] = field(default_factory=list)
    tasks: list[np.ndarray] = field(default_factory=list)

    def reader(self, mapping: str = MAPPING, latencies: Latencies | None = None) -> LeRobotReader:
        path = self.root.parent / "mapping.yaml"
        path.write_text(mapping)
        return LeRobotReader(self.root, path, latencies or Latencies())


def number_of(camera: int, episode: int, row: int) -> int:
    return (row * 8 + episode * 2 + camera) % 4096


def episode_images(camera: int, episode: int) -> list[np.ndarray]:
    return [coded_image(number_of(camera, episode, row)) for row in range(LENGTHS[episode])]


def image_cell(camera: int, episode: int, row: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(coded_image(number_of(camera, episode, row))).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"frame_{row:06d}.png"}


def make_content(root: Path) -> Dataset:
    dataset = Dataset(root, [])
    for episode, rows in enumerate(LENGTHS):
        parts = [np.column_stack(motion(rows, 10 * episode + arm)) for arm in (0, 1)]
        dataset.states.append(np.hstack(parts).astype(np.float32))
        dataset.times.append((np.arange(rows) / FPS).astype(np.float32))
        dataset.tasks.append(np.where(np.arange(rows) < 9, 0, 1) if episode == 1 else np.full(rows, episode // 2))
    return dataset


def table_of(dataset: Dataset, episode: int, images: bool) -> pyarrow.Table:
    rows = LENGTHS[episode]
    columns = {
        "observation.state": pyarrow.array(list(dataset.states[episode]), pyarrow.list_(pyarrow.float32())),
        "timestamp": pyarrow.array(dataset.times[episode], pyarrow.float32()),
        "frame_index": pyarrow.array(np.arange(rows)),
        "episode_index": pyarrow.array(np.full(rows, episode)),
        "index": pyarrow.array(np.arange(rows) + sum(LENGTHS[:episode])),
        "task_index": pyarrow.array(dataset.tasks[episode]),
    }
    if images:
        cell = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        for camera, name in enumerate(CAMERAS.values()):
            columns[name] = pyarrow.array([image_cell(camera, episode, row) for row in range(rows)], cell)
    return pyarrow.table(columns)


def write_info(root: Path, version: str, images: bool) -> None:
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": [16], "names": None},
        **{name: {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1]} for name in (
            "timestamp", "frame_index", "episode_index", "index", "task_index")},
        **{name: {"dtype": "image" if images else "video", "shape": [48, 96, 3]} for name in CAMERAS.values()},
    }  # fmt: skip
    if version == "v3.0":
        data_path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        video_path = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    else:
        data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        video_path = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    info = {"codebase_version": version, "robot_type": "two_arms", "fps": FPS, "features": features,
            "total_episodes": len(LENGTHS), "total_frames": sum(LENGTHS), "chunks_size": 2,
            "splits": {"train": f"0:{len(LENGTHS)}"}, "data_path": data_path,
            "video_path": None if images else video_path}  # fmt: skip
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info, indent=4))


def write_v2(dataset: Dataset, images: bool, codec: str) -> None:
    root = dataset.root
    lines = [
        {"episode_index": e, "tasks": [TASKS[t] for t in np.unique(dataset.tasks[e])], "length": n}
        for e, n in enumerate(LENGTHS)
    ]
    (root / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = [{"task_index": index, "task": task} for index, task in enumerate(TASKS)]
    (root / "meta" / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tasks))
    for episode in range(len(LENGTHS)):
        chunk = f"chunk-{episode // 2:03d}"  # chunks_size is 2
        (root / "data" / chunk).mkdir(parents=True, exist_ok=True)
        path = root / "data" / chunk / f"episode_{episode:06d}.parquet"
        pyarrow.parquet.write_table(table_of(dataset, episode, images), path)
        for camera, name in enumerate(() if images else CAMERAS.values()):
            path = root / "videos" / chunk / name / f"episode_{episode:06d}.mp4"
            encode_video(path, episode_images(camera, episode), FPS, codec)


def write_v3(dataset: Dataset, images: bool, codec: str) -> None:
    """Episodes 0 and 1 share files, episode 2 has its own; they are listed in two files, the later first."""
    root, groups = dataset.root, [(0, 1), (2,)]
    tasks = pyarrow.table({"task_index": [0, 1], "__index_level_0__": TASKS})
    pyarrow.parquet.write_table(tasks, root / "meta" / "tasks.parquet")
    rows = []
    for file, episodes in enumerate(groups):
        (root / "data" / "chunk-000").mkdir(parents=True, exist_ok=True)
        tables = [table_of(dataset, episode, images) for episode in episodes]
        path = root / "data" / "chunk-000" / f"file-{file:03d}.parquet"
        # Row groups that do not end where episodes do; with images, one group that is read in several parts.
        pyarrow.parquet.write_table(pyarrow.concat_tables(tables), path, row_group_size=100 if images else 15)
        for camera, name in enumerate(() if images else CAMERAS.values()):
            path = root / "videos" / name / "chunk-000" / f"file-{file:03d}.mp4"
            encode_video(path, [image for e in episodes for image in episode_images(camera, e)], FPS, codec)
        start = 0
        for episode in episodes:
            row: dict[str, Any] = {
                "episode_index": episode, "tasks": [TASKS[t] for t in np.unique(dataset.tasks[episode])],
                "length": LENGTHS[episode], "data/chunk_index": 0, "data/file_index": file,
                "dataset_from_index": sum(LENGTHS[:episode]), "dataset_to_index": sum(LENGTHS[: episode + 1]),
                "stats/timestamp/mean": [0.0],
            }  # fmt: skip
            for name in () if images else CAMERAS.values():
                row[f"videos/{name}/chunk_index"], row[f"videos/{name}/file_index"] = 0, file
                row[f"videos/{name}/from_timestamp"] = start / FPS
                row[f"videos/{name}/to_timestamp"] = (start + LENGTHS[episode]) / FPS
            start += LENGTHS[episode]
            rows.append(row)
    folder = root / "meta" / "episodes" / "chunk-000"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[2:]), folder / "file-000.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), folder / "file-001.parquet")


def write_dataset(folder: Path, version: str, images: bool = False, codec: str = "libx264") -> Dataset:
    dataset = make_content(folder / "dataset")
    write_info(dataset.root, version, images)
    (write_v3 if version == "v3.0" else write_v2)(dataset, images, codec)
    return dataset


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite_table(path: Path, **columns: Any) -> None:
    table = pyarrow.parquet.read_table(path, partitioning=None)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pyarrow.array(values))
    pyarrow.parquet.write_table(table, path)


def read_everything(reader: LeRobotReader, episode: int) -> None:
    for camera in reader.load(reader.episodes()[episode]).cameras.values():
        for image in camera.frames.read(range(LENGTHS[episode])):
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


def test_the_fingerprint_changes_with_files_mapping_and_latencies(tmp_path):
    dataset = write_dataset(tmp_path, "v2.1", images=True)
    first = dataset.reader().fingerprint()
    assert dataset.reader().fingerprint() == first
    assert dataset.reader(latencies=Latencies(pose_s=0.1)).fingerprint() != first
    assert dataset.reader(MAPPING + "instruction: Wipe the table.\n").fingerprint() != first
    os.utime(dataset.root / "data" / "chunk-000" / "episode_000001.parquet", ns=(1, 1))
    assert dataset.reader().fingerprint() != first


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
    for row, reason in ((4, "corrupt-jpeg"), (5, "bad-recording")):
        with pytest.raises(SampleError, match=f"row {row}") as caught:
            list(frames.read([row]))
        assert caught.value.reason == reason
    assert [coded_number(image) for image in frames.read([3, 6])] == [number_of(0, 0, 3), number_of(0, 0, 6)]


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
    found = []
    with pytest.raises(SampleError, match="image 15") as caught:
        found.extend(coded_number(image) for image in frames.read(range(LENGTHS[0])))
    assert caught.value.reason == "bad-recording"
    assert found == [number_of(1, 0, row) for row in range(15)]


def test_an_episode_never_takes_frames_of_the_next_one(tmp_path):
    dataset = write_dataset(tmp_path, "v3.0")
    rewrite_table(dataset.root / "data/chunk-000/file-000.parquet",
                  timestamp=np.concatenate([dataset.times[0] + np.float32(0.1), dataset.times[1]]))  # fmt: skip
    error = refused(dataset)
    assert error.reason == "bad-recording"
    assert "out of the episode's part" in str(error)


def test_frames_missing_inside_a_video_are_never_replaced_by_a_neighbour(tmp_path):
    path = tmp_path / "video.mp4"
    encode_video(path, [coded_image(number) for number in range(20)], FPS)
    twice_as_many = VideoFrames(path, np.arange(40) / (2 * FPS), tolerance_s=0.5 / (2 * FPS) - 1e-6)
    assert [coded_number(image) for image in twice_as_many.read(range(0, 40, 2))] == list(range(20))
    with pytest.raises(SampleError, match="image 7"):
        list(twice_as_many.read([6, 7, 8]))


def test_frames_before_a_keyframe_are_found_in_every_container(tmp_path):
    """The index of a container holds times of decoding, or none at all: a seek may land behind what is wanted."""
    for suffix in ("mp4", "mkv", "ts"):
        path = tmp_path / f"video.{suffix}"
        encode_video(path, [coded_image(number) for number in range(60)], 30, preset="veryfast", bf="3", g="8")
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            start_s = float((stream.start_time or 0) * (stream.time_base or 0))  # not 0 in a transport stream
        frames = VideoFrames(path, start_s + np.arange(60) / 30, tolerance_s=0.5 / 30)
        found = [coded_number(image) for index in range(60) for image in frames.read([index])]
        assert found == list(range(60)), suffix


def test_a_video_without_frames_is_named(tmp_path):
    path = tmp_path / "video.mp4"
    encode_video(path, [], 30)
    with pytest.raises(SampleError, match=r"video\.mp4") as caught:
        list(VideoFrames(path, np.arange(3) / 30, tolerance_s=0.5 / 30).read([1]))
    assert caught.value.reason == "bad-recording"


@pytest.mark.parametrize("options", [{"bf": "0", "g": "4"}, {"bf": "3", "g": "12"}, {"bf": "2", "g": "250"}])
def test_any_increasing_choice_of_frames_is_found(tmp_path, options):
    path, rng = tmp_path / "video.mp4", np.random.default_rng(0)
    encode_video(path, [coded_image(number) for number in range(120)], 30, preset="veryfast", **options)
    frames = VideoFrames(path, (np.arange(120) / 30).astype(np.float32).astype(np.float64), tolerance_s=0.5 / 30)
    for count in (1, 2, 5, 40):
        indices = np.sort(rng.choice(120, count, replace=False))
        assert [coded_number(image) for image in frames.read(indices)] == indices.tolist()
    assert list(frames.read([])) == []
    with pytest.raises(DataError, match="increase"):
        frames.read([3, 3])
