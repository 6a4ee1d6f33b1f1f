"""A problem that one step of a flow cannot solve: every condition has two right answers, and their mean is wrong.

Two movements lead away from the start in opposite directions, +m and -m, as when an obstacle can be passed on either
side. A single step of the flow goes towards the mean of both, which is nobody's answer; several steps choose one.
Conditions are fixed random keys and values in place of a backbone's. The network is the real one, small enough for a
CPU, and so are the chunks: 8 frames of 6 numbers.

Used by `examples/distillation_study.py` and by the tests of distillation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rdt2_jax.action_expert import distill, flow
from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.distill import DistillConfig, DistillState
from rdt2_jax.action_expert.flow import Schedule
from rdt2_jax.action_expert.model import ActionExpertParams, Condition, param_specs, unstacked
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import initialize
from rdt2_jax.qwen2_5_vl.text import KeysValues

CONFIG = ActionExpertConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_multiple_of=32,
    mlp_multiplier=0.35,
    num_registers=1,
    chunk_length=8,
    action_dim=6,
)

COMPUTE = Compute()

NUM_CONDITIONS = 2

CONDITION_TOKENS = 4

BATCH = 64

AMPLITUDE = 0.7
"""Root mean square of a right chunk, in units of normalised actions."""

TEACHER_STEPS = 800

STUDENT_STEPS = {"regression": 900, "consistency": 1500}
"""By objective: about the same computation where consistency starts from actions."""

HUBER_SCALE = 0.03
"""Of the pseudo-Huber distance, in units of normalised actions."""

STEPS_PER_CALL = 50
"""Training steps in one compiled loop."""

_FIRST_GAIN = 3.0
"""Factor of the first values of the adaptor of actions and of what self-attention passes on. With the published ones a
network as narrow as this sees little of the chunk and learns slowly."""

_LAST_TIME = 0.95
"""The teacher learns at times between 0 and this: what comes later, no schedule here asks for."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Two modes per condition.

    Attributes:
        modes: (conditions, frames, action_dim), root mean square `AMPLITUDE`; right are these and their negatives.
        keys_values: of every condition, (layers, conditions, kv_heads, tokens, head_dim).
    """

    modes: jax.Array
    keys_values: KeysValues

    def condition(self, which: jax.Array) -> Condition:
        """What the expert reads for conditions (B,)."""
        layers = tuple(
            KeysValues(self.keys_values.key[i][which], self.keys_values.value[i][which])
            for i in range(CONFIG.num_layers)
        )
        return Condition(layers, jnp.ones((which.shape[0], CONDITION_TOKENS), bool))

    def draw(self, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
        """Right chunks (batch, frames, action_dim) and their conditions (batch,)."""
        which_key, side_key = jax.random.split(key)
        which = jax.random.randint(which_key, (batch,), 0, NUM_CONDITIONS)
        side = jax.random.rademacher(side_key, (batch, 1, 1), jnp.float32)
        return side * self.modes[which], which

    def errors(self, chunks: jax.Array, which: jax.Array) -> jax.Array:
        """Distance (B,) from the nearest right chunk, in amplitudes: 1 where the mean of both lies."""
        return jnp.minimum(distance(chunks, self.modes[which]), distance(chunks, -self.modes[which]))

    def sides(self, chunks: jax.Array, which: jax.Array) -> jax.Array:
        """Where between the two right chunks (B,): 1 and -1 there, 0 in the middle."""
        return jnp.mean(chunks * self.modes[which], axis=(1, 2)) / AMPLITUDE**2


def make_problem(seed: int = 0) -> Problem:
    """Movements along a random direction with a minimum-jerk profile."""
    random = np.random.default_rng(seed)
    u = np.arange(1, CONFIG.chunk_length + 1)[:, None] / CONFIG.chunk_length
    directions = random.standard_normal((NUM_CONDITIONS, 1, CONFIG.action_dim))
    modes = (10 * u**3 - 15 * u**4 + 6 * u**5) * directions
    modes *= AMPLITUDE / np.sqrt(np.mean(modes**2, axis=(1, 2), keepdims=True))
    shape = (CONFIG.num_layers, NUM_CONDITIONS, CONFIG.num_kv_heads, CONDITION_TOKENS, CONFIG.head_dim)
    keys_values = KeysValues(*(jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(2)))
    return Problem(jnp.asarray(modes, jnp.float32), keys_values)


def distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Root mean square over each chunk (B,), in amplitudes."""
    return jnp.sqrt(jnp.mean(jnp.square(a - b), axis=(1, 2))) / AMPLITUDE


def no_state(batch: int) -> jax.Array:
    """The state of a robot that gives none."""
    return jnp.zeros((batch, CONFIG.state_dim))


