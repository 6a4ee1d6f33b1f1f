"""Both objectives against their definitions, on the published code's tiny expert."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.action_expert import distill, flow, model
from rdt2_jax.action_expert.checkpoint import LoadedExpert
from rdt2_jax.action_expert.distill import DistillConfig, DistillState
from rdt2_jax.action_expert.flow import ONE_STEP, Schedule
from rdt2_jax.config import parse_config
from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute

COMPUTE = Compute()
REGRESSION = DistillConfig(objective="regression")
CONSISTENCY = DistillConfig(objective="consistency")

velocity = jax.jit(model.velocity, static_argnames=("config", "compute"))
sample = jax.jit(flow.sample, static_argnames=("config", "compute", "schedule"))
path_of = jax.jit(flow.path, static_argnames=("config", "compute", "schedule"))
single_step = jax.jit(flow.single_step, static_argnames=("config", "compute", "schedule"))
gap_of = jax.jit(distill.gap, static_argnames=("config", "distill", "compute"))
arrival = jax.jit(distill.arrival, static_argnames=("config", "compute"))
loss = jax.jit(distill.loss, static_argnames=("config", "distill", "compute"))
regression_loss_at = jax.jit(distill.regression_loss_at, static_argnames=("config", "distill", "compute"))
consistency_loss_at = jax.jit(distill.consistency_loss_at, static_argnames=("config", "distill", "compute"))


@dataclasses.dataclass(frozen=True)
class Setting:
    """A teacher, two other networks, and a batch of three."""

    config: Any
    teacher: Any
    student: Any
    target: Any
    condition: Any
    state: Any
    noise: Any
    actions: Any

    @property
    def inputs(self) -> tuple[Any, Any, Compute]:
        return self.condition, self.state, COMPUTE

    def velocity(self, params: Any, x: Any, t: Any) -> np.ndarray:
        return np.asarray(velocity(params, self.config, x, jnp.asarray(t, jnp.float32), *self.inputs))


@pytest.fixture(scope="module")
def setting(golden_expert: LoadedExpert, condition: Any, state: Any, noise: Any, golden_io: Any) -> Setting:
    def changed(seed: int) -> Any:
        leaves, structure = jax.tree.flatten(golden_expert.params)
        random = np.random.default_rng(seed)
        drawn = [jnp.asarray(0.02 * random.standard_normal(leaf.shape), leaf.dtype) for leaf in leaves]
        return jax.tree.map(jnp.add, golden_expert.params, jax.tree.unflatten(structure, drawn))

    actions = np.random.default_rng(5).standard_normal(noise.shape).astype(np.float32)
    config, params = golden_expert.config, golden_expert.params
    return Setting(config, params, changed(1), changed(2), condition, state, np.asarray(noise), actions)


def test_regression_is_its_formula(setting: Setting) -> None:
    """Five Euler steps of the teacher, written out, against one step of the student."""
    rolled = setting.noise
    for i in range(5):
        rolled = rolled + 0.2 * setting.velocity(setting.teacher, rolled, i / 5)
    one = setting.noise + setting.velocity(setting.student, setting.noise, 0.0)
    found, report = regression_loss_at(
        setting.student, setting.teacher, setting.config, REGRESSION, setting.noise, *setting.inputs
    )
    expected = np.mean(np.square(rolled - one))
    assert expected > 1e-4
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    np.testing.assert_allclose(report["difference_rms"], np.sqrt(expected), rtol=2e-4)


def test_consistency_is_its_formula_from_actions(setting: Setting) -> None:
    """Every chunk at another step, the last among them."""
    index = np.array([0, 2, 4])
    t = (index / 5).astype(np.float32)[:, None, None]
    x = t * setting.actions + (1 - t) * setting.noise
    x_next = x + 0.2 * setting.velocity(setting.teacher, x, t[:, 0, 0])
    wanted = x_next + (0.8 - t) * setting.velocity(setting.target, x_next, t[:, 0, 0] + 0.2)
    found = x + (1 - t) * setting.velocity(setting.student, x, t[:, 0, 0])
    value, _ = consistency_at(setting, CONSISTENCY, index, actions=setting.actions)
    np.testing.assert_allclose(value, np.mean(np.square(found - wanted)), rtol=2e-4)


def consistency_at(setting: Setting, config: DistillConfig, index: Any, **choices: Any) -> Any:
    networks = (setting.student, setting.target, setting.teacher)
    return consistency_loss_at(
        *networks, setting.config, config, setting.noise, jnp.asarray(index), *setting.inputs, **choices
    )


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_consistency_without_actions_walks_on_the_rollout(method: Any, setting: Setting) -> None:
    config = DistillConfig(objective="consistency", num_steps=3, method=method)
    index = np.array([2, 0, 1])
    path = np.asarray(
        path_of(setting.teacher, setting.config, setting.noise, *setting.inputs, schedule=config.schedule)
    )
    rows = np.arange(3)
    x, x_next = path[index, rows], path[index + 1, rows]
    t = jnp.asarray(index / 3, jnp.float32)
    wanted = arrival(setting.target, setting.config, x_next, t + 1 / 3, *setting.inputs)
    found = arrival(setting.student, setting.config, x, t, *setting.inputs)
    value, _ = consistency_at(setting, config, index)
    np.testing.assert_allclose(value, np.mean(np.square(np.asarray(found) - np.asarray(wanted))), rtol=2e-4)


@pytest.mark.parametrize("schedule", [Schedule(2, "midpoint"), Schedule(times=(0.0, 0.1, 0.5, 1.0))])
def test_path_and_single_steps_are_the_sample(schedule: Schedule, setting: Setting) -> None:
    inputs = (setting.config, setting.noise, *setting.inputs)
    path = path_of(setting.teacher, *inputs, schedule=schedule)
    assert path.shape == (schedule.num_steps + 1, *setting.noise.shape)
    np.testing.assert_array_equal(path[0], setting.noise)
    whole = sample(setting.teacher, *inputs, schedule=schedule)
    np.testing.assert_allclose(path[-1], whole, atol=2e-6)
    index = jnp.asarray([schedule.num_steps - 1, 0, 1])
    rows = jnp.arange(3)
    after = single_step(setting.teacher, setting.config, path[index, rows], index, *setting.inputs, schedule=schedule)
    np.testing.assert_allclose(after, path[index + 1, rows], atol=2e-6)


def test_boundary_holds_by_construction(setting: Setting) -> None:
    """At t = 1 any network gives back what it got, so the last step of a rollout is learnt from the teacher alone."""
    for params in (setting.teacher, setting.student):
        found = arrival(params, setting.config, setting.noise, jnp.ones(3), *setting.inputs)
        np.testing.assert_array_equal(found, setting.noise)
    last = np.full(3, 4)
    here, _ = consistency_at(setting, CONSISTENCY, last)
    other = dataclasses.replace(setting, target=setting.teacher)
    np.testing.assert_array_equal(here, consistency_at(other, CONSISTENCY, last)[0])
    first = np.zeros(3, int)
    assert consistency_at(setting, CONSISTENCY, first)[0] != consistency_at(other, CONSISTENCY, first)[0]


def test_students_are_deployed_as_one_step(setting: Setting) -> None:
    inputs = (setting.config, setting.noise)
    found = sample(setting.student, *inputs, *setting.inputs, schedule=ONE_STEP)
    expected = arrival(setting.student, *inputs, jnp.zeros(3), *setting.inputs)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    gap = gap_of(setting.student, setting.teacher, setting.config, REGRESSION, setting.noise, *setting.inputs)
    value, _ = regression_loss_at(
        setting.student, setting.teacher, setting.config, REGRESSION, setting.noise, *setting.inputs
    )
    np.testing.assert_allclose(np.mean(np.square(gap)), value, rtol=1e-4)


def test_one_step_of_one_step_is_nothing_to_learn(setting: Setting) -> None:
    """A teacher that itself makes a single step is its own student, whatever the objective."""
    for objective in ("regression", "consistency"):
        config = DistillConfig(objective=objective, num_steps=1)
        key = jax.random.key(0)
        value, _ = loss(
            setting.teacher, setting.target, setting.teacher, setting.config, config, *setting.inputs[:2], key, COMPUTE
        )
        assert value < 1e-9


@pytest.mark.parametrize("config", [REGRESSION, CONSISTENCY], ids=lambda config: config.objective)
@pytest.mark.parametrize("from_actions", [False, True])
def test_gradients_reach_the_student_alone(config: DistillConfig, from_actions: bool, setting: Setting) -> None:
    actions = setting.actions if from_actions else None

    @partial(jax.jit, static_argnums=3)
    def gradients(student: Any, target: Any, teacher: Any, config: DistillConfig) -> Any:
        def value(student: Any, target: Any, teacher: Any) -> jax.Array:
            return distill.loss(
                student,
                target,
                teacher,
                setting.config,
                config,
                setting.condition,
                setting.state,
                jax.random.key(1),
                COMPUTE,
                actions=actions,
            )[0]

        return jax.grad(value, argnums=(0, 1, 2))(student, target, teacher)

    of_student, *others = gradients(setting.student, setting.target, setting.teacher, config)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(others))
    moved = [float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(of_student)]
    assert min(moved) > 0
    assert np.all(np.isfinite(moved))


@pytest.mark.parametrize("config", [REGRESSION, CONSISTENCY], ids=lambda config: config.objective)
def test_students_start_as_copies(config: DistillConfig, golden_expert: LoadedExpert) -> None:
    teacher = jax.tree.map(jnp.copy, golden_expert.params)
    state = distill.init(teacher, config)
    assert (state.target is None) == (config.objective == "regression")
    jax.tree.map(np.testing.assert_array_equal, state.student, teacher)
    jax.tree.map(lambda leaf: leaf.delete(), state)  # as donating it would
    jax.tree.map(np.testing.assert_array_equal, teacher, golden_expert.params)


def test_students_of_16_bit_teachers_are_trained_in_32(golden_expert: LoadedExpert) -> None:
    teacher = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), golden_expert.params)
    state = distill.init(teacher, CONSISTENCY)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(distill.init(teacher, REGRESSION, dtype=jnp.bfloat16))} == {
        jnp.dtype("bfloat16")
    }


def test_the_target_follows_the_student(setting: Setting) -> None:
    config = DistillConfig(objective="consistency", target_decay=0.75)
    before = DistillState(setting.student, setting.target)
    after = distill.after_step(before, config)
    assert after.student is setting.student

    def expected(target: Any, student: Any, found: Any) -> None:
        np.testing.assert_allclose(found, 0.75 * target + 0.25 * student, rtol=1e-5, atol=1e-7)

    jax.tree.map(expected, setting.target, setting.student, after.target)
    at_once = distill.after_step(before, DistillConfig(objective="consistency", target_decay=0.0)).target
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), at_once, setting.student)
    alone = DistillState(setting.student, None)
    assert distill.after_step(alone, REGRESSION) is alone


def test_weights_choose_what_counts(setting: Setting) -> None:
    """Frames of weight 0 may hold anything; a chunk without weight does not count, by either distance."""
    weights = np.ones(setting.noise.shape[:2], np.float32)
    weights[:, 5:] = 0
    weights[2] = 0
    for config in (REGRESSION, REGRESSION.model_copy(update={"distance": "pseudo_huber", "huber_scale": 0.1})):
        inputs = (setting.config, config, setting.noise, *setting.inputs)
        found, _ = regression_loss_at(setting.student, setting.teacher, *inputs, weights=jnp.asarray(weights))
        one = sample(setting.student, setting.config, setting.noise, *setting.inputs, schedule=ONE_STEP)
        rolled = sample(setting.teacher, setting.config, setting.noise, *setting.inputs, schedule=config.schedule)
        squares = np.mean(np.square(np.asarray(one - rolled))[:2, :5], axis=(1, 2))
        expected = squares if config.distance == "squared" else np.sqrt(squares + 0.01) - 0.1
        np.testing.assert_allclose(found, expected.mean(), rtol=2e-4)
        nothing, _ = regression_loss_at(setting.student, setting.teacher, *inputs, weights=jnp.zeros_like(weights))
        assert nothing == 0


def test_pseudo_huber_has_gradients_where_nothing_differs(setting: Setting) -> None:
    config = DistillConfig(objective="regression", num_steps=1, distance="pseudo_huber")

    def value(student: Any) -> jax.Array:
        inputs = (setting.teacher, setting.config, config, setting.noise, *setting.inputs)
        return distill.regression_loss_at(student, *inputs)[0]

    gradients = jax.jit(jax.grad(value))(setting.teacher)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_what_is_random_comes_from_the_key(setting: Setting) -> None:
    def value(key: int) -> float:
        inputs = (setting.config, CONSISTENCY, setting.condition, setting.state, jax.random.key(key), COMPUTE)
        return float(loss(setting.student, setting.target, setting.teacher, *inputs)[0])

    assert value(0) == value(0)
    assert value(0) != value(1)


def test_consistency_needs_a_target(setting: Setting) -> None:
    with pytest.raises(ConfigError, match="target network"):
        distill.loss(
            setting.student,
            None,
            setting.teacher,
            setting.config,
            CONSISTENCY,
            setting.condition,
            setting.state,
            jax.random.key(0),
            COMPUTE,
        )
    with pytest.raises(ConfigError, match="target network"):
        distill.after_step(DistillState(setting.student, None), CONSISTENCY)
    with pytest.raises(ConfigError, match="regression has no target network"):
        distill.after_step(DistillState(setting.student, setting.target), REGRESSION)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "adversarial"}, "regression"),
        ({"num_steps": 0}, "num_steps"),
        ({"target_decay": 1.0}, "target_decay"),
        ({"method": "rk4"}, "euler"),
        ({"distance": "lpips"}, "pseudo_huber"),
        ({"huber_scale": 0.0}, "huber_scale"),
        ({"targetdecay": 0.5}, "did you mean 'target_decay'"),
    ],
)
def test_configurations_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(DistillConfig, values, "here")
