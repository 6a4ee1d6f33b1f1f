"""One pass over the samples of a source, in their order, with several threads and in constant memory.

Threads suffice: reading waits for the storage, and decoding a JPEG does not hold the interpreter.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rdt2_data.problems import SampleError
from rdt2_data.samples import RawSample
from rdt2_data.shards.source import SampleSource

Item = TypeVar("Item")
Result = TypeVar("Result")

SAMPLES_PER_READ = 32
_WAITING_PER_WORKER = 3
"""Results that may wait for their turn: enough to keep all threads busy, and a bound on memory."""


def scan_samples(
    source: SampleSource,
    function: Callable[[int, RawSample | SampleError], Result],
    *,
    indices: Sequence[int] | None = None,
    members: Sequence[str] | None = None,
    workers: int | None = None,
) -> Iterator[list[Result]]:
    """Applies a function to every sample, in threads, and yields the results in the order of the samples.

    Args:
        source: where samples are read.
        function: gets the index of a sample, and the sample or why it could not be read.
        indices: which samples, all by default.
        members: which members of a sample are read, all by default.
        workers: threads, one per core by default.

    Yields:
        results of a few samples at a time.
    """
    wanted = range(len(source)) if indices is None else indices
    batches = (wanted[start : start + SAMPLES_PER_READ] for start in range(0, len(wanted), SAMPLES_PER_READ))

    def work(batch: Sequence[int]) -> list[Result]:
        return [function(index, raw) for index, raw in zip(batch, source.read(batch, members), strict=True)]

    yield from in_order(work, batches, workers=workers)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None
) -> Iterator[Result]:
    """`map` in threads: results in the order of the items, never more than a few of them waiting.

    An exception of the function is raised when its turn comes; what was not begun by then is not begun any more.
    """
    workers = workers or os.cpu_count() or 1
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= _WAITING_PER_WORKER * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
