"""Measures the anonymous memory of conversions; a program that test_checkpoint.py runs. Prints JSON.

Usage: conversion_memory.py FOLDER WAY. FOLDER has a model as "published", which the way "convert" puts as "converted"
beside it, for "export" and "load" to start from. "convert at once" and "load at once" are controls: they hold what the
others must not. One way a process: what an allocator keeps of one would hide the next.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.checkpoints import host_target, restore, save
from rdt2_jax.params import abstract
from rdt2_jax.qwen2_5_vl.checkpoint import convert, export, load_params
from rdt2_jax.qwen2_5_vl.config import read_config
from rdt2_jax.qwen2_5_vl.model import param_specs


def anonymous_bytes() -> int:
    """RssAnon of this process: mapped files do not count."""
    text = Path("/proc/self/status").read_text()
    return int(re.findall(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024


def measured(action: Callable[[], Any]) -> tuple[int, Any]:
    """Runs an action and polls its memory; returns how far the peak was above the start, and the action's result."""
    gc.collect()
    before = anonymous_bytes()
    peak, finished = before, threading.Event()

    def poll() -> None:
        nonlocal peak
        while not finished.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.0005)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        result = action()
    finally:
        finished.set()
        poller.join()
    return max(peak, anonymous_bytes()) - before, result


def run(folder: Path, way: str) -> dict[str, int]:
    """Measures one way; returns its growth, and sizes that bound it."""
    published, converted = folder / "published", folder / "converted"
    if way == "convert":
        growth, report = measured(lambda: convert(published, converted))
        loaded = report.loaded
        return {
            "growth": growth,
            "nbytes": report.saved.nbytes,
            "part": report.saved.largest_part_bytes,
            "leaf": loaded.largest_leaf_bytes,
            "tensor": loaded.largest_tensor_bytes,
        }
    if way == "export":
        growth, report = measured(lambda: export(converted, folder / "exported", max_shard_bytes=100_000_000))
        return {"growth": growth, "nbytes": report.nbytes}
    if way == "load":
        growth, loaded = measured(lambda: load_params(converted))
        return {"growth": growth, "nbytes": loaded.report.nbytes}
    if way == "convert at once":
        return {"growth": measured(lambda: save(folder / "whole", {"params": load_params(published).params}, {}))[0]}
    targets = jax.tree.map(host_target, abstract(param_specs(read_config(converted), jnp.bfloat16)))
    # the second copy stands for that of a device which does not share the host's memory
    everything = lambda: jax.tree.map(np.copy, restore(converted, "params", targets))  # noqa: E731
    return {"growth": measured(everything)[0]}


def main() -> None:
    """Warms the libraries up, measures one way, prints."""
    jax.device_put(np.zeros(8, np.float32)).block_until_ready()
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2])))


if __name__ == "__main__":
    main()
