"""What the machine can do, measured in the run whose floors it gives: matrix products and memory traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from timing import take_turns


@dataclass(frozen=True)
class Rates:
    """Measured ceilings.

    Attributes:
        flops_per_s: of one large matrix product of the dtype at hand.
        bytes_per_s: the better of reading a large array (a sum) and copying it (bytes read plus bytes written).
    """

    flops_per_s: float
    bytes_per_s: float

    def compute_ms(self, flops: float) -> float:
        """Milliseconds that so many operations take at least."""
        return 1e3 * flops / self.flops_per_s

    def memory_ms(self, num_bytes: float) -> float:
        """Milliseconds that so many bytes take at least."""
        return 1e3 * num_bytes / self.bytes_per_s


def measure_rates(dtype: Any, *, size: int, megabytes: int, seconds: float = 0.3, rounds: int = 5) -> Rates:
    """Measures both with random numbers: zeros would run faster than real data.

    Args:
        dtype: of the matrices and of the array.
        size: rows and columns of the square matrices.
        megabytes: of the array; several times the largest cache.
        seconds: length of one turn.
        rounds: turns, of which the best counts.
    """
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    rows = max(1, megabytes * 2**20 // (4096 * jnp.dtype(dtype).itemsize))
    array = jax.random.normal(jax.random.key(1), (rows, 4096), dtype)
    product = jax.jit(lambda a: a @ a)
    total = jax.jit(lambda a: jnp.sum(a, axis=-1, dtype=jnp.float32))
    copy = jax.jit(lambda a: -a)
    timings = take_turns(
        {
            "product": lambda: product(matrix).block_until_ready(),
            "sum": lambda: total(array).block_until_ready(),
            "copy": lambda: copy(array).block_until_ready(),
        },
        min_seconds=seconds,
        rounds=rounds,
    )
    best = {name: min(timing.seconds) for name, timing in timings.items()}
    return Rates(2.0 * size**3 / best["product"], max(array.nbytes / best["sum"], 2 * array.nbytes / best["copy"]))
