"""Counts of operations and bytes of the expert: against what XLA counts, and against the parameters themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from rdt2_jax.action_expert import cost
from rdt2_jax.action_expert.config import preset
from rdt2_jax.action_expert.flow import Schedule, sample
from rdt2_jax.action_expert.model import (
    Condition,
    modulations_at,
    param_specs,
    prepare,
    prepared_velocity,
    unstacked,
)
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import abstract, count_parameters, tree_bytes
from rdt2_jax.qwen2_5_vl.text import KeysValues

COMPUTE, LENGTH = Compute(), 96

# What is left out (norms, modulation, softmax, activations) is a few percent at tiny widths, little at the real ones.
REST = {"tiny": 0.08, "rdt2": 0.005}


def of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def arguments(config):
    """Parameters, noise, condition and state of one chunk, without values."""
    part = of(1, config.num_kv_heads, LENGTH, config.head_dim)
    condition = Condition(tuple(KeysValues(part, part) for _ in config.condition_layers), of(1, LENGTH, dtype=bool))
    params = jax.eval_shape(unstacked, abstract(param_specs(config)))
    return params, of(1, config.chunk_length, config.action_dim), condition, of(1, config.state_dim)


def counted(function, *arguments):
    """Operations that XLA counts before its optimisations."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["tiny", "rdt2"])
@pytest.mark.parametrize("num_times", [1, 5])
def test_preparation_as_xla_counts_it(name, num_times):
    config = preset(name)
    params, _, condition, state = arguments(config)
    times = of(num_times, 1)
    xla = counted(lambda p, c, s, t: prepare(p, config, c, s, t, COMPUTE), params, condition, state, times)
    assert 1.0 < xla / cost.prepare_flops(config, num_times) < 1 + REST[name]


@pytest.mark.parametrize("name", ["tiny", "rdt2"])
def test_velocity_as_xla_counts_it(name):
    config = preset(name)
    params, x, condition, state = arguments(config)
    prepared = jax.eval_shape(
        lambda p, c, s: prepare(p, config, c, s, jnp.zeros((1, 1)), COMPUTE), params, condition, state
    )

    def velocity(p, x, prepared):
        return prepared_velocity(p, config, x, prepared.condition, modulations_at(prepared, 0), COMPUTE)

    xla = counted(velocity, params, x, prepared)
    assert 1.0 < xla / cost.velocity_flops(config, LENGTH) < 1 + REST[name]


def test_a_sample_of_one_step_is_one_preparation_and_one_velocity():
    config = preset("tiny")
    xla = counted(lambda p, x, c, s: sample(p, config, x, c, s, COMPUTE, schedule=Schedule(1)), *arguments(config))
    one = cost.sample_flops(config, LENGTH, 1)
    assert one == cost.prepare_flops(config, 1) + cost.velocity_flops(config, LENGTH)
    assert 1.0 < xla / one < 1 + REST["tiny"]


def test_more_steps_cost_velocities_and_modulations_but_no_more_weights_of_these():
    config = preset("rdt2")
    params = param_specs(config, jnp.bfloat16)
    flops = [cost.sample_flops(config, LENGTH, n) for n in (1, 2, 5)]
    assert flops[1] - flops[0] == pytest.approx((flops[2] - flops[1]) / 3)
    num_bytes = [cost.sample_bytes(params, config, LENGTH, n) for n in (1, 2)]
    assert num_bytes[1] - num_bytes[0] == cost.velocity_bytes(params, config, LENGTH)


def test_every_weight_is_read_by_preparation_or_by_velocity():
    config = preset("rdt2")
    params = param_specs(config, jnp.bfloat16)
    assert cost.prepare_bytes(params) + cost.velocity_bytes(params, config, 0) == tree_bytes(params)
    # a modulation is (3 branches, 3, embed, 2 embed) and its bias
    modulations = config.num_layers * 9 * (2 * config.hidden_size**2 + config.hidden_size)
    assert modulations < cost.prepare_bytes(params) / 2 < modulations * 1.05
    assert modulations / count_parameters(params) > 0.5  # so that preparing them once is worth while


def test_bytes_in_both_layouts_and_of_the_condition():
    config = preset("tiny")
    stacked, per_layer = param_specs(config), arguments(config)[0]
    assert cost.prepare_bytes(stacked) == cost.prepare_bytes(per_layer)
    without, with_condition = (cost.velocity_bytes(per_layer, config, length) for length in (0, LENGTH))
    keys_values = arguments(config)[2].keys_values
    assert with_condition - without == tree_bytes(keys_values) // 2  # these are float32, counted were 16 bits
    assert cost.velocity_bytes(per_layer, config, LENGTH, jnp.float32) - without == tree_bytes(keys_values)
