"""One declaration per parameter, from which everything else follows.

A model declares its parameters once, as a pytree whose leaves are `ParamSpec`: shape, dtype, logical axes and
initializer side by side. The same tree gives initial values (`initialize`), shapes without memory (`abstract`),
shardings (`rdt2_jax.sharding`), restore targets (`rdt2_jax.checkpoints`) and the leaves that a weight table has to
fill (`rdt2_jax.weights`).
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.errors import ConfigError

PyTree = Any
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
"""`(key, shape, dtype) -> values`, the signature of `jax.nn.initializers`."""

LogicalAxes = tuple[str | None, ...]
"""One logical axis name per dimension; None means that the dimension is never split."""

zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones
normal = functools.cache(jax.nn.initializers.normal)


@functools.lru_cache
def fan_in_uniform(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in), the default of torch's linear and convolution layers, biases included.

    Cached: equal arguments give the same function, so that parameters of one shape share one compilation.
    """
    bound = float(fan_in) ** -0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@functools.lru_cache
def glorot_uniform(fan_in: int, fan_out: int) -> Initializer:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010), whatever the layout. Cached, as above."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one parameter is, before it has values.

    Attributes:
        shape: dimensions.
        axes: one logical axis name per dimension (None: never split). Rules map names to mesh axes.
        init: initializer.
        dtype: dtype of the stored parameter.
        fallbacks: alternative `axes`, tried in order when a dimension does not divide by its mesh axes. A last
            alternative of None names everywhere allows replication, which is then reported.
    """

    shape: tuple[int, ...]
    axes: LogicalAxes
    init: Initializer = zeros
    dtype: Any = jnp.float32
    fallbacks: tuple[LogicalAxes, ...] = ()

    def __post_init__(self) -> None:
        for axes in (self.axes, *self.fallbacks):
            if len(axes) != len(self.shape):
                raise ValueError(f"ParamSpec of shape {self.shape} needs {len(self.shape)} axes, got {axes}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored parameter."""
        return self.size * jnp.dtype(self.dtype).itemsize


def is_spec(leaf: object) -> bool:
    """True for a ParamSpec: the `is_leaf` of tree functions over declarations."""
    return isinstance(leaf, ParamSpec)


def leaf_path(path: tuple[Any, ...]) -> str:
    """A jax key path as one dotted name, `networks.pos.encoder.conv_in.kernel`."""
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Dotted name -> leaf, in the tree's order; ParamSpecs count as leaves.

    Raises:
        ConfigError: two leaves have the same dotted name (a dictionary key that contains a dot).
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]:
        name = leaf_path(path)
        if name in leaves:
            raise ConfigError("two leaves of a tree have the same name", where=name, fix="use keys without dots")
        leaves[name] = leaf
    return leaves


def from_named_leaves(tree: PyTree, leaves: dict[str, Any]) -> PyTree:
    """The structure of `tree` filled with `leaves` by dotted name.

    Raises:
        ConfigError: `leaves` and the leaves of `tree` do not have the same names; lists both differences.
    """
    names = named_leaves(tree)
    missing = [name for name in names if name not in leaves]
    extra = [name for name in leaves if name not in names]
    if missing or extra:
        raise ConfigError("leaves do not fit the tree", found=f"missing: {missing}, not in the tree: {extra}")
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_spec), [leaves[name] for name in names])


def initialize(specs: PyTree, key: jax.Array, shardings: PyTree | None = None) -> PyTree:
    """Initial values.

    Each leaf's key depends on its name alone, so that adding a leaf changes no other. Values do not depend on the
    shardings: jax's threefry generator is partitionable.

    Args:
        specs: tree of ParamSpec.
        key: PRNG key.
        shardings: tree like `specs` with sharding leaves. Each value is then computed where it will live, and no
            device ever holds more than its shard. None: the default device.
    """
    named = named_leaves(specs)
    places = dict.fromkeys(named) if shardings is None else named_leaves(shardings)
    values = {
        name: _compiled_initializer(spec.init, spec.shape, jnp.dtype(spec.dtype), places[name])(
            jax.random.fold_in(key, zlib.crc32(name.encode()))
        )
        for name, spec in named.items()
    }
    return from_named_leaves(specs, values)


@functools.lru_cache(maxsize=4096)
def _compiled_initializer(
    init: Initializer, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> Callable[[jax.Array], jax.Array]:
    """One compilation for all parameters of one shape: a large model has few distinct ones."""
    return jax.jit(lambda key: init(key, shape, dtype), out_shardings=sharding)


def abstract(specs: PyTree) -> PyTree:
    """`jax.ShapeDtypeStruct` leaves: the model's shapes without its memory."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec)


def stack(specs: PyTree, count: int, axis_name: str | None = "layers") -> PyTree:
    """The declaration of `count` such trees stacked on a new leading axis, each layer initialised on its own."""

    def stack_leaf(spec: ParamSpec) -> ParamSpec:
        return dataclasses.replace(
            spec,
            shape=(count, *spec.shape),
            axes=(axis_name, *spec.axes),
            init=_stacked(spec.init),
            fallbacks=tuple((axis_name, *axes) for axes in spec.fallbacks),
        )

    return jax.tree.map(stack_leaf, specs, is_leaf=is_spec)


@functools.cache
def _stacked(init: Initializer) -> Initializer:
    """An initializer of one layer, for a stack of them."""

    def stacked_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.vmap(lambda layer_key: init(layer_key, shape[1:], dtype))(jax.random.split(key, shape[0]))

    return stacked_init


def count_parameters(tree: PyTree) -> int:
    """Number of elements in a tree of specs, abstract values or arrays."""
    leaves = jax.tree.leaves(tree, is_leaf=is_spec)
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves)


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all elements in a tree of specs, abstract values or arrays; of sharded arrays, all shards together."""
    leaves = jax.tree.leaves(tree, is_leaf=is_spec)
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
