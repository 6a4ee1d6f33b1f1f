"""Who does the work, and what happens when it fails: dead workers, full disks, errors that hit every shard."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from convert_sources import SmallReader, dataset_files
from rdt2_data.converters import failures as failures_module
from rdt2_data.converters import shard as shard_module
from rdt2_data.converters import tokens as tokens_module
from rdt2_data.converters.convert import convert
from rdt2_data.converters.failures import Failures, StoppedError, disk_errors_stop
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.recording import EpisodeRef, Recording
from rdt2_data.converters.runners import LocalRunner, Shared, usable_cores
from rdt2_data.converters.tokens import Tokenizing

from rdt2_jax.errors import DataError

HERE = LocalRunner(workers=1)
OPTIONS = ConvertOptions(name="small", samples_per_shard=16)
ROWS = (40,) * 5  # one shard for each


@dataclass(frozen=True)
class LoggingReader(SmallReader):
    """Notes in a folder each copy of it that is unpickled; kills its process at one episode when told to."""

    folder: str = ""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        with open(f"{self.folder}/copies", "a") as file:
            file.write(f"{os.getpid()}\n")

    def load(self, episode: EpisodeRef) -> Recording:
        order = Path(self.folder, f"die-{episode.index}")
        if order.exists():
            left = int(order.read_text())
            if left:
                order.write_text(str(left - 1))
                os._exit(9)
        return super().load(episode)

    def fingerprint(self) -> str:
        return "the same"


def test_a_process_gets_one_reader(tmp_path: Path) -> None:
    reader = LoggingReader(ROWS, folder=str(tmp_path))
    convert(reader, tmp_path / "dataset", OPTIONS, runner=LocalRunner(workers=2))
    copies = (tmp_path / "copies").read_text().split()
    assert 1 <= len(copies) <= 2
    assert len(set(copies)) == len(copies)
    assert str(os.getpid()) not in copies


def test_dead_workers_cost_only_the_shard_at_which_two_died(tmp_path: Path) -> None:
    """Episode 1 kills one worker, episode 3 every one."""
    reader, folder = LoggingReader(ROWS, folder=str(tmp_path)), tmp_path / "dataset"
    convert(reader, folder, OPTIONS, runner=HERE)
    expected = dataset_files(folder)
    for index in range(5):
        (folder / "manifest" / f"shard-{index:06d}.json").unlink()
    (tmp_path / "die-1").write_text("1")
    (tmp_path / "die-3").write_text("99")
    with pytest.raises(DataError, match="1 of 5 shards could not be made; the others are finished") as caught:
        convert(reader, folder, OPTIONS, runner=LocalRunner(workers=2))
    assert "shard-000003: DataError: 2 worker processes died" in str(caught.value)
    assert (tmp_path / "die-1").read_text() == "0"
    assert (tmp_path / "die-3").read_text() == "97"
    assert not (folder / "manifest.json").exists()
    (tmp_path / "die-3").unlink()
    assert convert(reader, folder, OPTIONS, runner=HERE).made == 1
    assert dataset_files(folder) == expected


def test_an_episode_that_kills_workers_while_planning_is_named(tmp_path: Path) -> None:
    (tmp_path / "die-1").write_text("99")
    with pytest.raises(DataError, match="2 worker processes died"):
        convert(LoggingReader(ROWS, folder=str(tmp_path)), tmp_path / "out", OPTIONS, runner=LocalRunner(workers=2))


def test_the_cores_are_those_that_may_be_used() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert LocalRunner().workers == usable_cores()


@dataclass(frozen=True)
class Echo:
    """A job that does nothing, or fails with an error that cannot travel."""

    name: str
    fails: bool = False

    def perform(self, shared: Shared) -> int:
        class LocalError(Exception):
            pass

        if self.fails:
            raise LocalError("of this function only")
        return os.getpid()


def test_errors_that_cannot_be_pickled_are_told_all_the_same(tmp_path: Path) -> None:
    shared = Shared(SmallReader((40,)), OPTIONS, tmp_path)
    with LocalRunner(workers=2).start(shared) as run:
        outcomes = {job.name: outcome for job, outcome in run([Echo("a"), Echo("b", fails=True), Echo("c")])}
    assert isinstance(outcomes["b"], DataError)
    assert "LocalError: of this function only" in str(outcomes["b"])
    assert isinstance(outcomes["a"], int)
    assert isinstance(outcomes["c"], int)


# ------------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "make room, then start"), (errno.EDQUOT, "make room, then start"),
                        (errno.EROFS, "make the place writable"), (errno.EIO, "look at the disk")]
)  # fmt: skip
def test_errors_of_the_disk_stop_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    tries = []

    class FullDisk(shard_module.ShardWriter):
        def add(self, key: str, members: object) -> None:
            tries.append(key)
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shard_module, "ShardWriter", FullDisk)
    with pytest.raises(StoppedError, match=fix) as caught:
        convert(SmallReader((40, 30)), tmp_path / "dataset", OPTIONS, runner=HERE)
    assert "shard-000000" in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert len(tries) == 1


def test_errors_of_the_disk_are_found_behind_others(tmp_path: Path) -> None:
    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/big/file")
        except OSError as error:
            raise DataError("a file cannot be written") from error

    with pytest.raises(StoppedError, match="make room") as caught, disk_errors_stop(tmp_path):
        write()
    assert "/big/file" in str(caught.value)
    with pytest.raises(FileNotFoundError), disk_errors_stop(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no such file")


# --------------------------------------------------------------------------------------- many failures


def test_failures_in_a_row_stop_the_run_and_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(shard_module.ShardWriter):
        def add(self, key: str, members: object) -> None:
            raise RuntimeError("the same for all")

    class Counting(Tokenizing):
        def __init__(self) -> None:
            self.written: list[str] = []

        def fingerprint(self) -> str:
            return "tokens"

        def write(self, path: Path, *_: object) -> None:
            self.written.append(path.stem)
            tokens_module.write_array(path, shard_module.np.zeros((16, 27), "int16"))

    monkeypatch.setattr(shard_module, "ShardWriter", Broken)
    tokenizing = Counting()
    with pytest.raises(DataError, match="3 of 5 shards could not be made; stopped after 3 in a row, 2 more") as caught:
        convert(SmallReader(ROWS), tmp_path / "dataset", OPTIONS, runner=HERE, tokenizing=tokenizing)
    assert str(caught.value).count("RuntimeError: the same for all") == 1
    assert "shard-000000, shard-000001, shard-000002: RuntimeError" in str(caught.value)
    assert tokenizing.written == ["shard-000000", "shard-000001", "shard-000002"]


def test_a_success_between_failures_goes_on() -> None:
    failures = Failures(total=100, finished=0)
    for number in range(10):
        failures.failure(f"a{number}", RuntimeError("one"))
        failures.failure(f"b{number}", RuntimeError("two"))
        failures.success()
    with pytest.raises(DataError, match="20 of 100") as caught:
        failures.stop()
    assert "70 more are not made" in str(caught.value)
    assert "a0, a1, a2, a3, a4, a5, a6, a7, a8, a9: RuntimeError: one" in str(caught.value)
    Failures(total=3, finished=3).stop()


def test_the_last_shards_may_all_fail() -> None:
    failures = Failures(total=failures_module.IN_A_ROW, finished=0)
    for number in range(failures_module.IN_A_ROW):
        failures.failure(str(number), RuntimeError("one"))
    with pytest.raises(DataError, match="the others are finished"):
        failures.stop()
