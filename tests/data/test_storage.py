"""Ranges of files, local and in an object store that fails now and then."""

from __future__ import annotations

from itertools import pairwise

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from rdt2_data.problems import SampleError
from rdt2_data.shards import storage
from rdt2_data.shards.source import TarShards, open_source
from rdt2_data.shards.storage import Range, RemoteStorage, merge_ranges
from small_shards import sample, write_shards

from rdt2_jax.errors import DataError


class FlakyFileSystem(MemoryFileSystem):
    """An object store of this process that counts requests and fails some of them."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012  own files, not those of memory://
    pseudo_dirs = [""]  # noqa: RUF012
    requests: list = []  # noqa: RUF012
    failures = 0

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("flaky://").strip("/")

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


def test_changed_object_is_indexed_again(store, tmp_path):
    assert len(open_source("flaky://bucket/shard-000000.tar")) == 6
    folder = write_shards(tmp_path / "other", shards=1, samples=2)
    store.pipe_file("/bucket/shard-000000.tar", (folder / "shard-000000.tar").read_bytes())
    assert len(open_source("flaky://bucket/shard-000000.tar")) == 2


def test_unknown_places(store):
    with pytest.raises(DataError, match="fsspec"):
        open_source("nonsense://bucket/x.tar")
    with pytest.raises(DataError, match="cannot be opened"):
        open_source("flaky://bucket/absent.tar")
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
