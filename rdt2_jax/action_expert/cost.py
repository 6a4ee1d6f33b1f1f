"""Arithmetic and memory traffic of the expert, for floors: no machine samples a chunk faster than its rates allow.

Counted as in `qwen2_5_vl.cost`: products of matrices, a multiply-add as two operations; left out are norms,
modulations' use, softmax, activations and biases. Bytes are those of the parameters and of the condition, which a step
reads once each. Batch 1 throughout.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.parameters import BRANCHES, TIME_FREQUENCIES, ActionExpertParams
from rdt2_jax.params import tree_bytes

_ADAPTOR_LAYERS = 3


def prepare_flops(config: ActionExpertConfig, num_times: int) -> float:
    """Operations of `model.prepare`: embeddings of state and times, all modulations.

    Args:
        config: the expert.
        num_times: times at which the velocity will be wanted.
    """
    width = config.hidden_size
    times = num_times * (TIME_FREQUENCIES * width + width**2)
    parts = 3 * BRANCHES * config.num_layers + 2
    return 2.0 * (times + _adaptor_weights(config.state_dim, width) + num_times * parts * 2 * width**2)


def velocity_flops(config: ActionExpertConfig, condition_length: int) -> float:
    """Operations of `model.prepared_velocity`.

    Args:
        config: the expert.
        condition_length: tokens of the backbone that are attended to.
    """
    width, tokens = config.hidden_size, config.num_tokens
    heads_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    self_attention = 2 * width * heads_width + 2 * width * kv_width
    cross_attention = 2 * width * heads_width
    weights = self_attention + cross_attention + 3 * width * config.mlp_size
    pairs = 2 * heads_width * (tokens + condition_length)
    head = 4 * width**2 + 4 * width * config.action_dim
    actions = config.chunk_length * _adaptor_weights(config.action_dim, width)
    return 2.0 * (actions + tokens * config.num_layers * (weights + pairs) + config.chunk_length * head)


def sample_flops(config: ActionExpertConfig, condition_length: int, num_velocities: int) -> float:
    """Operations of `flow.sample` without a prefix, see `Schedule.num_velocities`."""
    return prepare_flops(config, num_velocities) + num_velocities * velocity_flops(config, condition_length)


def prepare_bytes(params: ActionExpertParams) -> int:
    """Bytes that `model.prepare` must read, once for all times.

    Args:
        params: arrays or specs, in either layout.
    """
    return tree_bytes(_prepared(params))


def velocity_bytes(
    params: ActionExpertParams, config: ActionExpertConfig, condition_length: int, dtype: Any = jnp.bfloat16
) -> int:
    """Bytes that `model.prepared_velocity` must read: all other weights, and the condition.

    Args:
        params: arrays or specs, in either layout.
        config: their shape.
        condition_length: tokens of the backbone that are attended to.
        dtype: of the condition's keys and values.
    """
    per_token = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    condition = len(config.condition_layers) * condition_length * per_token
    return tree_bytes(params) - prepare_bytes(params) + condition


def sample_bytes(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    condition_length: int,
    num_velocities: int,
    dtype: Any = jnp.bfloat16,
) -> int:
    """Bytes that `flow.sample` must read, if nothing stays in a cache from one velocity to the next."""
    return prepare_bytes(params) + num_velocities * velocity_bytes(params, config, condition_length, dtype)


def _adaptor_weights(inputs: int, width: int) -> int:
    return inputs * width + (_ADAPTOR_LAYERS - 1) * width**2


def _prepared(params: ActionExpertParams) -> Any:
    """The parameters that `model.prepare` reads."""
    layers = params.layers
    modulations = tuple(layer.modulation for layer in layers) if isinstance(layers, tuple) else layers.modulation
    return params.state_adaptor, params.state_position, params.time, modulations, params.head.modulation
