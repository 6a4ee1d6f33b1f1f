"""Sampling: methods, schedules, prefixes; the loss: times, weights, what it rewards."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.action_expert import flow, model
from rdt2_jax.action_expert.checkpoint import LoadedExpert
from rdt2_jax.action_expert.flow import ONE_STEP, Prefix, Schedule
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.layers.compute import Compute

COMPUTE = Compute()

sample = jax.jit(flow.sample, static_argnames=("config", "compute", "schedule"))
velocity = jax.jit(model.velocity, static_argnames=("config", "compute"))


@pytest.fixture(scope="module")
def sampled(golden_expert: LoadedExpert, condition: Any, state: Any, noise: Any) -> Any:
    """sampled(schedule, prefix) -> (3, 24, 20)."""

    def run(schedule: Schedule | None = None, prefix: Prefix | None = None) -> np.ndarray:
        found = sample(
            golden_expert.params,
            golden_expert.config,
            noise,
            condition,
            state,
            COMPUTE,
            schedule=schedule,
            prefix=prefix,
        )
        return np.asarray(found)

    return run


@pytest.fixture(scope="module")
def velocity_at(golden_expert: LoadedExpert, condition: Any, state: Any) -> Any:
    return lambda x, t: velocity(golden_expert.params, golden_expert.config, x, t, condition, state, COMPUTE)


def test_methods_are_their_formulas(sampled: Any, velocity_at: Any, noise: Any) -> None:
    x = noise
    for a, b in ((0.0, 0.3), (0.3, 1.0)):
        x = x + (b - a) * velocity_at(x, a)
    np.testing.assert_allclose(sampled(Schedule(times=(0, 0.3, 1))), x, atol=1e-5)
    x = noise + velocity_at(noise + 0.5 * velocity_at(noise, 0.0), 0.5)
    np.testing.assert_allclose(sampled(Schedule(1, "midpoint")), x, atol=1e-5)
    first = velocity_at(noise, 0.0)
    x = noise + 0.5 * (first + velocity_at(noise + first, 1.0))
    np.testing.assert_allclose(sampled(Schedule(1, "heun")), x, atol=1e-5)


def test_methods_of_second_order_converge_faster(sampled: Any) -> None:
    """Twice the steps: about half the error of Euler's method, about a quarter of the others'."""
    exact = sampled(Schedule(64, "midpoint"))
    for method, order in (("euler", 1), ("midpoint", 2), ("heun", 2)):
        coarse, fine = (np.abs(sampled(Schedule(n, method)) - exact).mean() for n in (4, 8))
        assert coarse / fine == pytest.approx(2**order, rel=0.35), method


def test_schedules() -> None:
    assert ONE_STEP.velocity_times == (0.0,)
    assert Schedule(4).ends == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert Schedule(2, "heun").velocity_times == (0.0, 0.5, 0.5, 1.0)
    assert Schedule(2, "midpoint").velocity_times == (0.0, 0.25, 0.5, 0.75)
    assert Schedule(times=(0, 0.1, 1)).num_steps == 2
    assert Schedule(times=(0, 0.1, 1)).num_velocities == 2
    assert Schedule(2, "heun").num_velocities == 4
    assert hash(Schedule(times=(0, 1))) == hash(Schedule(times=(0.0, 1.0)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 0},
        {"num_steps": 2.5},
        {"num_steps": True},
        {"method": "rk4"},
        {"times": (0.0,)},
        {"times": (0.1, 1.0)},
        {"times": (0.0, 0.9)},
        {"times": (0.0, 0.5, 0.5, 1.0)},
        {"times": (0.0, float("nan"), 1.0)},
    ],
)
def test_impossible_schedules(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Schedule(**wrong)


def test_prefix_of_no_weight_changes_nothing(sampled: Any, noise: Any) -> None:
    prefix = Prefix(jnp.ones_like(noise), jnp.zeros(noise.shape[:2]))
    np.testing.assert_allclose(sampled(prefix=prefix), sampled(), atol=1e-6)


def test_prefix_pulls_the_frames_that_it_weighs(sampled: Any, noise: Any) -> None:
    free = sampled()
    wanted = free + 0.2
    weights = np.zeros(noise.shape[:2], np.float32)
    weights[:, :6], weights[:, 6:12] = 1.0, np.linspace(1, 0, 6)
    found = sampled(prefix=Prefix(jnp.asarray(wanted), jnp.asarray(weights)))
    before, after = (np.abs(x - wanted).mean(axis=(0, 2)) for x in (free, found))
    assert (after[:6] < 0.35 * before[:6]).all()  # committed frames come close to what they are to be
    assert np.abs(found - free)[:, 12:].mean() < 0.5 * np.abs(found - free)[:, :6].mean()


def test_one_step_closes_the_gap_at_most_once(sampled: Any, velocity_at: Any, noise: Any) -> None:
    """The correction of a single step is the gradient itself: factor 1, whatever the formula's pole at t = 0."""
    wanted, weights = jnp.zeros_like(noise), jnp.ones(noise.shape[:2])
    arrived, pull_back = jax.vjp(lambda x: x + velocity_at(x, 0.0), jnp.asarray(noise))
    expected = arrived + pull_back(wanted - arrived)[0]
    np.testing.assert_allclose(sampled(ONE_STEP, Prefix(wanted, weights)), expected, atol=1e-5)


