"""Flow matching between noise and actions: what is learnt, and how chunks are sampled.

x_t = t * actions + (1 - t) * noise, and the velocity to learn is actions - noise (Lipman et al., arXiv 2210.02747, with
the straight paths of Liu et al., arXiv 2209.03003); RDT2 draws t from a logit-normal distribution. Actions are
normalised ones throughout.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.model import (
    ActionExpertParams,
    Condition,
    modulations_at,
    prepare,
    prepared_velocity,
    velocity,
)
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.layers.compute import Compute

Method = Literal["euler", "midpoint", "heun"]

TimeDistribution = Literal["logit_normal", "uniform"]

_NODES: dict[Method, tuple[float, ...]] = {"euler": (0.0,), "midpoint": (0.0, 0.5), "heun": (0.0, 1.0)}
"""Where within a step a method wants the velocity, in fractions of the step."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """At which times, and how, the flow is integrated. Hashable: a static argument of jit.

    Attributes:
        num_steps: steps of equal length from 0 to 1, where `times` does not say otherwise.
        method: Euler's (one velocity a step), or one of the two of second order (two velocities a step).
        times: ends of the steps, from 0 upwards to 1; replaces `num_steps`.

    Raises:
        ConfigError: no steps, times that do not rise from 0 to 1, or an unknown method.
    """

    num_steps: int = 5
    method: Method = "euler"
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in _NODES:
            raise ConfigError("no such method", where="Schedule.method", expected=", ".join(_NODES), found=self.method)
        if self.times is None:
            if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
                raise ConfigError("no steps", where="Schedule.num_steps", expected="1 or more", found=self.num_steps)
            return
        times = tuple(float(t) for t in self.times)
        rising = all(a < b for a, b in itertools.pairwise(times))
        if len(times) < 2 or times[0] != 0.0 or times[-1] != 1.0 or not rising:
            raise ConfigError(
                "not a way from noise to actions", where="Schedule.times", expected="0 < ... < 1", found=times
            )
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "num_steps", len(times) - 1)

    @property
    def ends(self) -> tuple[float, ...]:
        """Ends of the steps: num_steps + 1 times, the first 0, the last 1."""
        return self.times or tuple(i / self.num_steps for i in range(self.num_steps + 1))

    @property
    def num_velocities(self) -> int:
        """How often the network runs."""
        return self.num_steps * len(_NODES[self.method])

    @property
    def velocity_times(self) -> tuple[float, ...]:
        """Times at which the velocity is wanted, in order."""
        ends, nodes = self.ends, _NODES[self.method]
        return tuple(a + node * (b - a) for a, b in itertools.pairwise(ends) for node in nodes)


ONE_STEP = Schedule(num_steps=1)
"""How a distilled student is run."""


@struct.dataclass
class Prefix:
    """Actions that the sample is to agree with: the rest of a chunk that is being executed.

    Every velocity is corrected by the gradient that pulls the chunk it leads to towards these actions, as real-time
    chunking does it (Black et al., arXiv 2506.07339, equations 2 to 4).

    Attributes:
        actions: (B, frames, action_dim), normalised, aligned with the frames of the new chunk in time, and relative to
            the same poses: those of the arms when the new observation was captured. The rest of a chunk that was
            relative to earlier poses is another motion; express it anew first. Frames of weight 0 may hold anything
            finite.
        weights: (B, frames) in [0, 1]: 1 for frames that will have been executed before this chunk arrives, falling to
            0 for frames that are free.
        max_guidance: bound of the correction's factor, which is unbounded at both ends of the flow; None: the number
            of steps, so that one step can close the gap and not more (5 for 5 steps, as in the paper).
    """

    actions: Any
    weights: Any
    max_guidance: float | None = struct.field(pytree_node=False, default=None)


def sample(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    noise: jax.Array,
    condition: Condition,
    state: jax.Array,
    compute: Compute,
    *,
    schedule: Schedule | None = None,
    prefix: Prefix | None = None,
) -> jax.Array:
    """Follows the flow from noise to a chunk of normalised actions.

    Under jit, config, compute and schedule are static. What the steps share is computed once, see `model.prepare`; the
    steps are one compiled loop. The chunk is kept in float32 whatever the activations are.

    Args:
        params, config, condition, state, compute: as of `model.velocity`.
        noise: (B, frames, action_dim), standard normal.
        schedule: steps and method; None: `config.num_steps` of Euler's.
        prefix: actions to agree with.

    Returns:
        float32 (B, frames, action_dim).

    Raises:
        DataError: shapes that do not fit each other.
    """
    schedule = Schedule(config.num_steps) if schedule is None else schedule
    times = jnp.asarray(schedule.velocity_times, jnp.float32)
    free = _velocity_at(params, config, condition, state, times[:, None], compute)
    velocity_at = free if prefix is None else _guided(free, times, prefix, schedule, noise)
    lengths = jnp.diff(jnp.asarray(schedule.ends, jnp.float32))
    return jax.lax.fori_loop(
        0,
        schedule.num_steps,
        lambda i, x: _step(schedule.method, velocity_at, x, i, lengths[i]),
        noise.astype(jnp.float32),
    )


def path(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    noise: jax.Array,
    condition: Condition,
    state: jax.Array,
    compute: Compute,
    *,
    schedule: Schedule,
) -> jax.Array:
    """Where `sample` (see there for the arguments) passes: first the noise, then the chunk after every step.

    Returns:
        float32 (num_steps + 1, B, frames, action_dim), at the times `schedule.ends`.
    """
    times = jnp.asarray(schedule.velocity_times, jnp.float32)
    velocity_at = _velocity_at(params, config, condition, state, times[:, None], compute)

    def body(x: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x = _step(schedule.method, velocity_at, x, *step)
        return x, x

    x = noise.astype(jnp.float32)
    lengths = jnp.diff(jnp.asarray(schedule.ends, jnp.float32))
    _, passed = jax.lax.scan(body, x, (jnp.arange(schedule.num_steps), lengths))
    return jnp.concatenate([x[None], passed])


def single_step(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    x: jax.Array,
    index: jax.Array,
    condition: Condition,
    state: jax.Array,
    compute: Compute,
    *,
    schedule: Schedule,
) -> jax.Array:
    """One step of a schedule, for every chunk another one.

    Args:
        params, config, condition, state, compute, schedule: as of `sample`.
        x: float32 (B, frames, action_dim), chunks at the beginnings of their steps.
        index: int (B,), which step of the schedule, from 0.

    Returns:
        float32 (B, frames, action_dim), the chunks at the ends of these steps.
    """
    times = jnp.asarray(schedule.velocity_times, jnp.float32).reshape(schedule.num_steps, -1)
    lengths = jnp.diff(jnp.asarray(schedule.ends, jnp.float32))
    velocity_at = _velocity_at(params, config, condition, state, times[index].T, compute)
    return _step(schedule.method, velocity_at, x, 0, lengths[index][:, None, None])


def loss(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    actions: jax.Array,
    condition: Condition,
    state: jax.Array,
    key: jax.Array,
    compute: Compute,
    *,
    time_distribution: TimeDistribution = "logit_normal",
    weights: jax.Array | None = None,
) -> jax.Array:
    """Flow-matching loss with noise and times drawn from `key`.

    Args:
        params, config, condition, state, compute: as of `model.velocity`.
        actions: (B, frames, action_dim), normalised.
        key: PRNG key.
        time_distribution: of t: sigmoid of a standard normal (published), or uniform.
        weights: of the squared errors, see `full_weights`; None: 1. The mean is over the weights' sum.

    Returns:
        float32 ().
    """
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, actions.shape, jnp.float32)
    t = draw_times(time_key, actions.shape[0], time_distribution)
    return loss_at(params, config, actions, noise, t, condition, state, compute, weights=weights)


def loss_at(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    actions: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    condition: Condition,
    state: jax.Array,
    compute: Compute,
    *,
    weights: jax.Array | None = None,
) -> jax.Array:
    """`loss` at given noise (B, frames, action_dim) and times (B,): mean squared error of the velocity, float32 ()."""
    x = interpolate(actions, noise, t)
    found = velocity(params, config, x, t, condition, state, compute)
    return weighted_mean(jnp.square(found - (actions - noise)), weights)


def interpolate(actions: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """t * actions + (1 - t) * noise, with t (B,)."""
    t = t[:, None, None]
    return t * actions + (1 - t) * noise


def draw_times(key: jax.Array, batch: int, distribution: TimeDistribution = "logit_normal") -> jax.Array:
    """float32 (batch,) in (0, 1).

    Raises:
        ConfigError: another distribution.
    """
    if distribution == "logit_normal":
        return jax.nn.sigmoid(jax.random.normal(key, (batch,), jnp.float32))
    if distribution == "uniform":
        return jax.random.uniform(key, (batch,), jnp.float32)
    raise ConfigError("no such distribution of times", expected="logit_normal or uniform", found=distribution)


def weighted_mean(errors: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Mean of errors (B, frames, action_dim); of all weights zero, 0."""
    if weights is None:
        return jnp.mean(errors)
    weights = full_weights(weights, errors.shape)
    total = jnp.sum(weights)
    return jnp.sum(errors * weights) / jnp.where(total > 0, total, 1.0)


