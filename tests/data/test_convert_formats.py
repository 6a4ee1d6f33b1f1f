"""The command for all four formats: the same motion, written in each of them, gives the same chunks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import simplejpeg
import zarr
from click.testing import CliRunner
from convert_sources import read_samples, save_small_tokenizer, small_image, smooth_recording
from rdt2_data.converters.chunks import cut_chunks, select_frames
from rdt2_data.converters.commands import convert
from rdt2_data.converters.options import ChunkOptions
from rdt2_data.problems import Tally
from rdt2_data.samples import decode_image, read_action, read_action_token, read_meta
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from rdt2_jax.actions.chunks import PolicyFrames, policy_width_to_real_m
from rdt2_jax.actions.episode import EpisodeWriter
from rdt2_jax.actions.episode_schema import EpisodeMetadata
from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES
from rdt2_jax.actions.poses import invert, matrix_to_pose7
from rdt2_jax.actions.rotations import matrix_to_rotvec

ROWS, SAMPLES = 30, 6
RECORDING = smooth_recording(rows=ROWS)
TIME_S = np.arange(ROWS) / 30
SENTENCE = "Pick up the cup."
SIZE = (64, 64)


@dataclass(frozen=True)
class Shift:
    """How late each kind of data is stamped [s]."""

    camera_s: float = 0.0
    pose_s: float = 0.0
    gripper_s: float = 0.0

    def options(self) -> list[Any]:
        pairs = (("camera", self.camera_s), ("pose", self.pose_s), ("gripper", self.gripper_s))
        return [part for what, late_s in pairs if late_s for part in (f"--{what}-latency", late_s)]


def pose7(arm: str) -> np.ndarray:
    return matrix_to_pose7(RECORDING.poses[arm].pose_world_policy)  # type: ignore[index]


def jpeg(camera: str, row: int) -> bytes:
    return simplejpeg.encode_jpeg(small_image(CAMERA_NAMES.index(camera), row, SIZE), 98, "RGB", "444")


# ------------------------------------------------------------------------------------------------ formats


def write_umi(folder: Path, shift: Shift) -> list[Any]:
    group = zarr.open_group(folder / "buffer.zarr", mode="w", zarr_format=2)
    arrays: dict[str, np.ndarray] = {"meta/episode_ends": np.array([ROWS]), "data/timestamp": TIME_S + shift.pose_s}
    for number, arm in enumerate(("right", "left")):
        pose = RECORDING.poses[arm].pose_world_policy
        arrays[f"data/robot{number}_eef_pos"] = pose[:, :3, 3]
        arrays[f"data/robot{number}_eef_rot_axis_angle"] = matrix_to_rotvec(pose[:, :3, :3])
        arrays[f"data/robot{number}_gripper_width"] = RECORDING.widths[arm].width[:, None]
        seed = CAMERA_NAMES.index(f"{arm}_wrist")
        arrays[f"data/camera{number}_rgb"] = np.stack([small_image(seed, row, SIZE) for row in range(ROWS)])
    for name, array in arrays.items():
        group.create_array(name, shape=array.shape, dtype=array.dtype)[:] = array
    return ["umi-zarr", folder / "buffer.zarr", "--instruction", SENTENCE]


def write_lerobot(folder: Path, shift: Shift) -> list[Any]:
    root = folder / "dataset"
    cameras = {camera: f"observation.images.{camera}" for camera in CAMERA_NAMES}
    state = np.hstack([np.column_stack([pose7(arm), RECORDING.widths[arm].width]) for arm in ARM_NAMES])
    whole = pyarrow.array(np.arange(ROWS))
    columns: dict[str, Any] = {
        "observation.state": pyarrow.array(list(state), pyarrow.list_(pyarrow.float64())),
        "timestamp": pyarrow.array((TIME_S + shift.pose_s).astype(np.float32)),
        "frame_index": whole, "index": whole,
        "episode_index": pyarrow.array(np.zeros(ROWS, int)), "task_index": pyarrow.array(np.zeros(ROWS, int)),
    }  # fmt: skip
    cell = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for camera, name in cameras.items():
        cells = [{"bytes": jpeg(camera, row), "path": f"{row}.jpg"} for row in range(ROWS)]
        columns[name] = pyarrow.array(cells, cell)
    features: dict[str, Any] = {"observation.state": {"dtype": "float64", "shape": [16], "names": None}}
    features |= {name: {"dtype": "int64", "shape": [1]} for name in columns if "." not in name}
    features["timestamp"] = {"dtype": "float32", "shape": [1]}
    features |= {name: {"dtype": "image", "shape": [*SIZE, 3]} for name in cameras.values()}
    info = {
        "codebase_version": "v2.1", "robot_type": "two_arms", "fps": 30, "features": features, "total_episodes": 1,
        "total_frames": ROWS, "chunks_size": 1000, "video_path": None,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }  # fmt: skip
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": SENTENCE}) + "\n")
    episode = {"episode_index": 0, "tasks": [SENTENCE], "length": ROWS}
    (root / "meta" / "episodes.jsonl").write_text(json.dumps(episode) + "\n")
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "data" / "chunk-000" / "episode_000000.parquet")
    arms = {
        arm: {
            "position": f"observation.state[{start}:{start + 3}]",
            "rotation": {"columns": f"observation.state[{start + 3}:{start + 7}]", "format": "quat_wxyz"},
            "width": {"column": f"observation.state[{start + 7}]", "unit": "policy"},
        }
        for arm, start in zip(ARM_NAMES, (0, 8), strict=True)
    }
    (folder / "mapping.yaml").write_text(json.dumps({"frame": "policy", **arms, "cameras": cameras}))
    return ["lerobot", root, "--mapping", folder / "mapping.yaml"]


def write_rosbag(folder: Path, shift: Shift) -> list[Any]:
    store = get_typestore(Stores.ROS2_HUMBLE)
    types = store.types

    def stamp_ns(row: int, late_s: float) -> int:
        return 1_700_000_000_000_000_000 + round((TIME_S[row] + late_s) * 1e9)

    def header(ns: int) -> Any:
        return types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](*divmod(ns, 10**9)), "world")

    def pose(arm: str, row: int) -> Any:
        x, y, z, qw, qx, qy, qz = pose7(arm)[row]
        point = types["geometry_msgs/msg/Point"](x, y, z)
        return types["geometry_msgs/msg/Pose"](point, types["geometry_msgs/msg/Quaternion"](qx, qy, qz, qw))

    messages = []
    for row in range(ROWS):
        for arm in ARM_NAMES:
            ns = stamp_ns(row, shift.pose_s)
            name = "geometry_msgs/msg/PoseStamped"
            messages.append((ns, f"/{arm}/pose", name, types[name](header(ns), pose(arm, row))))
            ns, name = stamp_ns(row, shift.gripper_s), "std_msgs/msg/Float64"
            messages.append((ns, f"/{arm}/width", name, types[name](float(RECORDING.widths[arm].width[row]))))
            ns, name = stamp_ns(row, shift.camera_s), "sensor_msgs/msg/CompressedImage"
            data = np.frombuffer(jpeg(f"{arm}_wrist", row), np.uint8)
            messages.append((ns, f"/{arm}/image", name, types[name](header(ns), "jpeg", data)))
    with Writer(folder / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections: dict[str, Any] = {}
        for ns, topic, name, message in sorted(messages, key=lambda entry: entry[0]):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, name, typestore=store)
            writer.write(connections[topic], ns, store.serialize_cdr(message, name))
    arms = {
        arm: {"pose": {"topic": f"/{arm}/pose"}, "width": {"topic": f"/{arm}/width", "unit": "policy"}}
        for arm in ARM_NAMES
    }
    cameras = {f"{arm}_wrist": {"topic": f"/{arm}/image"} for arm in ARM_NAMES}
    mapping = {"frame": "policy", **arms, "cameras": cameras, "instruction": SENTENCE}
    (folder / "mapping.yaml").write_text(json.dumps(mapping))
    return ["rosbag", folder / "bag", "--mapping", folder / "mapping.yaml"]


def write_episode(folder: Path, shift: Shift) -> list[Any]:
    """Images carry their time of capture, whatever the latency."""
    start_s, frames = 5000.0, PolicyFrames.published("ur5e")
    metadata = EpisodeMetadata(
        robot="ur5e", config_hash="0", source="twin", fps=30.0, start_time="2026-01-31T12:00:00+00:00",
        start_time_s=start_s,
    )  # fmt: skip
    with EpisodeWriter(folder / "episode.mcap", metadata) as writer:
        writer.append("/instruction", start_s - 1, instruction=SENTENCE)
        for row, time_s in enumerate(start_s + TIME_S):
            for arm in ARM_NAMES:
                pose = RECORDING.poses[arm].pose_world_policy[row] @ invert(frames.pose_tcp_policy(arm))
                writer.append(f"/{arm}/measured/pose", time_s + shift.pose_s, pose_base_tcp=matrix_to_pose7(pose))
                width_m = float(policy_width_to_real_m(RECORDING.widths[arm].width[row]))
                writer.append(f"/{arm}/measured/gripper", time_s + shift.gripper_s, width_m=width_m)
            for camera in CAMERA_NAMES:
                writer.append(f"/{camera}/image", time_s + 0.1, jpeg=jpeg(camera, row), capture_time_s=time_s)
    return ["episodes", folder / "episode.mcap"]


FORMATS: dict[str, tuple[Callable[[Path, Shift], list[Any]], Shift]] = {
    "umi-zarr": (write_umi, Shift(0.25, 0.25, 0.25)),  # one stamp for all
    "lerobot": (write_lerobot, Shift(0.25, 0.25, 0.25)),
    "rosbag": (write_rosbag, Shift(0.25, 0.125, 0.0625)),
    "episodes": (write_episode, Shift(0.0, 0.125, 0.0625)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_chunks_also_when_stamped_late(tmp_path: Path, name: str) -> None:
    write, shift = FORMATS[name]
    selection = select_frames(RECORDING, ChunkOptions(), Tally(strict=True))
    assert len(selection) == SAMPLES
    expected = cut_chunks(RECORDING, selection).actions
    images = []
    for late in (Shift(), shift):
        folder = tmp_path / f"late-{late.camera_s or late.pose_s}"
        folder.mkdir()
        source_format, source, *more = write(folder, late)
        command = ["--from", source_format, source, folder / "out", *more, *late.options(), "--workers", 1, "--strict"]
        result = CliRunner().invoke(convert, [str(part) for part in [*command, "--json"]], catch_exceptions=False)
        assert json.loads(result.stdout)["samples"] == SAMPLES
        samples = read_samples(folder / "out")
        np.testing.assert_allclose([read_action(sample) for sample in samples], expected, atol=2e-5)
        assert [read_meta(sample)["frame"] for sample in samples] == list(range(SAMPLES))
        assert json.loads((folder / "out" / "instructions.json").read_text()) == {"0": SENTENCE}
        images.append([decode_image(sample) for sample in samples])
        for path in (folder / "out").rglob("*.json"):
            assert str(tmp_path) not in path.read_text()
    assert np.array_equal(*images)
    left = small_image(CAMERA_NAMES.index("left_wrist"), 2, SIZE)
    assert np.abs(images[0][2][48:384:96, 48:384:96].astype(int) - left[8::16, 8::16]).max() < 12


def test_tokens_through_the_command(tmp_path: Path) -> None:
    from rdt2_jax.action_tokenizer.checkpoint import load_tokenizer
    from rdt2_jax.action_tokenizer.tokenizer import encode

    (tmp_path / "tokenizer").mkdir()
    tokenizer = save_small_tokenizer(tmp_path / "tokenizer")
    source_format, source, *more = write_umi(tmp_path, Shift())
    command = ["--from", source_format, source, tmp_path / "out", *more, "--tokenizer", tokenizer, "--workers", 1]
    result = CliRunner().invoke(convert, [str(part) for part in command], catch_exceptions=False)
    assert result.exit_code == 0
    samples = read_samples(tmp_path / "out")
    loaded = load_tokenizer(tokenizer)
    chunks = np.stack([read_action(sample) for sample in samples])
    expected = np.asarray(encode(loaded.params, loaded.config, loaded.normalize(chunks)))
    tokens = [token for sample in samples if (token := read_action_token(sample)) is not None]
    assert np.array_equal(tokens, expected)
    assert "| action tokens | yes |" in (tmp_path / "out" / "README.md").read_text()
