"""Who does the work: this process, a pool of processes, or a Ray cluster. All of them give the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rdt2_data.converters.failures import stopping_error
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.recording import RecordingReader
from rdt2_jax.errors import DataError, missing_extra

MAX_DEATHS = 2
"""A job at which as many worker processes died is given up. The first may have been chance, or a lack of memory."""

_AHEAD = 2
"""Jobs handed to Ray for each worker: the next one waits beside it."""


@dataclass(frozen=True, eq=False)
class Shared:
    """What all jobs of a conversion have in common. Each process gets it once and keeps it.

    Attributes:
        reader, options: of the conversion.
        folder: the destination.
        hide: folder whose path is left away in messages, because it differs between machines; may be empty.
    """

    reader: RecordingReader
    options: ConvertOptions
    folder: Path
    hide: str = ""


class Job(Protocol):
    """A piece of work that can be pickled, and is small."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def perform(self, shared: Shared) -> Any:
        """Does it, in any process; doing it twice does no harm."""
        ...


Run = Callable[[Iterable[Any]], Generator[tuple[Any, Any], None, None]]
"""Does jobs in any order. Yields each with its result, or with the exception that it raised. Jobs are drawn when
somebody can soon take them. Closing the generator gives up what has not been started."""


class Runner(Protocol):
    """A place to work."""

    def start(self, shared: Shared) -> AbstractContextManager[Run]:
        """Workers for one conversion; they end with the block. Nothing is started before there is a job."""
        ...


def usable_cores() -> int:
    """Cores that this process may use; containers and schedulers often allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


class LocalRunner:
    """Processes on this machine; with one worker, this very process.

    A worker that dies is replaced. The job it died at is tried once more.

    Args:
        workers: number of processes, None for one per core.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or usable_cores()

    @contextmanager
    def start(self, shared: Shared) -> Iterator[Run]:
        """See `Runner.start`."""
        if self.workers == 1:
            yield lambda jobs: ((job, _outcome(job, shared)) for job in jobs)
            return
        sent = secrets.token_hex(8), pickle.dumps(shared)
        workers = [_Worker(*sent) for _ in range(self.workers)]
        try:
            yield lambda jobs: _with_workers(workers, iter(jobs))
        finally:
            for worker in workers:
                worker.end()


class RayRunner:
    """Tasks of Ray: on a cluster, or on processes of this machine.

    Args:
        address: of the cluster, None to start Ray here (and stop it at the end).
        workers: number of CPUs to give a Ray that is started here, None for all.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self.address, self.workers = address, workers

    @contextmanager
    def start(self, shared: Shared) -> Iterator[Run]:
        """See `Runner.start`. The first job raises MissingExtraError where Ray is not installed."""
        started: list[Any] = []

        def run(jobs: Iterable[Job]) -> Generator[tuple[Job, Any], None, None]:
            try:
                import ray
            except ModuleNotFoundError as error:
                raise missing_extra("ray", "ray", "the Ray runner") from error
            if not ray.is_initialized():
                _start_ray(ray, self.address, self.workers)
                started.append(ray)
            yield from _with_ray(ray, shared, iter(jobs))

        try:
            yield run
        finally:
            for ray in started:
                ray.shutdown()


# ---------------------------------------------------------------------------------------- in each process

_KEPT: dict[str, Shared] = {}
"""Token of a conversion -> what its jobs share: the reader is made once in each process, and its files stay open."""

_SENT: dict[str, bytes] = {}


def _begin(token: str, data: bytes) -> None:
    """Makes a process a worker. `data` is unpickled at the first job, whose error it then is if that fails."""
    _SENT[token] = data
    _end_with_parent()


def _keep(token: str, shared: Shared) -> None:
    """Keeps what a conversion shares, and forgets an earlier one: workers of Ray may live through several."""
    _KEPT.clear()
    _KEPT[token] = shared


def _perform(token: str, job: Job) -> Any:
    try:
        if token not in _KEPT:
            _keep(token, pickle.loads(_SENT[token]))  # our own bytes, from our own parent process
        shared = _KEPT[token]
        outcome = _outcome(job, shared)
    except Exception as error:  # noqa: BLE001 - handed on, see below
        outcome = error
    if isinstance(outcome, BaseException):
        raise _portable(outcome)
    return outcome


def _outcome(job: Job, shared: Shared) -> Any:
    """The job's result, or what it raised."""
    try:
        return job.perform(shared)
    except Exception as error:  # noqa: BLE001 - handed on, with the job it belongs to
        stop = stopping_error(error, shared.folder / job.name)
        if stop is not None and stop is not error:
            stop.__cause__ = error
        return stop or error