def full_weights(weights: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Weights of frames (B, frames), or of numbers, broadcastable to (B, frames, action_dim), in the latter shape.

    Raises:
        DataError: another shape.
    """
    full = weights[..., None] if weights.shape == shape[:-1] else weights
    if full.ndim != len(shape) or any(n not in (1, size) for n, size in zip(full.shape, shape, strict=True)):
        raise DataError("weights do not fit", where="weights", expected=f"{shape[:-1]} or {shape}", found=weights.shape)
    return jnp.broadcast_to(full, shape)


_Velocity = Callable[[jax.Array, Any], jax.Array]
"""(x, index of a prepared time) -> velocity."""


def _velocity_at(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    condition: Condition,
    state: jax.Array,
    times: jax.Array,
    compute: Compute,
) -> _Velocity:
    """float32 velocities at the given times, (times, B) or (times, 1)."""
    prepared = prepare(params, config, condition, state, times, compute)

    def velocity_at(x: jax.Array, index: Any) -> jax.Array:
        modulations = modulations_at(prepared, index)
        return prepared_velocity(params, config, x, prepared.condition, modulations, compute)

    return velocity_at


def _step(method: Method, velocity_at: _Velocity, x: jax.Array, i: Any, length: jax.Array) -> jax.Array:
    """One step of a method; i counts steps."""
    if method == "euler":
        return x + length * velocity_at(x, i)
    first = velocity_at(x, 2 * i)
    if method == "midpoint":
        return x + length * velocity_at(x + length / 2 * first, 2 * i + 1)
    return x + length / 2 * (first + velocity_at(x + length * first, 2 * i + 1))


def checked_guidance(bound: Any) -> float:
    """`Prefix.max_guidance` as a float of Python, part of what programs are compiled for.

    Raises:
        DataError: not a finite number from 0 upwards.
    """
    is_number = isinstance(bound, int | float | np.integer | np.floating) and not isinstance(bound, bool)
    if not is_number or not 0 <= bound < math.inf:
        raise DataError("no bound of guidance", where="prefix.max_guidance", expected="0 or more, finite", found=bound)
    return float(bound)


def _guided(
    velocity_at: _Velocity, times: jax.Array, prefix: Prefix, schedule: Schedule, noise: jax.Array
) -> _Velocity:
    """Velocities that are pulled towards a prefix."""
    actions, weights = jnp.asarray(prefix.actions, jnp.float32), jnp.asarray(prefix.weights, jnp.float32)
    if actions.shape != noise.shape or weights.shape != noise.shape[:2]:
        raise DataError(
            "the prefix does not fit the chunk",
            where="prefix",
            expected=f"actions {noise.shape}, weights {noise.shape[:2]}",
            found=f"actions {actions.shape}, weights {weights.shape}",
        )
    bound = schedule.num_steps if prefix.max_guidance is None else checked_guidance(prefix.max_guidance)

    def guided(x: jax.Array, index: jax.Array) -> jax.Array:
        t = times[index]

        def destination(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            direction = velocity_at(x, index)
            return x + (1 - t) * direction, direction

        arrived, pull_back, direction = jax.vjp(destination, x, has_aux=True)
        (correction,) = pull_back((actions - arrived) * weights[..., None])
        room = t * (1 - t)
        factor = (t**2 + (1 - t) ** 2) / jnp.where(room > 0, room, 1.0)
        return direction + jnp.where(room > 0, jnp.minimum(factor, bound), bound) * correction

    return guided
