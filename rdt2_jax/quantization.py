"""Weights in eight bits: a linear layer's weight as integers with one scale per output channel.

Activations keep their dtype ("weight-only"): the weight is converted when it is multiplied, and the scale is applied
to the product, so that no dequantised copy of a layer is ever kept.

The scheme is symmetric ("scale") quantisation per output channel with max calibration (Wu et al., "Integer
Quantization for Deep Learning Inference", arXiv 2004.09602, sections 3.1 and 3.2): scale = max |w| / 127 over the
inputs of a channel, value = w / scale rounded to the nearest integer, halves to the even one. Nothing needs clipping.

Which leaves of a model are quantised, and how many of their dimensions are inputs, is for the model's room to say: a
mapping from dotted leaf names to numbers of input dimensions goes in here, an `Int8Weight` stands in each one's place
afterwards. Stacked layers need no special care: the layer axis is one more output dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.params import ParamSpec, PyTree, is_spec, leaf_path, named_leaves, tree_bytes
from rdt2_jax.problems import Problems

LARGEST = 127
"""The range is symmetric: -128 is not used."""


@struct.dataclass
class Int8Weight:
    """A weight as `values * scale`.

    Attributes:
        values: int8 (*outputs, *inputs), within +-127.
        scale: float32 (*outputs), one per output channel; 0 for a channel of zeros.
    """

    values: Any
    scale: Any


@dataclasses.dataclass(frozen=True)
class QuantizedLeaf:
    """What quantisation did to one weight.

    Attributes:
        name: dotted name.
        shape: of the weight.
        relative_error: root mean square of the rounding errors over that of the weight; 0 for a weight of zeros.
        bytes_before, bytes_after: as it was, and of values and scales together.
    """

    name: str
    shape: tuple[int, ...]
    relative_error: float
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What quantisation did to a tree.

    Attributes:
        leaves: the quantised weights, in the tree's order.
        bytes_before, bytes_after: of all leaves of the tree, quantised or not.
    """

    leaves: tuple[QuantizedLeaf, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [f"{len(self.leaves)} weights in int8: {self.bytes_before:,} -> {self.bytes_after:,} bytes in all"]
        lines += [
            f"  {leaf.name} {leaf.shape}: relative rms error {leaf.relative_error:.2%}, "
            f"{leaf.bytes_before:,} -> {leaf.bytes_after:,} bytes"
            for leaf in self.leaves
        ]
        return "\n".join(lines)


def quantize(weight: jax.Array, num_inputs: int) -> Int8Weight:
    """One weight in eight bits. Not for use inside jit.

    Args:
        weight: floats (*outputs, *inputs); in a stack of layers, the layer axis first.
        num_inputs: how many dimensions `inputs` has.

    Raises:
        DataError: not floats, without an output or an element, or a value that is not finite.
    """
    return _quantize("weight", weight, num_inputs)[0]


def dequantize(weight: Int8Weight, dtype: Any = jnp.float32) -> jax.Array:
    """values * scale, (*outputs, *inputs), multiplied in float32 and then converted to `dtype`."""
    return _dequantized(weight.values, weight.scale).astype(dtype)


def quantize_leaves(
    tree: PyTree, num_inputs: Mapping[str, int], *, delete: bool = False
) -> tuple[PyTree, QuantizationReport]:
    """Weights of a tree in eight bits, one after the other, each on the devices where it is. Not for use inside jit.

    Args:
        tree: of arrays.
        num_inputs: dotted names of the weights to quantise, and how many of their last dimensions are inputs.
        delete: free each weight as soon as it is quantised, so that at most one of them exists twice. The other
            leaves are shared by both trees. After an error the tree is of no more use.

    Returns:
        The tree with an `Int8Weight` in the place of each weight, and the report.

    Raises:
        ConfigError: names without a leaf, or weights that are in eight bits already.
        DataError: as `quantize`; names the weight.
    """
    _require_names(tree, num_inputs)
    quantized: list[QuantizedLeaf] = []

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        name = leaf_path(path)
        if name not in num_inputs:
            return leaf
        weight, error = _quantize(name, leaf, num_inputs[name])
        quantized.append(QuantizedLeaf(name, tuple(leaf.shape), error, leaf.nbytes, tree_bytes(weight)))
        if delete and isinstance(leaf, jax.Array):
            jax.block_until_ready(weight)
            leaf.delete()
        return weight

    bytes_before = tree_bytes(tree)
    result = jax.tree_util.tree_map_with_path(convert, tree)
    return result, QuantizationReport(tuple(quantized), bytes_before, tree_bytes(result))


def dequantize_leaves(tree: PyTree, dtype: Any = jnp.float32) -> PyTree:
    """A tree with a floating array in the place of every `Int8Weight`; other leaves stay as they are."""
    return jax.tree.map(
        lambda leaf: dequantize(leaf, dtype) if isinstance(leaf, Int8Weight) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Int8Weight),
    )