def test_guidance_is_that_of_real_time_chunking(sampled: Any, velocity_at: Any, noise: Any) -> None:
    """arXiv 2506.07339: factor min(beta, (1 - t) / (t r^2)) with r^2 = (1 - t)^2 / (t^2 + (1 - t)^2)."""
    wanted = jnp.ones_like(noise)
    weights = jnp.broadcast_to(jnp.linspace(1, 0, noise.shape[1]), noise.shape[:2])
    x, steps, beta = jnp.asarray(noise), 4, 3.0
    for i in range(steps):
        t = i / steps
        arrived, pull_back = jax.vjp(lambda x, t=t: x + (1 - t) * velocity_at(x, t), x)
        squared = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
        factor = beta if t == 0 else min(beta, (1 - t) / (t * squared))
        (correction,) = pull_back((wanted - arrived) * weights[..., None])
        x = x + (velocity_at(x, t) + factor * correction) / steps
    found = sampled(Schedule(steps), Prefix(wanted, weights, max_guidance=beta))
    np.testing.assert_allclose(found, x, atol=2e-5)


@pytest.mark.parametrize("method", ["midpoint", "heun"])
def test_guidance_is_finite_at_both_ends(method: Any, sampled: Any, noise: Any) -> None:
    prefix = Prefix(jnp.zeros_like(noise), jnp.ones(noise.shape[:2]))
    assert np.isfinite(sampled(Schedule(3, method), prefix)).all()


def test_prefix_of_another_shape(sampled: Any, noise: Any) -> None:
    with pytest.raises(DataError, match="prefix does not fit"):
        sampled(prefix=Prefix(jnp.zeros((3, 12, 20)), jnp.zeros((3, 12))))


@pytest.mark.parametrize("bound", [-1.0, float("nan"), float("inf"), "5", True])
def test_impossible_guidance(bound: Any, sampled: Any, noise: Any) -> None:
    prefix = Prefix(jnp.zeros_like(noise), jnp.ones(noise.shape[:2]), max_guidance=bound)
    with pytest.raises(DataError, match="no bound of guidance"):
        sampled(prefix=prefix)


