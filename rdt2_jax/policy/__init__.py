"""Policies: from what the cameras see and what is asked for, to a chunk of actions.

`load_policy` reads one from model folders; `FmPolicy`, `OneStepPolicy` and `VqPolicy` take parts that are in memory.
This file imports nothing heavy: advice on instructions or a clock need no jax (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdt2_jax.policy.backbone import Backbone
    from rdt2_jax.policy.clock import StageClock
    from rdt2_jax.policy.fm import FmPolicy
    from rdt2_jax.policy.load import load_policy
    from rdt2_jax.policy.one_step import OneStepPolicy
    from rdt2_jax.policy.options import PolicyOptions
    from rdt2_jax.policy.results import InvalidGeneration, InvalidGenerationError, NetworkOutputError, VqTokens
    from rdt2_jax.policy.vq import VqPolicy

__all__ = [
    "Backbone",
    "FmPolicy",
    "InvalidGeneration",
    "InvalidGenerationError",
    "NetworkOutputError",
    "OneStepPolicy",
    "PolicyOptions",
    "StageClock",
    "VqPolicy",
    "VqTokens",
    "load_policy",
]

_FILES = {
    "Backbone": "backbone",
    "FmPolicy": "fm",
    "InvalidGeneration": "results",
    "InvalidGenerationError": "results",
    "NetworkOutputError": "results",
    "OneStepPolicy": "one_step",
    "PolicyOptions": "options",
    "StageClock": "clock",
    "VqPolicy": "vq",
    "VqTokens": "results",
    "load_policy": "load",
}


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(importlib.import_module(f"rdt2_jax.policy.{_FILES[name]}"), name)
    raise AttributeError(f"module 'rdt2_jax.policy' has no attribute '{name}'; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
