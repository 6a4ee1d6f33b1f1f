"""Stacked layers and tuples of layers: one function, two layouts."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.stack import first_layers, num_layers, over_layers, unstack

STACK = {"w": jnp.arange(12.0).reshape(3, 2, 2) / 10, "b": jnp.arange(6.0).reshape(3, 2)}


def body(x: jax.Array, layer: dict[str, jax.Array], extra: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    y = jnp.tanh(x @ layer["w"] + layer["b"]) + (0 if extra is None else extra)
    return y, y * 2


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_both_layouts_compute_the_same(remat: str) -> None:
    compute = Compute(remat=remat)  # pyright: ignore[reportArgumentType]
    x, extras = jnp.ones((4, 2)), jnp.arange(3.0)
    last, outputs = over_layers(body, x, STACK, compute, extras)
    last_unrolled, outputs_unrolled = over_layers(body, x, unstack(STACK), compute, tuple(extras))
    np.testing.assert_allclose(last, last_unrolled, rtol=1e-6)
    np.testing.assert_allclose(outputs, jnp.stack(outputs_unrolled), rtol=1e-6)


def test_remat_changes_no_gradient() -> None:
    def loss(layers: dict[str, jax.Array], compute: Compute) -> jax.Array:
        return over_layers(body, jnp.ones((4, 2)), layers, compute)[0].sum()

    plain = jax.grad(loss)(STACK, Compute())
    for remat in ("full", "dots"):
        chex.assert_trees_all_close(jax.grad(loss)(STACK, Compute(remat=remat)), plain, rtol=1e-6)


def test_counting_and_taking() -> None:
    layers = unstack(STACK)
    assert num_layers(STACK) == num_layers(layers) == 3
    chex.assert_trees_all_equal(first_layers(STACK, 2)["w"], STACK["w"][:2])
    assert first_layers(layers, 2) == layers[:2]
    assert first_layers(STACK, 3) is STACK
    for count in (0, 4):
        with pytest.raises(ConfigError, match="1 to 3"):
            first_layers(STACK, count)


def test_deleting_frees_the_stack() -> None:
    stack = jax.tree.map(jnp.array, STACK)
    layers = unstack(stack, delete=True)
    assert all(leaf.is_deleted() for leaf in stack.values())
    np.testing.assert_array_equal(layers[1]["b"], STACK["b"][1])


def test_not_a_stack() -> None:
    with pytest.raises(ConfigError, match="not a stack"):
        unstack({"a": jnp.zeros((2, 1)), "b": jnp.zeros((3, 1))})
