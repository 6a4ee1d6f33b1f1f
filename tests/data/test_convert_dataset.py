"""From recordings to a dataset: what is in it, what a second start does, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from convert_sources import SmallFrames, SmallReader, dataset_files, read_samples, small_image
from rdt2_data.converters.chunks import AFTER, cut_chunks, select_frames
from rdt2_data.converters.convert import convert
from rdt2_data.converters.options import ChunkOptions, ConvertOptions, ImageOptions
from rdt2_data.converters.recording import CameraTrack, EpisodeRef, Recording
from rdt2_data.converters.runners import LocalRunner, Shared
from rdt2_data.converters.shard import ShardJob
from rdt2_data.dataset_config import load_dataset
from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import decode_image, read_action, read_action_token, read_meta
from rdt2_data.shards.source import open_source

from rdt2_jax.errors import DataError, Rdt2Error

HERE = LocalRunner(workers=1)
TEN = ConvertOptions(name="small", samples_per_shard=10)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "dataset"
    convert(SmallReader((40, 20, 45, 40)), folder, TEN, runner=HERE)
    return folder


# ------------------------------------------------------------------------------------- what is in it


def test_samples_carry_chunk_image_and_origin(made: Path) -> None:
    samples = read_samples(made)
    # 24 frames of each episode have no 24 frames after them; the second episode has none at all.
    assert len(samples) == 16 + 0 + 21 + 16
    assert [sample.key for sample in samples] == [f"{index:09d}" for index in range(53)]
    reader, position = SmallReader((40, 20, 45, 40)), 0
    for reference in reader.episodes():
        recording = reader.load(reference)
        selection = select_frames(recording, ChunkOptions(), Tally())
        for row, action in enumerate(cut_chunks(recording, selection).actions):
            sample = samples[position]
            position += 1
            assert np.array_equal(read_action(sample), action)
            assert read_action_token(sample) is None
            time_s = 100.0 * reference.index + row / 30
            assert read_meta(sample) == {
                "sub_task_instruction_key": {"episode_0": "0", "episode_2": "1", "episode_3": "0"}[reference.name],
                "episode": reference.name,
                "frame": row,
                "capture_time_s": pytest.approx({"left_wrist": time_s, "right_wrist": time_s}),
            }
    image = decode_image(samples[20]).astype(int)  # row 4 of episode 2: seeds 4 (left) and 5 (right)
    for half, seed in ((image[:, :384], 4), (image[:, 384:], 5)):
        expected = small_image(seed, 4)[::12, ::16]
        assert np.abs(half[48::96, 48::96] - expected).max() < 12


def test_instructions_configuration_manifest_and_card(made: Path) -> None:
    assert json.loads((made / "instructions.json").read_text()) == {"0": "Do 0.", "1": "Do 2."}
    assert yaml.safe_load((made / "dataset.yaml").read_text()) == {
        "name": "small",
        "type": "single",
        "shards_dir": ".",
        "kwargs": {"instruction_path": "instructions.json", "normalizer_path": None},
    }
    manifest = json.loads((made / "manifest.json").read_text())
    assert [(shard["shard"], shard["samples"]) for shard in manifest["shards"]] == [
        *((f"shard-{index:06d}.tar", 10) for index in range(5)),
        ("shard-000005.tar", 3),
    ]
    checksums = dataset_files(made)
    for shard in manifest["shards"]:
        assert shard["sha256"] == checksums[shard["shard"]]
        assert shard["bytes"] == (made / shard["shard"]).stat().st_size
    assert manifest["samples"] == 53
    assert manifest["seconds"] == pytest.approx(53 / 30, abs=1e-3)
    assert manifest["instructions"] == {"0": 32, "1": 21}
    assert manifest["left_out"] == {AFTER: 24 + 20 + 24 + 24}
    assert manifest["problems"] == {"total": 0, "reasons": {}}
    card = (made / "README.md").read_text()
    assert "| samples | 53 in 6 shards |" in card
    assert "| 1 | 21 | Do 2. |" in card
    assert f"92 x frames {AFTER}" in card
    assert not (made / "tokens").exists()


def test_the_configuration_can_be_loaded_from_anywhere(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    dataset = load_dataset(made / "dataset.yaml")
    (component,) = dataset.components
    assert len(open_source(component.shards)) == 53
    assert component.instructions is not None
    assert dataset.normalizer_path is None


def test_no_path_and_no_leftover_is_in_the_dataset(made: Path) -> None:
    for path in made.rglob("*"):
        assert not path.name.startswith(".")
        if path.suffix in (".json", ".yaml", ".md"):
            assert str(made.parent) not in path.read_text()


# -------------------------------------------------------------------------------------- second starts


def test_a_finished_conversion_is_left_alone(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.glob("shard-*")}
    files = dataset_files(made)
    report = convert(SmallReader((40, 20, 45, 40)), made, TEN, runner=HERE)
    assert (report.made, report.shards, report.samples) == (0, 6, 53)
    assert {path: path.stat().st_mtime_ns for path in made.glob("shard-*")} == before
    assert dataset_files(made) == files


def test_what_is_missing_or_cut_off_is_made_again(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    convert(SmallReader((40, 20, 45, 40)), folder, TEN, runner=HERE)
    (folder / "shard-000001.tar").unlink()
    (folder / "manifest" / "shard-000002.json").unlink()
    with open(folder / "shard-000003.tar", "r+b") as file:
        file.truncate(5000)
    (folder / "manifest" / "shard-000004.json").write_text("{")
    (folder / ".shard-000001.tar.0123456789abcdef.tmp").write_bytes(b"leftover")
    (folder / "manifest.json").unlink()
    report = convert(SmallReader((40, 20, 45, 40)), folder, TEN, runner=HERE)
    assert report.made == 4
    assert dataset_files(folder) == dataset_files(made)
    assert len(read_samples(folder)) == 53


def test_processes_make_the_same_bytes(made: Path, tmp_path: Path) -> None:
    report = convert(SmallReader((40, 20, 45, 40)), tmp_path / "dataset", TEN, runner=LocalRunner(workers=2))
    assert report.made == 6
    assert dataset_files(tmp_path / "dataset") == dataset_files(made)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"reader": SmallReader((40, 20, 45, 40), version="2")}, "the files of the source have changed"),
        ({"options": TEN.model_copy(update={"samples_per_shard": 11})}, "options.samples_per_shard: 10 before, 11 now"),
        ({"options": TEN.model_copy(update={"images": ImageOptions(jpeg_quality=90)})}, "options.images.jpeg_quality"),
        ({"settings": {"format": "other"}}, "settings.format: None before, 'other' now"),
    ],
)
def test_another_plan_is_refused(made: Path, change: dict[str, Any], named: str) -> None:
    given = {"reader": SmallReader((40, 20, 45, 40)), "options": TEN, **change}
    files = dataset_files(made)
    with pytest.raises(DataError, match="another source, or with other options") as caught:
        convert(given["reader"], made, given["options"], settings=given.get("settings"), runner=HERE)
    assert named in str(caught.value)
    assert dataset_files(made) == files


def test_strict_may_change_between_starts(made: Path) -> None:
    strict = TEN.model_copy(update={"strict": True})
    assert convert(SmallReader((40, 20, 45, 40)), made, strict, runner=HERE).made == 0


def test_verify_reads_finished_shards_again(made: Path, tmp_path: Path) -> None:
    folder, reader = tmp_path / "dataset", SmallReader((40, 20, 45, 40))
    shutil.copytree(made, folder)
    with open(folder / "shard-000002.tar", "r+b") as file:
        file.seek(5000)
        file.write(b"one bit of rust")
    assert convert(reader, folder, TEN, runner=HERE).made == 0  # the size is right
    assert convert(reader, folder, TEN, runner=HERE, verify=True).made == 1
    assert dataset_files(folder) == dataset_files(made)
    assert convert(reader, folder, TEN, runner=HERE, verify=True).made == 0


def test_a_dataset_that_is_being_made_again_has_no_manifest(made: Path, tmp_path: Path) -> None:
    folder, reader = tmp_path / "dataset", SmallReader((40, 20, 45, 40))
    shutil.copytree(made, folder)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match="no place"):
        convert(reader, folder, TEN, runner=NoPlace())
    assert not (folder / "manifest.json").exists()
    assert convert(reader, folder, TEN, runner=HERE).made == 1
    assert dataset_files(folder) == dataset_files(made)


def test_only_leftovers_of_ours_are_removed_and_only_from_our_own_conversion(made: Path, tmp_path: Path) -> None:
    folder, reader = tmp_path / "dataset", SmallReader((40, 20, 45, 40))
    shutil.copytree(made, folder)
    ours = [".shard-000001.tar.0123456789abcdef.tmp", ".shard-000001.tar.idx.0123456789abcdef.tmp",
            ".manifest.json.0123456789abcdef.tmp", "manifest/.shard-000001.json.0123456789abcdef.tmp"]  # fmt: skip
    others = [".thesis.tex.0123456789abcdef.tmp", ".shard-000001.tar.0123456789abcdef.old", ".shard-000001.tar.tmp",
              "manifest/.shard-000001.tar.0123456789abcdef.tmp"]  # fmt: skip
    for name in ours + others:
        (folder / name).touch()
    with pytest.raises(DataError, match="another source"):
        convert(replace(reader, version="2"), folder, TEN, runner=HERE)
    assert all((folder / name).exists() for name in ours)
    convert(reader, folder, TEN, runner=HERE)
    assert not any((folder / name).exists() for name in ours)
    assert all((folder / name).exists() for name in others)


# -------------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize("raising", [False, True])
def test_unreadable_images_are_counted_and_missing(tmp_path: Path, raising: bool) -> None:
    reader = SmallReader((40, 40), unreadable=(3, 4, 11), raising=raising)
    report = convert(reader, tmp_path / "dataset", TEN, runner=HERE)
    assert (report.planned, report.samples) == (32, 26)
    assert report.problems.counts() == {"corrupt-jpeg": 6}
    keys = [int(sample.key) for sample in read_samples(tmp_path / "dataset")]
    assert keys == [key for key in range(32) if key % 16 not in (3, 4, 11)]
    assert "6 x corrupt-jpeg" in (tmp_path / "dataset" / "README.md").read_text()


def test_a_shard_without_a_single_image_gives_no_archive(tmp_path: Path) -> None:
    reader = SmallReader((60,), unreadable=tuple(range(10, 20)))
    folder = tmp_path / "dataset"
    report = convert(reader, folder, TEN, runner=HERE)
    assert (report.samples, report.shards) == (26, 3)
    assert sorted(path.name for path in folder.glob("*.tar")) == [f"shard-00000{index}.tar" for index in (0, 2, 3)]
    assert convert(reader, folder, TEN, runner=HERE).made == 0
    with pytest.raises(DataError, match="not a single sample could be made"):
        convert(SmallReader((30,), unreadable=tuple(range(30))), tmp_path / "nothing", TEN, runner=HERE)


def test_strict_stops_at_the_first_problem(tmp_path: Path) -> None:
    strict = TEN.model_copy(update={"strict": True})
    with pytest.raises(SampleError, match="image 3"):
        convert(SmallReader((40,), unreadable=(3,)), tmp_path / "dataset", strict, runner=HERE)
    report = convert(SmallReader((40,), unreadable=(3,)), tmp_path / "dataset", TEN, runner=HERE)
    assert report.problems.counts() == {"corrupt-jpeg": 1}


@dataclass(frozen=True)
class OddReader(SmallReader):
    """Its second episode has times that stand still, its third black images, its fourth a left camera that stutters."""

    def load(self, episode: EpisodeRef) -> Recording:
        recording = super().load(episode)
        left = recording.cameras["left_wrist"]
        if episode.index == 1:
            time_s = recording.poses["left"].time_s.copy()
            time_s[7] = time_s[6]
            return replace(
                recording, poses={**recording.poses, "left": replace(recording.poses["left"], time_s=time_s)}
            )
        if episode.index == 2:
            left = CameraTrack(left.time_s, SmallFrames(9, black=(5, 6)))
        if episode.index == 3:
            keep = np.delete(np.arange(len(left.time_s)), 5)
            left = CameraTrack(left.time_s[keep] + 0.016, SmallFrames(9))
        return replace(recording, cameras={**recording.cameras, "left_wrist": left})


def test_bad_episodes_do_not_stop_the_others(tmp_path: Path) -> None:
    report = convert(OddReader((40, 40, 40, 40)), tmp_path / "dataset", TEN, runner=HERE)
    assert report.problems.counts() == {"blank-image": 2, "bad-time": 1}
    assert "episode_1, poses of left" in report.problems.text()
    # Left images come 16 ms late; of the right one without its own, the nearest is the one before, 17 ms away.
    assert report.samples == 16 + 0 + 14 + 15
    strict = TEN.model_copy(update={"strict": True})
    with pytest.raises(SampleError, match="row 7"):
        convert(OddReader((40, 40)), tmp_path / "strict", strict, runner=HERE)


@dataclass(frozen=True)
class FailingReader(SmallReader):
    """Cannot be read once a file is there; raises something nobody expects."""

    flag: str = ""

    def load(self, episode: EpisodeRef) -> Recording:
        if episode.index == 1 and os.path.exists(self.flag):
            raise RuntimeError("the disk is on fire")
        return super().load(episode)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_fails_is_named_and_the_others_are_made(tmp_path: Path, workers: int) -> None:
    options = TEN.model_copy(update={"samples_per_shard": 16})
    reader = FailingReader((40, 40, 40, 40), flag=str(tmp_path / "flag"))
    strict = options.model_copy(update={"strict": True})
    with pytest.raises(DataError, match="no place"):
        # A first start that plans and makes nothing, after which the source becomes unreadable.
        convert(reader, tmp_path / "dataset", options, runner=NoPlace())
    (tmp_path / "flag").touch()
    with pytest.raises(DataError, match="1 of 4 shards could not be made") as caught:
        convert(reader, tmp_path / "dataset", options, runner=LocalRunner(workers))
    assert "shard-000001: RuntimeError: the disk is on fire" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "dataset").glob("*.tar")) == [
        f"shard-00000{index}.tar" for index in (0, 2, 3)
    ]
    (tmp_path / "flag").unlink()
    assert convert(reader, tmp_path / "dataset", strict, runner=HERE).made == 1


class NoPlace:
    """A runner that can plan, but make no shards."""

    @contextmanager
    def start(self, shared: Shared) -> Iterator[Any]:
        def run(jobs: Any) -> Any:
            for job in jobs:
                if isinstance(job, ShardJob):
                    raise DataError("no place to run")
                yield job, job.perform(shared)

        yield run


def test_a_source_that_changed_is_noticed(tmp_path: Path) -> None:
    class Shrinking(SmallReader):
        def fingerprint(self) -> str:
            return "the same"

    with pytest.raises(DataError, match="no place"):
        convert(Shrinking((40,)), tmp_path / "dataset", TEN, runner=NoPlace())
    with pytest.raises(DataError, match="the source has changed"):
        convert(Shrinking((39,)), tmp_path / "dataset", TEN, runner=HERE)


# ----------------------------------------------------------------------------------------- destinations


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    reader = SmallReader((40,))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for name, what in (("file/b", "cannot be created"), ("file", "is a file"), ("full", "not of a conversion")):
        with pytest.raises(Rdt2Error, match=what):
            convert(reader, tmp_path / name, TEN, runner=HERE)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_before_its_plan_leaves_a_place_that_can_be_used(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / ".plan.json.0123456789abcdef.tmp").write_bytes(b"half")
    convert(SmallReader((40,)), folder, TEN, runner=HERE)
    assert not [path for path in folder.rglob(".*")]


def test_two_conversions_do_not_share_a_destination(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another conversion is writing"):
        convert(SmallReader((40,)), folder, TEN, runner=HERE)
    os.close(descriptor)
    assert convert(SmallReader((40,)), folder, TEN, runner=HERE).made == 2


def test_a_plan_that_cannot_be_read_and_a_source_without_samples(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="the plan cannot be read"):
        convert(SmallReader((40,)), tmp_path / "dataset", TEN, runner=HERE)
    with pytest.raises(DataError, match="not a single sample") as caught:
        convert(SmallReader((20, 24)), tmp_path / "short", TEN, runner=HERE, where="/recordings/short")
    assert "where: /recordings/short" in str(caught.value)
    assert f"44 frames {AFTER}" in str(caught.value)


def test_episodes_of_one_name_are_refused(tmp_path: Path) -> None:
    class Twins(SmallReader):
        def episodes(self) -> list[EpisodeRef]:
            return [EpisodeRef("twin", 0), EpisodeRef("twin", 1)]

    with pytest.raises(DataError, match="same name"):
        convert(Twins((40, 40)), tmp_path / "dataset", TEN, runner=HERE)
