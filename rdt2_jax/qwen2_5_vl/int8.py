"""Which weights of the model go into eight bits: the linear layers of the decoder, and on request its head.

Norms, biases, the embedding and the vision tower stay as they are: a seventh of the 7B's weights, and the embedding is
read by rows. From bfloat16 the 7B goes from 16.6 to 10.1 GB, with its head to 9.5 GB. The scheme is that of
`rdt2_jax.quantization`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rdt2_jax.errors import ConfigError
from rdt2_jax.params import named_leaves
from rdt2_jax.quantization import QuantizationReport, dequantize_leaves, quantize_leaves, quantized_specs
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams

_LAYERS = "text.layers."
_HEAD = "text.head"

_NUM_INPUTS = {
    "attention.query.weight": 1,
    "attention.key.weight": 1,
    "attention.value.weight": 1,
    "attention.out.weight": 2,
    "mlp.gate.weight": 1,
    "mlp.up.weight": 1,
    "mlp.down.weight": 1,
}
"""Every `Linear` of a layer -> input dimensions of its weight."""


def int8_weights(params: Qwen25VLParams, *, head: bool = False) -> dict[str, int]:
    """Dotted names of the weights that go into eight bits -> how many of their last dimensions are inputs.

    Args:
        params: arrays or ParamSpecs; layers stacked, or a tuple.
        head: the output projection too.

    Raises:
        ConfigError: `head`, and the model has none of its own.
    """
    if head and params.text.head is None:
        tied = params.text.norm is not None
        raise ConfigError(
            "there is no head to quantise",
            where=_HEAD,
            found="it is the embedding, which stays in floats" if tied else "a decoder of keys and values alone",
            fix="pass head=False",
        )
    # one in eight bits already goes by the name of the weight that it was, so that it is refused instead of skipped
    candidates = (name.removesuffix(".values") for name in named_leaves(params) if name.startswith(_LAYERS))
    names = {
        name: num_inputs
        for name in candidates
        for ending, num_inputs in _NUM_INPUTS.items()
        if name.endswith(f".{ending}")
    }
    return {**names, _HEAD: 1} if head else names


def quantize_decoder(
    params: Qwen25VLParams, *, head: bool = False, delete: bool = False
) -> tuple[Qwen25VLParams, QuantizationReport]:
    """The model with its decoder's linear layers in eight bits. Not for use inside jit.

    Args:
        params: of any floating dtype, stacked or with a tree per layer, on one device or sharded.
        head: the output projection too.
        delete: free each weight as soon as it is quantised, so that at most one of them exists twice; after an error
            `params` are of no more use.

    Returns:
        Parameters for the same functions, and the report.

    Raises:
        ConfigError: in eight bits already, or `head` without one.
        DataError: a weight with NaN or infinity; names it.
    """
    return quantize_leaves(params, int8_weights(params, head=head), delete=delete)


def quantized_decoder_specs(specs: Qwen25VLParams, *, head: bool = False) -> Qwen25VLParams:
    """The declaration of what `quantize_decoder` makes of `model.param_specs`: see `quantization.quantized_specs`.

    Raises:
        ConfigError: as `quantize_decoder`.
    """
    return quantized_specs(specs, int8_weights(specs, head=head))


def dequantized_decoder(params: Qwen25VLParams, dtype: Any = jnp.float32) -> Qwen25VLParams:
    """The model with floats again; what rounding took away does not come back."""
    return dequantize_leaves(params, dtype)
