"""Indices of many local shards, made by several processes.

The processes are programs of their own that read names from their input. They know nothing of the program that started
them, so a plain script may open shards without guarding its top level.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_PROGRAM = "from rdt2_data.shards.index_processes import work; work()"


def index_in_processes(
    shards: Sequence[str], folder: Path | None, processes: int, done: Callable[[], None] = lambda: None
) -> None:
    """Makes the index files of local shards that have none; one that cannot be made is left out.

    Args:
        shards: paths.
        folder: where indices lie, see `indexing.index_places`.
        processes: how many work at the same time.
        done: called after each shard, from several threads.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for shard in shards:
        waiting.put(shard)

    def feed() -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-c", _PROGRAM]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as worker:
            while worker.poll() is None and (shard := _next(waiting)) is not None:
                if not _ask(worker, shard, folder):
                    return
                done()

    with ThreadPoolExecutor(processes) as pool:
        jobs = [pool.submit(feed) for _ in range(processes)]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            while _next(waiting) is not None:
                continue  # nothing new is begun
            raise


def _ask(worker: subprocess.Popen[str], shard: str, folder: Path | None) -> bool:
    """Has one index made. False when the worker has ended: the caller meets what ended it, and reports that."""
    if worker.stdin is None or worker.stdout is None:
        return False
    try:
        worker.stdin.write(json.dumps({"shard": shard, "folder": folder and str(folder)}) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return False
    return bool(worker.stdout.readline())


def _next(waiting: queue.SimpleQueue[str]) -> str | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def work() -> None:
    """The worker: one line of JSON in per shard, one line out when it is done with it."""
    import signal

    from rdt2_data.problems import SampleError
    from rdt2_data.shards.indexing import load_shard
    from rdt2_data.shards.storage import storage_for

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program that started it closes its input
    for line in sys.stdin:
        request = json.loads(line)
        folder = None if request["folder"] is None else Path(request["folder"])
        try:
            load_shard(request["shard"], storage_for(request["shard"]), folder)
        except SampleError as problem:
            print(problem.reason, flush=True)  # the caller meets it again, and reports it
        else:
            print("indexed", flush=True)
