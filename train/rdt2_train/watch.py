"""How fast training goes, as the host sees it: rates, time spent waiting for data, shares of the device's peak, memory.

All of it is measured between calls on the host. Steps are dispatched ahead of the device, so a single interval says
little; over a window in which something was fetched from the device (the log does) the rates are those of the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from rdt2_jax.errors import ConfigError
from rdt2_train.chips import peak_flops_per_s
from rdt2_train.flops import StepFlops


class StepWatch:
    """Counts steps between reports.

    Steps of the warm-up (the first one compiles) are in no report, and neither is what happened before their end: the
    first window begins when the last of them is done.

    Args:
        sample_flops: operations of a sample, see `flops`; None: no MFU.
        peak_flops: operations per second of all devices of the run together, see `peak_of_devices`; None: no MFU.
        warm_up_steps: after a start or a resume.
        clock: seconds from any beginning.

    Raises:
        ConfigError: a negative number of steps, or a peak that is not positive.
    """

    def __init__(
        self,
        *,
        sample_flops: StepFlops | None = None,
        peak_flops: float | None = None,
        warm_up_steps: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if warm_up_steps < 0:
            raise ConfigError("a number of steps", where="warm_up_steps", expected="0 or more", found=warm_up_steps)
        if peak_flops is not None and not peak_flops > 0:
            raise ConfigError("a rate", where="peak_flops", expected="more than 0, or None", found=peak_flops)
        self._sample_flops, self._peak_flops, self._clock = sample_flops, peak_flops, clock
        self._warm_up_left = warm_up_steps
        self._begin(clock())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around everything that waits for the next batch."""
        before = self._clock()
        try:
            yield
        finally:
            self._waited_s += self._clock() - before

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Around what is not training: evaluation, checkpoints. Its time is in no rate."""
        before = self._clock()
        try:
            yield
        finally:
            passed = self._clock() - before
            self._began_s += passed
            self._last_s += passed

    def step(self, samples: int, tokens: int = 0) -> None:
        """To be called once after every step.

        Args:
            samples: examples in the global batch.
            tokens: tokens in it; 0 for a stage without tokens.
        """
        now = self._clock()
        if self._warm_up_left:
            self._warm_up_left -= 1
            self._begin(now)
            return
        self._intervals_s.append(now - self._last_s)
        self._last_s = now
        self._samples += samples
        self._tokens += tokens

    def report(self) -> dict[str, float]:
        """What happened since the last report, and a new window.

        Returns:
            `samples_per_s`, `tokens_per_s` (where tokens were counted), `step_s` (median), `data_wait_percent`, and
            `mfu_percent` and `hfu_percent` where operations and peak are known. Empty where no step was taken since the
            last report or the end of the warm-up, or no time passed.
        """
        now = self._clock()
        passed = now - self._began_s
        if not self._intervals_s or passed <= 0:
            return {}
        rate = self._samples / passed
        found = {"samples_per_s": rate}
        if self._tokens:
            found["tokens_per_s"] = self._tokens / passed
        found["step_s"] = statistics.median(self._intervals_s)
        found["data_wait_percent"] = 100 * self._waited_s / passed
        if self._sample_flops is not None and self._peak_flops is not None:
            share = 100 * rate / self._peak_flops
            found["mfu_percent"] = share * self._sample_flops.model
            found["hfu_percent"] = share * self._sample_flops.hardware
        self._begin(now)
        return found

    def _begin(self, now: float) -> None:
        """A new window."""
        self._began_s = self._last_s = now
        self._waited_s = 0.0
        self._samples = self._tokens = 0
        self._intervals_s: list[float] = []


def peak_of_devices(devices: Sequence[Any] | None = None) -> float | None:
    """Operations per second of all devices together in bfloat16; None where one of them is not in the table.

    Args:
        devices: all devices of the mesh, those of other processes among them; None: `jax.devices()`.
    """
    peaks = [peak_flops_per_s(device.device_kind) for device in (jax.devices() if devices is None else devices)]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None


def device_memory(devices: Sequence[Any] | None = None) -> dict[str, int | None]:
    """Bytes on the fullest of this process's devices.

    Args:
        devices: None: `jax.local_devices()`.

    Returns:
        `bytes_in_use`, `peak_bytes_in_use` (since the process began) and `bytes_limit`; None where a device does not
        count them, as CPUs do not.
    """
    chosen = jax.local_devices() if devices is None else devices
    statistics_of = [device.memory_stats() or {} for device in chosen]
    return {name: _largest(statistics_of, name) for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")}


def _largest(statistics_of: Sequence[dict[str, int]], name: str) -> int | None:
    values = [counts[name] for counts in statistics_of if name in counts]
    return max(values, default=None)
