"""One-step distillation: a student whose single step lands where the teacher's whole rollout does.

Both objectives train one function, f(x, t) = x + (1 - t) v(x, t): where the flow would arrive if the velocity stayed as
it is. The student starts as a copy of the teacher and is deployed as f(noise, 0), which is
`flow.sample(..., schedule=ONE_STEP)`.

*Regression* (RDT2, arXiv 2602.03310): |F(noise) - f(noise, 0)|^2, with the teacher's whole rollout F computed on the
fly. *Consistency* (Song et al., arXiv 2303.01469): the teacher makes one step of its rollout, from x_t to x_next, and f
has to say the same of both: d(f(x_t, t), f_target(x_next, t_next)), where the target network is a moving average of the
student. f(x, 1) = x holds by construction, so the last step is learnt from the teacher alone and the others follow from
it: where the loss vanishes for all x_t, f(noise, 0) is the teacher's rollout with exactly these steps. Both objectives
have the same solution.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from rdt2_jax.action_expert import ema, flow
from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.flow import ONE_STEP, Method, Schedule
from rdt2_jax.action_expert.model import ActionExpertParams, Condition, velocity
from rdt2_jax.config import FrozenConfig, PositiveInt
from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute

Objective = Literal["regression", "consistency"]

Distance = Literal["squared", "pseudo_huber"]


class DistillConfig(FrozenConfig):
    """How a student is distilled. Hashable: a static argument of jit.

    Attributes:
        objective: the switch, see the module.
        num_steps: steps of the teacher's rollout that the student learns to make at once. Regression runs them all for
            every example, consistency one of them.
        method: of these steps.
        target_decay: share of the target network that a training step keeps; of consistency alone. 0: the student
            itself, without its gradient. The default is that of arXiv 2303.01469 for distillation on ImageNet.
        distance: mean squared error, or the pseudo-Huber distance of whole chunks, sqrt(mean square + scale^2) - scale
            (Song and Dhariwal, arXiv 2310.14189), which large errors pull less.
        huber_scale: `scale`, in units of normalised actions; the default is theirs, where the norm of a chunk of d
            numbers has 0.00054 sqrt(d).
    """

    objective: Objective = "regression"
    num_steps: PositiveInt = 5
    method: Method = "euler"
    target_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    distance: Distance = "squared"
    huber_scale: Annotated[float, Field(gt=0.0)] = 0.00054

    @property
    def schedule(self) -> Schedule:
        """The teacher's rollout."""
        return Schedule(self.num_steps, self.method)


@struct.dataclass
class DistillState:
    """What distillation changes.

    Attributes:
        student: being trained.
        target: its moving average; None: the objective has none.
    """

    student: ActionExpertParams
    target: ActionExpertParams | None


def init(teacher: ActionExpertParams, distill: DistillConfig, *, dtype: Any = jnp.float32) -> DistillState:
    """The student as a copy of the teacher, laid out like it; no buffer is shared, so that it may be donated.

    Args:
        teacher: parameters; they are never changed.
        distill: the objective.
        dtype: of the student and of the target. In 16 bits, small updates would be lost.
    """
    copy = jax.tree.map(lambda x: jnp.array(x, dtype=dtype, copy=True), teacher)
    return DistillState(copy, jax.tree.map(jnp.copy, copy) if distill.objective == "consistency" else None)


def after_step(state: DistillState, distill: DistillConfig) -> DistillState:
    """To be called once the optimizer has changed the student: the target follows.

    Raises:
        ConfigError: the state was made for the other objective.
    """
    target = _checked(state.target, distill)
    if target is None:
        return state
    return DistillState(state.student, ema.update(target, state.student, None, distill.target_decay))


