"""Which steps are traced, and that traces end whatever happens."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rdt2_train.profiler import ProfilerOptions, StepProfiler

from rdt2_jax.config import parse_config
from rdt2_jax.errors import ConfigError, Rdt2Error


@pytest.fixture
def calls(monkeypatch):
    """What jax's profiler is told, without its work."""
    told = []

    def start(folder, profiler_options):
        told.append(("start", folder.name, profiler_options.python_tracer_level))

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append(("stop",)))
    monkeypatch.setattr(jax, "block_until_ready", lambda result: told.append(("wait", result)))
    return told


def run(profiler, steps, told):
    with profiler:
        for number in steps:
            with profiler.step(number):
                told.append(number)
            profiler.done(number, f"result {number}")


@pytest.mark.parametrize("steps", [range(0, 7), range(2, 7)])
def test_the_steps_that_are_asked_for(tmp_path, calls, steps):
    run(StepProfiler(ProfilerOptions(first_step=3, steps=2), tmp_path), steps, calls)
    before, after = [n for n in steps if n < 3], [5, 6]
    assert calls == [*before, ("start", "profile", 0), 3, 4, ("wait", "result 4"), ("stop",), *after]


def test_a_run_that_resumes_between_traces_the_rest(tmp_path, calls):
    run(StepProfiler(ProfilerOptions(first_step=3, steps=4, python=True), tmp_path), range(5, 9), calls)
    assert calls == [("start", "profile", 1), 5, 6, ("wait", "result 6"), ("stop",), 7, 8]


def test_a_run_that_is_past_them_traces_nothing(tmp_path, calls):
    run(StepProfiler(ProfilerOptions(first_step=3), tmp_path), range(6, 9), calls)
    assert calls == [6, 7, 8]
    assert not (tmp_path / "profile").exists()


def test_off_is_off(tmp_path, calls):
    run(StepProfiler(None, tmp_path), range(20), calls)
    assert calls == list(range(20))
    assert list(tmp_path.iterdir()) == []


def fail_in_the_second_step(profiler):
    with profiler:
        with profiler.step(0):
            pass
        profiler.done(0, None)
        with profiler.step(1):
            raise KeyError


def test_a_failing_run_ends_its_trace(tmp_path, calls):
    with pytest.raises(KeyError):
        fail_in_the_second_step(StepProfiler(ProfilerOptions(first_step=0, steps=5), tmp_path))
    assert calls == [("start", "profile", 0), ("stop",)]


def test_a_trace_on_top_of_another_is_refused_with_a_reason(tmp_path, monkeypatch):
    def busy(*_, **__):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(jax.profiler, "start_trace", busy)
    profiler = StepProfiler(ProfilerOptions(first_step=0), tmp_path)
    with profiler, pytest.raises(Rdt2Error, match=r"(?s)cannot be started.*profile.*one profile"):
        profiler.step(0)


def test_a_trace_is_written(tmp_path):
    profiler = StepProfiler(ProfilerOptions(first_step=1, steps=1), tmp_path)
    with profiler:
        for number in range(3):
            with profiler.step(number):
                result = SimpleNamespace(value=jnp.arange(3.0) * number)
            profiler.done(number, result.value)
    assert [path.suffix for path in sorted((tmp_path / "profile").rglob("*.pb"))] == [".pb"]


@pytest.mark.parametrize("values", [{"first_step": -1}, {"steps": 0}, {"until": 3}])
def test_options_that_make_no_sense(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        parse_config(ProfilerOptions, values, where="test")
