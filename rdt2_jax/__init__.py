"""RDT2 in JAX: the models.

Import what you need from its room: `rdt2_jax.actions` (what a chunk is; no jax), `rdt2_jax.action_tokenizer`, ...
This file imports nothing heavy; rooms are loaded when they are first named (PEP 562).
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_ROOMS = (
    "action_tokenizer",
    "actions",
    "checkpoints",
    "config",
    "errors",
    "hub",
    "io",
    "layers",
    "params",
    "quantization",
    "qwen2_5_vl",
    "sharding",
    "weights",
)

try:
    __version__ = version("rdt2-jax")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"rdt2_jax.{name}")
    raise AttributeError(f"module 'rdt2_jax' has no attribute '{name}'; its rooms are {', '.join(_ROOMS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
