"""Ranges of files, local and in an object store that fails now and then."""

from __future__ import annotations

import pickle
import threading
from itertools import pairwise

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from rdt2_data.problems import SampleError
from rdt2_data.shards import storage
from rdt2_data.shards.source import TarShards, find_shards, open_source
from rdt2_data.shards.storage import Range, RemoteStorage, merge_ranges
from small_shards import sample, write_shards

from rdt2_jax.errors import DataError


class FlakyFileSystem(MemoryFileSystem):
    """An object store of this process that counts requests and fails some of them."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012  own files, not those of memory://
    pseudo_dirs = [""]  # noqa: RUF012
    requests: list = []  # noqa: RUF012
    asked: list = []  # noqa: RUF012  names of the calls about whole files
    failures = 0
    refusals: list = []  # noqa: RUF012  errors that the next such calls meet

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("flaky://").strip("/")

    def _count(self, call, path):
        type(self).asked.append((call, str(path).split("/")[-1]))
        if type(self).refusals:
            raise type(self).refusals.pop(0)

    def info(self, path, **options):
        self._count("info", path)
        return super().info(path, **options)

    def glob(self, path, **options):
        self._count("glob", path)
        return super().glob(path, **options)

    def _open(self, path, *arguments, **options):
        self._count("open", path)
        return super()._open(path, *arguments, **options)

    def cat_ranges(self, paths, starts, ends, max_gap=None, on_error="return", **options):
        type(self).requests.append(list(zip(paths, starts, ends, strict=True)))
        answers = super().cat_ranges(paths, starts, ends, max_gap, on_error=on_error, **options)
        for i in range(len(answers)):
            if type(self).failures:
                type(self).failures -= 1
                answers[i] = ConnectionResetError("the store hung up") if i % 2 else answers[i][:-1]
        return answers


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The scheme flaky:// with one folder of shards in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.clear_instance_cache()
    FlakyFileSystem.store, FlakyFileSystem.pseudo_dirs = {}, [""]
    FlakyFileSystem.requests, FlakyFileSystem.failures = [], 0
    FlakyFileSystem.asked, FlakyFileSystem.refusals = [], []
    files = fsspec.filesystem("flaky")
    folder = write_shards(tmp_path / "local", shards=2, samples=6)
    for path in sorted(folder.glob("*.tar")):
        files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    return files


def test_shards_in_an_object_store(store):
    source = open_source("flaky://bucket")
    assert len(source) == len(open_source("flaky://bucket/shard-{000000..000001}.tar")) == 12
    assert [dict(raw.members) for raw in source.read([11, 0, 4])] == [sample(11), sample(0), sample(4)]


def test_neighbours_become_one_request(store):
    source = open_source("flaky://bucket")
    FlakyFileSystem.requests.clear()
    raws = source.read([3, 0, 1, 2, 8])
    assert [raw.key for raw in raws] == ["3", "0", "1", "2", "8"]
    ((first, second),) = FlakyFileSystem.requests
    assert first[0].endswith("000000.tar")
    assert second[0].endswith("000001.tar")


def test_failures_are_tried_again(store, monkeypatch):
    pauses = []
    source = open_source("flaky://bucket")
    source._storage = RemoteStorage("flaky", sleep=pauses.append)
    FlakyFileSystem.failures = 3
    raws = source.read([0, 7])
    assert [dict(raw.members) for raw in raws] == [sample(0), sample(7)]
    assert pauses == [storage.FIRST_PAUSE_S, 2 * storage.FIRST_PAUSE_S]


def test_what_keeps_failing_is_reported(store):
    source = open_source("flaky://bucket")
    source._storage = RemoteStorage("flaky", sleep=lambda _: None)
    FlakyFileSystem.failures = 10**6
    for raw in source.read([0, 7]):
        assert isinstance(raw, SampleError)
        assert raw.reason == "read-error"
        assert "flaky://bucket/shard-00000" in raw.line()


def test_finding_and_opening_are_tried_again(store, monkeypatch):
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    files = RemoteStorage("flaky")
    FlakyFileSystem.refusals = [ConnectionResetError("no"), RuntimeError("503")]
    assert find_shards("flaky://bucket/*.tar") == [f"flaky://bucket/shard-{i:06d}.tar" for i in range(2)]
    assert pauses == [0.2, 0.4]
    FlakyFileSystem.refusals = [TimeoutError("no")]
    assert files.stamp("flaky://bucket/shard-000000.tar").size > 0
    FlakyFileSystem.refusals = [TimeoutError("no"), RuntimeError("503")]
    assert files.use("flaky://bucket/shard-000000.tar", lambda stream: len(stream.read(512))) == 512
    assert pauses == [0.2, 0.4, 0.2, 0.2, 0.4]
    FlakyFileSystem.refusals = [RuntimeError("503")] * 100
    with pytest.raises(DataError, match="RuntimeError: 503") as caught:
        files.stamp("flaky://bucket/shard-000000.tar")
    assert len(FlakyFileSystem.refusals) == 95
    assert not isinstance(caught.value, SampleError)  # a store that is down must not make the dataset smaller


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("not yours")])
def test_what_will_not_pass_is_not_tried_again(store, error):
    pauses = []
    files = RemoteStorage("flaky", sleep=pauses.append)
    FlakyFileSystem.refusals = [error]
    with pytest.raises(SampleError, match=str(error)):
        files.stamp("flaky://bucket/shard-000000.tar")
    source = open_source("flaky://bucket")
    source._storage = files
    store.rm("/bucket/shard-000001.tar")
    good, bad = source.read([0, 11])
    assert good.key == "0"
    assert "FileNotFoundError" in bad.line()
    assert "sample number 5 of this shard" in bad.line()
    assert pauses == []


def test_a_driver_that_raises_whatever_it_likes(store, monkeypatch):
    source = open_source("flaky://bucket")
    source._storage = RemoteStorage("flaky", sleep=lambda _: None)
    calls = []

    def fail(*arguments, **options):
        calls.append(1)
        raise KeyError("the library's own")

    monkeypatch.setattr(FlakyFileSystem, "cat_ranges", fail)
    (raw,) = source.read([0])
    assert raw.reason == "read-error"
    assert len(calls) == storage.ATTEMPTS


def test_after_the_start_nothing_is_asked_but_ranges(store):
    source = open_source("flaky://bucket")
    FlakyFileSystem.asked.clear()
    source.read(range(12))
    pickle.loads(pickle.dumps(source)).read(range(12))
    assert FlakyFileSystem.asked == []


def test_shards_are_opened_together(store, monkeypatch):
    for number in range(2, 6):
        store.cp_file("/bucket/shard-000000.tar", f"/bucket/shard-{number:06d}.tar")
    together = threading.Barrier(6, timeout=30)
    stamp = RemoteStorage.stamp
    waited = set()

    def stamp_together(self, path):
        if path not in waited:
            waited.add(path)
            together.wait()  # breaks unless all six are asked for at the same time
        return stamp(self, path)

    monkeypatch.setattr(RemoteStorage, "stamp", stamp_together)
    assert len(open_source("flaky://bucket")) == 36


class TestIndexInTheStore:
    """An index uploaded beside its archive spares the scan, and is not believed for another archive."""

    def upload(self, store, tmp_path):
        for path in sorted((tmp_path / "local").glob("*.idx")):
            store.pipe_file(f"/bucket/{path.name}", path.read_bytes())

    def test_it_is_fetched_once(self, store, tmp_path, monkeypatch):
        self.upload(store, tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr("rdt2_data.shards.indexing.scan_shard", lambda *_: pytest.fail("scanned"))
            source = open_source("flaky://bucket")
        assert [dict(raw.members) for raw in source.read([11, 0])] == [sample(11), sample(0)]
        FlakyFileSystem.asked.clear()
        assert len(open_source("flaky://bucket")) == 12
        assert {call for call, _ in FlakyFileSystem.asked} == {"info"}

    def test_of_another_archive_as_long(self, store, tmp_path):
        self.upload(store, tmp_path)
        other = write_shards(tmp_path / "other", shards=1, samples=6, first=100)
        data = (other / "shard-000000.tar").read_bytes()
        assert len(data) == store.size("/bucket/shard-000000.tar")
        store.pipe_file("/bucket/shard-000000.tar", data)
        assert dict(open_source("flaky://bucket").read([4])[0].members) == sample(104)

    def test_damaged(self, store, tmp_path):
        for number in range(2):
            store.pipe_file(f"/bucket/shard-{number:06d}.tar.idx", b"RDT2IDX2 nonsense")
        assert len(open_source("flaky://bucket")) == 12


def test_changed_object_is_indexed_again(store, tmp_path):
    assert len(open_source("flaky://bucket/shard-000000.tar")) == 6
    folder = write_shards(tmp_path / "other", shards=1, samples=2)
    store.pipe_file("/bucket/shard-000000.tar", (folder / "shard-000000.tar").read_bytes())
    assert len(open_source("flaky://bucket/shard-000000.tar")) == 2


def test_unknown_places(store):
    with pytest.raises(DataError, match="fsspec"):
        open_source("nonsense://bucket/x.tar")
    with pytest.raises(DataError, match="no shards"):
        open_source("flaky://bucket/absent.tar")
    with pytest.raises(DataError, match=r"1 missing: flaky://bucket/shard-000002\.tar"):
        open_source("flaky://bucket/shard-{000000..000002}.tar")


def test_patterns(store):
    names = [f"flaky://bucket/shard-{number:06d}.tar" for number in range(2)]
    assert find_shards("flaky://bucket/shard-00000?.tar") == find_shards("flaky://bucket") == names
    assert find_shards("flaky://bucket/shard-00000[12].tar") == names[1:]
    with pytest.raises(DataError, match="no shards"):
        find_shards("flaky://bucket/x*.tar")


def test_a_shard_that_may_not_be_read_is_counted(store):
    shards = find_shards("flaky://bucket")
    FlakyFileSystem.refusals = [PermissionError("not yours")]
    source = TarShards(shards)
    assert source.tally.counts() == {"read-error": 1}
    assert len(source) == 6


def test_one_kind_of_storage(store):
    with pytest.raises(DataError, match="one kind of storage"):
        TarShards(["flaky://bucket/shard-000000.tar", "local.tar"])


ranges = st.builds(
    lambda path, start, length: Range(path, start, start + length),
    st.sampled_from(["a", "b"]),
    st.integers(0, 500),
    st.integers(1, 60),
)


@given(st.lists(ranges, max_size=12), st.integers(0, 100))
def test_merged_ranges_cover_and_do_not_waste(asked, gap):
    merged = merge_ranges(asked, gap)
    for range_ in asked:
        assert sum(m.path == range_.path and m.start <= range_.start and range_.stop <= m.stop for m in merged) == 1
    for one, two in pairwise(merged):
        assert one.path < two.path or two.start > one.stop + gap
    for m in merged:
        wanted = {byte for r in asked if r.path == m.path for byte in range(r.start, r.stop)}
        unwanted = [byte for byte in range(m.start, m.stop) if byte not in wanted]
        runs = sum(1 for i, byte in enumerate(unwanted) if i == 0 or byte != unwanted[i - 1] + 1)
        assert len(unwanted) <= gap * runs
