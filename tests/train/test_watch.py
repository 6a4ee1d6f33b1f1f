"""Rates of training by an injected clock, shares of the peak, and memory of devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdt2_train.chips import peak_flops_per_s
from rdt2_train.flops import StepFlops
from rdt2_train.watch import StepWatch, device_memory, peak_of_devices

from rdt2_jax.errors import ConfigError

FLOPS = StepFlops(forward=4e9, activation_gradients=3e9, weight_gradients=1e9, recomputed=2e9)


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


def take_step(watch, clock, wait_s, compute_s, samples=8, tokens=0):
    with watch.waiting():
        clock.pass_s(wait_s)
    clock.pass_s(compute_s)
    watch.step(samples, tokens)


def test_rates_wait_and_shares_of_a_window():
    clock = Clock()
    watch = StepWatch(sample_flops=FLOPS, peak_flops=1e12, clock=clock)
    take_step(watch, clock, 5.0, 60.0)  # compiles
    for compute_s in (1.0, 1.0, 4.0):
        take_step(watch, clock, 0.5, compute_s, samples=16, tokens=320)
    found = watch.report()
    assert found == pytest.approx(
        {
            "samples_per_s": 48 / 7.5,
            "tokens_per_s": 960 / 7.5,
            "step_s": 1.5,
            "data_wait_percent": 20.0,
            "mfu_percent": 100 * 8e9 * 48 / 7.5 / 1e12,
            "hfu_percent": 100 * 10e9 * 48 / 7.5 / 1e12,
        }
    )


def test_each_report_begins_a_window():
    clock = Clock()
    watch = StepWatch(clock=clock)
    take_step(watch, clock, 1.0, 1.0)
    take_step(watch, clock, 1.0, 1.0)
    first = watch.report()
    clock.pass_s(2.0)  # time between steps counts, whatever it was spent on
    take_step(watch, clock, 0.0, 2.0)
    second = watch.report()
    assert first == pytest.approx({"samples_per_s": 4.0, "step_s": 2.0, "data_wait_percent": 50.0})
    assert second == pytest.approx({"samples_per_s": 2.0, "step_s": 4.0, "data_wait_percent": 0.0})


def test_pauses_are_in_no_rate():
    clock = Clock()
    watch = StepWatch(clock=clock)
    take_step(watch, clock, 0.0, 1.0)
    take_step(watch, clock, 0.5, 0.5)
    with watch.pausing():
        clock.pass_s(1000.0)
    take_step(watch, clock, 0.5, 0.5)
    assert watch.report() == pytest.approx({"samples_per_s": 8.0, "step_s": 1.0, "data_wait_percent": 50.0})


def failing(around, clock, seconds):
    with around():
        clock.pass_s(seconds)
        raise KeyError


def test_time_counts_although_the_body_failed():
    clock = Clock()
    watch = StepWatch(warm_up_steps=0, clock=clock)
    for around, seconds in ((watch.waiting, 3.0), (watch.pausing, 5.0)):
        with pytest.raises(KeyError):
            failing(around, clock, seconds)
    clock.pass_s(1.0)
    watch.step(4)
    assert watch.report() == pytest.approx({"samples_per_s": 1.0, "step_s": 4.0, "data_wait_percent": 75.0})


def test_nothing_to_report():
    clock = Clock()
    watch = StepWatch(clock=clock)
    assert watch.report() == {}
    take_step(watch, clock, 0.0, 9.0)  # the warm-up
    clock.pass_s(1.0)
    assert watch.report() == {}
    take_step(watch, clock, 0.0, 0.0)
    assert watch.report()["samples_per_s"] == pytest.approx(8.0)  # the second that passed before is still in the window
    take_step(watch, clock, 0.0, 0.0)
    assert watch.report() == {}  # a step, but no time


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(1e-3, 10)), min_size=2, max_size=20))
def test_rate_times_time_is_what_was_done(steps):
    clock = Clock()
    watch = StepWatch(clock=clock)
    take_step(watch, clock, *steps[0])
    for step in steps[1:]:
        take_step(watch, clock, *step, samples=3)
    found = watch.report()
    passed = sum(wait + compute for wait, compute in steps[1:])
    assert found["samples_per_s"] * passed == pytest.approx(3 * (len(steps) - 1), rel=1e-6)
    assert 0 <= found["data_wait_percent"] <= 100 * (1 + 1e-9)
    assert set(found) == {"samples_per_s", "step_s", "data_wait_percent"}


@pytest.mark.parametrize(("choices", "name"), [({"warm_up_steps": -1}, "warm_up_steps"), ({"peak_flops": 0.0}, "peak")])
def test_choices_that_make_no_sense(choices, name):
    with pytest.raises(ConfigError, match=name):
        StepWatch(**choices)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
    ],
)
def test_known_chips(kind, teraflops):
    assert peak_flops_per_s(kind) == teraflops * 1e12


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA H20",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A10",
        "TPU v5 heavy",
    ],
)
def test_a_relative_is_not_the_chip(kind):
    assert peak_flops_per_s(kind) is None


def chip(kind="TPU v4", **counts):
    return SimpleNamespace(device_kind=kind, memory_stats=lambda: counts or None)


def test_peak_of_all_devices_or_of_none():
    assert peak_of_devices([chip(), chip()]) == 550e12
    assert peak_of_devices([chip(), chip("cpu")]) is None
    assert peak_of_devices([]) is None
    assert peak_of_devices() is None  # CPUs


def test_memory_is_that_of_the_fullest_device():
    devices = [
        chip(bytes_in_use=5, peak_bytes_in_use=9, bytes_limit=100),
        chip(bytes_in_use=7, peak_bytes_in_use=8, bytes_limit=100, num_allocs=3),
    ]
    assert device_memory(devices) == {"bytes_in_use": 7, "peak_bytes_in_use": 9, "bytes_limit": 100}


def test_devices_that_do_not_count_their_memory():
    nothing = {"bytes_in_use": None, "peak_bytes_in_use": None, "bytes_limit": None}
    assert device_memory([chip()]) == nothing
    assert device_memory() == nothing