def _portable(error: BaseException) -> BaseException:
    """The error, or one that tells the same if it cannot travel between processes (which would end the worker)."""
    try:
        pickle.loads(pickle.dumps(error))  # our own bytes
    except Exception:  # noqa: BLE001 - anything may be wrong with it
        return DataError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    """A worker whose parent was killed ends at once, instead of waiting for work or writing on."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ----------------------------------------------------------------------------------------- local processes


class _Worker:
    """One process, started for its first job, and again after it died.

    Each is a pool of its own: so it is known at which job a process died, and the others are not touched by it.
    """

    def __init__(self, token: str, data: bytes) -> None:
        self._token, self._data = token, data
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, job: Job) -> Future[Any]:
        """Hands it a job; it must have none."""
        if self._pool is None:
            arguments = self._token, self._data
            self._pool = ProcessPoolExecutor(1, mp_context=_context(), initializer=_begin, initargs=arguments)
        try:
            return self._pool.submit(_perform, self._token, job)
        except BrokenProcessPool:  # it died while it was idle: nobody's fault
            self.end()
            return self.submit(job)

    def end(self) -> None:
        """Ends the process, after its job."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _with_workers(workers: list[_Worker], jobs: Iterator[Job]) -> Generator[tuple[Job, Any], None, None]:
    """Each worker has one job; as many are drawn ahead, because drawing one may take time (tokens)."""
    free, ready = list(reversed(workers)), deque[Job]()
    busy: dict[Future[Any], tuple[_Worker, Job]] = {}
    deaths: Counter[str] = Counter()
    more = True
    while True:
        if more and len(ready) < len(workers):
            job = next(jobs, None)
            more = job is not None
            ready.extend([] if job is None else [job])
        while free and ready:
            worker, job = free.pop(), ready.popleft()
            busy[worker.submit(job)] = worker, job
        if not busy and not more:
            return
        draw = more and (bool(free) or len(ready) < len(workers))
        for future in wait(busy, 0 if draw else None, FIRST_COMPLETED).done:
            worker, job = busy.pop(future)
            free.append(worker)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                worker.end()
                deaths[job.name] += 1
                if deaths[job.name] < MAX_DEATHS:
                    ready.appendleft(job)
                    continue
                error = _died(error)
            yield job, error or future.result()


def _died(error: BaseException) -> DataError:
    fix = "if memory ran out, start the same command again with fewer workers"
    what = f"{MAX_DEATHS} worker processes died, one after the other"
    died = DataError(what, found="the system ended them, or a library crashed", fix=fix)
    died.__cause__ = error
    return died


def _context() -> Any:
    """Never plain fork: the parent may hold JAX, whose threads do not survive it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rdt2_data.converters.shard", "rdt2_data.converters.planning"])
    return context


# -------------------------------------------------------------------------------------------------- Ray


def _start_ray(ray: Any, address: str | None, workers: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        ray.init(address=address, **quiet)
        return
    # Jobs and entries are a few kilobytes: the smallest object store that Ray accepts is plenty.
    ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=80 * 2**20, **quiet)


def _perform_on_ray(token: str, sent: list[Any], job: Job) -> Any:
    """As `_perform`; `sent` holds a reference, which Ray does not follow by itself, so that it is fetched once."""
    if token not in _KEPT:
        import ray

        _keep(token, ray.get(sent[0]))
    return _perform(token, job)


def _with_ray(ray: Any, shared: Shared, jobs: Iterator[Job]) -> Iterator[tuple[Job, Any]]:
    token, sent = secrets.token_hex(8), [ray.put(shared)]
    window = max(1, int(ray.cluster_resources().get("CPU", 1))) * _AHEAD
    task = ray.remote(max_retries=MAX_DEATHS - 1)(_perform_on_ray)
    pending: dict[Any, Job] = {}
    try:
        while True:
            while len(pending) < window and (job := next(jobs, None)) is not None:
                pending[task.remote(token, sent, job)] = job
            if not pending:
                return
            for handle in ray.wait(list(pending), num_returns=1)[0]:
                try:
                    outcome = ray.get(handle)
                except ray.exceptions.WorkerCrashedError as error:
                    outcome = _died(error)
                except ray.exceptions.RayError as error:
                    outcome = getattr(error, "cause", None) or error
                yield pending.pop(handle), outcome
    finally:
        for handle in pending:  # a cluster of others lives on: nothing may be written there any more
            ray.cancel(handle)
