"""Damaged shards, shards that cannot be opened, shards that change: named and counted, and the others are there."""

from __future__ import annotations

import errno
import io
import os
import tarfile

import pytest
from rdt2_data.problems import SampleError, Tally
from rdt2_data.shards.source import TarShards, find_shards, open_source
from rdt2_data.shards.writer import ShardWriter
from small_shards import append, sample, write_shards

from rdt2_jax.errors import DataError


def read(source, number):
    (raw,) = source.read([number])
    return raw


def refusing(ending, error, real=open):
    """`open` that raises for paths with this ending."""

    def open_or_raise(path, *arguments, **options):
        if str(path).endswith(ending):
            raise error
        return real(path, *arguments, **options)

    return open_or_raise


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
        with pytest.raises(DataError, match="changed while it was read"):
            read(source, 3)

    def test_members_of_very_many_kinds(self, tmp_path):
        with tarfile.open(tmp_path / "shard-000000.tar", "w") as archive:
            for number in range(40):
                info = tarfile.TarInfo(f"{number}.x{number}")
                info.size = 1
                archive.addfile(info, io.BytesIO(b"x"))
        self.open(tmp_path, "damaged-shard", samples=0, where="40: x0")

    def test_archives_joined(self, tmp_path):
        write_shards(tmp_path / "two", shards=2, samples=2)
        one, two = sorted((tmp_path / "two").glob("*.tar"))
        length = two.stat().st_size
        (tmp_path / "shard-000000.tar").write_bytes(one.read_bytes() + two.read_bytes())
        source = self.open(tmp_path, "damaged-shard", samples=2, where="end mark")
        assert f"{length} bytes that are not read" in source.tally.text()

    def test_padding_is_no_damage(self, tmp_path):
        shard = self.shard(tmp_path)
        with open(shard, "ab") as file:
            file.write(bytes(3_000_000))
        source = open_source(tmp_path)
        assert (len(source), source.tally.total) == (4, 0)


class TestOneBadShard:
    """The others are there; this one is counted, and a strict tally stops."""

    def open(self, folder, reason):
        with pytest.raises(SampleError) as caught:
            open_source(folder, tally=Tally(strict=True))
        assert caught.value.reason == reason
        source = open_source(folder)
        assert source.tally.counts() == {reason: 1}
        assert "shard-000001.tar" in source.tally.text()
        assert [dict(raw.members) for raw in source.read(range(6))] == [sample(n) for n in (0, 1, 2, 6, 7, 8)]
        assert len(source) == 6

    def test_folder_named_like_a_shard(self, tmp_path):
        write_shards(tmp_path, shards=3, samples=3)
        (tmp_path / "shard-000001.tar").unlink()
        (tmp_path / "shard-000001.tar").mkdir()
        self.open(tmp_path, "damaged-shard")

    def test_unreadable(self, tmp_path, monkeypatch):
        write_shards(tmp_path, shards=3, samples=3)
        (tmp_path / "shard-000001.tar.idx").unlink()
        monkeypatch.setattr("builtins.open", refusing("000001.tar", PermissionError(errno.EACCES, "permission denied")))
        self.open(tmp_path, "read-error")

    def test_too_many_open_files_are_not_the_fault_of_a_shard(self, tmp_path, monkeypatch):
        write_shards(tmp_path, shards=1, samples=3)
        for name in (".tar.idx", ".tar"):
            monkeypatch.setattr("builtins.open", refusing(name, OSError(errno.EMFILE, "too many open files")))
            with pytest.raises(DataError, match="too many open files") as caught:
                open_source(tmp_path)
            assert not isinstance(caught.value, SampleError)
            monkeypatch.undo()
            (tmp_path / "shard-000000.tar.idx").unlink(missing_ok=True)

    def test_deleted_between_finding_and_opening(self, tmp_path):
        write_shards(tmp_path, shards=3, samples=3)
        shards = find_shards(tmp_path)
        os.unlink(shards[1])
        opened = TarShards(shards)
        assert opened.tally.counts() == {"read-error": 1}
        assert [raw.key for raw in opened.read(range(6))] == ["0", "1", "2", "6", "7", "8"]

    def test_deleted_while_it_is_read(self, tmp_path):
        write_shards(tmp_path, shards=3, samples=3)
        opened = open_source(tmp_path)
        os.unlink(tmp_path / "shard-000001.tar")
        raws = opened.read(range(9))
        assert [raw.reason if isinstance(raw, SampleError) else raw.key for raw in raws] == [
            *"012",
            *["read-error"] * 3,
            *"678",
        ]
        assert "shard-000001.tar, sample number 2 of this shard" in raws[5].line()


class TestChanges:
    """A shard that is not what it was gives an error, never another sample."""

    def replaced(self, folder, opened):
        with ShardWriter(folder / "shard-000000.tar") as writer:
            for number in range(3):
                writer.add(str(number), sample(number + 10))
        with pytest.raises(DataError, match=r"changed while it was read.*\n.*shard-000000") as caught:
            opened.read([0])
        assert not isinstance(caught.value, SampleError)  # such a sample would be replaced, and the run would go on

    def test_before_it_was_read_first(self, tmp_path):
        folder = write_shards(tmp_path, shards=2, samples=3)
        self.replaced(folder, open_source(folder))

    def test_under_its_old_index(self, tmp_path):
        folder = write_shards(tmp_path, shards=1, samples=3)
        opened = open_source(folder)
        shard = folder / "shard-000000.tar"
        data = shard.read_bytes()
        shard.write_bytes(data[:3000] + b"garbled" + data[3007:])  # as long as before
        os.utime(shard, ns=(5, 5))
        with pytest.raises(DataError, match="changed while it was read"):
            opened.read([0])

    def test_written_into_while_it_is_open(self, tmp_path):
        folder = write_shards(tmp_path, shards=1, samples=3)
        opened = open_source(folder)
        opened.read([0])
        with open(folder / "shard-000000.tar", "r+b") as file:
            file.seek(3000)
            file.write(b"garbled")
        os.utime(folder / "shard-000000.tar", ns=(5, 5))
        with pytest.raises(DataError, match="changed while it was read"):
            opened.read([0])

    def test_one_replaced_while_it_is_open_is_read_to_its_end(self, tmp_path):
        folder = write_shards(tmp_path, shards=1, samples=3)
        opened = open_source(folder)
        opened.read([0])
        with ShardWriter(folder / "shard-000000.tar") as writer:
            writer.add("0", sample(20))
        assert [dict(raw.members) for raw in opened.read(range(3))] == [sample(n) for n in range(3)]
        assert dict(read(open_source(folder), 0).members) == sample(20)  # in the same process

    def test_index_that_vanishes_is_made_again(self, tmp_path):
        folder = write_shards(tmp_path, shards=1, samples=3)
        opened = open_source(folder)
        (folder / "shard-000000.tar.idx").unlink()
        assert dict(read(opened, 2).members) == sample(2)
        assert (folder / "shard-000000.tar.idx").exists()
