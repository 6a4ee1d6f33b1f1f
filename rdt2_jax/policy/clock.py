"""Where the time of a policy goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")

STAGES = ("processor", "vision", "prefill", "decode", "expert", "detokenise")
"""Names in the order in which they run: "decode" is VQ's alone, "expert" that of the flow policies.

"processor": images and words to a batch on the device. "vision": vision tower and embeddings. "prefill": the decoder
over the prompt. "detokenise": from the network's answer to chunks in physical units.
"""


class StageClock:
    """Adds up milliseconds by stage. A policy that is given one waits for the device after every stage.

    Attributes:
        milliseconds: stage -> sum over all calls.
    """

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what is inside, also where it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + 1e3 * (time.perf_counter() - started)

    @property
    def total_ms(self) -> float:
        """Of all stages."""
        return sum(self.milliseconds.values())


def timed(clock: StageClock | None, name: str, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Calls `function`; with a clock, waits for the device and counts the time as that of stage `name`."""
    if clock is None:
        return function(*args, **kwargs)
    import jax

    with clock.stage(name):
        return jax.block_until_ready(function(*args, **kwargs))
