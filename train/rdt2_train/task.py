"""What a stage hands to the shared loop: parameters, a loss over examples, and what changes without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.params import PyTree


@struct.dataclass
class Sum:
    """A mean in two parts, so that parts of a batch can be put together exactly.

    Attributes:
        total: float32 (), sum over what is averaged.
        weight: float32 (), how much that is.
    """

    total: Any
    weight: Any

    @property
    def mean(self) -> jax.Array:
        """total / weight; 0 where there is nothing to average."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)


@struct.dataclass
class Outcome:
    """What a loss function found in a batch or a part of one.

    Attributes:
        loss: to be minimised; its gradient is that of `loss.total` over the weight of the whole batch.
        metrics: for the log, by name.
        carried: the new `TrainState.carried`, or None where nothing changes.
    """

    loss: Sum
    metrics: Mapping[str, Sum]
    carried: Any = None


Loss = Callable[[PyTree, PyTree, PyTree, Any, jax.Array], Outcome]
"""(trainable, frozen, carried, batch, key of the step) -> outcome. What is random about an example is to be drawn from
the key that the batch holds for it, so that it does not depend on how the batch is divided."""

AfterStep = Callable[[PyTree, PyTree], PyTree]
"""(trainable after the optimizer, carried) -> carried: moving averages of parameters."""


@dataclass(frozen=True)
class Task:
    """One stage of training, apart from its data.

    Attributes:
        name: of the stage.
        specs: trainable parameters as ParamSpecs.
        loss: see `Loss`.
        carried_specs: what changes without a gradient, as ParamSpecs; None: nothing.
        after_step: see `AfterStep`; None: nothing follows the parameters.
        divisible: whether a batch may be divided (gradient accumulation); not where `carried` depends on all of it.
    """

    name: str
    specs: PyTree
    loss: Loss
    carried_specs: PyTree = None
    after_step: AfterStep | None = None
    divisible: bool = True
