"""The tokenizer's loss and training step, as pure functions.

Written on the global view: under jit with the batch split over a mesh, means, code hits and codebook sums become
all-reduces, and every device ends the step with the same codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.action_tokenizer.codec import decode_latents, encode_latents
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.action_tokenizer.quantizer import (
    Codebook,
    Draw,
    Quantized,
    draw,
    pass_through,
    quantize,
    quantize_and_update,
)
from rdt2_jax.action_tokenizer.tokenizer import (
    ActionTokenizerParams,
    Network,
    group_channels,
    reconstruction_loss,
    require_chunks,
)
from rdt2_jax.actions.layout import GROUP_CHANNELS, GROUP_NAMES, GroupName
from rdt2_jax.params import PyTree


class Optimizer(Protocol):
    """What a training step needs of an optimizer: any `optax.GradientTransformation`."""

    @property
    def init(self) -> Any: ...

    @property
    def update(self) -> Any: ...


@struct.dataclass
class TrainState:
    """Everything that a training step reads and writes."""

    params: ActionTokenizerParams
    optimizer_state: PyTree
    step: jax.Array


@struct.dataclass
class GroupLosses:
    """Losses of one VQ-VAE, scalars. total = reconstruction + quantization; quantization = commitment_cost x
    commitment + codebook_cost x codebook, where `codebook` repeats the commitment's value and has no gradient."""

    total: jax.Array
    reconstruction: jax.Array
    quantization: jax.Array
    commitment: jax.Array


@struct.dataclass
class GroupOutput:
    """Reconstruction (batch, frames, channels), indices (batch, steps, levels) and losses of one VQ-VAE."""

    reconstruction: jax.Array
    indices: jax.Array
    losses: GroupLosses


def init_state(params: ActionTokenizerParams, optimizer: Optimizer) -> TrainState:
    """A state at step 0; only the networks get optimizer state."""
    return TrainState(params, optimizer.init(params.networks), jnp.zeros((), jnp.int32))


def standardize(params: ActionTokenizerParams, mean: jax.Array, std: jax.Array) -> ActionTokenizerParams:
    """Initial parameters that see and produce centred channels of unit variance, without another layer.

    Rotation channels are near-constant ones and zeros with a small signal on top, which a freshly drawn encoder
    cannot tell apart and whose quantizer then collapses. So the first convolution is made to act on
    (x - mean) / spread, and the last one to give spread * y + mean, by changing their kernels and biases. The spread is
    the root mean square of a group's standard deviations: one number per group, because the ones on a rotation's
    diagonal move with the square of the angle and must not be blown up.

    Args:
        params: freshly initialised.
        mean, std: (20,) of the normalised training chunks, not all zero inside a group.
    """
    networks = {}
    for group, network in params.networks.items():
        channels = jnp.asarray(GROUP_CHANNELS[group])
        spread = jnp.sqrt(jnp.mean(jnp.square(std[channels])))
        first, last = network.encoder.conv_in, network.decoder.conv_out
        kernel = first.kernel / spread
        first = replace(first, kernel=kernel, bias=first.bias - jnp.einsum("wio,i->o", kernel, mean[channels]))
        last = replace(last, kernel=last.kernel * spread, bias=last.bias * spread + mean[channels])
        networks[group] = replace(
            network,
            encoder=replace(network.encoder, conv_in=first),
            decoder=replace(network.decoder, conv_out=last),
        )
    return replace(params, networks=networks)


def draw_choices(key: jax.Array, config: ActionTokenizerConfig, batch_size: int) -> dict[GroupName, Draw]:
    """Random choices of one step for all groups."""
    vectors = batch_size * config.num_latents
    keys = jax.random.split(key, len(GROUP_NAMES))
    return {
        group: draw(group_key, config.num_levels(group), vectors, config.num_codes)
        for group, group_key in zip(GROUP_NAMES, keys, strict=True)
    }


