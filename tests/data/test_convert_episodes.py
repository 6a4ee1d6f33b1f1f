"""Episodes of the executor: a chunk that was commanded and followed comes back as it was."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from convert_sources import small_image
from rdt2_data.converters.chunks import cut_chunks, select_frames
from rdt2_data.converters.convert import convert
from rdt2_data.converters.episodes import EpisodesOptions, EpisodesReader
from rdt2_data.converters.options import ChunkOptions, ConvertOptions, Latencies
from rdt2_data.converters.runners import LocalRunner
from rdt2_data.problems import SampleError, Tally
from rdt2_data.synthetic import smooth_chunks
from recorded_motion import good_images

from rdt2_jax.actions.chunks import PolicyFrames, RobotName, chunk_to_tcp
from rdt2_jax.actions.episode import EpisodeReader, EpisodeWriter
from rdt2_jax.actions.episode_schema import CHANNELS, EpisodeMetadata
from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES, ArmName
from rdt2_jax.actions.poses import compose, make_pose, matrix_to_pose7
from rdt2_jax.actions.rotations import rotvec_to_matrix
from rdt2_jax.actions.types import ActionChunk
from rdt2_jax.errors import DataError

START_S = 5000.0
SKEW_S = 0.004
HERE = LocalRunner(workers=1)
ANCHOR_BASE_TCP = {
    "right": make_pose(rotvec_to_matrix(np.array([0.3, -2.0, 0.4])), np.array([0.4, 0.1, 0.3])),
    "left": make_pose(rotvec_to_matrix(np.array([-0.1, 0.5, 2.5])), np.array([-0.2, 0.5, 0.2])),
}


def commanded(robot: RobotName) -> tuple[np.ndarray, dict[ArmName, float], dict, dict]:
    """A chunk, the anchors of both arms, and the TCP poses and widths (25 each, first the anchor) that follow it."""
    actions = smooth_chunks(1, seed=3)[0]
    capture_s = {"right_wrist": START_S, "left_wrist": START_S + SKEW_S}
    anchors_s: dict[ArmName, float] = {"right": START_S, "left": START_S + SKEW_S}
    chunk = ActionChunk(actions=actions, anchor_time_s=anchors_s, observation_id="0", capture_time_s=capture_s)
    tcp = chunk_to_tcp(chunk, PolicyFrames.published(robot))
    poses, widths = {}, {}
    for arm in ARM_NAMES:
        relative = np.concatenate([np.eye(4)[None], tcp.poses_anchor_tcp[arm]])
        poses[arm] = compose(ANCHOR_BASE_TCP[arm], relative)
        widths[arm] = np.concatenate([tcp.widths_m[arm][:1], tcp.widths_m[arm]])
    return actions, anchors_s, poses, widths


def record(path: Path, robot: RobotName = "ur5e", name: str | None = None, fail_after: int | None = None) -> np.ndarray:
    """Writes an episode in which the arms do exactly what was commanded; returns the chunk."""
    actions, anchors_s, poses, widths = commanded(robot)
    metadata = EpisodeMetadata(
        robot=name or robot,
        config_hash="0",
        source="twin",
        fps=30.0,
        start_time="2026-01-31T12:00:00+00:00",
        start_time_s=START_S,
    )
    with EpisodeWriter(path, metadata) as writer:
        writer.append("/instruction", START_S - 1.0, instruction="Pick up the apple.")
        for step in range(25):
            if step == fail_after:
                raise RuntimeError("the arm stopped")
            for arm in ARM_NAMES:
                due_s = anchors_s[arm] + step / 30
                pose = matrix_to_pose7(poses[arm][step])
                writer.append(f"/{arm}/measured/pose", due_s, pose_base_tcp=pose)
                writer.append(f"/{arm}/measured/gripper", due_s, width_m=float(widths[arm][step]))
            for camera in CAMERA_NAMES:
                capture_s = anchors_s["right" if camera == "right_wrist" else "left"] + step / 30
                image = small_image(CAMERA_NAMES.index(camera), step, (64, 64))
                jpeg = simplejpeg.encode_jpeg(image, 98, "RGB", "444")
                # The message comes later than the image was taken: its time must not matter.
                writer.append(f"/{camera}/image", capture_s + 0.05, jpeg=jpeg, capture_time_s=capture_s)
    return actions


@pytest.mark.parametrize("robot", ["ur5e", "fr3"])
def test_the_commanded_chunk_comes_back(tmp_path: Path, robot: RobotName) -> None:
    actions = record(tmp_path / "one.mcap", robot)
    reader = EpisodesReader(tmp_path / "one.mcap")
    recording = reader.load(reader.episodes()[0])
    assert recording.name == "one"
    assert recording.instructions == [(START_S - 1.0, "Pick up the apple.")]
    selection = select_frames(recording, ChunkOptions(), Tally(strict=True))
    assert selection.right_frame.tolist() == [0]
    np.testing.assert_allclose(cut_chunks(recording, selection).actions[0], actions, atol=1e-6)
    for camera in CAMERA_NAMES:
        images = list(good_images(recording.cameras[camera].frames, [2, 5]))
        for step, image in zip((2, 5), images, strict=True):
            expected = small_image(CAMERA_NAMES.index(camera), step, (64, 64)).astype(int)
            assert np.abs(image.astype(int) - expected).max() < 12


def test_another_robots_constants_give_another_chunk(tmp_path: Path) -> None:
    actions = record(tmp_path / "one.mcap", "ur5e", name="bench")
    with pytest.raises(SampleError, match="no published frames"):
        EpisodesReader(tmp_path).load(EpisodesReader(tmp_path).episodes()[0])
    for robot, same in (("ur5e", True), ("fr3", False)):
        reader = EpisodesReader(tmp_path, EpisodesOptions.model_validate({"robot": robot}))
        recording = reader.load(reader.episodes()[0])
        ours = cut_chunks(recording, select_frames(recording, ChunkOptions(), Tally())).actions[0]
        assert np.allclose(ours, actions, atol=1e-6) == same


def test_a_folder_with_an_interrupted_and_a_damaged_recording(tmp_path: Path) -> None:
    source = tmp_path / "runs"
    (source / "day").mkdir(parents=True)
    record(source / "day" / "a.mcap")
    with pytest.raises(RuntimeError, match="the arm stopped"):
        record(source / "b.mcap", fail_after=10)
    record(source / "c.mcap")
    data = (source / "c.mcap").read_bytes()
    (source / "c.mcap").write_bytes(data[: len(data) // 2])
    reader = EpisodesReader(source)
    assert [reference.name for reference in reader.episodes()] == ["b.mcap.partial", "c", "day/a"]
    options = ConvertOptions(chunks=ChunkOptions(at_end="hold"))
    report = convert(reader, tmp_path / "out", options, runner=HERE, hide=str(tmp_path))
    assert report.samples == 10 + 25
    assert report.notes == {"b.mcap.partial": "the recording was interrupted by RuntimeError: the arm stopped"}
    assert report.problems.counts() == {"bad-recording": 1}
    assert "runs/c.mcap" in report.problems.text()
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert "the arm stopped" in (tmp_path / "out" / "README.md").read_text()


def test_an_image_that_cannot_be_decoded_is_counted(tmp_path: Path) -> None:
    record(tmp_path / "one.mcap")
    whole = EpisodeReader(tmp_path / "one.mcap").read()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    with EpisodeWriter(damaged / "one.mcap", EpisodeReader(tmp_path / "one.mcap").metadata) as writer:
        for topic, series in whole.items():
            for index, time_s in enumerate(series.time_s):
                values = {name: column[index] for name, column in series.values.items()}
                if topic == "/left_wrist/image" and index == 4:
                    values["jpeg"] = values["jpeg"][:30]
                writer.append(topic, time_s, **values)
    options = ConvertOptions(chunks=ChunkOptions(at_end="hold"))
    report = convert(EpisodesReader(damaged), tmp_path / "out", options, runner=HERE)
    assert (report.samples, report.problems.counts()) == (24, {"corrupt-jpeg": 1})
    reader = EpisodesReader(damaged)
    before, problem, after = reader.load(reader.episodes()[0]).cameras["left_wrist"].frames.read([3, 4, 5])
    assert isinstance(problem, SampleError)
    assert "/left_wrist/image, message 4" in str(problem)
    assert isinstance(before, np.ndarray)
    assert isinstance(after, np.ndarray)


def rerecord(path: Path, repeated: Callable[[str, dict[str, Any]], dict[str, Any] | None]) -> None:
    """Writes the episode again, with another message of the same time after each for which there is one."""
    reader = EpisodeReader(path)
    messages = list(reader.messages(*CHANNELS))
    path.unlink()
    with EpisodeWriter(path, reader.metadata) as writer:
        for topic, message in messages:
            time_s = message.pop("time_s")
            writer.append(topic, time_s, **message)
            if (again := repeated(topic, message)) is not None:
                writer.append(topic, time_s, **again)


def test_exact_repeats_are_left_out_and_told(tmp_path: Path) -> None:
    record(tmp_path / "one.mcap")
    source = EpisodesReader(tmp_path / "one.mcap")
    once = source.load(source.episodes()[0])
    rerecord(tmp_path / "one.mcap", lambda topic, message: message if "/measured/" in topic else None)
    reader = EpisodesReader(tmp_path / "one.mcap")
    recording = reader.load(reader.episodes()[0])
    for arm in ARM_NAMES:
        assert np.array_equal(recording.poses[arm].time_s, once.poses[arm].time_s)
        assert np.array_equal(recording.poses[arm].pose_world_policy, once.poses[arm].pose_world_policy)
        assert np.array_equal(recording.widths[arm].width, once.widths[arm].width)
    assert reader.notes == {"one": "100 exact repeats of poses and widths were left out"}
    assert source.notes == {}


def test_two_values_at_one_time_are_refused(tmp_path: Path) -> None:
    record(tmp_path / "one.mcap")
    rerecord(tmp_path / "one.mcap", lambda topic, message: {"width_m": 0.01} if topic.endswith("gripper") else None)
    with pytest.raises(SampleError, match="widths of right") as caught:
        EpisodesReader(tmp_path).load(EpisodesReader(tmp_path).episodes()[0])
    assert caught.value.reason == "bad-time"


def test_files_are_looked_for_once_and_images_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "one.mcap")
    record(tmp_path / "two.mcap")
    reader = EpisodesReader(tmp_path)
    episodes = reader.episodes()
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("looked for again"))
    copy = pickle.loads(pickle.dumps(reader))
    recording = copy.load(episodes[1])
    assert (copy.episodes(), recording.name) == (episodes, "two")
    assert b"\xff\xd8\xff" not in pickle.dumps(recording)  # the beginning of every JPEG file
    images = pickle.loads(pickle.dumps(recording)).cameras["left_wrist"].frames
    assert [image.shape for image in good_images(images, [3, 20])] == [(64, 64, 3)] * 2


def test_sources_and_latencies_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such episodes"):
        EpisodesReader(tmp_path / "missing")
    with pytest.raises(DataError, match="there are no episodes"):
        EpisodesReader(tmp_path).episodes()
    with pytest.raises(DataError, match="time of capture"):
        EpisodesReader(tmp_path, latencies=Latencies(camera_s=0.07))
    record(tmp_path / "one.mcap")
    reader = EpisodesReader(tmp_path, latencies=Latencies(pose_s=0.01, gripper_s=0.02))
    recording = reader.load(reader.episodes()[0])
    assert recording.poses["right"].time_s[0] == pytest.approx(START_S - 0.01)
    assert recording.widths["right"].time_s[0] == pytest.approx(START_S - 0.02)
    assert recording.cameras["right_wrist"].time_s[0] == START_S
    assert reader.fingerprint() == EpisodesReader(tmp_path).fingerprint()
    assert reader.settings()["latencies"] == {"camera_s": 0.0, "pose_s": 0.01, "gripper_s": 0.02}
    assert reader.settings()["options"] == {"robot": None}
    record(tmp_path / "two.mcap")
    assert reader.fingerprint() != EpisodesReader(tmp_path).fingerprint()
