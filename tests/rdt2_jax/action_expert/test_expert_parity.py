"""Velocity, loss, samples and gradients beside what the public PyTorch code computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rdt2_jax.action_expert import flow, model
from rdt2_jax.action_expert.checkpoint import LoadedExpert
from rdt2_jax.action_expert.config import preset
from rdt2_jax.layers.attention import AttentionBackend
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import initialize
from rdt2_jax.qwen2_5_vl.text import KeysValues
from rdt2_jax.weights.action_expert import action_expert_table
from rdt2_jax.weights.loader import export

TOLERANCE = 2e-5
"""Largest absolute difference in float32; torch itself is 1.6e-6 from float64."""

INFO = json.loads((Path(__file__).parents[2] / "golden" / "rdt_tiny" / "info.json").read_text())

velocity = jax.jit(model.velocity, static_argnames=("config", "compute"))
sample = jax.jit(flow.sample, static_argnames=("config", "compute", "schedule"))


@pytest.fixture(scope="module", params=["stacked", "unrolled"])
def expert(request: pytest.FixtureRequest, golden_expert: LoadedExpert) -> tuple[Any, Any]:
    """Parameters in both layouts, and the configuration."""
    params = golden_expert.params
    return (params if request.param == "stacked" else model.unstacked(params)), golden_expert.config


@pytest.mark.parametrize("t", ["0", "0.05", "0.2", "0.4", "0.5", "0.6", "0.8", "0.95", "1"])
def test_velocity(t: str, expert: Any, golden_io: Any, condition: Any, state: Any) -> None:
    params, config = expert
    found = velocity(params, config, golden_io["in/action"], float(t), condition, state, Compute())
    np.testing.assert_allclose(found, golden_io[f"f32/velocity_t{t}"], atol=TOLERANCE, rtol=0)


def test_velocity_at_a_time_per_chunk(expert: Any, golden_io: Any, condition: Any, state: Any) -> None:
    params, config = expert
    t = jnp.asarray(golden_io["in/timesteps_f32"])
    found = velocity(params, config, golden_io["in/action"], t, condition, state, Compute())
    np.testing.assert_allclose(found, golden_io["f32/velocity_t_per_sample"], atol=TOLERANCE, rtol=0)


def test_velocity_without_padding(expert: Any, golden_io: Any, condition: Any, state: Any) -> None:
    params, config = expert
    whole = condition.replace(valid=jnp.ones_like(condition.valid))
    found = velocity(params, config, golden_io["in/action"], 0.5, whole, state, Compute())
    np.testing.assert_allclose(found, golden_io["f32/velocity_t0.5_nomask"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_samples(steps: int, expert: Any, golden_io: Any, condition: Any, state: Any, noise: Any) -> None:
    params, config = expert
    found = sample(params, config, noise, condition, state, Compute(), schedule=flow.Schedule(steps))
    np.testing.assert_allclose(found, golden_io[f"f32/sample_{steps}step"], atol=TOLERANCE, rtol=0)


def test_five_steps_are_the_default(expert: Any, golden_io: Any, condition: Any, state: Any, noise: Any) -> None:
    params, config = expert
    found = sample(params, config, noise, condition, state, Compute())
    np.testing.assert_allclose(found, golden_io["f32/sample_5step"], atol=TOLERANCE, rtol=0)


def golden_loss(params: Any, config: Any, io: Any, condition: Any, state: Any, compute: Compute) -> jax.Array:
    t = jax.nn.sigmoid(jnp.asarray(io["in/tnorm"]))
    return flow.loss_at(params, config, io["in/action"], io["in/noise"], t, condition, state, compute)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_loss_and_gradients(
    remat: Any, golden_expert: LoadedExpert, golden_io: Any, condition: Any, state: Any, tmp_path: Path
) -> None:
    config = golden_expert.config
    compute = Compute(remat=remat)
    loss, gradients = jax.jit(
        jax.value_and_grad(lambda p: golden_loss(p, config, golden_io, condition, state, compute))
    )(golden_expert.params)
    assert abs(float(loss) - float(golden_io["f32/loss"])) < 2e-6
    export(action_expert_table(config), gradients, tmp_path / "gradients.safetensors")
    ours = load_file(tmp_path / "gradients.safetensors")
    expected = {name.removeprefix("grad/"): golden_io[name] for name in golden_io if name.startswith("grad/")}
    assert len(expected) == 19
    for name, theirs in expected.items():
        difference = np.abs(ours[name] - theirs).max() / np.abs(theirs).max()
        assert difference <= 5e-5, f"{name}: {difference}"
    for name, norm in INFO["grad_norms"].items():  # those that were not stored whole
        assert np.linalg.norm(ours[name]) == pytest.approx(norm, rel=1e-4), name


class HalfPrecision:
    """Parameters, condition and activations in bfloat16, as the published model runs."""

    def __init__(self, expert: LoadedExpert, io: Any, condition: Any, state: Any) -> None:
        self.config, self.io, self.state = expert.config, io, state
        self.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expert.params)
        self.condition = jax.tree.map(lambda x: x.astype(jnp.bfloat16), condition).replace(valid=condition.valid)
        self.compute = Compute(dtype=jnp.bfloat16)

    def velocity(self, t: float) -> jax.Array:
        return velocity(self.params, self.config, self.io["in/action"], t, self.condition, self.state, self.compute)

    def sample(self, steps: int) -> jax.Array:
        schedule = flow.Schedule(steps)
        return sample(
            self.params, self.config, self.io["in/init"], self.condition, self.state, self.compute, schedule=schedule
        )


@pytest.mark.parametrize(
    "name",
    ["velocity_t0", "velocity_t0.5", "velocity_t1", "sample_1step", "sample_5step", "sample_10step"],
)
def test_bfloat16_is_as_close_to_float64_as_the_original(
    name: str, golden_expert: LoadedExpert, golden_io: Any, condition: Any, state: Any
) -> None:
    run = HalfPrecision(golden_expert, golden_io, condition, state)
    kind, _, value = name.partition("_")
    found = run.velocity(float(value[1:])) if kind == "velocity" else run.sample(int(value.removesuffix("step")))
    rms = float(np.sqrt(np.mean((np.asarray(found, np.float64) - golden_io[f"f64/{name}"]) ** 2)))
    assert 0 < rms <= INFO["bf16_vs_f64"][name]["rms"]


def test_bfloat16_gradients(
    golden_expert: LoadedExpert, golden_io: Any, condition: Any, state: Any, tmp_path: Path
) -> None:
    run = HalfPrecision(golden_expert, golden_io, condition, state)
    loss, gradients = jax.jit(
        jax.value_and_grad(lambda p: golden_loss(p, run.config, golden_io, run.condition, state, run.compute))
    )(run.params)
    assert abs(float(loss) - float(golden_io["f64/loss"])) <= 1.5 * INFO["bf16_vs_f64"]["loss"]["maxabs"]
    gradients = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
    export(action_expert_table(run.config), gradients, tmp_path / "gradients.safetensors")
    ours = load_file(tmp_path / "gradients.safetensors")
    ratios = {}
    for name, of_the_original in INFO["grad_bf16_vs_f64_rel_norm"].items():
        theirs = golden_io[f"grad/{name}"]
        ratios[name] = np.linalg.norm(ours[name] - theirs) / np.linalg.norm(theirs) / of_the_original
    assert len(ratios) == 19
    assert max(ratios.values()) <= 2.0, ratios
    assert np.mean(list(ratios.values())) <= 1.0, ratios  # over all of them no worse than the original


def test_time_features(golden_io: Any, golden_expert: LoadedExpert) -> None:
    times = jnp.asarray(golden_io["temb/t"])
    np.testing.assert_allclose(model.time_features(times), golden_io["temb/sincos_256"], atol=2e-6)
    embedded = model._embed_times(golden_expert.params, times, Compute())
    np.testing.assert_allclose(embedded, golden_io["temb/mlp_out"], atol=TOLERANCE)


def test_fresh_parameters_are_distributed_as_published(golden_io: Any, tmp_path: Path) -> None:
    config = preset("tiny")
    fresh = initialize(model.param_specs(config), jax.random.key(0))
    np.testing.assert_allclose(fresh.positions, golden_io["init/x_pos_emb_init"][0], atol=1e-6)
    export(action_expert_table(config), fresh, tmp_path / "fresh.safetensors")
    ours = load_file(tmp_path / "fresh.safetensors")
    for name, (low, high, deviation) in INFO["default_init_min_max_std"].items():
        if name in INFO["params_without_gradient"]:
            continue
        assert ours[name].std() == pytest.approx(deviation, rel=0.25, abs=1e-6), name
        if "t_embedder" not in name and "register" not in name:  # those are normal: no bounds
            bound = max(abs(low), abs(high))
            assert np.abs(ours[name]).max() <= 1.2 * bound, name
    zero = [name for name in INFO["zero_initialised_parameters"] if ours[name].any()]
    assert not zero


def test_a_fresh_expert_predicts_nothing(condition: Any, state: Any, noise: Any) -> None:
    config = preset("tiny")
    fresh = initialize(model.param_specs(config), jax.random.key(0))
    assert not np.asarray(velocity(fresh, config, noise, 0.3, condition, state, Compute())).any()


def test_fewer_layers_of_the_backbone_are_read_in_turn(
    golden_expert: LoadedExpert, condition: Any, state: Any, noise: Any
) -> None:
    """The published rule: block i reads the keys and values of layer i modulo their number."""
    config = golden_expert.config.model_copy(update={"condition_layers": (1, 3)})
    two = condition.keys_values[1], condition.keys_values[3]
    repeated = condition.replace(keys_values=(*two, *two))
    expected = velocity(golden_expert.params, golden_expert.config, noise, 0.5, repeated, state, Compute())
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *two)
    for params in (golden_expert.params, model.unstacked(golden_expert.params)):
        for given in (two, stacked):
            found = velocity(params, config, noise, 0.5, condition.replace(keys_values=given), state, Compute())
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_attention_in_chunks_of_queries(
    golden_expert: LoadedExpert, golden_io: Any, condition: Any, state: Any
) -> None:
    compute = Compute(attention=AttentionBackend.CHUNKED, query_chunk=8)
    found = velocity(golden_expert.params, golden_expert.config, golden_io["in/action"], 0.5, condition, state, compute)
    np.testing.assert_allclose(found, golden_io["f32/velocity_t0.5"], atol=TOLERANCE, rtol=0)


def test_padding_does_not_matter(golden_expert: LoadedExpert, golden_io: Any, condition: Any, state: Any) -> None:
    padding = ~condition.valid[:, None, :, None]
    spoilt = tuple(
        KeysValues(jnp.where(padding, 1e3, kv.key), jnp.where(padding, -1e3, kv.value)) for kv in condition.keys_values
    )
    found = velocity(
        golden_expert.params,
        golden_expert.config,
        golden_io["in/action"],
        0.5,
        condition.replace(keys_values=spoilt),
        state,
        Compute(),
    )
    np.testing.assert_allclose(found, golden_io["f32/velocity_t0.5"], atol=TOLERANCE, rtol=0)
