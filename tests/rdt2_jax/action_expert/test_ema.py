"""The average of weights: its formula, its start, its dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.action_expert import ema


def test_formula_after_many_steps() -> None:
    average, params = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 6.0])}
    found = ema.update(average, params, 10_000, decay=0.75)
    np.testing.assert_allclose(found["a"], [1.5, 3.0])


def test_random_first_weights_are_forgotten_soon() -> None:
    """With a constant decay of 0.9999 they would still be 99% of the average after 100 steps."""
    average = jnp.array(100.0)
    for step in range(100):
        average = ema.update(average, jnp.array(1.0), step)
    assert float(average) == pytest.approx(1.0, abs=1e-3)


def test_without_a_step_the_decay_is_constant() -> None:
    found = ema.update(jnp.array(0.0), jnp.array(1.0), None, decay=0.75)
    assert float(found) == pytest.approx(0.25)
    assert float(ema.update(jnp.array(0.0), jnp.array(1.0), 0, decay=0.75)) == pytest.approx(0.9)


def test_constant_weights_stay_and_dtype_too() -> None:
    params = jnp.array([0.1, -3.0], jnp.float32)
    found = jax.jit(ema.update)(params, params.astype(jnp.float32), 7)
    np.testing.assert_array_equal(found, params)
    assert ema.update(params, params.astype(jnp.bfloat16), 7).dtype == jnp.float32