def test_times_are_drawn_as_named() -> None:
    normal = flow.draw_times(jax.random.key(0), 20_000)
    logits = np.log(normal / (1 - normal))
    assert abs(logits.mean()) < 0.03
    assert abs(logits.std() - 1) < 0.03
    uniform = np.asarray(flow.draw_times(jax.random.key(0), 20_000, "uniform"))
    np.testing.assert_allclose(np.quantile(uniform, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    with pytest.raises(ConfigError, match="no such distribution"):
        flow.draw_times(jax.random.key(0), 1, "cosine")  # type: ignore[arg-type]


def test_loss_is_explicit_about_its_key(
    golden_expert: LoadedExpert, golden_io: Any, condition: Any, state: Any
) -> None:
    def loss(seed: int, **choices: Any) -> float:
        key = jax.random.key(seed)
        arguments = golden_expert.params, golden_expert.config, golden_io["in/action"], condition, state, key, COMPUTE
        return float(flow.loss(*arguments, **choices))

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
    assert loss(0) != loss(0, time_distribution="uniform")


def test_weights_choose_what_counts() -> None:
    errors = jnp.arange(24.0).reshape(2, 3, 4)
    assert float(flow.weighted_mean(errors, None)) == float(errors.mean())
    weights = jnp.zeros((2, 3)).at[1, 2].set(2.0)
    assert float(flow.weighted_mean(errors, weights)) == pytest.approx(float(errors[1, 2].mean()))
    assert float(flow.weighted_mean(errors, jnp.zeros((2, 3, 4)))) == 0.0
    for wrong in ((4,), (2,), (3, 4), (2, 3, 5)):
        with pytest.raises(DataError, match="weights do not fit"):
            flow.weighted_mean(errors, jnp.ones(wrong))
    gradient = jax.grad(lambda e: flow.weighted_mean(e, weights))(errors)
    assert not np.asarray(gradient[0]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": np.zeros((3, 19), np.float32)}, r"state of shape \(3, 19\)"),
        ({"x": np.zeros((3, 16, 20), np.float32)}, "chunks have the wrong shape"),
        ({"x": np.zeros((2, 24, 20), np.float32)}, "chunks have the wrong shape"),
        ({"t": np.full(2, 0.5, np.float32)}, "times have the wrong shape"),
    ],
)
def test_shapes_that_do_not_fit(
    change: dict, message: str, golden_expert: LoadedExpert, condition: Any, state: Any, noise: Any
) -> None:
    given = {"x": noise, "t": 0.5, "condition": condition, "state": state} | change
    with pytest.raises(DataError, match=message):
        model.velocity(golden_expert.params, golden_expert.config, **given, compute=COMPUTE)


def test_conditions_that_do_not_fit(golden_expert: LoadedExpert, condition: Any, state: Any, noise: Any) -> None:
    fewer = condition.replace(keys_values=condition.keys_values[:2])
    narrow = condition.replace(keys_values=jax.tree.map(lambda x: x[..., :8], condition.keys_values))
    for wrong, message in ((fewer, "keys and values of 2 layers"), (narrow, r"\(3, 2, 11, 8\)")):
        with pytest.raises(DataError, match=message):
            model.velocity(golden_expert.params, golden_expert.config, noise, 0.5, wrong, state, COMPUTE)


def equations(jaxpr: Any) -> list[Any]:
    """All equations of a program, those of its loops and calls too."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    found += equations(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_steps_share_one_program_and_what_does_not_change(
    layout: str, golden_expert: LoadedExpert, condition: Any, state: Any, noise: Any
) -> None:
    """The program does not grow with the steps; modulations and the state's embedding are computed outside the loop."""
    config = golden_expert.config
    params = golden_expert.params if layout == "stacked" else model.unstacked(golden_expert.params)

    def program(steps: int) -> Any:
        run = lambda p: flow.sample(p, config, noise, condition, state, COMPUTE, schedule=Schedule(steps))  # noqa: E731
        return jax.make_jaxpr(run)(params).jaxpr

    five, fifty = program(5), program(50)
    assert len(equations(five)) == len(equations(fifty))
    (loop,) = [e for e in five.eqns if e.primitive.name in ("while", "scan") and is_over_steps(e, noise.shape)]
    inside = products(equations(loop.params.get("body_jaxpr", loop.params.get("jaxpr")).jaxpr))
    everywhere = products(equations(five))
    width, hidden = 2 * config.hidden_size, config.hidden_size
    modulations = {(9 * hidden, width), (2 * hidden, width)}
    assert modulations <= everywhere
    assert not modulations & inside
    assert (config.mlp_size, hidden) in inside  # the test sees what is in the loop


def is_over_steps(equation: Any, shape: tuple[int, ...]) -> bool:
    """A loop that carries the chunk."""
    return any(getattr(v.aval, "shape", None) == shape for v in equation.outvars)


def products(found: list[Any]) -> set[tuple[int, ...]]:
    """Shapes of the matrices that something is multiplied with."""
    return {e.invars[1].aval.shape for e in found if e.primitive.name == "dot_general"}
