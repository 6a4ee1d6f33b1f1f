"""Counts compilations, for policies that are to be ready once they are made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import pytest


class Compilations:
    """Counts what XLA compiles or takes from its cache of compiled programs."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: str, _: float, **__: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)
