"""Every kind of bad input is counted, named and reported, and stops a strict check; a clean dataset is clean."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from click.testing import CliRunner, Result
from look_shards import JPEGS, good_samples, meta_times, write_shards
from rdt2_data.check import CheckOptions, check_dataset, chosen_samples, grey_entropy_bits
from rdt2_data.commands_look import check
from rdt2_data.instructions import Instructions
from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import COMPOSITE_SHAPE, Turn, question_members
from rdt2_data.shards.source import open_source

from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.errors import CheckpointError

COUNT = 24
Members = dict[str, bytes]


def run(folder: Path, *more: str) -> Result:
    arguments = [str(folder), "--instructions", str(folder / "instructions.json"), *more]
    return CliRunner().invoke(check, arguments)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def edited_npy(data: bytes, edit: Callable[[np.ndarray], Any]) -> bytes:
    array = np.load(io.BytesIO(data))
    changed = edit(array)
    return npy(array if changed is None else changed)


def with_meta(members: Members, **changes: Any) -> None:
    members["meta.json"] = json.dumps({**json.loads(members["meta.json"]), **changes}).encode()


# ---------------------------------------------------------------------------------- faults of one sample


def no_image(members: Members) -> None:
    del members["image.jpg"]


def cut_jpeg(members: Members) -> None:
    members["image.jpg"] = members["image.jpg"][:-3000]


def double_precision(members: Members) -> None:
    members["action.npy"] = edited_npy(members["action.npy"], lambda a: a.astype(np.float64))


def pickled(members: Members) -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    members["action.npy"] = stream.getvalue()


def long_rotation(members: Members) -> None:
    members["action.npy"] = edited_npy(
        members["action.npy"], lambda a: a * np.where(np.arange(20) == 13, 1.01, 1).astype("f4")
    )


def unknown_key(members: Members) -> None:
    with_meta(members, sub_task_instruction_key="no such key")


def unreadable_key(members: Members) -> None:
    with_meta(members, sub_task_instruction_key=["0"])


def backwards(members: Members) -> None:
    with_meta(members, **meta_times(0, 1))


def late(members: Members) -> None:
    with_meta(members, **meta_times(0, 9))


def skewed(members: Members) -> None:
    times = meta_times(0, 5)["capture_time_s"]
    with_meta(members, capture_time_s={**times, "right_wrist": times["right_wrist"] + 0.02})


def odd_times(members: Members) -> None:
    with_meta(members, capture_time_s={"left_wrist": "noon"})


def covered_lens(members: Members) -> None:
    image = simplejpeg.decode_jpeg(members["image.jpg"], "RGB")
    image[:, : COMPOSITE_SHAPE[1] // 2] = 3
    members["image.jpg"] = simplejpeg.encode_jpeg(image, quality=90, colorspace="RGB")


def small_image(members: Members) -> None:
    members["image.jpg"] = simplejpeg.encode_jpeg(np.zeros((8, 16, 3), np.uint8), colorspace="RGB")


def large_token(members: Members) -> None:
    members["action_token.npy"] = edited_npy(members["action_token.npy"], lambda t: t.__setitem__(2, 1024))


def negative_position_token(members: Members) -> None:
    members["action_token.npy"] = edited_npy(members["action_token.npy"], lambda t: t.__setitem__(23, -1))


SAMPLE_FAULTS = {
    no_image: "missing-member",
    cut_jpeg: "corrupt-jpeg",
    double_precision: "wrong-dtype",
    pickled: "corrupt-npy",
    long_rotation: "bad-rotation",
    unknown_key: "unknown-instruction",
    unreadable_key: "bad-meta",
    backwards: "bad-time",
    late: "time-gap",
    skewed: "camera-skew",
    odd_times: "bad-meta",
    covered_lens: "blank-image",
    small_image: "wrong-image",
    large_token: "bad-token",
    negative_position_token: "bad-token",
}


def break_sample(folder: Path, fault: Callable[[Members], None]) -> Path:
    samples = good_samples(COUNT)
    fault(samples[5])
    return write_shards(folder, samples)


# --------------------------------------------------------------------------------- faults of a container


def append_raw(path: Path, name: str, data: bytes) -> None:
    with tarfile.open(path, "a") as archive:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        archive.addfile(header, io.BytesIO(data))


def cut_off(folder: Path) -> Path:
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-12_000])
    return path


def repeat_key(folder: Path) -> Path:
    path = folder / "shard-000001.tar"
    append_raw(path, "000000010.image.jpg", JPEGS[0])
    return path


def no_sample(folder: Path) -> Path:
    path = folder / "shard-000001.tar"
    with tarfile.open(path, "w"):
        pass
    return path


def no_byte(folder: Path) -> Path:
    path = folder / "shard-000001.tar"
    path.write_bytes(b"")
    return path


CONTAINER_FAULTS = {
    cut_off: "truncated-shard",
    repeat_key: "duplicate-key",
    no_sample: "empty-shard",
    no_byte: "empty-shard",
}


# ----------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("clean"), good_samples(COUNT))


def test_a_clean_dataset_is_clean(clean, tmp_path):
    report = tmp_path / "report.json"
    result = run(clean, "--report", str(report))
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert found["clean"]
    assert (found["samples"], found["checked"], found["with_tokens"], found["with_times"]) == (COUNT,) * 4
    assert found["image_entropy_bits"]["left_wrist"]["min"] > 5
    assert "no problems" in result.output


@pytest.mark.parametrize(("fault", "reason"), SAMPLE_FAULTS.items(), ids=lambda v: getattr(v, "__name__", v))
def test_a_bad_sample_is_counted_named_reported_and_stops_a_strict_check(fault, reason, tmp_path):
    folder = break_sample(tmp_path / "shards", fault)
    result = run(folder, "--json")
    assert result.exit_code == 1
    problems = json.loads(result.output)["problems"]["reasons"]
    assert reason in problems
    # a frame that jumps ahead is followed by one that seems to come before it
    assert sum(entry["count"] for entry in problems.values()) <= (4 if reason in ("bad-time", "time-gap") else 1)
    places = ("sample 000000005", "sample 000000006")
    assert any(place in problems[reason]["examples"][0] for place in places)

    options = CheckOptions(instructions=Instructions.load(folder / "instructions.json"))
    with pytest.raises(SampleError) as caught:
        check_dataset(open_source(folder, tally=Tally(strict=True)), options)
    assert caught.value.reason == reason
    strict = run(folder, "--strict", "--json")
    assert strict.exit_code == 1
    assert json.loads(strict.output)["stopped_at"]["reason"] == reason


@pytest.mark.parametrize(("fault", "reason"), CONTAINER_FAULTS.items(), ids=lambda v: getattr(v, "__name__", v))
def test_a_bad_archive_is_counted_named_reported_and_stops_a_strict_check(fault, reason, tmp_path):
    folder = write_shards(tmp_path / "shards", good_samples(COUNT))
    path = fault(folder)
    for _ in range(2):  # the second run reads the index that the first has made
        result = run(folder, "--json")
        assert result.exit_code == 1
        found = json.loads(result.output)
        assert found["problems"]["reasons"][reason]["count"] == 1
        assert str(path) in found["problems"]["reasons"][reason]["examples"][0]
        # all that is whole has been looked at
        lost = {"truncated-shard": 1, "duplicate-key": 0, "empty-shard": 10}[reason]
        assert found["checked"] == COUNT - lost
    strict = run(folder, "--strict")
    assert strict.exit_code == 1
    assert f"stopped at the first problem, {reason}" in strict.output


def test_one_sample_with_three_faults_is_counted_three_times(tmp_path):
    samples = good_samples(3)
    for fault in (no_image, double_precision, unknown_key):
        fault(samples[1])
    result = run(write_shards(tmp_path, samples))
    assert result.exit_code == 1
    for line in ("1 x missing-member", "1 x wrong-dtype", "1 x unknown-instruction"):
        assert line in result.output


def test_questions_are_held_to_their_own_rules(tmp_path):
    picture = simplejpeg.encode_jpeg(np.zeros((20, 30, 3), np.uint8), colorspace="RGB")
    good = question_members(image_jpeg=picture, turns=[Turn("What is it?", "A cup.")])
    bad = {**good, "conversation.json": b'{"turns": []}'}
    found = check_dataset(open_source(write_shards(tmp_path, [good, bad])))
    assert found.questions == 2
    assert found.tally.counts() == {"bad-conversation": 1}


def test_chunks_beyond_the_bounds_of_a_normalizer_are_told_by_channel(clean, tmp_path):
    chunks = np.stack([np.load(io.BytesIO(members["action.npy"])) for members in good_samples(COUNT)])
    fitting, narrow = tmp_path / "normalizer.npz", tmp_path / "narrow.json"
    LinearNormalizer.fit_actions(chunks).save(fitting)
    short = chunks.copy()
    short[..., 2] *= 0.5
    LinearNormalizer.fit_actions(short).save(narrow)
    assert run(clean, "--tokenizer", str(tmp_path)).exit_code == 0

    result = run(clean, "--normalizer", str(narrow), "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found["problems"]["reasons"]["out-of-range"]["count"] == 1
    assert "right z" in found["problems"]["reasons"]["out-of-range"]["examples"][0]
    expected = LinearNormalizer.load(narrow).out_of_range(chunks).fraction
    np.testing.assert_allclose(list(found["share_outside"].values()), expected, atol=1e-12)
    assert expected[2] > 0.01


def test_a_tokenizer_without_its_normalizer_is_an_error(clean, tmp_path):
    result = run(clean, "--tokenizer", str(tmp_path))
    assert isinstance(result.exception, CheckpointError)
    assert "--normalizer" in str(result.exception)


def test_some_samples_stand_for_all(clean):
    result = run(clean, "--sample", "5", "--json")
    assert result.exit_code == 0  # no gaps in time are seen between samples that are far apart
    assert json.loads(result.output)["checked"] == 5
    assert chosen_samples(100, 3) == [0, 50, 99]
    assert list(chosen_samples(3, 10)) == [0, 1, 2]


def test_a_dataset_without_times_and_tokens_is_fine(tmp_path):
    samples = good_samples(3)
    for members in samples:
        del members["action_token.npy"]
        members["meta.json"] = b'{"sub_task_instruction_key": 1}'
    found = check_dataset(open_source(write_shards(tmp_path, samples)))
    assert found.clean
    assert (found.with_tokens, found.with_times) == (0, 0)


def test_samples_of_no_episode_and_of_other_folders_are_not_compared_in_time(tmp_path):
    samples = good_samples(3)
    for members in samples:
        with_meta(members, capture_time_s={"left_wrist": 7.0})
        document = json.loads(members["meta.json"])
        del document["episode"]
        members["meta.json"] = json.dumps(document).encode()
    folders = [write_shards(tmp_path / name, good_samples(5)) for name in ("a", "b")]
    folders.append(write_shards(tmp_path / "c", samples))
    found = check_dataset(open_source(folders))
    assert found.clean
    assert found.with_times == 13


def test_entropy_has_known_values():
    flat = np.full((16, 16, 3), 77, np.uint8)
    halves = flat.copy()
    halves[:8] = 200
    every = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None], 3, axis=-1)
    assert grey_entropy_bits(flat) == 0
    assert grey_entropy_bits(halves) == pytest.approx(1)
    assert grey_entropy_bits(every) == pytest.approx(8)
