"""Files for the Rerun viewer: whole, with the entities and times that they should have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from click.testing import CliRunner
from look_shards import JPEGS, SENTENCES, good_samples, write_shards
from rdt2_data.commands_look import view
from rdt2_data.samples import Turn, question_members
from rdt2_data.synthetic import smooth_chunks
from rdt2_data.view import view_episode, view_shards

from rdt2_jax.actions.chunks import PolicyFrames, chunk_to_tcp
from rdt2_jax.actions.episode import EpisodeWriter
from rdt2_jax.actions.episode_schema import EpisodeMetadata
from rdt2_jax.actions.poses import matrix_to_pose7, pose7_to_matrix
from rdt2_jax.actions.types import ActionChunk
from rdt2_jax.errors import DataError

MAGIC = b"RRF2"
START_S = 50.0


class Recording:
    """A `.rrd` file as Rerun's own reader finds it: rows of every entity, and single components."""

    def __init__(self, path: Path) -> None:
        from rerun.chunk import RrdReader

        self.chunks = [chunk for chunk in RrdReader(str(path)).stream().to_chunks()]
        self.rows: dict[str, int] = {}
        for chunk in self.chunks:
            entity = str(chunk.entity_path)
            self.rows[entity] = self.rows.get(entity, 0) + chunk.num_rows

    def column(self, entity: str, ending: str) -> list[Any]:
        """All values of a column of an entity whose name ends like that, in the order of time."""
        values: list[Any] = []
        for chunk in self.chunks:
            if str(chunk.entity_path) == entity:
                batch = chunk.to_record_batch()
                for name in batch.schema.names:
                    if name.endswith(ending):
                        values += batch.column(name).to_pylist()
        return values


@pytest.fixture
def shards(tmp_path):
    samples = good_samples(12)
    samples[3]["image.jpg"] = samples[3]["image.jpg"][:400]
    samples.append(question_members(image_jpeg=JPEGS[0], turns=[Turn("What is it?", "A cup.")]))
    return write_shards(tmp_path / "shards", samples)


