"""Linear maps between tensors of any rank, and the gated MLP of transformers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.lora import AdaptedWeight, dropped_out
from rdt2_jax.params import Initializer, LogicalAxes, ParamSpec, normal, zeros
from rdt2_jax.quantization import Int8Weight

WEIGHT_INIT = normal(0.02)
"""The deviation with which published language models of this kind start (`initializer_range`)."""

Dimension = tuple[str | None, int]
"""(logical axis, size)."""


@struct.dataclass
class Linear:
    """A weight of shape (*outputs, *inputs) and a bias of shape (*outputs) or None. The weight is an array, an
    `Int8Weight`, or an `AdaptedWeight`.

    Outputs come first, as in the published files: a product with one token then reads memory in order, which on a CPU
    takes a quarter off the time.
    """

    weight: Any
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
        init: of the weight.
        fallbacks: alternative axes of the weight; a bias takes the part that is its own.
    """
    axes, shape = zip(*outputs, *inputs, strict=True)
    own = len(outputs)
    weight = ParamSpec(shape, axes, init, dtype, fallbacks)
    if not bias:
        return Linear(weight)
    return Linear(weight, ParamSpec(shape[:own], axes[:own], zeros, dtype, tuple(axes[:own] for axes in fallbacks)))


def gated_mlp_specs(
    width: int,
    hidden: int,
    *,
    bias: bool,
    dtype: Any = jnp.float32,
    init: Initializer = WEIGHT_INIT,
    may_replicate: bool = False,
) -> GatedMLP:
    """The declaration of a gated MLP from `width` through `hidden` and back.

    Args:
        width, hidden: sizes.
        bias: whether the three maps have one.
        dtype: of the stored parameters.
        init: of the weights.
        may_replicate: where `hidden` does not divide by its mesh axes, keep it whole on each of them (reported).
    """
    into = linear_specs(
        (("embed", width),),
        (("mlp", hidden),),
        bias=bias,
        dtype=dtype,
        init=init,
        fallbacks=((None, "embed"),) if may_replicate else (),
    )
    out_of = linear_specs(
        (("mlp", hidden),),
        (("embed", width),),
        bias=bias,
        dtype=dtype,
        init=init,
        fallbacks=(("embed", None),) if may_replicate else (),
    )
    return GatedMLP(gate=into, up=into, down=out_of)


def linear(layer: Linear, x: jax.Array, num_inputs: int = 1) -> jax.Array:
    """Multiplies the last dimensions of `x` with the last ones of the weight.

    Args:
        layer: weight (*outputs, *inputs) and bias (*outputs) or None. They are converted to the dtype of `x`.
        x: (..., *inputs).
        num_inputs: how many dimensions `inputs` has.

    Returns:
        (..., *outputs), in the dtype of `x`.
    """
    y = _product(x, layer.weight, num_inputs)
    return y if layer.bias is None else y + layer.bias.astype(x.dtype)


def gated_mlp(layer: GatedMLP, x: jax.Array) -> jax.Array:
    """(..., width) -> (..., width)."""
    return linear(layer.down, jax.nn.silu(linear(layer.gate, x)) * linear(layer.up, x))


def _product(x: jax.Array, weight: Any, num_inputs: int) -> jax.Array:
    """`x` times a weight of any kind."""
    if isinstance(weight, AdaptedWeight):
        low_rank = _contract(dropped_out(x, weight), weight.adapter.down, num_inputs)
        added = _contract(low_rank, weight.adapter.up, 1)
        return _product(x, weight.base, num_inputs) + weight.scale * added
    if isinstance(weight, Int8Weight):
        # in float32: rounded to 16 bits, a scale would be off by as much for its whole channel
        return (_contract(x, weight.values, num_inputs).astype(jnp.float32) * weight.scale).astype(x.dtype)
    return _contract(x, weight, num_inputs)


def _contract(x: jax.Array, weight: jax.Array, num_inputs: int) -> jax.Array:
    """The product as one of matrices: on a CPU, XLA copies a weight of more dimensions before it multiplies."""
    outputs, inputs = weight.shape[: weight.ndim - num_inputs], weight.shape[weight.ndim - num_inputs :]
    matrix = weight.astype(x.dtype).reshape(math.prod(outputs), math.prod(inputs))
    rows = x.reshape(*x.shape[: x.ndim - num_inputs], math.prod(inputs))
    product = jax.lax.dot_general(rows, matrix, (((rows.ndim - 1,), (1,)), ((), ())))
    return product.reshape(*product.shape[:-1], *outputs)
