"""Benchmarks run as a user runs them, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

_PROGRAM = """
import os, runpy, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
script, *absent = sys.argv.pop(1).split(",")
sys.modules.update(dict.fromkeys(absent))
sys.path.insert(0, "benchmarks")
runpy.run_path(script, run_name="__main__")
"""


def run_benchmark(script: str, *arguments: str, absent: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a script of `benchmarks/` on one processor: threads of torch and XLA that wait for each other are slow on a
    machine that has other things to do.

    Args:
        script: file name.
        arguments: of the script.
        absent: modules that are to be as if they were not installed.
    """
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, ",".join([f"benchmarks/{script}", *absent]), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