@partial(jax.jit, static_argnames="schedule")
def _sample(params: ActionExpertParams, noise: jax.Array, condition: Condition, schedule: Schedule) -> jax.Array:
    return flow.sample(params, CONFIG, noise, condition, no_state(noise.shape[0]), COMPUTE, schedule=schedule)


def sample(
    problem: Problem, params: ActionExpertParams, noise: jax.Array, which: jax.Array, schedule: Schedule
) -> jax.Array:
    """Chunks (B, frames, action_dim) for conditions (B,)."""
    return _sample(params, noise, problem.condition(which), schedule)


def fresh_noise(batch: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Noise (batch, frames, action_dim) and conditions (batch,) in turn."""
    noise = jax.random.normal(jax.random.key(seed), (batch, CONFIG.chunk_length, CONFIG.action_dim))
    return noise, jnp.arange(batch) % NUM_CONDITIONS


def train_teacher(
    problem: Problem,
    steps: int,
    *,
    learning_rate: float = 6e-3,
    seed: int = 0,
    progress: Callable[..., None] | None = None,
) -> ActionExpertParams:
    """A teacher from scratch, by flow matching."""
    params = initialize(param_specs(CONFIG), jax.random.key(seed))
    adaptor, key_value, out = jax.tree.map(
        lambda x: _FIRST_GAIN * x,
        (params.action_adaptor, params.layers.self_attention.key_value, params.layers.self_attention.out),
    )
    mixing = dataclasses.replace(params.layers.self_attention, key_value=key_value, out=out)
    layers = dataclasses.replace(params.layers, self_attention=mixing)
    params = unstacked(dataclasses.replace(params, action_adaptor=adaptor, layers=layers))

    def loss(params: ActionExpertParams, _: None, key: jax.Array) -> tuple[jax.Array, None]:
        draw_key, noise_key, time_key = jax.random.split(key, 3)
        actions, which = problem.draw(draw_key, BATCH)
        noise = jax.random.normal(noise_key, actions.shape)
        t = _LAST_TIME * jax.random.uniform(time_key, (BATCH,))
        condition = problem.condition(which)
        return flow.loss_at(params, CONFIG, actions, noise, t, condition, no_state(BATCH), COMPUTE), None

    start = DistillState(params, None)
    return _train(loss, start, lambda state: state, steps, learning_rate, seed, progress).student


def train_student(
    problem: Problem,
    teacher: ActionExpertParams,
    config: DistillConfig,
    steps: int,
    *,
    from_actions: bool = False,
    learning_rate: float = 2e-3,
    seed: int = 1,
    progress: Callable[..., None] | None = None,
) -> ActionExpertParams:
    """A student by either objective; `from_actions`: see `distill.loss`."""

    def loss(
        student: ActionExpertParams, target: ActionExpertParams | None, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        draw_key, loss_key = jax.random.split(key)
        actions, which = problem.draw(draw_key, BATCH)
        condition, state = problem.condition(which), no_state(BATCH)
        given = actions if from_actions else None
        return distill.loss(
            student, target, teacher, CONFIG, config, condition, state, loss_key, COMPUTE, actions=given
        )

    start = distill.init(teacher, config)
    return _train(
        loss, start, lambda state: distill.after_step(state, config), steps, learning_rate, seed, progress
    ).student


def _train(
    loss: Callable[..., Any],
    start: DistillState,
    after_step: Callable[[DistillState], DistillState],
    steps: int,
    learning_rate: float,
    seed: int,
    progress: Callable[..., None] | None,
) -> DistillState:
    """Adam with a short warm-up and a cosine to nothing; `steps` is rounded up to whole calls."""
    calls = -(-steps // STEPS_PER_CALL)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 20, calls * STEPS_PER_CALL)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    gradient = jax.value_and_grad(loss, has_aux=True)

    def body(carry: tuple[DistillState, Any], key: jax.Array) -> tuple[tuple[DistillState, Any], jax.Array]:
        state, memory = carry
        (value, _), gradients = gradient(state.student, state.target, key)
        updates, memory = optimizer.update(gradients, memory)
        student = jax.tree.map(jnp.add, state.student, updates)
        return (after_step(DistillState(student, state.target)), memory), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(body, carry, keys), donate_argnums=0)
    carry = (start, optimizer.init(start.student))
    for key in jax.random.split(jax.random.key(seed), calls):
        carry, losses = run(carry, jax.random.split(key, STEPS_PER_CALL))
        if progress is not None:
            progress(STEPS_PER_CALL, f"loss {float(jnp.mean(losses)):.4f}")
    return carry[0]
