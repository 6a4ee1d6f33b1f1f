"""The network: a noisy chunk, a time and a condition to the velocity that leads to actions.

A transformer over the chunk's frames and a few registers. Every block attends to itself, then to the keys and values
of one backbone layer, exactly as the backbone left them; its norms are modulated by time and state (adaLN, Peebles and
Xie, arXiv 2212.09748). Source: RDT2 (arXiv 2602.03310) and its public code.

Modulations depend on time and state alone, and theirs are more than half of the published weights: `prepare` computes
those of all the times of a sampler at once, so that these weights are read once per chunk instead of once per step.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.parameters import (
    MAX_PERIOD,
    TIME_FREQUENCIES,
    ActionExpertParams,
    CrossAttention,
    ExpertLayer,
    SelfAttention,
    param_specs,
    unstacked,
)
from rdt2_jax.errors import DataError
from rdt2_jax.layers.attention import attention
from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.linear import Linear, gated_mlp, linear
from rdt2_jax.layers.norms import rms_norm
from rdt2_jax.layers.stack import num_layers, over_layers, unstack
from rdt2_jax.problems import Problems

__all__ = [
    "ActionExpertParams",
    "Condition",
    "Prepared",
    "modulations_at",
    "param_specs",
    "prepare",
    "prepared_velocity",
    "time_features",
    "unstacked",
    "velocity",
]


@struct.dataclass
class Condition:
    """What the backbone says: `qwen2_5_vl.model.keys_and_values` of the layers that the expert reads.

    Attributes:
        keys_values: keys and values (B, kv_heads, length, head_dim) of every layer, in a tuple or stacked.
        valid: bool (B, length), False for padding.
    """

    keys_values: Any
    valid: Any


@struct.dataclass
class Prepared:
    """What does not change while a chunk is sampled.

    Attributes:
        condition: with one layer per block, in the layout of the parameters, in the dtype of the activations.
        modulations: of every block (times, B, 3, 3, embed), in the layout of the parameters.
        head: (times, B, 2, embed).
    """

    condition: Condition
    modulations: Any
    head: jax.Array

    @property
    def num_times(self) -> int:
        """How many times it was made for."""
        return self.head.shape[0]


def velocity(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    x: jax.Array,
    t: jax.Array,
    condition: Condition,
    state: jax.Array,
    compute: Compute,
) -> jax.Array:
    """The velocity dx/dt of the flow from noise (t = 0) to normalised actions (t = 1).

    Args:
        params: parameters.
        config: their shape.
        x: (B, frames, action_dim), between noise and normalised actions.
        t: (B,) or (), in [0, 1].
        condition: what the backbone says.
        state: (B, state_dim), zeros where the robot gives none.
        compute: how to compute it.

    Returns:
        float32 (B, frames, action_dim).

    Raises:
        DataError: shapes that do not fit the configuration or each other.
    """
    batch, t = condition.valid.shape[0], jnp.asarray(t)
    _require_chunks(config, batch, x)
    if t.shape not in ((), (batch,)):
        raise DataError("times have the wrong shape", where="t", expected=f"() or {(batch,)}", found=t.shape)
    times = jnp.broadcast_to(t, (batch,))[None]
    prepared = prepare(params, config, condition, state, times, compute)
    return prepared_velocity(params, config, x, prepared.condition, modulations_at(prepared, 0), compute)


def prepare(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    condition: Condition,
    state: jax.Array,
    times: jax.Array,
    compute: Compute,
) -> Prepared:
    """Everything that does not depend on the noisy chunk, for all the times at which the velocity will be wanted.

    Args:
        params, config, condition, state, compute: as in `velocity`.
        times: (times, B) or (times, 1) float32.

    Raises:
        DataError: shapes that do not fit the configuration or each other.
    """
    batch = condition.valid.shape[0]
    _require_condition(config, condition, state)
    embedded = _embed_times(params, times.astype(jnp.float32), compute)
    described = _adapt(params.state_adaptor, state, compute) + params.state_position.astype(compute.dtype)
    shape = (times.shape[0], batch, config.hidden_size)
    both = jnp.concatenate([jnp.broadcast_to(embedded, shape), jnp.broadcast_to(described, shape)], axis=-1)
    driver = compute.constrain(jax.nn.silu(both), None, "batch", None)

    def body(_: None, layer: ExpertLayer, __: Any) -> tuple[None, jax.Array]:
        return None, compute.constrain(linear(layer.modulation, driver), None, "batch", None, None, None)

    # Laid out by rows, like what they modulate. Left to itself, XLA lays them out by columns; over three axes with one
    # row a device it then exchanges rows for columns wrongly (seen with jax 0.10 and 0.12 on CPUs).
    _, modulations = over_layers(body, None, params.layers, compute)
    head = compute.constrain(linear(params.head.modulation, driver), None, "batch", None, None)
    keys_values = _one_per_layer(params, condition.keys_values, compute)
    return Prepared(Condition(keys_values, condition.valid), modulations, head)


def modulations_at(prepared: Prepared, index: Any) -> tuple[Any, jax.Array]:
    """Modulations of the blocks and of the head at one of the prepared times."""
    layers = prepared.modulations
    if isinstance(layers, tuple):
        return tuple(layer[index] for layer in layers), prepared.head[index]
    return layers[:, index], prepared.head[index]


def prepared_velocity(
    params: ActionExpertParams,
    config: ActionExpertConfig,
    x: jax.Array,
    condition: Condition,
    modulations: tuple[Any, jax.Array],
    compute: Compute,
) -> jax.Array:
    """`velocity` at a time that was prepared.

    Args:
        params, config, x, compute: as in `velocity`.
        condition: `Prepared.condition`.
        modulations: see `modulations_at`.
    """
    per_layer, head = modulations
    _require_chunks(config, condition.valid.shape[0], x)
    tokens = _adapt(params.action_adaptor, x, compute)
    registers = jnp.broadcast_to(params.registers.astype(compute.dtype), (x.shape[0], *params.registers.shape))
    hidden = jnp.concatenate([tokens, registers], axis=1).astype(jnp.float32) + params.positions.astype(jnp.float32)
    hidden = compute.constrain(hidden, "batch", None, None)

    def body(hidden: jax.Array, layer: ExpertLayer, inputs: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
        keys_values, modulation = inputs
        return _block(layer, config, hidden, keys_values, condition.valid, modulation, compute), None

    inputs = (condition.keys_values, per_layer)
    if isinstance(per_layer, tuple):
        inputs = tuple(zip(*inputs, strict=True))
    hidden, _ = over_layers(body, hidden, params.layers, compute, inputs)
    hidden = hidden[:, : config.chunk_length]  # registers have done their work
    normalized = _modulate(rms_norm(params.head.norm, hidden, config.norm_eps), head[:, 0], head[:, 1])
    widened = jax.nn.silu(linear(params.head.up, normalized.astype(compute.dtype)))
    return linear(params.head.down, widened.astype(jnp.float32))


def _block(
    layer: ExpertLayer,
    config: ActionExpertConfig,
    hidden: jax.Array,
    keys_values: Any,
    valid: jax.Array,
    modulation: jax.Array,
    compute: Compute,
) -> jax.Array:
    """One block; `modulation` (B, 3 branches, 3, embed). What goes from block to block is float32: 28 tokens are few,
    and most of the error of 16-bit activations would be in the sums."""
    branches = (
        (layer.self_norm, lambda x: _attend_to_self(layer.self_attention, config, x, compute)),
        (
            layer.cross_norm,
            lambda x: _attend_to_backbone(layer.cross_attention, config, x, keys_values, valid, compute),
        ),
        (layer.mlp_norm, lambda x: gated_mlp(layer.mlp, x)),
    )
    for i, (norm, branch) in enumerate(branches):
        shift, scale, gate = (modulation[:, i, j] for j in range(3))
        modulated = _modulate(rms_norm(norm, hidden, config.norm_eps), shift, scale)
        update = branch(modulated.astype(compute.dtype))
        hidden = compute.constrain(hidden + gate[:, None] * update, "batch", None, None)
    return hidden


def _attend_to_self(layer: SelfAttention, config: ActionExpertConfig, x: jax.Array, compute: Compute) -> jax.Array:
    query = rms_norm(layer.query_norm, linear(layer.query, x), config.norm_eps)
    key_value = linear(layer.key_value, x)
    key = rms_norm(layer.key_norm, key_value[:, :, 0], config.norm_eps)
    heads = (jnp.swapaxes(part, 1, 2) for part in (query, key, key_value[:, :, 1]))
    mixed = attention(*heads, backend=compute.attention, query_chunk=compute.query_chunk)
    return linear(layer.out, jnp.swapaxes(mixed, 1, 2), num_inputs=2)


def _attend_to_backbone(
    layer: CrossAttention,
    config: ActionExpertConfig,
    x: jax.Array,
    keys_values: Any,
    valid: jax.Array,
    compute: Compute,
) -> jax.Array:
    """The backbone's keys are taken as they are: turned by their positions, not normalised. Queries are not turned."""
    query = rms_norm(layer.query_norm, linear(layer.query, x), config.norm_eps)
    mixed = attention(
        jnp.swapaxes(query, 1, 2),
        keys_values.key,
        keys_values.value,
        backend=compute.attention,
        key_valid=valid,
        query_chunk=compute.query_chunk,
    )
    return linear(layer.out, jnp.swapaxes(mixed, 1, 2), num_inputs=2)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """(B, tokens, embed) with shift and scale (B, embed)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def _mlp(layers: tuple[Linear, ...], x: jax.Array) -> jax.Array:
    """Linear maps with SiLU between them."""
    for layer in layers[:-1]:
        x = jax.nn.silu(linear(layer, x))
    return linear(layers[-1], x)


def _adapt(layers: tuple[Linear, ...], x: jax.Array, compute: Compute) -> jax.Array:
    """`_mlp` of (B, ..., inputs), everything in it laid out by rows: see `prepare` for what XLA does otherwise."""
    x = x.astype(compute.dtype)
    for i, layer in enumerate(layers):
        x = compute.constrain(linear(layer, x), "batch", *[None] * (x.ndim - 1))
        x = x if i == len(layers) - 1 else jax.nn.silu(x)
    return x


def _embed_times(params: ActionExpertParams, times: jax.Array, compute: Compute) -> jax.Array:
    """float32 (...) -> (..., embed)."""
    return _mlp(params.time, time_features(times).astype(compute.dtype))


def time_features(times: jax.Array, width: int = TIME_FREQUENCIES) -> jax.Array:
    """Cosines, then sines, of times at geometrically spaced frequencies: float32 (...) -> (..., width)."""
    half = width // 2
    angles = times[..., None] * jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _one_per_layer(params: ActionExpertParams, keys_values: Any, compute: Compute) -> Any:
    """Keys and values for every block, in the layout of the parameters; fewer than blocks are repeated in turn."""
    count, given = num_layers(params.layers), num_layers(keys_values)
    keys_values = jax.tree.map(lambda x: x.astype(compute.dtype), keys_values)
    if isinstance(params.layers, tuple):
        per_layer = keys_values if isinstance(keys_values, tuple) else unstack(keys_values)
        return tuple(per_layer[i % given] for i in range(count))
    if isinstance(keys_values, tuple):
        keys_values = jax.tree.map(lambda *layers: jnp.stack(layers), *keys_values)
    return keys_values if given == count else jax.tree.map(lambda x: x[jnp.arange(count) % given], keys_values)


def _require_chunks(config: ActionExpertConfig, batch: int, x: jax.Array) -> None:
    expected = (batch, config.chunk_length, config.action_dim)
    if x.shape != expected:
        raise DataError("chunks have the wrong shape", where="x", expected=expected, found=x.shape)


def _require_condition(config: ActionExpertConfig, condition: Condition, state: jax.Array) -> None:
    """What can be told from shapes alone, inside jit too."""
    problems = Problems()
    batch, length = condition.valid.shape
    given = num_layers(condition.keys_values)
    if given != len(config.condition_layers):
        problems.add(f"keys and values of {given} layers, the expert reads {len(config.condition_layers)}")
    expected = (batch, config.num_kv_heads, length, config.head_dim)
    for leaf in jax.tree.leaves(condition.keys_values):
        found = leaf.shape if isinstance(condition.keys_values, tuple) else leaf.shape[1:]
        if found != expected:
            problems.add(f"keys or values of shape {found}, expected {expected}")
            break
    if state.shape != (batch, config.state_dim):
        problems.add(f"state of shape {state.shape}, expected {(batch, config.state_dim)}")
    problems.raise_if_any(DataError, "the condition does not fit the action expert", where="Condition")
