"""Honest comparisons on noisy machines: contestants take turns, medians and ratios are reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each counted run, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def take_turns(
    contestants: Mapping[str, Callable[[], object]], *, min_seconds: float, rounds: int = 9, warm_up: int = 2
) -> dict[str, Timing]:
    """Times functions that return when their work is done, A B A B ..., each turn lasting about `min_seconds`.

    A turn repeats the function often enough to last, and counts the mean of the repeats as one run.
    """
    repeats = {}
    for name, function in contestants.items():
        for _ in range(warm_up):
            function()
        started = time.perf_counter()
        function()
        repeats[name] = max(1, round(min_seconds / max(time.perf_counter() - started, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            seconds[name].append((time.perf_counter() - started) / repeats[name])
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over rounds of numerator / denominator, so that drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True))
