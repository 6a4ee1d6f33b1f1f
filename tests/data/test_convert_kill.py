"""A conversion that is killed twenty times gives, to the last bit, the dataset of one that was left in peace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from convert_sources import dataset_files
from rdt2_data.problems import SampleError
from rdt2_data.shards.source import open_source

KILLS = 20
LATE_KILLS = 3
"""Of these, how many are meant for the end, when all shards are there and the dataset is being finished."""

SHARDS = 45
CHILD = """
import sys
from convert_sources import SmallReader
from rdt2_data.converters.convert import convert
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.runners import LocalRunner

reader = SmallReader((54,) * 9, size=(384, 384), unreadable=(17,))
convert(reader, sys.argv[1], ConvertOptions(samples_per_shard=6), runner=LocalRunner(workers=2))
"""
LIMIT_S = 60.0


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A conversion in a process group of its own, to which its workers belong."""
    paths = [path for path in sys.path if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", CHILD, str(folder)]
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE)


def kill_group(process: subprocess.Popen[bytes]) -> bool:
    """kill -9 to all of them; whether the conversion was still running."""
    running = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the conversion stands still"
        time.sleep(0.001)


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob(".*")} if folder.is_dir() else set()


def entries(folder: Path) -> int:
    return len(list((folder / "manifest").glob("shard-*.json")))


def kill_somewhere(folder: Path, generator: np.random.Generator, kills: int, misses: int) -> bool:
    """Starts a conversion and kills it: after a time, when a file is being written, or after some shards.

    Returns whether it was still running. Every miss makes the time shorter, so that fast machines are hit as well.
    """
    before, old = entries(folder), hidden(folder)
    process = start(folder)
    kind = "end" if kills >= KILLS - LATE_KILLS else ("time", "file", "shard")[generator.integers(3)]
    if kind == "end":
        wait_until(lambda: entries(folder) >= SHARDS, process)
        time.sleep(generator.uniform(0, 0.01) if before < SHARDS else generator.uniform(0.1, 0.3) * 0.8**misses)
    elif kind == "file":
        wait_until(lambda: bool(hidden(folder) - old), process)
        time.sleep(generator.uniform(0, 0.01))
    elif kind == "shard":
        wanted = before + int(generator.integers(1, 6))
        wait_until(lambda: entries(folder) >= wanted, process)
        time.sleep(generator.uniform(0, 0.05))
    else:
        time.sleep(generator.uniform(0, 0.5))
    return kill_group(process)


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    process = start(undisturbed)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors.decode()

    generator = np.random.default_rng(20)
    kills, interrupted, progress = 0, 0, set()
    for start_number in range(3 * KILLS):
        if kills == KILLS:
            break
        kills += kill_somewhere(disturbed, generator, kills, misses=start_number - kills)
        progress.add(entries(disturbed))
        interrupted += any(name.startswith(".shard-") and ".tar." in name for name in hidden(disturbed))
    assert kills == KILLS
    # The kills hit different stages, and several of them the middle of a shard.
    assert len(progress) >= 6
    assert interrupted >= 5

    process = start(disturbed)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors.decode()
    assert dataset_files(disturbed) == dataset_files(undisturbed)
    assert len(list(disturbed.glob("*.tar"))) == SHARDS
    assert not hidden(disturbed)
    source = open_source(str(disturbed))
    samples = source.read(range(len(source)))
    assert len(samples) == 9 * 30 - 9  # one image of each episode cannot be read
    assert not [sample for sample in samples if isinstance(sample, SampleError)]


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Otherwise they would write on beside those of the next start, or wait for ever."""
    process = start(tmp_path / "dataset")
    wait_until(lambda: entries(tmp_path / "dataset") > 0, process)
    process.kill()
    process.communicate(timeout=LIMIT_S)  # returns once all that inherited standard error have ended
    assert 0 < entries(tmp_path / "dataset") < SHARDS
