"""UMI replay buffers: zipped and not, compressed images and videos, and what is wrong with broken ones."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from convert_sources import small_image
from rdt2_data.converters.chunks import cut_chunks, select_frames
from rdt2_data.converters.convert import convert
from rdt2_data.converters.options import ChunkOptions, ConvertOptions, Latencies
from rdt2_data.converters.runners import LocalRunner
from rdt2_data.converters.umi_zarr import UmiZarrOptions, UmiZarrReader
from rdt2_data.problems import SampleError, Tally
from zarr.storage import ZipStore

from rdt2_jax.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "dataset" / "io.npz"
ENDS = [40, 66, 91, 122, 177]
TOLD = UmiZarrOptions(instruction="Do it.")
HERE = LocalRunner(workers=1)


def buffer_arrays(images: bool = True) -> dict[str, np.ndarray]:
    """The golden replay buffer, with small images."""
    with np.load(GOLDEN, allow_pickle=False) as archive:
        names = [f"robot{n}_{part}" for n in (0, 1) for part in ("eef_pos", "eef_rot_axis_angle", "gripper_width")]
        arrays = {f"data/{name}": archive[f"buffer/{name}"] for name in names}
        arrays["meta/episode_ends"] = archive["buffer/episode_ends"]
    if images:
        for camera in (0, 1):
            arrays[f"data/camera{camera}_rgb"] = np.stack([small_image(camera, row, (32, 32)) for row in range(177)])
    return arrays


def write_buffer(path: Path, arrays: dict[str, np.ndarray], compressor: Any = None) -> Path:
    store = ZipStore(path, mode="w") if path.suffix == ".zip" else path
    group = zarr.open_group(store, mode="w", zarr_format=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate name")  # zarr writes attributes twice into a zip file
        for name, array in arrays.items():
            is_image = name.endswith("_rgb")
            chunks = (1, *array.shape[1:]) if is_image else array.shape
            settings = {"compressors": compressor} if is_image else {}
            group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks, **settings)[:] = array
    if path.suffix == ".zip":
        store.close()  # type: ignore[union-attr]
    return path


def jpeg_xl() -> Any:
    from imagecodecs.numcodecs import Jpegxl, register_codecs

    register_codecs(verbose=False)
    return Jpegxl(lossless=True)


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_buffer(tmp_path_factory.mktemp("umi") / "buffer.zarr.zip", buffer_arrays(), jpeg_xl())


def all_actions(reader: UmiZarrReader, episode: int) -> np.ndarray:
    recording = reader.load(reader.episodes()[episode])
    return cut_chunks(recording, select_frames(recording, ChunkOptions(), Tally(strict=True))).actions


# ------------------------------------------------------------------------------------------------ reading


def test_the_right_hand_is_number_zero(zipped: Path) -> None:
    reader = UmiZarrReader(zipped, TOLD)
    assert [reference.name for reference in reader.episodes()] == [f"episode_00000{index}" for index in range(5)]
    recording = reader.load(reader.episodes()[1])
    arrays = buffer_arrays()
    for number, arm in enumerate(("right", "left")):
        position = recording.poses[arm].pose_world_policy[:, :3, 3]
        assert np.array_equal(position, arrays[f"data/robot{number}_eef_pos"][40:66].astype(np.float64))
        assert np.array_equal(recording.widths[arm].width, arrays[f"data/robot{number}_gripper_width"][40:66, 0])
        image = next(iter(recording.cameras[f"{arm}_wrist"].frames.read([3])))
        assert np.array_equal(image, small_image(number, 43, (32, 32)))
    np.testing.assert_allclose(recording.poses["right"].time_s, np.arange(26) / 30)
    assert recording.instructions == [(0.0, "Do it.")]


def test_the_chunks_are_those_of_the_public_dataset(zipped: Path) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        reader = UmiZarrReader(zipped, TOLD)
        by_episode = {episode: all_actions(reader, episode) for episode in (1, 2, 4)}
        for pick, exact in zip(golden["dataset/pick"], golden["dataset/action_rel_20_exact_f64"], strict=True):
            current, start, stop, _ = golden["dataset/train_indices"][pick]
            ours = by_episode[ENDS.index(stop)][current - start]
            np.testing.assert_allclose(ours, exact, atol=1e-6)


def test_folders_timestamps_masks_and_latencies(tmp_path: Path) -> None:
    arrays = buffer_arrays()
    time_s = 5.0 + np.arange(177) / 60
    mask = np.ones((177, 2), bool)
    mask[50, 1] = False
    folder = write_buffer(tmp_path / "b.zarr", {**arrays, "data/timestamp": time_s, "data/gripper_width_mask": mask})
    reader = UmiZarrReader(folder, TOLD, Latencies(camera_s=0.07, pose_s=0.01, gripper_s=0.02))
    recording = pickle.loads(pickle.dumps(reader)).load(reader.episodes()[1])
    for track, latency_s in (
        (recording.cameras["left_wrist"], 0.07),
        (recording.poses["left"], 0.01),
        (recording.widths["left"], 0.02),
    ):
        np.testing.assert_allclose(track.time_s, time_s[40:66] - latency_s)
    assert np.flatnonzero(~recording.widths["left"].valid).tolist() == [10]
    assert recording.widths["right"].valid.all()
    one = write_buffer(tmp_path / "one.zarr", {**arrays, "data/gripper_width_mask": mask[:, 1]})
    recording = UmiZarrReader(one, UmiZarrOptions(instruction="Do it.", fps=20)).load(reader.episodes()[1])
    assert [np.flatnonzero(~recording.widths[arm].valid).tolist() for arm in ("right", "left")] == [[10], [10]]
    assert recording.poses["left"].time_s[20] == pytest.approx(1.0)


def test_instructions_of_each_episode(zipped: Path, tmp_path: Path) -> None:
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(["One.", [[0, "Two."], [0.5, "Three."]], None, "Four.", " "]))
    reader = UmiZarrReader(zipped, UmiZarrOptions(instructions=path))
    references = reader.episodes()
    assert reader.load(references[1]).instructions == [(0.0, "Two."), (0.5, "Three.")]
    for episode in (2, 4):
        with pytest.raises(SampleError) as caught:
            reader.load(references[episode])
        assert caught.value.reason == "unknown-instruction"
    report = convert(reader, tmp_path / "out", ConvertOptions(), runner=HERE)
    assert report.problems.counts() == {"unknown-instruction": 2}
    assert json.loads((tmp_path / "out" / "instructions.json").read_text()) == {"0": "One.", "1": "Two.", "2": "Four."}
    path.write_text('["One."]')
    with pytest.raises(DataError, match="5 entries"):
        UmiZarrReader(zipped, UmiZarrOptions(instructions=path)).episodes()


def test_videos_beside_the_buffer(tmp_path: Path) -> None:
    import av

    for camera in (0, 1):
        with av.open(str(tmp_path / f"v{camera}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=30)
            stream.width = stream.height = 32
            stream.pix_fmt = "bgr0"
            for row in range(55):
                image = small_image(camera, 122 + row, (32, 32))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())
    entry = {"camera0_rgb": "v0.mkv", "camera1_rgb": "v1.mkv"}
    (tmp_path / "videos.json").write_text(json.dumps([entry, {}]))
    arrays = buffer_arrays(images=False)
    arrays["meta/episode_video_id"] = np.array([1, 1, 1, 1, 0])
    arrays["data/rgb"] = np.concatenate([np.zeros(122, np.int64), np.arange(55)])
    reader = UmiZarrReader(write_buffer(tmp_path / "buffer.zarr.zip", arrays), TOLD)
    recording = reader.load(reader.episodes()[4])
    for number, camera in enumerate(("right_wrist", "left_wrist")):
        images = list(recording.cameras[camera].frames.read([0, 7, 54]))
        for row, image in zip((0, 7, 54), images, strict=True):
            assert np.array_equal(image, small_image(number, 122 + row, (32, 32)))
    report = convert(reader, tmp_path / "out", ConvertOptions(), runner=HERE)
    assert (report.samples, report.problems.counts()) == (31, {"bad-recording": 4})


# --------------------------------------------------------------------------------------------- bad sources


def test_what_is_no_replay_buffer(zipped: Path, tmp_path: Path) -> None:
    (tmp_path / "text.zarr.zip").write_text("no zip file")
    (tmp_path / "empty").mkdir()
    for name in ("text.zarr.zip", "empty"):
        with pytest.raises(DataError, match="not a replay buffer"):
            UmiZarrReader(tmp_path / name, TOLD).episodes()
    with pytest.raises(DataError, match="no such replay buffer"):
        UmiZarrReader(tmp_path / "missing.zarr.zip", TOLD)
    for options in (UmiZarrOptions(), UmiZarrOptions(instruction="One.", instructions=tmp_path / "i.json")):
        with pytest.raises(DataError, match="holds no instructions"):
            UmiZarrReader(zipped, options)


def changed_buffers() -> dict[str, tuple[dict[str, np.ndarray | None], str]]:
    return {
        "no poses": ({"data/robot1_eef_pos": None}, "data/robot1_eef_pos"),
        "no ends": ({"meta/episode_ends": None}, "meta/episode_ends"),
        "no images": ({"data/camera1_rgb": None}, "no images"),
        "ends beyond": ({"meta/episode_ends": np.array([40, 178])}, "up to 177 rows"),
        "ends that fall": ({"meta/episode_ends": np.array([40, 30])}, "numbers that increase"),
    }


@pytest.mark.parametrize("name", changed_buffers())
def test_missing_arrays_and_wrong_ends_stop_everything(tmp_path: Path, name: str) -> None:
    changes, named = changed_buffers()[name]
    arrays = {key: array for key, array in {**buffer_arrays(), **changes}.items() if array is not None}
    reader = UmiZarrReader(write_buffer(tmp_path / "b.zarr", arrays), TOLD)
    with pytest.raises(DataError, match=named) as caught:
        convert(reader, tmp_path / "out", ConvertOptions(), runner=HERE)
    assert "b.zarr" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_damaged_rows_and_images_are_counted(tmp_path: Path) -> None:
    time_s = np.arange(177) / 30
    time_s[10] = 0.0
    arrays = {**buffer_arrays(), "data/timestamp": time_s}
    folder = write_buffer(tmp_path / "b.zarr", arrays, jpeg_xl())
    (folder / "data" / "camera0_rgb" / "130.0.0.0").write_bytes(b"no image")
    (folder / "data" / "camera1_rgb" / "131.0.0.0").unlink()  # zarr reads a missing chunk as zeros: a black image
    reader = UmiZarrReader(folder, TOLD)
    report = convert(reader, tmp_path / "out", ConvertOptions(), runner=HERE, hide=str(tmp_path))
    assert report.problems.counts() == {"bad-time": 1, "corrupt-jpeg": 1, "blank-image": 1}
    text = report.problems.text()
    assert "episode_000000, poses of right" in text
    assert "b.zarr, data/camera0_rgb, row 130" in text
    assert str(tmp_path) not in text
    assert report.samples == 2 + 1 + 7 + 31 - 2


def test_the_fingerprint_follows_files_and_options(tmp_path: Path) -> None:
    folder = write_buffer(tmp_path / "b.zarr", buffer_arrays(images=False))
    path = tmp_path / "i.json"
    path.write_text("[]")
    first = UmiZarrReader(folder, TOLD).fingerprint()
    assert first == UmiZarrReader(folder, TOLD).fingerprint()
    others = {
        UmiZarrReader(folder, UmiZarrOptions(instruction="Do that.")).fingerprint(),
        UmiZarrReader(folder, TOLD, Latencies(pose_s=0.1)).fingerprint(),
        UmiZarrReader(folder, UmiZarrOptions(instructions=path)).fingerprint(),
    }
    path.write_text("[1]")
    others.add(UmiZarrReader(folder, UmiZarrOptions(instructions=path)).fingerprint())
    next((folder / "data" / "robot0_eef_pos").iterdir()).write_bytes(b"x")
    others.add(UmiZarrReader(folder, TOLD).fingerprint())
    assert len({first, *others}) == 6
