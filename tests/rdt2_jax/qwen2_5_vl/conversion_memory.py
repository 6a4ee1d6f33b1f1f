"""Measures the anonymous memory of conversions; a program that test_checkpoint.py runs. Prints JSON.

Usage: conversion_memory.py FOLDER WAY, with WAY one of "convert", "export", "load" and "everything at once". One way a
process: what an allocator keeps of one would hide the next. "convert" writes the published model first.
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
import ml_dtypes
import numpy as np

from rdt2_jax.checkpoints import save
from rdt2_jax.qwen2_5_vl.checkpoint import convert, export, load_params
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, TextConfig, VisionConfig, to_published
from rdt2_jax.qwen2_5_vl.model import param_specs
from rdt2_jax.sharding import DEFAULT_RULES, make_mesh, shardings
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table
from rdt2_jax.weights.safetensors_writer import write_safetensors
from rdt2_jax.weights.sources import TensorInfo
from rdt2_jax.weights.table import bind

CONFIG = Qwen25VLConfig(
    vision=VisionConfig(
        depth=4,
        hidden_size=256,
        num_heads=4,
        intermediate_size=512,
        out_hidden_size=1024,
        full_attention_blocks=(1, 3),
    ),
    text=TextConfig(
        vocab_size=8192, hidden_size=1024, num_layers=8, num_heads=8, num_kv_heads=2, intermediate_size=4096
    ),
)


def write_published(folder: Path) -> None:
    """A published model of random bits, which do not compress, one tensor at a time."""
    folder.mkdir()
    plan = bind(qwen2_5_vl_table(CONFIG), param_specs(CONFIG))
    infos = {
        slot.names[0]: TensorInfo(slot.names[0], np.dtype(ml_dtypes.bfloat16), binding.source_shape)
        for binding in plan.bindings
        for slot in binding.slots
    }
    random = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        info = infos[name]
        return np.frombuffer(random.bytes(info.nbytes), info.dtype).reshape(info.shape)

    write_safetensors(folder, list(infos.values()), read, max_shard_bytes=100_000_000)
    (folder / "config.json").write_text(json.dumps(to_published(CONFIG, "bfloat16")))


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
    """Measures one way; returns its growth and the sizes that bound it."""
    published, converted = folder / "published", folder / "converted"
    if way == "convert":
        growth, report = measured(lambda: convert(published, converted))
        held = report.saved.largest_part_bytes, report.loaded.largest_leaf_bytes, report.loaded.largest_tensor_bytes
        return {"growth": growth, "nbytes": report.saved.nbytes, "part": held[0], "leaf": held[1], "tensor": held[2]}
    if way == "export":
        growth, report = measured(lambda: export(converted, folder / "exported", max_shard_bytes=100_000_000))
        return {"growth": growth, "nbytes": report.nbytes}
    if way == "load":
        mesh = make_mesh({"fsdp": 4, "tensor": 2})
        growth, loaded = measured(
            lambda: load_params(converted, shardings=lambda specs: shardings(specs, DEFAULT_RULES, mesh)[0])
        )
        return {"growth": growth, "nbytes": loaded.report.nbytes}
    # the control: what a conversion must not do
    growth, _ = measured(lambda: save(folder / "whole", {"params": load_params(published).params}, {}))
    return {"growth": growth}


def main() -> None:
    """Writes the published model if there is none, warms the libraries up, measures one way, prints."""
    folder, way = Path(sys.argv[1]), sys.argv[2]
    if not (folder / "published").exists():
        write_published(folder / "published")
    jax.device_put(np.zeros(8, np.float32)).block_until_ready()
    print(json.dumps(run(folder, way)))


if __name__ == "__main__":
    main()
