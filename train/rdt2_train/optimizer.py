"""AdamW with clipping by the global norm, and the learning rate over the steps.

Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; values of RDT2, arXiv
2602.03310.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax.numpy as jnp
import optax
from pydantic import Field, model_validator

from rdt2_jax.config import FrozenConfig
from rdt2_jax.params import ParamSpec, PyTree, from_named_leaves, named_leaves

NonNegativeInt = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ScheduleConfig(FrozenConfig):
    """The learning rate over the steps: a linear warm-up, a main part, and an anneal at the end.

    Attributes:
        peak: after the warm-up.
        warmup_steps: from 0 to the peak; step s of them has peak * (s + 1) / warmup_steps.
        shape: of the main part: the peak throughout, or half a cosine down to `main_end`.
        main_end: share of the peak at the end of a cosine.
        anneal_steps: at the end, falling exponentially from where the main part ended. The paper says how many and
            that they are exponential, but neither where they start nor where they end.
        anneal_end: share of the peak after the last step.
    """

    peak: Annotated[float, Field(gt=0)]
    warmup_steps: NonNegativeInt = 0
    shape: Literal["constant", "cosine"] = "constant"
    main_end: Annotated[float, Field(gt=0, le=1)] = 0.1
    anneal_steps: NonNegativeInt = 0
    anneal_end: Annotated[float, Field(gt=0, le=1)] = 0.01


class OptimizerConfig(FrozenConfig):
    """AdamW; the defaults are the paper's.

    Attributes:
        schedule: of the learning rate.
        b1, b2, eps: of Adam.
        weight_decay: of matrices; norms and biases have none.
        clip: largest global norm of the gradient; larger ones are scaled down to it.
    """

    schedule: ScheduleConfig
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    clip: Annotated[float, Field(gt=0)] = 1.0


class StepsConfig(FrozenConfig):
    """How long, and how fast.

    Attributes:
        steps: of the optimizer.
        optimizer: see `OptimizerConfig`.
    """

    steps: Annotated[int, Field(ge=1)]
    optimizer: OptimizerConfig

    @model_validator(mode="after")
    def _parts_fit(self) -> StepsConfig:
        schedule = self.optimizer.schedule
        if schedule.warmup_steps + schedule.anneal_steps > self.steps:
            parts = f"warmup_steps {schedule.warmup_steps} and anneal_steps {schedule.anneal_steps}"
            raise ValueError(f"{parts} do not fit into {self.steps} steps")
        return self


def learning_rate(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate, float32."""
    main_steps = max(steps - config.warmup_steps - config.anneal_steps, 1)
    main_end = 1.0 if config.shape == "constant" else config.main_end

    def rate(count: Any) -> Any:
        step = jnp.asarray(count, jnp.float32)
        warm = (step + 1) / max(config.warmup_steps, 1)
        progress = jnp.clip((step - config.warmup_steps) / main_steps, 0, 1)
        cosine = main_end + (1 - main_end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        annealed = (step - (steps - config.anneal_steps) + 1) / max(config.anneal_steps, 1)
        exponential = main_end * (config.anneal_end / main_end) ** jnp.clip(annealed, 0, 1)
        share = jnp.where(step >= steps - config.anneal_steps, exponential, cosine) if config.anneal_steps else cosine
        return config.peak * jnp.where(step < config.warmup_steps, warm, share)

    return rate


def make_optimizer(config: StepsConfig, specs: PyTree) -> optax.GradientTransformation:
    """The optimizer of a tree of parameters.

    Args:
        config: see there.
        specs: of the trainable parameters; decides which are decayed.
    """
    chosen = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(chosen.clip),
        optax.adamw(
            learning_rate(chosen.schedule, config.steps),
            b1=chosen.b1,
            b2=chosen.b2,
            eps=chosen.eps,
            weight_decay=chosen.weight_decay,
            mask=decay_mask(specs),
        ),
    )


def decay_mask(specs: PyTree) -> PyTree:
    """Which parameters are decayed, as a tree of bool: matrices, and nothing that is a norm or a bias."""
    leaves = named_leaves(specs)
    return from_named_leaves(specs, {name: _decays(name, spec) for name, spec in leaves.items()})


def _decays(name: str, spec: ParamSpec) -> bool:
    own_axes = [axis for axis in spec.axes if axis != "layers"]
    parts = name.split(".")
    return len(own_axes) >= 2 and parts[-1] != "bias" and not any("norm" in part for part in parts[-2:])
