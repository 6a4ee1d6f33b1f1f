"""Where a training state lies: every leaf beside its parameter, everything else on all devices.

Parameters follow `rdt2_jax.sharding`; the optimizer's moments lie where their parameters lie, so that no device holds
more than its share of them (ZeRO).
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from rdt2_jax.params import PyTree, abstract
from rdt2_jax.sharding import Layout, batch_sharding, replicated
from rdt2_train.step import TrainState, init_state
from rdt2_train.task import Task


def state_shardings(task: Task, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """A sharding for every leaf of the training state.

    Raises:
        ShardingError: a parameter that cannot be laid out over the mesh.
    """
    params, _ = layout.shardings(task.specs)
    carried = None if task.carried_specs is None else layout.shardings(task.carried_specs)[0]
    whole = replicated(layout.mesh)
    shapes = jax.eval_shape(optimizer.init, abstract(task.specs))
    moments = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, shapes, params, transform_non_params=lambda _: whole
    )
    return TrainState(step=whole, params=params, optimizer=moments, carried=carried, key=whole)


def place_batch(batch: PyTree, layout: Layout) -> PyTree:
    """This process's rows of a batch as arrays over the whole mesh.

    Args:
        batch: numpy arrays, this process's part of every leading axis.
        layout: of the mesh.
    """
    sharding = batch_sharding(layout.mesh, layout.rules)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def abstract_state(task: Task, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Shapes, types and shardings of the training state: the target of a restore."""
    shapes: Any = jax.eval_shape(
        lambda params, carried, key: init_state(params, carried, optimizer, key),
        abstract(task.specs),
        None if task.carried_specs is None else abstract(task.carried_specs),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(task, optimizer, layout),
    )
