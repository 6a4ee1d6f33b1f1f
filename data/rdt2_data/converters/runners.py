"""Who makes the shards: this process, a pool of processes, or a Ray cluster. All of them give the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from rdt2_data.converters.manifest import ShardEntry
from rdt2_data.converters.shard import ShardJob, make_shard
from rdt2_jax.errors import DataError, missing_extra

Outcome = tuple[ShardJob, ShardEntry | BaseException]
_AHEAD = 2
"""Jobs handed out for each worker: the next one waits beside it."""


class Runner(Protocol):
    """Makes shards in any order."""

    def run(self, jobs: Iterable[ShardJob]) -> Iterator[Outcome]:
        """Yields each job with its entry, or with what went wrong. Jobs are drawn when somebody can take them.

        Closing the iterator gives up what has not been started.
        """
        ...


class LocalRunner:
    """A pool of processes on this machine; with one worker, this very process.

    Args:
        workers: number of processes, None for one per core.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or os.cpu_count() or 1

    def run(self, jobs: Iterable[ShardJob]) -> Iterator[Outcome]:
        """See `Runner.run`."""
        if self.workers == 1:
            for job in jobs:
                try:
                    outcome: ShardEntry | BaseException = make_shard(job)
                except Exception as error:  # noqa: BLE001 - handed on, with the shard it belongs to
                    outcome = error
                yield job, outcome
            return
        pool = ProcessPoolExecutor(self.workers, mp_context=_context(), initializer=_end_with_parent)
        try:
            yield from _in_window(jobs, self.workers * _AHEAD, lambda job: _submit(pool, job), _first_done)
        finally:
            pool.shutdown(cancel_futures=True)


class RayRunner:
    """Tasks of Ray: on a cluster, or on processes of this machine.

    Args:
        address: of the cluster, None to start Ray here (and stop it at the end).
        workers: number of CPUs to give a Ray that is started here, None for all.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self.address, self.workers = address, workers

    def run(self, jobs: Iterable[ShardJob]) -> Iterator[Outcome]:
        """See `Runner.run`.

        Raises:
            MissingExtraError: Ray is not installed.
        """
        try:
            import ray
        except ModuleNotFoundError as error:
            raise missing_extra("ray", "ray", "the Ray runner") from error
        started = not ray.is_initialized()
        if started:
            _start_ray(ray, self.address, self.workers)
        try:
            window = max(1, int(ray.cluster_resources().get("CPU", 1))) * _AHEAD
            task = ray.remote(make_shard)
            yield from _in_window(jobs, window, task.remote, lambda pending: _ray_done(ray, pending))
        finally:
            if started:
                ray.shutdown()


def _in_window(
    jobs: Iterable[ShardJob],
    size: int,
    submit: Callable[[ShardJob], Any],
    finished: Callable[[list[Any]], Iterator[tuple[Any, ShardEntry | BaseException]]],
) -> Iterator[Outcome]:
    """Keeps up to `size` jobs in work, and yields them as they finish."""
    waiting, pending = iter(jobs), {}
    while True:
        while len(pending) < size and (job := next(waiting, None)) is not None:
            pending[submit(job)] = job
        if not pending:
            return
        for handle, outcome in finished(list(pending)):
            yield pending.pop(handle), outcome


# -------------------------------------------------------------------------------------------- processes


def _context() -> Any:
    """Never plain fork: the parent may hold JAX, whose threads do not survive it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_parent() -> None:
    """A worker whose parent was killed ends at once, instead of waiting for work or writing on."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _submit(pool: ProcessPoolExecutor, job: ShardJob) -> Future[ShardEntry]:
    try:
        return pool.submit(make_shard, job)
    except BrokenProcessPool as error:
        future: Future[ShardEntry] = Future()
        future.set_exception(error)
        return future


def _first_done(pending: list[Future[ShardEntry]]) -> Iterator[tuple[Any, ShardEntry | BaseException]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            fix = "start the same command again; if memory ran out, with fewer workers"
            error = DataError("a worker process died", found=str(error), fix=fix)
        yield future, error or future.result()


# -------------------------------------------------------------------------------------------------- Ray


def _start_ray(ray: Any, address: str | None, workers: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        ray.init(address=address, **quiet)
        return
    # Jobs and entries are a few kilobytes: the smallest object store that Ray accepts is plenty.
    ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=80 * 2**20, **quiet)


def _ray_done(ray: Any, pending: list[Any]) -> Iterator[tuple[Any, ShardEntry | BaseException]]:
    done, _ = ray.wait(pending, num_returns=1)
    for handle in done:
        try:
            yield handle, ray.get(handle)
        except ray.exceptions.RayError as error:
            yield handle, getattr(error, "cause", None) or error
