"""Measures the anonymous memory of a load; a program that test_loader.py runs. Prints JSON.

Usage: loading_memory.py PATH WAY. One way a process: what an allocator keeps of one load would hide the next.
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
import numpy as np

from rdt2_jax.params import ParamSpec
from rdt2_jax.sharding import DEFAULT_RULES, make_mesh, shardings
from rdt2_jax.weights.loader import LoadReport, load
from rdt2_jax.weights.ops import heads_out, transpose
from rdt2_jax.weights.safetensors_files import SafetensorsFiles
from rdt2_jax.weights.safetensors_writer import write_safetensors
from rdt2_jax.weights.sources import ArraySource, TensorInfo
from rdt2_jax.weights.table import Row, Table

LAYERS, EMBED, MLP, HEADS = 8, 1024, 2048, 16
MATRICES = ("up", "gate", "down", "out")
SPECS = {
    **{name: ParamSpec((LAYERS, EMBED, MLP), ("layers", "embed", "mlp")) for name in MATRICES},
    "q": ParamSpec((LAYERS, EMBED, HEADS, EMBED // HEADS), ("layers", "embed", "heads", "head_dim")),
    "norm": ParamSpec((LAYERS, EMBED), ("layers", None)),
    "embedding": ParamSpec((MLP, EMBED), ("vocab", "embed")),
}
TABLE = Table(
    "Large",
    (
        *(Row(f"h.{{i}}.{name}", name, transpose) for name in MATRICES),
        Row("h.{i}.q", "q", heads_out(HEADS, EMBED // HEADS)),
        Row("h.{i}.norm", "norm"),
        Row("embedding", "embedding"),
    ),
)


def write(path: Path) -> None:
    """The published file, one tensor at a time; every tensor is filled with its own number."""
    shapes = {f"h.{i}.{name}": (MLP, EMBED) for name in MATRICES for i in range(LAYERS)}
    shapes |= {f"h.{i}.q": (EMBED, EMBED) for i in range(LAYERS)}
    shapes |= {f"h.{i}.norm": (EMBED,) for i in range(LAYERS)} | {"embedding": (MLP, EMBED)}
    infos = {name: TensorInfo(name, np.dtype(np.float32), shape) for name, shape in shapes.items()}
    numbers = {name: number for number, name in enumerate(infos)}
    write_safetensors(path, list(infos.values()), lambda name: np.full(infos[name].shape, numbers[name], np.float32))


def anonymous_bytes() -> int:
    """RssAnon of this process: mapped files do not count."""
    text = Path("/proc/self/status").read_text()
    return int(re.findall(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024


def measured(action: Callable[[], tuple[Any, LoadReport]]) -> tuple[int, LoadReport]:
    """Runs an action and polls its memory; returns how far the peak was above the start."""
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
        params, report = action()
        jax.block_until_ready(params)
    finally:
        finished.set()
        poller.join()
    return max(peak, anonymous_bytes()) - before, report


def load_at_once(path: Path) -> tuple[Any, LoadReport]:
    """What the loader must not do: all tensors in host memory, then the parameters."""
    with SafetensorsFiles(path) as files:
        arrays = {name: np.array(files.read(name)) for name in files.tensors}
    return load(TABLE, SPECS, ArraySource(arrays))


def main() -> None:
    """Writes the file if there is none, measures one way, prints."""
    path, way = Path(sys.argv[1]), sys.argv[2]
    if not path.exists():
        write(path)
    places, _ = shardings(SPECS, DEFAULT_RULES, make_mesh({"fsdp": 4, "tensor": 2}))
    ways: dict[str, Callable[[], tuple[Any, LoadReport]]] = {
        "one device": lambda: load(TABLE, SPECS, path),
        "eight devices": lambda: load(TABLE, SPECS, path, shardings=places),
        "everything at once": lambda: load_at_once(path),
    }
    jax.device_put(np.zeros(8, np.float32)).block_until_ready()
    growth, report = measured(ways[way])
    sizes = {name: getattr(report, name) for name in ("nbytes", "largest_leaf_bytes", "largest_tensor_bytes")}
    print(json.dumps({"growth": growth, **sizes}))


if __name__ == "__main__":
    main()
