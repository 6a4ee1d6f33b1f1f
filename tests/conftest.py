"""Shared by all tests: eight CPU devices, the golden numbers, and one hypothesis profile."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# jax reads these when it starts. Eight devices make multi-device code run everywhere; on a busy machine eight threads
# may take longer to meet in a collective than XLA's default allows before it aborts the process.
if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could ask for eight CPU devices")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_collective_timeout_seconds=600",
    ]
).strip()

# How many threads XLA's CPU client has for all devices together; else it takes the number of processors. A program
# over eight devices keeps a thread for every collective that it has begun, several to a device: where none is left,
# all wait for ever.
os.environ.setdefault("NPROC", "32")

# Tests share processes, and torch's threads wait for each other by spinning: one is faster than two that are disturbed.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Most of the time of these tests is compilation: what was compiled once on this kind of machine is kept.
_CPU = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
_CACHE = Path(__file__).parent.parent / ".pytest_cache" / f"jax-{hashlib.sha256(_CPU.encode()).hexdigest()[:12]}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

_LARGE_BYTES = 3 * 2**30
"""Two processes of this size, and what one file of tests adds, fit a machine of 16 GB."""

GOLDEN = Path(__file__).parent / "golden"

# Derandomized, so that a failure is the same failure on every machine; no deadline, because machines differ.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def golden() -> Iterator[Callable[[str, str], Mapping[str, np.ndarray]]]:
    """`golden(family, file)`: arrays that the public PyTorch code computed, by name, read when asked for."""
    with ExitStack() as open_files:

        def load(family: str, file: str) -> Mapping[str, np.ndarray]:
            return open_files.enter_context(np.load(GOLDEN / family / file, allow_pickle=False))

        yield load


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests over eight devices run one at a time, whatever process they are in: each is eight threads already."""
    if "eight_devices" not in getattr(item, "fixturenames", ()):
        return (yield)
    _CACHE.mkdir(parents=True, exist_ok=True)
    with open(_CACHE / "eight_devices.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Between files, a process that has grown large forgets what it compiled: what is kept on disk brings it back."""
    yield
    jax = sys.modules.get("jax")
    if jax is not None and _resident_bytes() > _LARGE_BYTES:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


@pytest.fixture(scope="session")
def eight_devices() -> list[Any]:
    """Eight jax devices; their absence fails the test, so that no multi-device test is ever skipped unseen."""
    import jax

    devices = jax.devices()
    if len(devices) < 8:
        pytest.fail(f"8 devices are needed, found {len(devices)}: was jax started before tests/conftest.py ran?")
    return devices[:8]
