"""UMI replay buffers: zipped and not, compressed images and videos, and what is wrong with broken ones."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
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
from recorded_motion import good_images
from zarr.storage import ZipStore

from rdt2_jax.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "dataset" / "io.npz"
ENDS = [40, 66, 91, 122, 177]
TOLD = UmiZarrOptions(instruction="Do it.", fps=30)
TIMED = UmiZarrOptions(instruction="Do it.")
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
            # As zarr did by default when the public buffers were written: chunks of zeros are chunks all the same.
            settings["config"] = {"write_empty_chunks": True}
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
        image = next(good_images(recording.cameras[f"{arm}_wrist"].frames, [3]))
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
    reader = UmiZarrReader(folder, TIMED, Latencies(camera_s=0.07, pose_s=0.01, gripper_s=0.02))
    recording = pickle.loads(pickle.dumps(reader)).load(reader.episodes()[1])
    for track, latency_s in (
        (recording.cameras["left_wrist"], 0.07),
        (recording.poses["left"], 0.01),
        (recording.widths["left"], 0.02),
    ):
        np.testing.assert_allclose(track.time_s, time_s[40:66] - latency_s)
    assert recording.instructions == [(recording.cameras["right_wrist"].time_s[0], "Do it.")]
    assert np.flatnonzero(~recording.widths["left"].valid).tolist() == [10]
    assert recording.widths["right"].valid.all()
    one = write_buffer(tmp_path / "one.zarr", {**arrays, "data/gripper_width_mask": mask[:, 1]})
    recording = UmiZarrReader(one, UmiZarrOptions(instruction="Do it.", fps=20)).load(reader.episodes()[1])
    assert [np.flatnonzero(~recording.widths[arm].valid).tolist() for arm in ("right", "left")] == [[10], [10]]
    assert recording.poses["left"].time_s[20] == pytest.approx(1.0)


def test_instructions_of_each_episode(zipped: Path, tmp_path: Path) -> None:
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(["One.", [[0, "Two."], [0.5, "Three."]], None, "Four.", " "]))
    options = UmiZarrOptions(instructions=path, fps=30)
    reader = UmiZarrReader(zipped, options)
    references = reader.episodes()
    assert reader.load(references[1]).instructions == [(0.0, "Two."), (0.5, "Three.")]
    late = UmiZarrReader(zipped, options, Latencies(camera_s=0.07))
    assert late.load(references[1]).instructions == [(-0.07, "Two."), (pytest.approx(0.43), "Three.")]
    for episode in (2, 4):
        with pytest.raises(SampleError) as caught:
            reader.load(references[episode])
        assert caught.value.reason == "unknown-instruction"
    report = convert(reader, tmp_path / "out", ConvertOptions(), runner=HERE)
    assert report.problems.counts() == {"unknown-instruction": 2}
    assert json.loads((tmp_path / "out" / "instructions.json").read_text()) == {"0": "One.", "1": "Two.", "2": "Four."}
    path.write_text('["One."]')
    with pytest.raises(DataError, match="5 entries"):
        UmiZarrReader(zipped, options).episodes()
    path.write_text(json.dumps([[[0, "One."], [0, "Two."]]] + 4 * ["Three."]))
    with pytest.raises(SampleError, match="with rising times"):
        UmiZarrReader(zipped, options).load(references[0])


def test_a_rate_is_neither_guessed_nor_put_in_the_place_of_times(zipped: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)does not say when.*59\.94"):
        UmiZarrReader(zipped, TIMED).episodes()
    arrays = {**buffer_arrays(images=False), "data/timestamp": np.arange(177) / 60}
    with pytest.raises(DataError, match=r"(?s)timestamps of its own.*--fps 30"):
        UmiZarrReader(write_buffer(tmp_path / "b.zarr", arrays), TOLD).episodes()


def test_a_buffer_is_opened_once_and_again_in_each_copy(zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    whole = zarr.open_group
    monkeypatch.setattr(zarr, "open_group", lambda *args, **options: opened.append(1) or whole(*args, **options))
    reader = UmiZarrReader(zipped, TOLD)
    recordings = [reader.load(reference) for reference in reader.episodes()]
    for recording in recordings:
        assert len(list(recording.cameras["left_wrist"].frames.read([0, 2]))) == 2
    assert len(opened) == 1
    copy = pickle.loads(pickle.dumps(reader))
    for reference in reader.episodes():
        copy.load(reference)
    assert len(opened) == 2


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
        images = list(good_images(recording.cameras[camera].frames, [0, 7, 54]))
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
    for options in (UmiZarrOptions(fps=30), UmiZarrOptions(instruction="One.", instructions=tmp_path / "i.json")):
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
    assert not list((tmp_path / "out").glob("*.tar"))


def test_damaged_rows_and_images_are_counted(tmp_path: Path) -> None:
    time_s = np.arange(177) / 30
    time_s[10] = 0.0
    arrays = {**buffer_arrays(), "data/timestamp": time_s}
    folder = write_buffer(tmp_path / "b.zarr", arrays, jpeg_xl())
    (folder / "data" / "camera0_rgb" / "130.0.0.0").write_bytes(b"no image")
    (folder / "data" / "camera1_rgb" / "131.0.0.0").unlink()
    reader = UmiZarrReader(folder, TIMED)
    seen = reader.load(reader.episodes()[4]).cameras["right_wrist"].frames
    image, last = good_images(seen, [7, 9])
    _, problem, _ = seen.read([7, 8, 9])
    assert isinstance(problem, SampleError)
    assert np.array_equal(image, small_image(0, 129, (32, 32)))
    assert np.array_equal(last, small_image(0, 131, (32, 32)))
    report = convert(reader, tmp_path / "out", ConvertOptions(), runner=HERE, hide=str(tmp_path))
    assert report.problems.counts() == {"bad-recording": 2, "bad-time": 1}
    text = report.problems.text()
    assert "episode_000000, poses of right" in text
    assert "b.zarr, data/camera0_rgb, rows 130 to 131" in text
    assert "b.zarr, data/camera1_rgb: a chunk of an array is missing, expected chunk 131.0.0.0" in text
    assert str(tmp_path) not in text
    assert report.samples == 2 + 1 + 7 + 31 - 2


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("robot0_eef_pos", "zarr"),
        ("robot1_eef_rot_axis_angle", "zarr.zip"),
        ("robot1_gripper_width", "zarr"),
        ("timestamp", "zarr.zip"),
        ("gripper_width_mask", "zarr"),
    ],
)
def test_numbers_whose_chunk_is_missing_are_no_zeros(tmp_path: Path, name: str, suffix: str) -> None:
    arrays = {**buffer_arrays(images=False), "data/timestamp": 1 + np.arange(177) / 60}
    arrays["data/gripper_width_mask"] = np.zeros((177, 2), bool)
    for camera in (0, 1):
        arrays[f"data/camera{camera}_rgb"] = np.ones((177, 2, 2, 3), np.uint8)
    whole = write_buffer(tmp_path / "whole.zarr", arrays)
    array = zarr.open_group(whole, mode="a")["data"].create_array(  # type: ignore[union-attr]
        name, shape=arrays[f"data/{name}"].shape, dtype=float, chunks=(50, 1)[: arrays[f"data/{name}"].ndim],
        overwrite=True, config={"write_empty_chunks": True},
    )  # fmt: skip
    array[:] = arrays[f"data/{name}"]
    gone = sorted((whole / "data" / name).glob("1*"))[-1]  # rows 50 to 99
    gone.unlink()
    path = tmp_path / f"b.{suffix}"
    if suffix == "zarr":
        whole.rename(path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for file in whole.rglob("*"):
                archive.write(file, file.relative_to(whole))
    reader = UmiZarrReader(path, TIMED)
    references = reader.episodes()
    for episode, rows in enumerate(zip([0, *ENDS], ENDS, strict=False)):
        if rows[1] > 50 and rows[0] < 100:
            with pytest.raises(
                SampleError, match=rf"(?s)chunk of an array is missing.*data/{name}.*{gone.name}"
            ) as caught:
                reader.load(references[episode])
            assert caught.value.reason == "bad-recording"
        else:
            assert reader.load(references[episode]).name == references[episode].name


def test_arrays_that_are_shorter_than_the_episodes_are_named(tmp_path: Path) -> None:
    for name in ("data/robot1_eef_pos", "data/camera1_rgb"):
        arrays = buffer_arrays()
        arrays[name] = arrays[name][:150]
        reader = UmiZarrReader(write_buffer(tmp_path / f"{name[-3:]}.zarr", arrays), TOLD)
        assert reader.load(reader.episodes()[3]).name == "episode_000003"
        with pytest.raises(SampleError, match=f"(?s){name}.*at least 177") as caught:
            reader.load(reader.episodes()[4])
        assert caught.value.reason == "wrong-shape"


def test_the_fingerprint_follows_files(tmp_path: Path) -> None:
    folder = write_buffer(tmp_path / "b.zarr", buffer_arrays(images=False))
    path = tmp_path / "i.json"
    path.write_text("[]")
    first = UmiZarrReader(folder, TOLD).fingerprint()
    assert first == UmiZarrReader(folder, TOLD, Latencies(pose_s=0.1)).fingerprint()
    others = [UmiZarrReader(folder, UmiZarrOptions(instructions=path)).fingerprint()]
    path.write_text("[1]")
    others.append(UmiZarrReader(folder, UmiZarrOptions(instructions=path)).fingerprint())
    entry = {"camera0_rgb": "v0.mp4", "camera1_rgb": str(tmp_path / "v1.mp4")}
    (tmp_path / "videos.json").write_text(json.dumps([entry, {}]))
    for change in (lambda: None, lambda: (tmp_path / "v0.mp4").write_text("0"), lambda: (tmp_path / "v1.mp4").touch()):
        change()
        others.append(UmiZarrReader(folder, TOLD).fingerprint())
    (tmp_path / "v0.mp4").write_text("00")
    others.append(UmiZarrReader(folder, TOLD).fingerprint())
    next((folder / "data" / "robot0_eef_pos").iterdir()).write_bytes(b"x")
    others.append(UmiZarrReader(folder, TOLD).fingerprint())
    assert len({first, *others}) == 8


def test_the_settings_name_options_and_latencies(zipped: Path, tmp_path: Path) -> None:
    settings = UmiZarrReader(zipped, TOLD, Latencies(pose_s=0.1)).settings()
    assert settings["options"] == {"fps": 30.0, "instruction": "Do it."}
    assert settings["latencies"]["pose_s"] == 0.1
    other = UmiZarrOptions(instructions=tmp_path / "elsewhere.json")
    assert str(tmp_path) not in json.dumps(UmiZarrReader(zipped, other).settings())
