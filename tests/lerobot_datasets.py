"""LeRobot datasets for the tests of converters, written file by file in the layouts that LeRobot documents.

Images say which one they are, so that a frame taken for its neighbour fails.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from rdt2_data.converters.lerobot import LeRobotReader
from rdt2_data.converters.options import Latencies
from recorded_motion import coded_image, encode_video, motion

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
