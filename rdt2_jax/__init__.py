"""RDT2 in JAX: the models.

Import what you need from its room: `rdt2_jax.actions` (what a chunk is; no jax), `rdt2_jax.action_tokenizer`, ...
`rdt2_jax.load_policy` and `rdt2_jax.Observation` are here too.
This file imports nothing heavy; rooms are loaded when they are first named (PEP 562).
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_ROOMS = (
    "action_expert",
    "action_tokenizer",
    "actions",
    "checkpoints",
    "config",
    "errors",
    "hub",
    "io",
    "layers",
    "params",
    "policy",
    "quantization",
    "qwen2_5_vl",
    "sharding",
    "weights",
)

_NAMES = {"Observation": "actions", "load_policy": "policy"}
"""What a few lines of Python need, and the rooms in which it lives."""

try:
    __version__ = version("rdt2-jax")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", *_NAMES, *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"rdt2_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"rdt2_jax.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'rdt2_jax' has no attribute '{name}'; its rooms are {', '.join(_ROOMS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