def loss(
    student: ActionExpertParams,
    target: ActionExpertParams | None,
    teacher: ActionExpertParams,
    config: ActionExpertConfig,
    distill: DistillConfig,
    condition: Condition,
    state: jax.Array,
    key: jax.Array,
    compute: Compute,
    *,
    actions: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of either objective, with what is random drawn from `key`; differentiate with respect to `student`.

    Args:
        student, target: `DistillState.student` and `.target`.
        teacher: as in `init`; gets no gradient.
        config, condition, state, compute: as of `model.velocity`.
        distill: the objective.
        key: PRNG key.
        actions: (B, frames, action_dim), normalised. Consistency then meets x_t = t * actions + (1 - t) * noise, at the
            price of one teacher step. None: x_t lies on the teacher's own rollout, at the price of all of its steps.
            Regression needs no actions and does not look at them.
        weights: of the squared differences, see `flow.loss`.

    Returns:
        float32 (), and scalars to report: `difference_rms`, the root mean square of what the distance is taken of.
        Under regression that is how far the student is from the teacher; under consistency it is how far f jumps from
        one end of a step to the other, and `gap` tells the former.

    Raises:
        ConfigError: consistency without a target.
    """
    noise_key, index_key = jax.random.split(key)
    shape = (state.shape[0], config.chunk_length, config.action_dim)
    noise = jax.random.normal(noise_key, shape, jnp.float32)
    target = None if distill.objective == "regression" else _checked(target, distill)
    if target is None:
        return regression_loss_at(student, teacher, config, distill, noise, condition, state, compute, weights=weights)
    index = jax.random.randint(index_key, shape[:1], 0, distill.num_steps)
    return consistency_loss_at(
        student,
        target,
        teacher,
        config,
        distill,
        noise,
        index,
        condition,
        state,
        compute,
        actions=actions,
        weights=weights,
    )


def regression_loss_at(
    student: ActionExpertParams,
    teacher: ActionExpertParams,
    config: ActionExpertConfig,
    distill: DistillConfig,
    noise: jax.Array,
    condition: Condition,
    state: jax.Array,
    compute: Compute,
    *,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`loss` of regression at given noise (B, frames, action_dim)."""
    wanted = flow.sample(
        jax.lax.stop_gradient(teacher), config, noise, condition, state, compute, schedule=distill.schedule
    )
    found = arrival(student, config, noise, jnp.zeros(noise.shape[:1]), condition, state, compute)
    return _distance(found - wanted, distill, weights)


def consistency_loss_at(
    student: ActionExpertParams,
    target: ActionExpertParams,
    teacher: ActionExpertParams,
    config: ActionExpertConfig,
    distill: DistillConfig,
    noise: jax.Array,
    index: jax.Array,
    condition: Condition,
    state: jax.Array,
    compute: Compute,
    *,
    actions: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`loss` of consistency at given noise (B, frames, action_dim) and steps of the rollout, int (B,), from 0."""
    teacher, target = jax.lax.stop_gradient((teacher, target))
    ends = jnp.asarray(distill.schedule.ends, jnp.float32)
    t, t_next = ends[index], ends[index + 1]
    if actions is None:
        path = flow.path(teacher, config, noise, condition, state, compute, schedule=distill.schedule)
        x, x_next = _at(path, index), _at(path, index + 1)
    else:
        x = flow.interpolate(actions.astype(jnp.float32), noise, t)
        x_next = flow.single_step(teacher, config, x, index, condition, state, compute, schedule=distill.schedule)
    wanted = arrival(target, config, x_next, t_next, condition, state, compute)
    found = arrival(student, config, x, t, condition, state, compute)
    return _distance(found - wanted, distill, weights)


def arrival(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    x: jax.Array,
    t: jax.Array,
    condition: Condition,
    state: jax.Array,
    compute: Compute,
) -> jax.Array:
    """f(x, t) = x + (1 - t) v(x, t): where the velocity at x leads by t = 1; x itself at t = 1.

    Args:
        params, config, condition, state, compute: as of `model.velocity`.
        x: float32 (B, frames, action_dim).
        t: (B,), in [0, 1].

    Returns:
        float32 (B, frames, action_dim).
    """
    direction = velocity(params, config, x, t, condition, state, compute).astype(jnp.float32)
    return x + (1 - t)[:, None, None] * direction


def gap(
    params: ActionExpertParams,
    teacher: ActionExpertParams,
    config: ActionExpertConfig,
    distill: DistillConfig,
    noise: jax.Array,
    condition: Condition,
    state: jax.Array,
    compute: Compute,
) -> jax.Array:
    """How far one step of `params` ends from the teacher's rollout from the same noise: what both objectives are for.

    Args:
        params: a student's, or the teacher's own for comparison.
        teacher, config, distill, condition, state, compute: as of `loss`.
        noise: (B, frames, action_dim), standard normal.

    Returns:
        float32 (B,): root mean square over each chunk, in units of normalised actions.
    """
    found = flow.sample(params, config, noise, condition, state, compute, schedule=ONE_STEP)
    wanted = flow.sample(teacher, config, noise, condition, state, compute, schedule=distill.schedule)
    return jnp.sqrt(jnp.mean(jnp.square(found - wanted), axis=(1, 2)))


def _at(path: jax.Array, index: jax.Array) -> jax.Array:
    """Of every chunk the place with its index: (places, B, frames, action_dim), (B,) -> (B, frames, action_dim)."""
    return jnp.take_along_axis(path, index[None, :, None, None], axis=0)[0]


def _distance(
    difference: jax.Array, distill: DistillConfig, weights: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The distance over a batch, and what to report. Chunks count as much as their weights sum up to."""
    squares = jnp.square(difference)
    mean = flow.weighted_mean(squares, weights)
    report = {"difference_rms": jnp.sqrt(jax.lax.stop_gradient(mean))}
    if distill.distance == "squared":
        return mean, report
    weights = jnp.ones_like(squares) if weights is None else flow.full_weights(weights, squares.shape)
    total = jnp.sum(weights, axis=(1, 2))
    of_chunk = jnp.sum(squares * weights, axis=(1, 2)) / jnp.where(total > 0, total, 1.0)
    scale = distill.huber_scale
    return flow.weighted_mean(jnp.sqrt(of_chunk + scale**2) - scale, total), report


def _checked(target: ActionExpertParams | None, distill: DistillConfig) -> ActionExpertParams | None:
    """The target of a state that was made for this objective."""
    if (target is None) == (distill.objective == "consistency"):
        raise ConfigError(
            "this state belongs to the other objective",
            where="DistillState.target",
            expected="a target network" if target is None else "none: regression has no target network",
            found="none" if target is None else "a target network",
            fix="start from distill.init with the same objective",
        )
    return target
