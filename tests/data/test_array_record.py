"""ArrayRecord files hold the same samples, and packing loses nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rdt2_data.problems import SampleError, Tally
from rdt2_data.shards.array_record import ArrayRecordShards, ArrayRecordWriter, pack_record, unpack_record
from rdt2_data.shards.commands import pack_command
from rdt2_data.shards.pack import PackOptions, pack
from rdt2_data.shards.source import find_shards, open_source
from small_shards import question, sample, write_shards

from rdt2_jax.errors import DataError


def contents(source):
    return [dict(raw.members) for raw in source.read(range(len(source)))]


def test_a_record_is_a_sample():
    for members in (sample(3), question(1)):
        raw = unpack_record(pack_record("abc", members), "x.array_record", 0)
        assert (raw.key, dict(raw.members)) == ("abc", members)
    for rubbish in (b"", b"rubbish" * 200, pack_record("a", sample(1)) + pack_record("b", sample(2))):
        with pytest.raises(SampleError) as caught:
            unpack_record(rubbish, "x.array_record", 5)
        assert "x.array_record, record 5" in str(caught.value)


def test_there_and_back_again(tmp_path):
    tar = write_shards(tmp_path / "tar", shards=3, samples=5)
    report = pack(tar, tmp_path / "records", PackOptions("array_record", 4))
    assert (report.samples, report.written, report.kept, report.tally.total) == (15, 4, 0, 0)
    records = open_source(tmp_path / "records")
    assert isinstance(records, ArrayRecordShards)
    assert contents(records) == contents(open_source(tar)) == [sample(n) for n in range(15)]
    pack(tmp_path / "records", tmp_path / "again", PackOptions("tar", 5))
    assert contents(open_source(tmp_path / "again")) == contents(open_source(tar))


def test_source_behaves_like_the_other(tmp_path):
    pack(write_shards(tmp_path / "tar"), tmp_path / "records", PackOptions("array_record", 5))
    source = open_source(tmp_path / "records")
    (raw,) = source.read([7], members=("action.npy", "state.npy"))
    assert list(raw.members) == ["action.npy"]
    assert source.locate(7) == (str(tmp_path / "records/shard-000001.array_record"), 2)
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)
    with pytest.raises(DataError, match="0 to 9"):
        source.read([10])


def test_shuffled_packing_keeps_every_sample(tmp_path):
    tar = write_shards(tmp_path / "tar", shards=2, samples=20)
    for folder in ("a", "b"):
        pack(tar, tmp_path / folder, PackOptions("tar", 16, shuffle_seed=3))
    tokens = [int(np.frombuffer(m["action_token.npy"][-2:], "<i2")[0]) for m in contents(open_source(tmp_path / "a"))]
    assert sorted(tokens) == list(range(40))
    assert tokens != sorted(tokens)
    for one, two in zip(find_shards(tmp_path / "a"), find_shards(tmp_path / "b"), strict=True):
        assert Path(one).read_bytes() == Path(two).read_bytes()


def test_interrupted_packing_goes_on(tmp_path):
    tar = write_shards(tmp_path / "tar", shards=2, samples=6)
    options = PackOptions("tar", 4)
    pack(tar, tmp_path / "whole", options)
    pack(tar, tmp_path / "part", options)
    (tmp_path / "part/shard-000001.tar").unlink()
    kept = (tmp_path / "part/shard-000000.tar").stat()
    report = pack(tar, tmp_path / "part", options)
    assert (report.written, report.kept) == (1, 2)
    assert (tmp_path / "part/shard-000000.tar").stat().st_mtime_ns == kept.st_mtime_ns
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "part" / path.name).read_bytes()


def test_packing_refuses(tmp_path):
    tar = write_shards(tmp_path / "tar")
    pack(tar, tmp_path / "out", PackOptions("tar", 4))
    with pytest.raises(DataError, match="otherwise"):
        pack(tar, tmp_path / "out", PackOptions("tar", 5))
    with pytest.raises(DataError, match="not empty"):
        pack(tar, tar, PackOptions("tar", 5))
    with pytest.raises(DataError, match="this machine"):
        ArrayRecordShards(["gs://bucket/x.array_record"])
    with pytest.raises(DataError, match="array_record"):
        ArrayRecordWriter(tmp_path / "x.tar")


@pytest.mark.parametrize("content", [b"", b"nonsense" * 5000])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "x.array_record").write_bytes(content)
    source = open_source(tmp_path)
    assert len(source) == 0
    assert source.tally.total == 1
    assert "x.array_record" in source.tally.text()
    with pytest.raises(SampleError):
        open_source(tmp_path, tally=Tally(strict=True))


@pytest.mark.parametrize("length", [10, 1000, 65536, 131072, -1, -65536])
def test_files_cut_short_are_truncated(tmp_path, length):
    pack(write_shards(tmp_path / "tar", shards=1, samples=20), tmp_path / "whole", PackOptions("array_record", 20))
    data = (tmp_path / "whole/shard-000000.array_record").read_bytes()
    assert len(data) > 3 * 65536
    (tmp_path / "x.array_record").write_bytes(data[:length])
    source = open_source(tmp_path / "x.array_record")
    assert (len(source), source.tally.counts()) == (0, {"truncated-shard": 1})


def test_files_without_records_are_empty(tmp_path):
    with ArrayRecordWriter(tmp_path / "x.array_record"):
        pass
    assert open_source(tmp_path).tally.counts() == {"empty-shard": 1}


def test_one_bad_file_does_not_stop_the_others(tmp_path):
    pack(write_shards(tmp_path / "tar"), tmp_path / "records", PackOptions("array_record", 5))
    (tmp_path / "records/shard-000000.array_record").unlink()
    (tmp_path / "records/shard-000000.array_record").mkdir()
    source = open_source(tmp_path / "records")
    assert source.tally.counts() == {"damaged-shard": 1}
    assert contents(source) == [sample(n) for n in range(5, 10)]


def test_a_file_that_changes_is_refused(tmp_path):
    for file in range(2):
        with ArrayRecordWriter(tmp_path / f"{file}.array_record") as writer:
            writer.add("0", sample(file))
    source = open_source(tmp_path)
    before = source.fingerprint()
    (tmp_path / "0.array_record").write_bytes(b"other")
    with pytest.raises(DataError, match="changed while it was read"):
        source.read([0])
    assert source.fingerprint() == before  # of what was opened


@pytest.mark.parametrize(
    ("key", "members"), [("a.b", {"x": b"1"}), ("", {"x": b"1"}), ("a/b", {"x": b"1"}), ("a", {}), ("a", {"x": b""})]
)
def test_writer_refuses_what_the_other_refuses(tmp_path, key, members):
    with pytest.raises(DataError, match="a sample"), ArrayRecordWriter(tmp_path / "x.array_record") as writer:
        writer.add(key, members)
    assert list(tmp_path.iterdir()) == []


def test_packing_goes_on_only_with_the_same_source(tmp_path):
    tar = write_shards(tmp_path / "tar", first=100)
    options = PackOptions("tar", 4)
    pack(tar, tmp_path / "out", options)
    (tmp_path / "out/shard-000002.tar").unlink()
    before = open_source(tar).fingerprint()
    write_shards(tar, first=107)  # images repeat after 7 samples
    assert open_source(tar).fingerprint() == before
    with pytest.raises(DataError, match="otherwise"):
        pack(tar, tmp_path / "out", options)


@pytest.mark.parametrize("claimed", [True, False])
def test_packing_removes_what_a_killed_run_left(tmp_path, claimed):
    tar = write_shards(tmp_path / "tar")
    folder = tmp_path / "out"
    folder.mkdir()
    if claimed:
        pack(tar, folder, PackOptions("tar", 4))
    whole = {"pack.json", *(f"shard-{n:06d}.tar{suffix}" for n in range(3) for suffix in ("", ".idx"))}
    for name in (".shard-000001.tar.0123.tmp", ".shard-000001.tar.idx.4567.tmp", ".pack.json.89ab.tmp"):
        (folder / name).write_bytes(b"half")
    pack(tar, folder, PackOptions("tar", 4))
    assert {path.name for path in folder.iterdir()} == whole


def test_command(tmp_path):
    write_shards(tmp_path / "tar")
    arguments = [str(tmp_path / "tar"), str(tmp_path / "out"), "--to", "array-record", "--json"]
    result = CliRunner().invoke(pack_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "folder": str(tmp_path / "out"),
        "samples": 10,
        "written": 1,
        "kept": 0,
        "problems": {"total": 0, "reasons": {}},
    }
