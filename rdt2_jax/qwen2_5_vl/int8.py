"""Which weights of the model go into eight bits: the linear layers of the decoder, and on request its head.

Norms, biases, the embedding and the vision tower stay as they are: a seventh of the 7B's weights, and the embedding is
read by rows. From bfloat16 the 7B goes from 16.6 to 10.1 GB, with its head to 9.5 GB. The scheme is that of
`rdt2_jax.quantization`.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from rdt2_jax.errors import ConfigError
from rdt2_jax.params import PyTree, named_leaves
from rdt2_jax.quantization import QuantizationReport, dequantize_leaves, quantize_leaves, quantized_specs
from rdt2_jax.qwen2_5_vl.checkpoint import LoadedModel, load_params
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams, param_specs
from rdt2_jax.sharding import Layout

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
            fix="leave the head as it is",
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


def load_quantized(
    folder: str | os.PathLike[str],
    *,
    head: bool = False,
    num_layers: int | None = None,
    vision: bool = True,
    dtype: Any = None,
    layout: Layout | None = None,
) -> LoadedModel:
    """Loads a model folder with the decoder in eight bits.

    Weights are loaded and rounded in the host's memory, so that no device ever holds the model in floats.

    Args:
        folder, num_layers, vision, dtype: as in `checkpoint.load_params`.
        head: the output projection in eight bits too.
        layout: mesh and rules over which the result is laid out; None: the default device.

    Raises:
        CheckpointError: as `checkpoint.load_params`.
        ConfigError: as `checkpoint.load_params`; `head` without one, before anything is read; or jax was started
            without its CPU backend.
        DataError: a weight with NaN or infinity.
        ShardingError: the mesh does not fit the model.
    """

    def on_host(specs: Qwen25VLParams) -> Sharding:
        int8_weights(specs, head=head)  # refuses a head that is not there
        return _host()

    loaded = load_params(folder, num_layers=num_layers, vision=vision, dtype=dtype, shardings=on_host)
    params, _ = quantize_decoder(loaded.params, head=head, delete=True)
    return dataclasses.replace(loaded, params=jax.device_put(params, _places(loaded, head, layout)))


def _host() -> Sharding:
    """The host's memory.

    Raises:
        ConfigError: jax was started without its CPU backend.
    """
    try:
        return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise ConfigError(
            "weights are rounded in the host's memory, and jax has no CPU backend",
            found=str(error),
            fix="add it: JAX_PLATFORMS=cuda,cpu (or tpu,cpu), or leave JAX_PLATFORMS unset",
        ) from error


def _places(loaded: LoadedModel, head: bool, layout: Layout | None) -> PyTree:
    """Where stacked parameters in eight bits go."""
    if layout is None:
        (device,) = jnp.zeros(()).devices()  # the default one, whichever way it was chosen
        return SingleDeviceSharding(device)
    params = loaded.params
    specs = param_specs(loaded.config, vision=params.vision is not None, with_head=params.text.norm is not None)
    return layout.shardings(quantized_decoder_specs(specs, head=head))[0]