def quantized_specs(specs: PyTree, num_inputs: Mapping[str, int]) -> PyTree:
    """The declaration of what `quantize_leaves` makes: for shardings, restore targets, abstract values and bytes.

    Values keep the axes of the weight, scales take those of its outputs. Such a declaration cannot be initialised:
    quantise initialised weights.

    Args:
        specs: tree of ParamSpec.
        num_inputs: as in `quantize_leaves`.

    Raises:
        ConfigError: as `quantize_leaves`.
        DataError: a weight without outputs, or not of floats.
    """
    _require_names(specs, num_inputs)

    def convert(path: tuple[Any, ...], spec: ParamSpec) -> ParamSpec | Int8Weight:
        name = leaf_path(path)
        return _quantized_spec(name, spec, num_inputs[name]) if name in num_inputs else spec

    return jax.tree_util.tree_map_with_path(convert, specs, is_leaf=is_spec)


def _quantize(name: str, weight: Any, num_inputs: int) -> tuple[Int8Weight, float]:
    """A weight in eight bits, and its relative error."""
    _require_weight(name, weight, num_inputs)
    scale, unusable = _scale(weight, num_inputs)
    if unusable:
        raise DataError(
            "a weight with values that are not finite",
            where=name,
            expected="finite floats",
            found=f"NaN or infinity in {unusable} of {scale.size} output channels",
            fix="load the weights again; a damaged file or a diverged training run gives such values",
        )
    values = _values(weight, scale)
    squares = float(_squares(weight))
    error = (float(_squared_errors(weight, values, scale)) / squares) ** 0.5 if squares else 0.0
    return Int8Weight(values, scale), error


# Four small functions: in one, XLA would keep a float32 copy of a 16-bit weight for all its results.


@functools.partial(jax.jit, static_argnums=1)
def _scale(weight: jax.Array, num_inputs: int) -> tuple[jax.Array, jax.Array]:
    """Scales, and how many are not finite: those of channels with a weight that is not."""
    inputs = tuple(range(weight.ndim - num_inputs, weight.ndim))
    scale = jnp.max(jnp.abs(weight), axis=inputs).astype(jnp.float32) / LARGEST
    return scale, jnp.sum(~jnp.isfinite(scale))


@jax.jit
def _values(weight: jax.Array, scale: jax.Array) -> jax.Array:
    divisor = _over_inputs(jnp.where(scale > 0, scale, 1), weight.ndim)
    return jnp.round(weight.astype(jnp.float32) / divisor).astype(jnp.int8)


@jax.jit
def _squares(weight: jax.Array) -> jax.Array:
    return jnp.sum(weight.astype(jnp.float32) ** 2)


@jax.jit
def _squared_errors(weight: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.sum((_dequantized(values, scale) - weight.astype(jnp.float32)) ** 2)


def _dequantized(values: jax.Array, scale: jax.Array) -> jax.Array:
    return values.astype(jnp.float32) * _over_inputs(scale, values.ndim)


def _over_inputs(scale: jax.Array, ndim: int) -> jax.Array:
    """(*outputs) -> (*outputs, 1, ...), of rank `ndim`."""
    return scale.reshape(*scale.shape, *(1,) * (ndim - scale.ndim))


def _quantized_spec(name: str, spec: ParamSpec, num_inputs: int) -> Int8Weight:
    _require_weight(name, spec, num_inputs)
    outputs = len(spec.shape) - num_inputs
    return Int8Weight(
        values=dataclasses.replace(spec, dtype=jnp.int8, init=_no_init),
        scale=ParamSpec(
            spec.shape[:outputs],
            spec.axes[:outputs],
            _no_init,
            jnp.float32,
            tuple(axes[:outputs] for axes in spec.fallbacks),
        ),
    )


def _no_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    raise ConfigError(
        "weights in eight bits have no initial values",
        found=f"{jnp.dtype(dtype)} {shape}",
        fix="initialise the declaration in floats, then quantise the weights",
    )


def _require_names(tree: PyTree, num_inputs: Mapping[str, int]) -> None:
    leaves, problems = named_leaves(tree), Problems()
    for name in num_inputs:
        if f"{name}.values" in leaves:
            problems.add(f"{name} is in eight bits already")
        elif name not in leaves:
            problems.add(f"there is no {name}")
    problems.raise_if_any(ConfigError, "weights that cannot be quantised")


def _require_weight(name: str, weight: Any, num_inputs: int) -> None:
    """Raises DataError unless it has floats, elements, and the inputs leave an output."""
    shape = tuple(weight.shape)
    floating = jnp.issubdtype(weight.dtype, jnp.floating)
    if not floating or not 1 <= num_inputs < len(shape) or 0 in shape:
        raise DataError(
            "not the weight of a linear layer",
            where=name,
            expected=f"floats with elements, {num_inputs} input dimensions (1 or more) and at least one of outputs",
            found=f"{jnp.dtype(weight.dtype)} {shape}",
        )