@partial(jax.jit, static_argnames="config")
def loss(
    params: ActionTokenizerParams, config: ActionTokenizerConfig, actions: jax.Array
) -> tuple[jax.Array, dict[GroupName, GroupOutput]]:
    """The sum of the groups' total losses with the codebooks as they are.

    Args:
        actions: normalised chunks (batch, frames, 20).

    Returns:
        scalar loss and the output of each group.
    """

    def quantizer(group: GroupName, latents: jax.Array) -> tuple[Quantized, None]:
        return quantize(params.networks[group].projections, params.codebooks[group].codes, latents), None

    total, (outputs, _) = _loss(params.networks, config, actions, quantizer)
    return total, outputs


@partial(jax.jit, static_argnames=("config", "continuous"))
def loss_and_codebooks(
    networks: dict[GroupName, Network],
    codebooks: dict[GroupName, Codebook],
    config: ActionTokenizerConfig,
    actions: jax.Array,
    choices: dict[GroupName, Draw],
    *,
    continuous: bool = False,
) -> tuple[jax.Array, tuple[dict[GroupName, GroupOutput], dict[GroupName, Codebook]]]:
    """The training loss, computed while the codebooks move; differentiate with respect to `networks`.

    With `continuous`, no codes are used and no codebook moves.

    Returns:
        scalar loss, and (outputs, updated codebooks) by group.
    """

    def quantizer(group: GroupName, latents: jax.Array) -> tuple[Quantized, Codebook]:
        if continuous:
            return pass_through(networks[group].projections, latents), codebooks[group]
        return quantize_and_update(networks[group].projections, codebooks[group], latents, choices[group], config)

    return _loss(networks, config, actions, quantizer)


@partial(jax.jit, static_argnames=("config", "optimizer", "continuous"))
def train_step(
    state: TrainState,
    actions: jax.Array,
    choices: dict[GroupName, Draw],
    config: ActionTokenizerConfig,
    optimizer: Optimizer,
    *,
    continuous: bool = False,
) -> tuple[TrainState, dict[GroupName, GroupOutput]]:
    """One step: networks by the optimizer, codebooks by their averages.

    Pure and compiled; inside another jit that donates `state`, no second copy of it is held.

    Args:
        state: from `init_state` or the previous step.
        actions: normalised chunks, the global batch (batch, frames, 20).
        choices: from `draw_choices`.
        continuous: leave the codes out, as a warm-up (see `quantizer.pass_through`); codebooks stay untouched, and the
            first step with codes initialises them from its batch.
    """
    gradient = jax.grad(partial(loss_and_codebooks, continuous=continuous), has_aux=True)
    networks = state.params.networks
    gradients, (outputs, codebooks) = gradient(networks, state.params.codebooks, config, actions, choices)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, networks)
    networks = jax.tree.map(lambda parameter, update: parameter + update, networks, updates)
    return TrainState(ActionTokenizerParams(networks, codebooks), optimizer_state, state.step + 1), outputs


def _loss(
    networks: dict[GroupName, Network],
    config: ActionTokenizerConfig,
    actions: jax.Array,
    quantizer: Callable[[GroupName, jax.Array], tuple[Quantized, Any]],
) -> tuple[jax.Array, tuple[dict[GroupName, GroupOutput], dict[GroupName, Any]]]:
    require_chunks(config, actions)
    outputs, states, total = {}, {}, jnp.zeros(())
    for group in GROUP_NAMES:
        target = group_channels(actions, group)
        quantized, states[group] = quantizer(group, encode_latents(networks[group].encoder, target))
        decoded = decode_latents(networks[group].decoder, quantized.latents)
        reconstruction = reconstruction_loss(group, decoded, target, config.rotation_loss)
        quantization = config.commitment_cost * quantized.commitment + config.codebook_cost * jax.lax.stop_gradient(
            quantized.commitment
        )
        losses = GroupLosses(reconstruction + quantization, reconstruction, quantization, quantized.commitment)
        outputs[group] = GroupOutput(decoded, quantized.indices, losses)
        total += losses.total
    return total, (outputs, states)
