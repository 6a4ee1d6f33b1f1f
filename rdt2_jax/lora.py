"""Low-rank adapters: a linear layer's weight stays as it is, and a product of two thin matrices is added to it.

y = W x + (alpha / rank) B A dropout(x), with A (rank, inputs) and B (outputs, rank); B starts at zero, so that an
adapted model begins as the model it adapts (Hu et al., "LoRA", arXiv 2106.09685). The thin matrices are applied one
after the other and W gets no gradient, so that a training step never computes one of W's size.

Which leaves of a model are adapted, and how many of their dimensions are inputs, is for the model's room to say, as in
`rdt2_jax.quantization`. The base may be in eight bits. Stacked layers need no special care.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from rdt2_jax.config import FrozenConfig, PositiveInt
from rdt2_jax.errors import ConfigError
from rdt2_jax.params import ParamSpec, PyTree, fan_in_uniform, is_spec, leaf_path, named_leaves, zeros
from rdt2_jax.problems import Problems
from rdt2_jax.quantization import Int8Weight, dequantize


class LoraConfig(FrozenConfig):
    """Adapters. The defaults are the published ones.

    Attributes:
        rank: of the product.
        alpha: the product is multiplied by alpha / rank.
        dropout: share of a layer's inputs that its adapter does not see in a training step.
    """

    rank: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] = 8.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank


@struct.dataclass
class Adapter:
    """The thin matrices of one weight (*outputs, *inputs).

    Attributes:
        down: (rank, *inputs), A; with a leading axis in a stack of layers.
        up: (*outputs, rank), B.
    """

    down: Any
    up: Any


@struct.dataclass
class AdaptedWeight:
    """A weight with its adapter, in the place of the weight (see `layers.linear`).

    Attributes:
        base: array or `Int8Weight` (*outputs, *inputs).
        adapter: thin matrices.
        key: data of a PRNG key for dropout; None: no dropout.
        scale, dropout: of `LoraConfig`.
    """

    base: Any
    adapter: Adapter
    key: Any = None
    scale: float = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)


Adapters = dict[str, Adapter]
"""Dotted name of a weight -> its adapter."""


def adapter_specs(
    specs: PyTree, num_inputs: Mapping[str, int], config: LoraConfig, dtype: Any = jnp.float32
) -> Adapters:
    """The declaration of a model's adapters.

    A starts uniform in +-1/sqrt(inputs), B at zero. Matrices are laid out like the sides of the weight they belong to.

    Args:
        specs: the model's ParamSpecs; layers stacked.
        num_inputs: dotted names of the weights to adapt, and how many of their last dimensions are inputs.
        config: adapters.
        dtype: of the stored adapters.

    Raises:
        ConfigError: names without a leaf.
    """
    leaves = _chosen(specs, num_inputs)
    return {name: _adapter_spec(leaves[name], count, config.rank, dtype) for name, count in num_inputs.items()}


def attach(params: PyTree, adapters: Adapters, config: LoraConfig, key: jax.Array | None = None) -> PyTree:
    """The model with adapted weights in the place of those that have an adapter. Nothing is copied.

    Args:
        params: the model; weights are arrays or `Int8Weight`.
        adapters: as `adapter_specs` declares them.
        config: adapters.
        key: PRNG key of this step's dropout; None: no dropout, as for inference. Every weight and layer gets its own.

    Raises:
        ConfigError: adapters of weights that the model has not.
    """
    _chosen(params, adapters)
    dropout = 0.0 if key is None else config.dropout

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        name = leaf_path(path)
        if name not in adapters:
            return leaf
        adapter = adapters[name]
        own = _layer_keys(key, name, _num_stacked(leaf, adapter)) if key is not None and dropout else None
        return AdaptedWeight(leaf, adapter, own, config.scale, dropout)

    return jax.tree_util.tree_map_with_path(convert, params, is_leaf=_is_weight)


def merge(params: PyTree, adapters: Adapters, config: LoraConfig) -> PyTree:
    """The model with W + scale * B A in the place of every adapted weight, in the dtype of the weight (float32 where
    that is in eight bits). The products are computed in float32.

    Raises:
        ConfigError: as `attach`.
    """
    _chosen(params, adapters)

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        adapter = adapters.get(leaf_path(path))
        if adapter is None:
            return leaf
        base = dequantize(leaf) if isinstance(leaf, Int8Weight) else leaf
        return (base.astype(jnp.float32) + config.scale * _product(adapter, base.shape)).astype(base.dtype)

    return jax.tree_util.tree_map_with_path(convert, params, is_leaf=_is_weight)


def dropped_out(x: jax.Array, weight: AdaptedWeight) -> jax.Array:
    """What an adapter sees of a layer's inputs: a share of them is 0, the others are scaled up to keep the mean."""
    if weight.key is None or not weight.dropout:
        return x
    kept = jax.random.bernoulli(jax.random.wrap_key_data(weight.key), 1 - weight.dropout, x.shape)
    return jnp.where(kept, x / (1 - weight.dropout), 0).astype(x.dtype)


def _adapter_spec(spec: ParamSpec, num_inputs: int, rank: int, dtype: Any) -> Adapter:
    inputs = len(spec.shape) - num_inputs
    stacked = int(spec.axes[:1] == ("layers",))
    fan_in = math.prod(spec.shape[inputs:])
    lead_shape, lead_axes = spec.shape[:stacked], spec.axes[:stacked]
    down = ParamSpec(
        (*lead_shape, rank, *spec.shape[inputs:]),
        (*lead_axes, "rank", *spec.axes[inputs:]),
        fan_in_uniform(fan_in),
        dtype,
        tuple((*axes[:stacked], "rank", *axes[inputs:]) for axes in spec.fallbacks),
    )
    up = ParamSpec(
        (*spec.shape[:inputs], rank),
        (*spec.axes[:inputs], "rank"),
        zeros,
        dtype,
        tuple((*axes[:inputs], "rank") for axes in spec.fallbacks),
    )
    return Adapter(down, up)


def _product(adapter: Adapter, shape: tuple[int, ...]) -> jax.Array:
    """B A of every layer, of the shape of the weight."""
    up, down = adapter.up.astype(jnp.float32), adapter.down.astype(jnp.float32)
    rank = up.shape[-1]
    stacked = up.ndim - 1 + down.ndim - 1 > len(shape)  # both then have the axis of layers, the weight has it once
    if not stacked:
        return jnp.tensordot(up, down, axes=1).reshape(shape)
    layers = up.shape[0]
    products = jnp.einsum("lor,lri->loi", up.reshape(layers, -1, rank), down.reshape(layers, rank, -1))
    return products.reshape(shape)


def _num_stacked(leaf: Any, adapter: Adapter) -> int | None:
    """Layers in a stack; None for a single weight."""
    shape = leaf.values.shape if isinstance(leaf, Int8Weight) else leaf.shape
    stacked = adapter.up.ndim + adapter.down.ndim - 2 > len(shape)
    return shape[0] if stacked else None


def _layer_keys(key: jax.Array, name: str, layers: int | None) -> jax.Array:
    """Data of a key of its own for a weight, one per layer of a stack."""
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return jax.random.key_data(own if layers is None else jax.random.split(own, layers))


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Int8Weight) or is_spec(leaf)


def _chosen(tree: PyTree, names: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of those names; ConfigError lists names that have none."""
    leaves = {name.removesuffix(".values"): leaf for name, leaf in named_leaves(tree).items()}
    problems = Problems()
    for name in names:
        if name not in leaves:
            problems.add(name)
    problems.raise_if_any(ConfigError, "there are no such weights to adapt", expected="dotted names of the model")
    return leaves
