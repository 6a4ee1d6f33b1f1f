"""Tar shards: bytes as published, indices that are trusted only while they fit, damage that is named."""

from __future__ import annotations

import errno
import gc
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import webdataset
from rdt2_data.shards import descriptors, tar_scan
from rdt2_data.shards.descriptors import DescriptorCache
from rdt2_data.shards.indexing import IndexNotKeptWarning
from rdt2_data.shards.source import TarShards, find_shards, open_source
from rdt2_data.shards.writer import ShardWriter
from small_shards import append, sample, write_shards

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
    scan = tar_scan.scan_shard
    monkeypatch.setattr("rdt2_data.shards.indexing.scan_shard", lambda *a: scans.append(a) or scan(*a))
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


@pytest.mark.parametrize("damage", [b"", b"RDT2IDX2", b"nonsense" * 20, None])
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


def test_few_descriptors_for_many_shards_and_threads(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, shards=40, samples=1)
    cache = DescriptorCache(10)
    monkeypatch.setattr("rdt2_data.shards.source.DESCRIPTORS", cache)
    monkeypatch.setattr("rdt2_data.shards.storage.DESCRIPTORS", cache)
    source = open_source(folder)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        for number, raw in enumerate(pool.map(lambda n: read(source, n % 40), range(400))):
            assert dict(raw.members) == sample(number % 40)
        assert len(cache) <= 10
        assert len(os.listdir("/proc/self/fd")) - before <= 10 + 8
    cache.clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_leave_room_for_others(tmp_path, monkeypatch):
    allowed = 400
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _: (allowed, allowed))
    assert DescriptorCache().limit == 200
    (tmp_path / "x").write_bytes(b"x")
    cache = DescriptorCache()
    cache.get(str(tmp_path / "x"), 0, lambda _: None)
    opened = []

    def refuse_once(path, flags):
        opened.append(path)
        if len(opened) == 1:
            raise OSError(errno.EMFILE, "too many open files")
        return real(path, flags)

    real = os.open
    monkeypatch.setattr(os, "open", refuse_once)
    assert cache.get(str(tmp_path / "x"), 1, lambda _: None).read(0, 1) == b"x"
    assert len(cache) == 1  # what was open was given up


def test_opening_keeps_nothing_of_samples(tmp_path):
    write_shards(tmp_path / "one", shards=1, samples=50)
    many = tmp_path / "many"
    many.mkdir()
    for number in range(200):
        for suffix in (".tar", ".tar.idx"):
            shutil.copy2(tmp_path / f"one/shard-000000{suffix}", many / f"shard-{number:06d}{suffix}")
    open_source(tmp_path / "one")
    tracemalloc.start()
    try:
        source = open_source(many)
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 10_000
    assert grown < 40 * len(source)  # their places alone are 48 bytes each; an object each would be hundreds


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


def test_index_that_nothing_takes_is_held_in_memory(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, shards=3, samples=3)
    for path in folder.glob("*.idx"):
        path.unlink()

    def full(path, index):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("rdt2_data.shards.indexing.write_index", full)
    with pytest.warns(IndexNotKeptWarning, match="3 shards") as warned:
        opened = open_source(folder)
    assert len(warned) == 1
    copy = pickle.loads(pickle.dumps(opened))
    for source_ in (opened, copy):
        assert [dict(raw.members) for raw in source_.read(range(9))] == [sample(n) for n in range(9)]


def test_problems_in_an_index_name_the_present_place(tmp_path):
    shard = write_shards(tmp_path / "old", shards=1, samples=3) / "shard-000000.tar"
    append(shard, "1.image.jpg", b"other")
    open_source(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    index = tmp_path / "new/shard-000000.tar.idx"
    before = index.stat().st_mtime_ns
    text = open_source(tmp_path / "new").tally.text()
    assert index.stat().st_mtime_ns == before  # read, not made again
    assert str(tmp_path / "new") in text
    assert "sample 1" in text
    assert str(tmp_path / "old") not in text
    assert str(tmp_path).encode() not in index.read_bytes()


def test_finding_shards(tmp_path):
    write_shards(tmp_path, shards=3)
    names = [str(tmp_path / f"shard-{i:06d}.tar") for i in range(3)]
    for asked in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/shard-{{000000..000002}}.tar", names, [*names, names[0]]):
        assert find_shards(asked) == names
    for nothing in (tmp_path / "absent", f"{tmp_path}/x*.tar", [], tmp_path / "e"):
        (tmp_path / "e").mkdir(exist_ok=True)
        with pytest.raises(DataError):
            open_source(nothing)


def test_names_out_of_braces_must_exist(tmp_path):
    write_shards(tmp_path, shards=5)
    for number in (1, 3):
        (tmp_path / f"shard-{number:06d}.tar").unlink()
    with pytest.raises(DataError) as caught:
        find_shards(f"{tmp_path}/shard-{{000000..000004}}.tar")
    for words in ("2 missing", "shard-000001.tar", "shard-000003.tar"):
        assert words in str(caught.value)
    assert "shard-000002.tar" not in str(caught.value)


def test_patterns_with_one_character_and_folders_with_brackets(tmp_path):
    folder = write_shards(tmp_path / "run[1]", shards=3)
    names = [str(folder / f"shard-{i:06d}.tar") for i in range(3)]
    assert find_shards(folder) == names
    assert find_shards(names[0]) == names[:1]
    assert find_shards(f"{folder}/*.tar") == find_shards(f"{folder}/shard-00000?.tar") == names
    assert find_shards(f"{folder}/shard-00000[02].tar") == [names[0], names[2]]
    write_shards(tmp_path / "run2", shards=1)
    assert find_shards(f"{tmp_path}/run[2-3]/*.tar") == [str(tmp_path / "run2/shard-000000.tar")]


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


def test_indices_made_in_several_processes(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, shards=34, samples=1)
    for path in folder.glob("*.idx"):
        path.unlink()
    scans = []
    scan = tar_scan.scan_shard
    monkeypatch.setattr("rdt2_data.shards.indexing.scan_shard", lambda *a: scans.append(a) or scan(*a))
    source = TarShards(find_shards(folder), workers=2)
    assert len(source) == 34
    assert len(list(folder.glob("*.idx"))) == 34
    assert len(scans) == 1  # one here, to see whether indices can be written; the others elsewhere


def test_processes_that_end_leave_the_work_to_this_one(tmp_path, monkeypatch, capfd):
    folder = write_shards(tmp_path, shards=34, samples=1)
    for path in folder.glob("*.idx"):
        path.unlink()
    monkeypatch.setattr("rdt2_data.shards.index_processes._PROGRAM", "import sys; sys.stdin.readline(); 1 / 0")
    assert len(TarShards(find_shards(folder), workers=2)) == 34
    assert "ZeroDivisionError" in capfd.readouterr().err  # says why it was slow


def test_a_plain_script_opens_many_shards(tmp_path):
    folder = write_shards(tmp_path / "shards", shards=34, samples=1)
    for path in folder.glob("*.idx"):
        path.unlink()
    script = tmp_path / "script.py"
    lines = ["from rdt2_data.shards.source import open_source", f"print(len(open_source({str(folder)!r}, workers=2)))"]
    script.write_text("\n".join(lines))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("34\n", "", 0)
