"""How much of the machine others used while something was timed; threads that wait for each other suffer from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

QUIET = 0.05
"""Share of the processors' time up to which a comparison counts."""


class Bystanders:
    """Processor time of all other processes, counted from the moment of creation. Linux."""

    def __init__(self) -> None:
        self._others_s, self._started_s = _others_s(), time.perf_counter()

    def share(self) -> float:
        """Their processor time since then, of what this process' processors have to give."""
        available_s = (time.perf_counter() - self._started_s) * len(os.sched_getaffinity(0))
        return max(0.0, (_others_s() - self._others_s) / available_s)


def in_quiet(measure: Callable[[], T], rounds: int, patience: int = 2) -> tuple[list[T], float]:
    """Measures until there are as many quiet rounds as are wanted; without so many, the quietest ones count.

    Args:
        measure: one round.
        rounds: how many are wanted.
        patience: at most so many times as many are tried.

    Returns:
        What `measure` gave in these rounds, in their order, and the share of others in the busiest of them.
    """
    tried: list[tuple[float, int, T]] = []
    while len(tried) < patience * rounds and sum(share <= QUIET for share, _, _ in tried) < rounds:
        bystanders = Bystanders()
        result = measure()
        tried.append((bystanders.share(), len(tried), result))
    kept = sorted(tried, key=lambda item: item[:2])[:rounds]
    return [result for _, _, result in sorted(kept, key=lambda item: item[1])], kept[-1][0]


def _others_s() -> float:
    """Seconds that all processors worked for other processes, since the machine started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = (int(field) for field in fields[:8])
    busy = user + nice + system + interrupts + soft_interrupts + stolen
    own = os.times()
    return busy / os.sysconf("SC_CLK_TCK") - own.user - own.system
