"""Linear maps between tensors of any rank, and the gated MLP of transformers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.params import Initializer, LogicalAxes, ParamSpec, normal, zeros
from rdt2_jax.quantization import Int8Kernel

WEIGHT_INIT = normal(0.02)
"""The deviation with which published language models of this kind start (`initializer_range`)."""

Dimension = tuple[str | None, int]
"""(logical axis, size)."""


@struct.dataclass
class Linear:
    """A kernel of shape (*inputs, *outputs), an array or an `Int8Kernel`, and a bias of shape (*outputs) or None."""

    kernel: Any
    bias: Any = None


@struct.dataclass
class GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear


def linear_specs(
    inputs: tuple[Dimension, ...],
    outputs: tuple[Dimension, ...],
    *,
    bias: bool,
    dtype: Any = jnp.float32,
    init: Initializer = WEIGHT_INIT,
    fallbacks: tuple[LogicalAxes, ...] = (),
) -> Linear:
    """The declaration of a linear map.

    Args:
        inputs, outputs: (logical axis, size) of every dimension.
        bias: whether there is one; it starts at zero.
        dtype: of the stored parameters.
        init: of the kernel.
        fallbacks: alternative axes of the kernel; a bias takes the part that is its own.
    """
    axes, shape = zip(*inputs, *outputs, strict=True)
    own = len(inputs)
    kernel = ParamSpec(shape, axes, init, dtype, fallbacks)
    if not bias:
        return Linear(kernel)
    return Linear(kernel, ParamSpec(shape[own:], axes[own:], zeros, dtype, tuple(axes[own:] for axes in fallbacks)))


def gated_mlp_specs(width: int, hidden: int, *, bias: bool, dtype: Any = jnp.float32) -> GatedMLP:
    """The declaration of a gated MLP from `width` through `hidden` and back."""
    into = linear_specs((("embed", width),), (("mlp", hidden),), bias=bias, dtype=dtype)
    out_of = linear_specs((("mlp", hidden),), (("embed", width),), bias=bias, dtype=dtype)
    return GatedMLP(gate=into, up=into, down=out_of)


def linear(layer: Linear, x: jax.Array, num_inputs: int = 1) -> jax.Array:
    """Multiplies the last dimensions of `x` with the first ones of the kernel.

    Args:
        layer: kernel (*inputs, *outputs) and bias (*outputs) or None. They are converted to the dtype of `x`.
        x: (..., *inputs).
        num_inputs: how many dimensions `inputs` has.

    Returns:
        (..., *outputs), in the dtype of `x`.
    """
    kernel = layer.kernel
    if isinstance(kernel, Int8Kernel):
        y = _contract(x, kernel.values, num_inputs) * kernel.scale.astype(x.dtype)
    else:
        y = _contract(x, kernel, num_inputs)
    return y if layer.bias is None else y + layer.bias.astype(x.dtype)


def gated_mlp(layer: GatedMLP, x: jax.Array) -> jax.Array:
    """(..., width) -> (..., width)."""
    return linear(layer.down, jax.nn.silu(linear(layer.gate, x)) * linear(layer.up, x))


def _contract(x: jax.Array, kernel: jax.Array, num_inputs: int) -> jax.Array:
    dimensions = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (dimensions, ((), ())))
