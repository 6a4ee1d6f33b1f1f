"""An exponential moving average of weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rdt2_jax.params import PyTree


def update(average: PyTree, params: PyTree, step: Any, decay: float = 0.9999) -> PyTree:
    """The average after one more training step; start from a copy of the first parameters.

    The decay grows with the steps, min(decay, (1 + step) / (10 + step)), so that random first weights are forgotten
    soon (the rule of TensorFlow's `ExponentialMovingAverage` with `num_updates`). Averages are kept in their own dtype:
    with bfloat16 a decay near 1 changes nothing, so give float32.

    Args:
        average: tree of floats.
        params: tree like it.
        step: how many updates came before, int or int array; None: the decay does not grow, for a first value that is
            not to be forgotten soon.
        decay: in [0, 1); 0 copies, up to rounding.
    """
    rate: Any = 1.0 - decay
    if step is not None:
        step = jnp.asarray(step, jnp.float32)
        rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: (a + rate * (p.astype(jnp.float32) - a)).astype(a.dtype), average, params)