def test_samples_become_images_chunks_widths_and_sentences(shards, tmp_path):
    out = tmp_path / "samples.rrd"
    arguments = [str(shards), "--instructions", str(shards / "instructions.json"), "--save", str(out), "--json"]
    result = CliRunner().invoke(view, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["counts"] == {"samples": 13, "problems": 1}
    assert "1 x corrupt-jpeg" in found["notes"][0]
    assert out.read_bytes()[:4] == MAGIC
    assert [p.name for p in tmp_path.glob(".*")] == []

    recording = Recording(out)
    for entity in ("/left_wrist", "/right_wrist", "/left/chunk", "/right/chunk", "/left/now", "/widths/right"):
        assert recording.rows[entity] >= 11
    texts = [text for cell in recording.column("/instruction", "text") for text in cell or []]
    assert len(texts) == 13
    assert sum(text.startswith(SENTENCES["0"]) for text in texts) == 6
    assert sum("corrupt" in text or "cannot be decoded" in text for text in texts) == 1
    assert "What is it?\nA cup." in texts

    widths = np.array([value for cell in recording.column("/widths/right", "scalars") for value in cell or []])
    chunks = smooth_chunks(12, 0)
    np.testing.assert_allclose(widths, np.delete(chunks[:, 0, 9], 3), rtol=1e-6)
    paths = [strip for cell in recording.column("/left/chunk", "strips") for strip in cell or []]
    np.testing.assert_allclose(np.array(paths[0])[1:], chunks[0, :, 10:13], rtol=1e-5, atol=1e-7)


def test_each_wrist_gets_its_half_of_the_composite(shards, tmp_path):
    out = tmp_path / "one.rrd"
    view_shards([str(shards)], save=out, start=1, limit=1)
    recording = Recording(out)
    composite = simplejpeg.decode_jpeg(JPEGS[1], "RGB")
    for camera, half in zip(("left_wrist", "right_wrist"), np.split(composite, 2, axis=1), strict=True):
        (blob,) = [blob for cell in recording.column(f"/{camera}", "blob") for blob in cell or []]
        image = simplejpeg.decode_jpeg(bytes(blob), "RGB")
        assert image.shape == (384, 384, 3)
        assert np.abs(image.astype(int) - half).mean() < 4


def test_without_a_file_a_window_opens(shards, monkeypatch):
    import rerun as rr

    opened = []
    monkeypatch.setattr(rr.RecordingStream, "spawn", lambda self, **options: opened.append(options))
    assert view_shards([str(shards)], limit=2)["counts"]["samples"] == 2
    assert len(opened) == 1


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    for name in ("missing/a.rrd", "a.rrd.txt"):
        result = CliRunner().invoke(view, ["no shards here", "--save", str(tmp_path / name)])
        assert isinstance(result.exception, DataError)
        assert "cannot be written" in str(result.exception)


def test_what_is_not_shown_is_said(shards, tmp_path):
    shown = view_shards([str(shards)], save=tmp_path / "a.rrd", start=5, limit=3)
    assert shown["counts"]["samples"] == 3
    assert shown["notes"] == ["10 of 13 samples are not shown"]
    with pytest.raises(DataError, match="no such sample"):
        view_shards([str(shards)], save=tmp_path / "a.rrd", start=13)


# ------------------------------------------------------------------------------------------------ episodes


def write_episode(path: Path, robot: str = "ur5e") -> np.ndarray:
    """Two seconds of standing still at different places, with one chunk; returns the chunk."""
    anchors = np.stack([matrix_to_pose7(np.eye(4)), matrix_to_pose7(np.eye(4))])
    anchors[0, :3], anchors[1, :3] = (0.4, 0.1, 0.3), (0.3, -0.2, 0.25)
    half = np.ascontiguousarray(simplejpeg.decode_jpeg(JPEGS[0], "RGB")[:, :384])
    jpeg = simplejpeg.encode_jpeg(half, colorspace="RGB")
    chunk = smooth_chunks(1, 5)[0]
    metadata = EpisodeMetadata(
        robot=robot,
        config_hash="x",
        source="twin",
        fps=30.0,
        start_time="2026-01-31T12:00:00+00:00",
        start_time_s=START_S,
    )
    with EpisodeWriter(path, metadata) as writer:
        writer.append("/instruction", START_S, instruction="Pick up the apple.")
        for i in range(10):
            time_s = START_S + i / 5
            for number, arm in enumerate(("right", "left")):
                writer.append(f"/{arm}/measured/pose", time_s, pose_base_tcp=anchors[number])
                writer.append(f"/{arm}/measured/gripper", time_s, width_m=0.01 * i)
            for camera in ("left_wrist", "right_wrist"):
                writer.append(f"/{camera}/image", time_s + 0.07, jpeg=jpeg, capture_time_s=time_s)
        times = np.array([START_S, START_S])
        values = {"anchor_time_s": times, "anchor_pose_base_tcp": anchors, "observation_id": "0"}
        writer.append("/policy/chunk", START_S + 0.2, actions=chunk, **values)
        writer.append("/events", START_S + 1, name="stop", text="done")
    return chunk


def test_an_episode_becomes_images_poses_widths_chunks_and_texts(tmp_path):
    path, out = tmp_path / "episode.mcap", tmp_path / "episode.rrd"
    actions = write_episode(path)
    result = CliRunner().invoke(view, [str(path), "--save", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_bytes()[:4] == MAGIC
    recording = Recording(out)
    assert recording.rows["/left_wrist"] == recording.rows["/right_wrist"] == 10
    assert recording.rows["/right/measured/tcp"] == recording.rows["/widths/left_measured"] == 10
    assert {"/left/measured/trajectory", "/instruction", "/events"} <= set(recording.rows)
    poses = [place for cell in recording.column("/left/measured/tcp", "translation") for place in cell or []]
    np.testing.assert_allclose(poses, np.tile([0.3, -0.2, 0.25], (10, 1)), rtol=1e-6)

    # the path of the TCP is the one that the executor would drive
    camera_times = {"left_wrist": START_S, "right_wrist": START_S}
    arm_times: Any = {"left": START_S, "right": START_S}
    chunk = ActionChunk(actions=actions, anchor_time_s=arm_times, observation_id="0", capture_time_s=camera_times)
    expected = chunk_to_tcp(chunk, PolicyFrames.published("ur5e")).poses_anchor_tcp["right"][:, :3, 3] + [0.4, 0.1, 0.3]
    (strip,) = [strip for cell in recording.column("/right/chunk", "strips") for strip in cell or []]
    np.testing.assert_allclose(np.array(strip)[1:], expected, atol=1e-6)
    np.testing.assert_allclose(strip[0], np.asarray(pose7_to_matrix(np.array([0.4, 0.1, 0.3, 1, 0, 0, 0.0])))[:3, 3])


def test_an_episode_of_an_unknown_robot_needs_a_name(tmp_path):
    path, out = tmp_path / "episode.mcap", tmp_path / "episode.rrd"
    write_episode(path, robot="prototype")
    with pytest.raises(DataError, match="--robot ur5e"):
        view_episode(path, save=out)
    assert not out.exists()
    assert view_episode(path, save=out, robot="fr3")["counts"]["policy/chunk"] == 1


def test_bad_arguments_are_refused_before_anything_is_read(shards, tmp_path):
    for save in (tmp_path / "x.rdd", tmp_path / "missing" / "x.rrd"):
        result = CliRunner().invoke(view, [str(shards), "--save", str(save)])
        assert isinstance(result.exception, DataError)
    result = CliRunner().invoke(view, ["a.mcap", "b.mcap"])
    assert result.exit_code == 2
    assert "an episode is shown alone" in result.output
