"""Clocks: the only way this room learns the time or waits.

Code that takes a `Clock` runs unchanged in real time and in lockstep with a simulation, where it is reproducible.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from rdt2_jax.errors import DataError, Rdt2Error


@runtime_checkable
class Clock(Protocol):
    """A monotonic clock. Its zero means nothing: only differences and comparisons do."""

    def now_s(self) -> float:
        """The time [s]; never less than an earlier answer."""
        ...

    def sleep_until_s(self, time_s: float) -> None:
        """Returns once `now_s()` is at least `time_s`; at once when it is already.

        Raises:
            DataError: when `time_s` is not finite.
        """
        ...


class WallClock:
    """The machine's monotonic clock, the one `time.monotonic` reads; it ignores changes of the date."""

    def now_s(self) -> float:
        """The time [s] since some moment before the program started."""
        return time.monotonic()

    def sleep_until_s(self, time_s: float) -> None:
        """Sleeps until `time_s`, however late the machine wakes up.

        Raises:
            DataError: when `time_s` is not finite.
        """
        _require_finite(time_s, "time_s")
        while (left_s := time_s - time.monotonic()) > 0:
            time.sleep(left_s)


class SimulatedClock:
    """Time that passes only by stepping a simulation: sleeping runs physics, and nothing else does.

    The number of steps is counted as an integer and the time computed from it, so that an hour of steps of 2 ms ends
    at 3600 s and not beside it.

    Args:
        step: advances the simulation by one step. It may read the clock (which shows the time before the step), not
            sleep on it. When it raises, the step does not count.
        step_s: length of a step [s].
        start_s: time before the first step [s].

    Raises:
        DataError: when the step is not positive or a number is not finite.
    """

    _ROUNDING_STEPS = 1e-6
    """A time asked for that lies beyond a step by less than this part of it was meant to lie on it: 0.1 * 3 s is
    more than 150 steps of 2 ms by rounding alone, and must not cost a 151st."""

    def __init__(self, step: Callable[[], None], step_s: float, start_s: float = 0.0) -> None:
        _require_finite(step_s, "step_s")
        _require_finite(start_s, "start_s")
        if step_s <= 0:
            raise DataError("a simulated step takes time", where="step_s", expected="> 0 s", found=step_s)
        self._step = step
        self._step_s = step_s
        self._start_s = start_s
        self._steps = 0
        self._reached_s = start_s
        self._stepping = False

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._steps

    @property
    def step_s(self) -> float:
        """Length of a step [s]."""
        return self._step_s

    def now_s(self) -> float:
        """The time [s]: start + steps * step length.

        Only where rounding makes a time that was slept for come out above its own step is that time the answer, so
        that `now_s()` is never below what `sleep_until_s` was asked for.
        """
        return max(self._start_s + self._steps * self._step_s, self._reached_s)

    def sleep_until_s(self, time_s: float) -> None:
        """Steps until the time is `time_s`, or the first step after it; a time that has passed takes none.

        Raises:
            DataError: when `time_s` is not finite.
            Rdt2Error: when called from within a step.
        """
        _require_finite(time_s, "time_s")
        target = math.ceil((time_s - self._start_s) / self._step_s - self._ROUNDING_STEPS)
        self._step_to(target)
        self._reached_s = max(self._reached_s, time_s)

    def advance(self, steps: int = 1) -> None:
        """Takes a number of steps.

        Raises:
            DataError: for a negative number: time does not go back.
            Rdt2Error: when called from within a step.
        """
        if steps < 0:
            raise DataError("a clock does not go back", where="advance", expected=">= 0 steps", found=steps)
        self._step_to(self._steps + steps)

    def _step_to(self, target: int) -> None:
        if self._stepping:
            raise Rdt2Error(
                "a simulation step waits for simulated time",
                where="the step function of a SimulatedClock",
                expected="a step that returns without sleeping on its own clock",
                fix="compare times with now_s() instead of sleeping",
            )
        self._stepping = True
        try:
            while self._steps < target:
                self._step()
                self._steps += 1
        finally:
            self._stepping = False


def _require_finite(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise DataError(f"{name} must be finite", where=name, expected="seconds", found=value)
