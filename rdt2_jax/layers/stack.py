"""Layers of one shape, in either of two layouts: stacked on a leading axis, or a tuple with one tree each.

A stack is scanned: one compilation for all layers, shardable, what training and pods want. A tuple is unrolled: the
compiler reads each layer's weights where they lie, where a scan would copy them out of the stack first; that is what
single-device inference wants. Never index a stack inside jit: it copies. Unstack once, after loading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import PyTree

Body = Callable[..., tuple[Any, Any]]
"""(carry, layer, per_layer_input) -> (carry, per_layer_output)."""


def over_layers(body: Body, carry: Any, layers: PyTree, compute: Compute, inputs: PyTree = None) -> tuple[Any, PyTree]:
    """Runs `body` over layers in their order.

    Args:
        body: (carry, layer, input) -> (carry, output).
        carry: of the first layer.
        layers: a stack (every leaf with a leading axis), or a tuple of trees.
        compute: its `remat` applies to every layer.
        inputs: one per layer, in the same layout as `layers`; None: none.

    Returns:
        The last carry, and the outputs in the layout of `layers`.
    """
    step = compute.rematerialized(body)
    if not isinstance(layers, tuple):
        return jax.lax.scan(lambda c, xs: step(c, *xs), carry, (layers, inputs))
    outputs = []
    for i, layer in enumerate(layers):
        carry, output = step(carry, layer, None if inputs is None else inputs[i])
        outputs.append(output)
    return carry, tuple(outputs)


def num_layers(layers: PyTree) -> int:
    """How many there are, in either layout."""
    return len(layers) if isinstance(layers, tuple) else jax.tree.leaves(layers)[0].shape[0]


def unstack(layers: PyTree, *, delete: bool = False) -> tuple[PyTree, ...]:
    """A stack as a tuple of layers. Not for use inside jit.

    Args:
        layers: a stack.
        delete: free each stacked array as soon as it is taken apart, so that at most one exists twice.

    Raises:
        ConfigError: the leading axes differ.
    """
    leaves, structure = jax.tree.flatten(layers)
    counts = {leaf.shape[0] for leaf in leaves}
    if len(counts) != 1:
        raise ConfigError("not a stack of layers", expected="one leading size for all arrays", found=sorted(counts))
    count = counts.pop()
    parts: list[list[Any]] = [[] for _ in range(count)]
    for leaf in leaves:
        for i in range(count):
            parts[i].append(leaf[i])
        if delete and isinstance(leaf, jax.Array):
            jax.block_until_ready([part[-1] for part in parts])
            leaf.delete()
    return tuple(jax.tree.unflatten(structure, part) for part in parts)


def first_layers(layers: PyTree, count: int) -> PyTree:
    """The first `count` layers, in the layout that they have. On a stack this copies: not for use inside jit.

    Raises:
        ConfigError: there are fewer.
    """
    available = num_layers(layers)
    if not 1 <= count <= available:
        raise ConfigError("there are not so many layers", expected=f"1 to {available}", found=count)
    if count == available:
        return layers
    return layers[:count] if isinstance(layers, tuple) else jax.tree.map(lambda leaf: leaf[:count], layers)
