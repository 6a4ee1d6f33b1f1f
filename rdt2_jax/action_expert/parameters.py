"""What the network consists of: its parameters, declared with the initial values of the published code."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.layers.linear import GatedMLP, Linear, gated_mlp_specs, linear_specs
from rdt2_jax.layers.norms import norm_specs
from rdt2_jax.layers.stack import unstack
from rdt2_jax.params import Initializer, ParamSpec, fan_in_uniform, glorot_uniform, normal, stack, zeros

TIME_FREQUENCIES = 256
"""Width of the time's sines and cosines."""

MAX_PERIOD = 10_000.0
"""Longest period of the time's frequencies. Times in [0, 1] go in unscaled, as published."""

BRANCHES = 3
"""Self-attention, cross-attention, MLP: each with a shift, a scale and a gate."""


@struct.dataclass
class SelfAttention:
    """Weights (heads, head_dim, embed); `key_value` (2, kv_heads, head_dim, embed); norms of every head's queries and
    keys (head_dim,)."""

    query: Linear
    key_value: Linear
    query_norm: Any
    key_norm: Any
    out: Linear


@struct.dataclass
class CrossAttention:
    """Queries alone: keys and values are the backbone's."""

    query: Linear
    query_norm: Any
    out: Linear


@struct.dataclass
class ExpertLayer:
    """One block; `modulation` (3 branches, 3, embed, 2 embed), the second axis shift, scale, gate."""

    modulation: Linear
    self_norm: Any
    self_attention: SelfAttention
    cross_norm: Any
    cross_attention: CrossAttention
    mlp_norm: Any
    mlp: GatedMLP


@struct.dataclass
class Head:
    """What follows the blocks; `modulation` (2, embed, 2 embed): shift, scale."""

    modulation: Linear
    norm: Any
    up: Linear
    down: Linear


@struct.dataclass
class ActionExpertParams:
    """All parameters.

    Attributes:
        action_adaptor, state_adaptor: three linear maps with SiLU between them.
        time: two linear maps with SiLU between them.
        registers: (registers, embed).
        positions: (frames + registers, embed), learnt.
        state_position: (embed,), learnt.
        layers: `ExpertLayer` stacked on a leading axis, or a tuple of them.
        head: the way back to actions.
    """

    action_adaptor: tuple[Linear, Linear, Linear]
    state_adaptor: tuple[Linear, Linear, Linear]
    time: tuple[Linear, Linear]
    registers: Any
    positions: Any
    state_position: Any
    layers: ExpertLayer | tuple[ExpertLayer, ...]
    head: Head


def param_specs(config: ActionExpertConfig, dtype: Any = jnp.float32) -> ActionExpertParams:
    """The declaration of all parameters, with the initial values of the published code.

    Modulations and the last map start at zero: a fresh expert predicts velocity zero.
    """
    width, embed = config.hidden_size, (("embed", config.hidden_size),)
    heads = (("heads", config.num_heads), ("head_dim", config.head_dim))
    key_value = ((None, 2), ("kv_heads", config.num_kv_heads), ("head_dim", config.head_dim))
    glorot = glorot_uniform(width, width)
    glorot_key_value = glorot_uniform(width, 2 * config.num_kv_heads * config.head_dim)
    both = (("embed", 2 * width),)

    def modulation(*parts: int) -> Linear:
        return linear_specs(both, (*((None, n) for n in parts), ("mlp", width)), bias=True, dtype=dtype, init=zeros)

    def projection(inputs: Any, outputs: Any, init: Initializer = glorot) -> Linear:
        # few key heads stay whole where the tensor axis has more devices than there are
        replicable = ((None, None, None, "embed"),) if outputs is key_value else ()
        return linear_specs(inputs, outputs, bias=False, dtype=dtype, init=init, fallbacks=replicable)

    head_norm = norm_specs(config.head_dim, dtype, axis="head_dim")
    layer = ExpertLayer(
        modulation=modulation(BRANCHES, 3),
        self_norm=norm_specs(width, dtype),
        self_attention=SelfAttention(
            query=projection(embed, heads),
            key_value=projection(embed, key_value, glorot_key_value),
            query_norm=head_norm,
            key_norm=head_norm,
            out=projection(heads, embed),
        ),
        cross_norm=norm_specs(width, dtype),
        cross_attention=CrossAttention(
            query=projection(embed, heads), query_norm=head_norm, out=projection(heads, embed)
        ),
        mlp_norm=norm_specs(width, dtype),
        mlp=gated_mlp_specs(
            width, config.mlp_size, bias=False, dtype=dtype, init=glorot_uniform(width, config.mlp_size)
        ),
    )
    hidden = 4 * width
    positions = _initial_positions(config.chunk_length, config.num_registers, width)
    return ActionExpertParams(
        action_adaptor=_adaptor_specs(config.action_dim, width, dtype),
        state_adaptor=_adaptor_specs(config.state_dim, width, dtype),
        time=(
            linear_specs(((None, TIME_FREQUENCIES),), (("mlp", width),), bias=True, dtype=dtype),
            linear_specs((("mlp", width),), embed, bias=True, dtype=dtype),
        ),
        registers=ParamSpec((config.num_registers, width), (None, "embed"), normal(1.0), dtype),
        positions=ParamSpec((config.num_tokens, width), (None, "embed"), positions, dtype),
        state_position=ParamSpec((width,), ("embed",), zeros, dtype),
        layers=stack(layer, config.num_layers),
        head=Head(
            modulation=modulation(2),
            norm=norm_specs(width, dtype),
            up=linear_specs(embed, (("mlp", hidden),), bias=True, dtype=dtype, init=glorot_uniform(width, hidden)),
            down=linear_specs((("mlp", hidden),), ((None, config.action_dim),), bias=True, dtype=dtype, init=zeros),
        ),
    )


def unstacked(params: ActionExpertParams, *, delete: bool = False) -> ActionExpertParams:
    """The same parameters with a tree per layer, for inference on one device. Not for use inside jit."""
    return dataclasses.replace(params, layers=unstack(params.layers, delete=delete))


def _adaptor_specs(inputs: int, width: int, dtype: Any) -> tuple[Linear, Linear, Linear]:
    def specs(size: int, axis: str | None) -> Linear:
        uniform = fan_in_uniform(size)
        layer = linear_specs(((axis, size),), (("mlp", width),), bias=True, dtype=dtype, init=uniform)
        return dataclasses.replace(layer, bias=dataclasses.replace(layer.bias, init=uniform))

    return specs(inputs, None), specs(width, "embed"), specs(width, "embed")


@functools.lru_cache
def _initial_positions(frames: int, registers: int, width: int) -> Initializer:
    """Sines and cosines of the place within actions or registers, plus those of 0 for actions, of 1 for registers."""
    places = np.concatenate([np.arange(frames), np.arange(registers)])
    kinds = np.repeat([0, 1], [frames, registers])
    table = _sines_and_cosines(places, width) + _sines_and_cosines(kinds, width)
    return lambda key, shape, dtype: jnp.asarray(table, dtype)


def _sines_and_cosines(places: np.ndarray, width: int) -> np.ndarray:
    """float64 (places, width): sines, then cosines."""
    frequencies = MAX_PERIOD ** -(np.arange(width // 2) / (width / 2))
    angles = places[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
