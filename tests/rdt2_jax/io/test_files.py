"""Files and directories appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rdt2_jax.errors import Rdt2Error
from rdt2_jax.io.files import atomic_directory, atomic_write


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt: not an Exception, and must be cleaned up after all the same."""


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_with_its_content_and_nothing_beside_it(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"one")
        assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"one"
    assert names(tmp_path) == ["a.bin"]


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    target.chmod(0o640)
    with atomic_write(target) as file:
        file.write(b"new")
        file.close()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_an_exception_leaves_the_old_file_untouched(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def write() -> None:
        with atomic_write(target) as file:
            file.write(b"half of the new")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_rename_that_fails_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no rename today")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="no rename today"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert names(tmp_path) == []


def test_the_bytes_are_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), real_fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), real_replace(*names)))
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.bin").write_bytes(b"old")
    (tmp_path / "link.bin").symlink_to("real.bin")
    with atomic_write(tmp_path / "link.bin") as file:
        file.write(b"new")
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "real.bin").read_bytes() == b"new"


def test_a_file_needs_a_folder_and_no_directory_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(Rdt2Error, match="folder to write into does not exist"), atomic_write(tmp_path / "no" / "a"):
        pass
    with pytest.raises(Rdt2Error, match="cannot replace a directory"), atomic_write(tmp_path):
        pass


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with atomic_directory(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("one")
        assert not target.exists()
    assert (target / "deep" / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["run"]


def test_an_empty_directory_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with atomic_directory(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("one")
    assert names(tmp_path / "run") == ["a.txt"]
    assert names(tmp_path) == ["run"]


def test_a_full_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(Rdt2Error, match=r"not empty(.|\n)*overwrite=True"), atomic_directory(target):
        pytest.fail("the block must not run")
    with atomic_directory(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert names(target) == ["old.txt"]
    assert names(target) == ["new.txt"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_an_exception_leaves_the_old_directory_untouched(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "old.txt").write_text("old")

    def build() -> None:
        with atomic_directory(target, overwrite=True) as folder:
            (folder / "new.txt").write_text("new")
            raise error

    with pytest.raises(error):
        build()
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["run"]


def test_a_failing_second_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "old.txt").write_text("old")
    real_rename = os.rename

    def rename(source: Path, destination: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("disk trouble")
        real_rename(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="disk trouble"), atomic_directory(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["run"]


def test_a_directory_filled_by_someone_else_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "run"

    def build() -> None:
        with atomic_directory(target) as folder:
            (folder / "mine.txt").write_text("mine")
            target.mkdir()
            (target / "theirs.txt").write_text("theirs")

    with pytest.raises(Rdt2Error, match="not empty"):
        build()
    assert names(target) == ["theirs.txt"]
    assert names(tmp_path) == ["run"]


def test_a_directory_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(Rdt2Error, match="cannot replace a file"), atomic_directory(tmp_path / "run", overwrite=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "run").read_text() == "a file"
