"""Tar shards: bytes as published, indices that are trusted only while they fit, damage that is named."""

from __future__ import annotations

import gc
import io
import os
import pickle
import shutil
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import webdataset
from rdt2_data.problems import SampleError, Tally
from rdt2_data.shards import index as index_module
from rdt2_data.shards.source import TarShards, find_shards, open_source
from rdt2_data.shards.writer import ShardWriter
from small_shards import sample, write_shards

from rdt2_jax.errors import DataError


def read(source, number):
    (raw,) = source.read([number])
    return raw


def read_with_webdataset(pattern):
    """All samples as the library gives them; it leaves files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
        gc.collect()
    return samples


def append(path, name, data):
    """Puts one more member into an archive, as tar would."""
    with tarfile.open(path, "a:") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def test_webdataset_reads_the_same_bytes(tmp_path):
    write_shards(tmp_path, shards=3, samples=4)
    pattern = str(tmp_path / "shard-{000000..000002}.tar")
    peer = read_with_webdataset(pattern)
    source = open_source(pattern)
    assert len(peer) == len(source) == 12
    for number, theirs in enumerate(peer):
        ours = read(source, number)
        assert theirs["__key__"] == ours.key == str(number)
        assert {k: v for k, v in theirs.items() if not k.startswith("__")} == dict(ours.members) == sample(number)


def test_shards_written_by_webdataset_are_read(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "shard-%06d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(8):
            writer.write({"__key__": f"{number}", **sample(number)})
    source = open_source(tmp_path)
    assert [len(open_source(shard)) for shard in find_shards(tmp_path)] == [3, 3, 2]
    assert [dict(raw.members) for raw in source.read(range(8))] == [sample(number) for number in range(8)]
    assert source.tally.total == 0


def test_bytes_depend_on_samples_alone(tmp_path):
    first, second = write_shards(tmp_path / "a"), write_shards(tmp_path / "b")
    for name in ("shard-000000.tar", "shard-000001.tar"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_names_with_folders_and_long_names(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for key in ("one/0001", "two/0001", "x" * 120):
            for extension, data in sample(1).items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    source = open_source(tmp_path / "x.tar")
    raws = source.read(range(3))
    assert [raw.key for raw in raws[:2]] == ["one/0001", "two/0001"]
    assert dict(raws[2].members) == sample(1)
    assert source.tally.total == 0


def test_index_is_made_once_and_trusted_only_while_it_fits(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, shards=1, samples=3)
    shard = folder / "shard-000000.tar"
    scans = []
    scan = index_module.scan_shard
    monkeypatch.setattr("rdt2_data.shards.source.scan_shard", lambda *a: scans.append(a[1]) or scan(*a))
    assert len(open_source(folder)) == 3
    assert scans == []  # the writer left an index
    os.utime(shard, ns=(1, 1))
    assert len(open_source(folder)) == 3
    assert len(open_source(folder)) == 3
    assert len(scans) == 1
    with ShardWriter(shard) as writer:
        for number in range(5):
            writer.add(str(number), sample(number))
    os.utime(shard, ns=(1, 1))  # another size under the same time
    assert len(open_source(folder)) == 5
    assert len(scans) == 2


@pytest.mark.parametrize("damage", [b"", b"RDT2IDX1", b"nonsense" * 20, None])
def test_damaged_index_is_made_again(tmp_path, damage):
    folder = write_shards(tmp_path, shards=1, samples=3)
    path = folder / "shard-000000.tar.idx"
    path.write_bytes(path.read_bytes()[:-12] if damage is None else damage)
    source = open_source(folder)
    assert dict(read(source, 2).members) == sample(2)


def test_read_only_folder_keeps_its_index_on_this_host(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "data", shards=1, samples=2)
    (folder / "shard-000000.tar.idx").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: False if str(path) == str(folder) else real(path, mode))
    assert len(open_source(folder)) == 2
    assert not (folder / "shard-000000.tar.idx").exists()
    assert len(list((tmp_path / "cache/rdt2/index").iterdir())) == 1


def test_many_threads_and_pickling(tmp_path):
    source = open_source(write_shards(tmp_path, shards=4, samples=6))
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda n: (n, read(source, n % 24), read(copy, n % 24)), range(96)):
            number, one, two = found
            assert dict(one.members) == dict(two.members) == sample(number % 24)


def test_few_descriptors_for_many_shards(tmp_path):
    folder = write_shards(tmp_path, shards=130, samples=1)
    source = open_source(folder)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(130):
        read(source, number)
    assert len(os.listdir("/proc/self/fd")) - before <= 64 + 32


def test_members_asked_for_are_the_only_ones_read(tmp_path):
    source = open_source(write_shards(tmp_path, shards=1, samples=2))
    (raw,) = source.read([1], members=("action.npy", "meta.json", "state.npy"))
    assert sorted(raw.members) == ["action.npy", "meta.json"]
    assert raw.key == "1"


def test_fingerprint_is_of_the_content_not_the_place(tmp_path):
    one = write_shards(tmp_path / "a")
    two = tmp_path / "b"
    shutil.copytree(one, two)
    assert open_source(one).fingerprint() == open_source(two).fingerprint()
    assert open_source(one).fingerprint() != open_source(write_shards(tmp_path / "c", samples=6)).fingerprint()


class TestDamage:
    """Each is counted and named, the rest of the archive is read, and a strict tally stops."""

    def open(self, folder, reason, *, samples, where=""):
        with pytest.raises(SampleError) as caught:
            open_source(folder, tally=Tally(strict=True))
        assert caught.value.reason == reason
        source = open_source(folder)
        assert source.tally.counts() == {reason: 1}
        assert where in source.tally.text()
        assert len(source) == samples
        for number in range(samples):
            assert "image.jpg" in read(source, number).members
        return source

    def shard(self, tmp_path, samples=4):
        return write_shards(tmp_path, shards=1, samples=samples) / "shard-000000.tar"

    def test_cut_inside_a_member(self, tmp_path):
        shard = self.shard(tmp_path)
        data = shard.read_bytes()
        shard.write_bytes(data[: data.rindex(b"3.image.jpg") + 900])
        self.open(tmp_path, "truncated-shard", samples=3, where="sample 3")

    def test_cut_between_members(self, tmp_path):
        shard = self.shard(tmp_path)
        data = shard.read_bytes()
        shard.write_bytes(data[: data.rindex(b"3.meta.json")])
        self.open(tmp_path, "truncated-shard", samples=3, where="sample 3")

    def test_no_end_mark(self, tmp_path):
        shard = self.shard(tmp_path)
        data = shard.read_bytes().rstrip(b"\0")
        shard.write_bytes(data + b"\0" * (-len(data) % 512))
        self.open(tmp_path, "truncated-shard", samples=3, where="sample 3")

    def test_header_overwritten(self, tmp_path):
        shard = self.shard(tmp_path)
        data = bytearray(shard.read_bytes())
        place = data.rindex(b"2.image.jpg")
        data[place : place + 512] = b"\xff" * 512
        shard.write_bytes(data)
        self.open(tmp_path, "damaged-shard", samples=1, where="shard-000000.tar")

    def test_no_archive(self, tmp_path):
        (tmp_path / "shard-000000.tar").write_bytes(b"nonsense" * 300)
        self.open(tmp_path, "damaged-shard", samples=0)

    @pytest.mark.parametrize("content", ["nothing", "no-samples"])
    def test_empty(self, tmp_path, content):
        shard = tmp_path / "shard-000000.tar"
        shard.write_bytes(b"" if content == "nothing" else b"\0" * 10240)
        self.open(tmp_path, "empty-shard", samples=0)

    def test_member_twice(self, tmp_path):
        shard = self.shard(tmp_path)
        append(shard, "3.action.npy", b"other")
        source = self.open(tmp_path, "duplicate-key", samples=4, where="sample 3")
        assert dict(read(source, 3).members) == sample(3)

    def test_sample_twice(self, tmp_path):
        shard = self.shard(tmp_path)
        append(shard, "1.image.jpg", b"other")
        append(shard, "1.action.npy", b"other")
        source = self.open(tmp_path, "duplicate-key", samples=4, where="sample 1")
        assert dict(read(source, 1).members) == sample(1)

    def test_cut_after_it_was_indexed(self, tmp_path):
        shard = self.shard(tmp_path)
        source = open_source(tmp_path)
        read(source, 0)
        with open(shard, "r+b") as file:
            file.truncate(1000)
        assert read(source, 3).reason == "read-error"


def test_finding_shards(tmp_path):
    write_shards(tmp_path, shards=3)
    names = [str(tmp_path / f"shard-{i:06d}.tar") for i in range(3)]
    for asked in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/shard-{{000000..000002}}.tar", names, [*names, names[0]]):
        assert find_shards(asked) == names
    for nothing in (tmp_path / "absent", f"{tmp_path}/x*.tar", [], tmp_path / "e"):
        (tmp_path / "e").mkdir(exist_ok=True)
        with pytest.raises(DataError):
            open_source(nothing)


def test_sample_outside(tmp_path):
    source = open_source(write_shards(tmp_path))
    for number in (-1, 10):
        with pytest.raises(DataError, match="0 to 9"):
            source.read([number])


def write_same_key_twice(path):
    with ShardWriter(path) as writer:
        writer.add("1", {"x": b"1"})
        writer.add("1", {"x": b"1"})


def test_writer_refuses(tmp_path):
    with pytest.raises(DataError, match=r"\.tar"):
        ShardWriter(tmp_path / "x.zip")
    for key, members in (("a.b", {"x": b"1"}), ("", {"x": b"1"}), ("a/b", {"x": b"1"}), ("a", {}), ("a", {"x": b""})):
        with pytest.raises(DataError), ShardWriter(tmp_path / "x.tar") as writer:
            writer.add(key, members)
    with pytest.raises(DataError, match="once"):
        write_same_key_twice(tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []  # neither a half nor a temporary file


def test_indices_made_in_several_processes(tmp_path):
    folder = write_shards(tmp_path, shards=34, samples=1)
    for path in folder.glob("*.idx"):
        path.unlink()
    source = TarShards(find_shards(folder), workers=2)
    assert len(source) == 34
    assert len(list(folder.glob("*.idx"))) == 34
