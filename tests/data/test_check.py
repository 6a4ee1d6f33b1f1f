"""Every kind of bad input is counted, named and reported, and stops a strict check; a clean dataset is clean."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import simplejpeg
from click.testing import CliRunner, Result
from look_shards import JPEGS, good_samples, meta_times, write_shards
from rdt2_data.capture_times import was_packed_shuffled
from rdt2_data.check import check_dataset, chosen_samples
from rdt2_data.check_sample import CheckOptions, grey_entropy_bits
from rdt2_data.commands_look import check
from rdt2_data.instructions import Instructions
from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import COMPOSITE_SHAPE, Turn, question_members
from rdt2_data.shards.pack import PackOptions, pack
from rdt2_data.shards.source import open_source

from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.errors import CheckpointError, ConfigError, DataError

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


def test_a_report_comes_with_every_single_problem(tmp_path):
    samples = good_samples(COUNT)
    for number in range(0, COUNT, 2):
        no_image(samples[number])
    double_precision(samples[2])
    folder, report = write_shards(tmp_path / "shards", samples), tmp_path / "report.json"
    cut_off(folder)
    assert run(folder, "--report", str(report)).exit_code == 1
    found = json.loads(report.read_text())
    log = tmp_path / found["problems_file"]
    assert log.name == "report.problems.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == found["problems"]["total"] == 14
    missing = [line["where"] for line in lines if line["reason"] == "missing-member"]
    for number, where in zip(range(0, COUNT, 2), missing, strict=True):
        assert f"sample {number:09d}" in where
    assert len(found["problems"]["reasons"]["missing-member"]["examples"]) == 5
    (dtype,) = [line for line in lines if line["reason"] == "wrong-dtype"]
    assert (dtype["expected"], dtype["found"]) == ("float32", "float64")
    assert {line["reason"] for line in lines} >= {"truncated-shard"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.problems.jsonl", "shards"]

    assert run(folder, "--report", str(report), "--strict").exit_code == 1
    assert len(log.read_text().splitlines()) == 1  # the old lines are gone
    assert run(write_shards(tmp_path / "good", good_samples(3)), "--report", str(report)).exit_code == 0
    assert log.read_bytes() == b""


@pytest.mark.parametrize("question_first", [False, True])
def test_actions_and_questions_in_one_folder_are_a_problem(question_first, tmp_path):
    picture = simplejpeg.encode_jpeg(np.zeros((20, 30, 3), np.uint8), colorspace="RGB")
    questions = [question_members(image_jpeg=picture, turns=[Turn("What is it?", "A cup.")])] * 3
    actions = good_samples(3)
    mixed = write_shards(tmp_path / "mixed", questions + actions if question_first else actions + questions, 2)
    result = run(mixed, "--json")
    assert result.exit_code == 1
    problems = json.loads(result.output)["problems"]["reasons"]
    assert {reason: entry["count"] for reason, entry in problems.items()} == {"mixed-kinds": 1}
    line = problems["mixed-kinds"]["examples"][0]
    action, question = ("3", "0") if question_first else ("0", "3")
    assert f"an action in {mixed}/shard-00000{int(action) // 2}.tar, sample 00000000{action}" in line
    assert f"a question in {mixed}/shard-00000{int(question) // 2}.tar, sample 00000000{question}" in line
    assert "stopped at the first problem, mixed-kinds" in run(mixed, "--strict").output

    apart = [write_shards(tmp_path / "actions", actions), write_shards(tmp_path / "questions", questions)]
    assert check_dataset(open_source(apart)).clean


def test_a_shuffled_dataset_is_compared_by_its_frames(tmp_path):
    samples = good_samples(COUNT)
    folder = write_shards(tmp_path / "shards", samples)
    packed = tmp_path / "packed"
    pack(str(folder), packed, PackOptions("tar", 7, shuffle_seed=5))
    found = check_dataset(open_source(packed))
    assert found.clean
    assert found.with_times == COUNT
    assert any(str(packed) in note and "shuffled" in note for note in found.notes)

    (packed / "pack.json").unlink()
    sentences = ["--instructions", str(folder / "instructions.json")]
    assert "bad-time" in CliRunner().invoke(check, [str(packed), *sentences]).output
    assert CliRunner().invoke(check, [str(packed), *sentences, "--shuffled"]).exit_code == 0

    for members in samples:  # the later the frame, the earlier the time
        meta = json.loads(members["meta.json"])
        with_meta(members, capture_time_s={name: -time for name, time in meta["capture_time_s"].items()})
    backwards_packed = tmp_path / "backwards"
    pack(str(write_shards(tmp_path / "other", samples)), backwards_packed, PackOptions("tar", 7, shuffle_seed=5))
    assert check_dataset(open_source(backwards_packed)).tally.counts()["bad-time"] == 2 * (COUNT - 3)


def test_pack_files_are_read_where_the_shards_lie(tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe("/look-shuffled/pack.json", b'{"shuffle_seed": 0}')
    files.pipe("/look-ordered/pack.json", b'{"shuffle_seed": null}')
    files.pipe("/look-damaged/pack.json", b'{"shuffle')
    assert was_packed_shuffled("memory://look-shuffled")
    for folder in ("memory://look-ordered", "memory://look-damaged", "memory://look-nowhere", str(tmp_path)):
        assert not was_packed_shuffled(folder)


def test_a_dataset_packed_in_its_order_is_looked_at_for_gaps(tmp_path):
    samples = good_samples(COUNT)
    late(samples[5])
    pack(str(write_shards(tmp_path / "shards", samples)), tmp_path / "packed", PackOptions("tar", 7))
    assert "time-gap" in check_dataset(open_source(tmp_path / "packed")).tally.counts()


@pytest.mark.parametrize("option", ["--max-gap", "--min-entropy"])
@pytest.mark.parametrize("value", ["nan", "-0.1"])
def test_limits_that_are_none_are_refused(option, value):
    result = CliRunner().invoke(check, ["no shards here", option, value])
    assert isinstance(result.exception, ConfigError)


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "taken.problems.jsonl").mkdir()
    for report in ("missing/report.json", "report.txt", "taken.json"):
        result = CliRunner().invoke(check, ["no shards here", "--report", str(tmp_path / report)])
        assert isinstance(result.exception, DataError)
        assert "cannot be written" in str(result.exception)


def test_what_was_not_looked_at_is_said(clean):
    alone = CliRunner().invoke(check, [str(clean)])
    assert alone.exit_code == 0
    assert "instruction keys were not looked up" in alone.output
    assert "instruction keys were not looked up" not in run(clean).output
    assert f"{COUNT - 5} samples were not looked at" in run(clean, "--sample", "5").output
    assert json.loads(CliRunner().invoke(check, [str(clean), "--json"]).output)["notes"]
    assert json.loads(run(clean, "--json").output)["notes"] == []


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
