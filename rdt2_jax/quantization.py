"""Weights in eight bits: a linear layer's weight as integers with one scale per output channel.

Activations keep their dtype ("weight-only"): the weight is converted when it is multiplied, and the scale is applied
to the product, so that no dequantised copy of a layer is ever kept.
"""

from __future__ import annotations

from typing import Any

from flax import struct


@struct.dataclass
class Int8Weight:
    """A weight as `values * scale`.

    Attributes:
        values: int8 (*outputs, *inputs), within +-127.
        scale: float32 (*outputs), one per output channel.
    """

    values: Any
    scale: Any
