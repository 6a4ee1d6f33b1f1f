"""Clocks: exact simulated time, no step too many, and never backwards."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdt2_hardware.clock import Clock, SimulatedClock, WallClock

from rdt2_jax.errors import DataError, Rdt2Error


def counting_clock(step_s: float = 0.002, start_s: float = 0.0) -> tuple[SimulatedClock, list[float]]:
    """A clock, and the list of times at which its steps were taken."""
    steps: list[float] = []
    clock = SimulatedClock(lambda: steps.append(clock.now_s()), step_s, start_s)
    return clock, steps


@pytest.mark.parametrize("clock", [WallClock(), SimulatedClock(lambda: None, 0.002)], ids=["wall", "simulated"])
def test_every_clock_keeps_the_protocol(clock: Clock) -> None:
    assert isinstance(clock, Clock)
    start_s = clock.now_s()
    clock.sleep_until_s(start_s + 0.01)
    reached_s = clock.now_s()
    assert reached_s >= start_s + 0.01
    clock.sleep_until_s(start_s)
    clock.sleep_until_s(-1e9)
    assert clock.now_s() >= reached_s
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(DataError, match="time_s must be finite"):
            clock.sleep_until_s(bad)


def test_sleeping_steps_the_simulation_and_nothing_else_does() -> None:
    clock, steps = counting_clock()
    for _ in range(3):
        assert clock.now_s() == 0.0
    clock.sleep_until_s(0.01)
    assert (clock.steps, len(steps)) == (5, 5)
    assert steps == pytest.approx([0.0, 0.002, 0.004, 0.006, 0.008])
    assert clock.now_s() == 0.01


def test_time_between_steps_is_rounded_up() -> None:
    clock, _ = counting_clock()
    clock.sleep_until_s(0.0021)
    assert (clock.steps, clock.now_s()) == (2, 0.004)
    clock.sleep_until_s(0.0039)
    assert clock.steps == 2


@pytest.mark.parametrize("start_s", [0.0, 1000.0, -5.0])
def test_an_hour_has_no_drift(start_s: float) -> None:
    clock, steps = counting_clock(step_s=0.1, start_s=start_s)
    for tick in range(1, 36001):
        clock.sleep_until_s(start_s + tick * 0.1)
    assert len(steps) == 36000
    assert clock.now_s() == pytest.approx(start_s + 3600.0, abs=1e-12)


@given(st.integers(1, 400), st.sampled_from([0.001, 0.002, 0.1, 1 / 30, 1 / 240]), st.sampled_from([0.0, 12345.678]))
def test_rounding_costs_no_step(count: int, step_s: float, start_s: float) -> None:
    clock, _ = counting_clock(step_s, start_s)
    added_up_s = start_s
    for _ in range(count):
        added_up_s += step_s
    clock.sleep_until_s(added_up_s)
    assert clock.steps == count
    assert clock.now_s() >= added_up_s


@given(st.lists(st.floats(-0.1, 0.5), max_size=20))
def test_time_never_goes_back_and_always_arrives(times_s: list[float]) -> None:
    clock, steps = counting_clock()
    before_s = clock.now_s()
    for time_s in times_s:
        clock.sleep_until_s(time_s)
        assert clock.now_s() >= max(before_s, time_s)
        assert clock.now_s() < max(before_s, time_s) + clock.step_s
        before_s = clock.now_s()
    assert clock.steps == len(steps)
    assert steps == sorted(steps)


def test_advance_counts_steps() -> None:
    clock, steps = counting_clock(start_s=5.0)
    clock.advance()
    clock.advance(4)
    clock.advance(0)
    assert len(steps) == 5
    assert clock.now_s() == pytest.approx(5.01)
    with pytest.raises(DataError, match="does not go back"):
        clock.advance(-1)


def test_a_step_that_fails_does_not_count_and_can_be_tried_again() -> None:
    failures = [RuntimeError("diverged")]

    def step() -> None:
        if failures:
            raise failures.pop()

    clock = SimulatedClock(step, 0.002)
    with pytest.raises(RuntimeError, match="diverged"):
        clock.sleep_until_s(0.004)
    assert (clock.steps, clock.now_s()) == (0, 0.0)
    clock.sleep_until_s(0.004)
    assert clock.steps == 2


def test_a_step_must_not_wait_for_its_own_clock() -> None:
    clock = SimulatedClock(lambda: clock.sleep_until_s(1.0), 0.002)
    with pytest.raises(Rdt2Error, match="a simulation step waits for simulated time"):
        clock.advance()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "takes time"),
        ((-0.002,), "takes time"),
        ((math.nan,), "step_s must be finite"),
        ((0.002, math.inf), "start_s must be finite"),
    ],
)
def test_bad_steps_are_refused(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SimulatedClock(lambda: None, *arguments)
