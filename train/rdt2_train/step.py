"""One optimizer step: gradients of one or several parts of a batch, the update, and what the log wants to know.

Parameters, optimizer state and gradients are float32 and sharded by the rules of `rdt2_jax.sharding`: every device
updates its own share (ZeRO). Gradients are summed over devices in float32, since they are gradients of float32
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rdt2_jax.errors import ConfigError
from rdt2_jax.params import PyTree
from rdt2_jax.sharding import Layout
from rdt2_train.task import Outcome, Sum, Task


@struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: int32 (), optimizer steps taken.
        params: trainable parameters, float32.
        optimizer: state of the optimizer.
        carried: changes without a gradient (codebooks, averages); None where a stage has nothing of the kind.
        key: PRNG key of the run; steps fold their number in, and leave it as it is.
    """

    step: Any
    params: PyTree
    optimizer: PyTree
    carried: PyTree
    key: Any


def init_state(params: PyTree, carried: PyTree, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carried, key)


def train_step(
    state: TrainState,
    frozen: PyTree,
    batch: PyTree,
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    parts: int = 1,
    layout: Layout | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """A step on one batch. To be jitted, with `task`, `optimizer`, `parts` and `layout` closed over.

    Args:
        state: donated.
        frozen: parameters without a gradient.
        batch: arrays with a common leading axis.
        task: the stage.
        optimizer: see `optimizer.make_optimizer`.
        parts: the batch is worked through in so many parts, whose gradients are added up.
        layout: of the batch; None: one device.

    Returns:
        The new state, and scalars: `loss`, `grad_norm` (before clipping), `finite`, and the task's metrics. Where loss
        or gradient are not finite, parameters, optimizer and what is carried stay as they were.

    Raises:
        ConfigError: a batch that cannot be divided into `parts`.
    """
    key = jax.random.fold_in(state.key, state.step)
    if parts == 1:
        gradients, outcome = _gradients(task, state, frozen, batch, key)
    else:
        gradients, outcome = _accumulated(task, state, frozen, batch, key, parts, layout)
    weight = jnp.where(outcome.loss.weight > 0, outcome.loss.weight, 1.0)
    gradients = jax.tree.map(lambda g: g / weight, gradients)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(outcome.loss.mean)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    carried = state.carried if outcome.carried is None else outcome.carried
    if task.after_step is not None:
        carried = task.after_step(params, carried)
    params, optimizer_state, carried = _where(
        finite, (params, optimizer_state, carried), (state.params, state.optimizer, state.carried)
    )
    metrics = {name: value.mean for name, value in outcome.metrics.items()}
    report = {"loss": outcome.loss.mean, "grad_norm": norm, "finite": finite, **metrics}
    return TrainState(state.step + 1, params, optimizer_state, carried, state.key), report


def _where(finite: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The new state, or the old one where a step went wrong: a run that stops then has something to save."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def _gradients(task: Task, state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, Outcome]:
    """Of the loss's total, not of its mean."""

    def total(params: PyTree) -> tuple[jax.Array, Outcome]:
        outcome = task.loss(params, frozen, state.carried, batch, key)
        return outcome.loss.total, outcome

    gradients, outcome = jax.grad(total, has_aux=True)(state.params)
    return gradients, outcome


def _accumulated(
    task: Task, state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array, parts: int, layout: Layout | None
) -> tuple[PyTree, Outcome]:
    """Gradients and sums of all parts."""
    if not task.divisible:
        raise ConfigError(
            "this stage needs its batch as a whole", where="accumulation", expected=1, found=parts, fix="set it to 1"
        )
    divided = jax.tree.map(lambda x: _divided(x, parts, layout), batch)

    def body(sums: tuple[PyTree, Sum, Mapping[str, Sum]], part: Any) -> tuple[Any, None]:
        number, rows = part
        gradients, outcome = _gradients(task, state, frozen, rows, jax.random.fold_in(key, number))
        found = (gradients, outcome.loss, dict(outcome.metrics))
        return jax.tree.map(jnp.add, sums, found), None

    first = jax.tree.map(lambda x: x[0], divided)
    shapes = jax.eval_shape(lambda rows: _gradients(task, state, frozen, rows, key), first)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[1].loss, dict(shapes[1].metrics))
    )
    (gradients, loss, metrics), _ = jax.lax.scan(body, zeros, (jnp.arange(parts), divided))
    return gradients, Outcome(loss, metrics)


def _divided(x: jax.Array, parts: int, layout: Layout | None) -> jax.Array:
    """(B, ...) -> (parts, B / parts, ...). Every part takes rows from all devices, so that none has to move."""
    if x.shape[0] % parts:
        raise ConfigError(
            "the batch cannot be divided", where="accumulation", expected=f"a divisor of {x.shape[0]}", found=parts
        )
    divided = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
    return divided if layout is None else layout.constrain(divided, None, "batch", *[None] * (x.ndim - 1))
