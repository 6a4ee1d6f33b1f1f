"""Weights in eight bits: a linear layer's kernel as integers with one scale per output channel.

Activations keep their dtype ("weight-only"): the kernel is converted when it is multiplied, and the scale is applied
to the product, so that no dequantised copy of a layer is ever kept.
"""

from __future__ import annotations

from typing import Any

from flax import struct


@struct.dataclass
class Int8Kernel:
    """A kernel as `values * scale`.

    Attributes:
        values: int8 (*inputs, *outputs), within +-127.
        scale: float32 (*outputs).
    """

    values: Any
    scale: Any
