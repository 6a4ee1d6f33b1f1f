"""The action tokenizer: a chunk of 24 x 20 numbers <-> 27 tokens.

Three independent VQ-VAEs take the position, rotation and width channels of both arms. Inside one of them the tokens
run through the latent steps, and at each step through the levels; the sequence is positions, rotations, widths.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rdt2_jax.action_tokenizer.codec import (
    Decoder,
    Encoder,
    decode_latents,
    decoder_specs,
    encode_latents,
    encoder_specs,
)
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.action_tokenizer.quantizer import (
    Codebook,
    Projections,
    codebook_specs,
    dequantize,
    projection_specs,
    quantize,
)
from rdt2_jax.actions.layout import ACTION_DIM, GROUP_CHANNELS, GROUP_NAMES, GroupName
from rdt2_jax.actions.rotations import geodesic_angle_as_published, rot6d_to_matrix
from rdt2_jax.errors import DataError


@struct.dataclass
class Network:
    """What one VQ-VAE trains by gradient."""

    encoder: Encoder
    projections: Projections
    decoder: Decoder


@struct.dataclass
class ActionTokenizerParams:
    """`networks` move by gradient, `codebooks` by exponential averages; both by channel group."""

    networks: dict[GroupName, Network]
    codebooks: dict[GroupName, Codebook]


def param_specs(config: ActionTokenizerConfig) -> ActionTokenizerParams:
    """Declaration of all parameters: the tree of ParamSpec from which everything else follows."""
    return ActionTokenizerParams(
        networks={
            group: Network(
                encoder=encoder_specs(config, len(GROUP_CHANNELS[group])),
                projections=projection_specs(config, config.num_levels(group)),
                decoder=decoder_specs(config, len(GROUP_CHANNELS[group])),
            )
            for group in GROUP_NAMES
        },
        codebooks={group: codebook_specs(config, config.num_levels(group)) for group in GROUP_NAMES},
    )


@partial(jax.jit, static_argnames="config")
def encode(params: ActionTokenizerParams, config: ActionTokenizerConfig, actions: jax.Array) -> jax.Array:
    """Normalised chunks (batch, frames, 20) -> tokens (batch, num_tokens) int32 in [0, num_codes).

    Raises:
        DataError: the trailing shape is not (chunk_length, 20).
    """
    require_chunks(config, actions)
    tokens = []
    for group in GROUP_NAMES:
        network = params.networks[group]
        latents = encode_latents(network.encoder, group_channels(actions, group))
        indices = quantize(network.projections, params.codebooks[group].codes, latents).indices
        tokens.append(indices.reshape(indices.shape[0], -1))
    return jnp.concatenate(tokens, axis=-1)


@partial(jax.jit, static_argnames="config")
def decode(params: ActionTokenizerParams, config: ActionTokenizerConfig, tokens: jax.Array) -> jax.Array:
    """Tokens (batch, num_tokens) -> normalised chunks (batch, frames, 20) float32.

    Tokens must lie in [0, num_codes): `check_tokens` says so on the host; under jit an index out of range would be
    clamped by XLA.

    Raises:
        DataError: the trailing shape is not (num_tokens,).
    """
    if tokens.ndim != 2 or tokens.shape[-1] != config.num_tokens:
        raise DataError(
            "tokens have the wrong shape", expected=f"(batch, {config.num_tokens})", found=str(tokens.shape)
        )
    groups = {}
    for group in GROUP_NAMES:
        network = params.networks[group]
        indices = tokens[:, config.token_slice(group)]
        indices = indices.reshape(-1, config.num_latents, config.num_levels(group))
        latents = dequantize(network.projections, params.codebooks[group].codes, indices)
        groups[group] = decode_latents(network.decoder, latents)
    return merge_groups(groups)


def merge_groups(groups: dict[GroupName, jax.Array]) -> jax.Array:
    """Channel groups (..., channels of the group) -> action frames (..., 20)."""
    order = np.argsort(np.concatenate([GROUP_CHANNELS[group] for group in GROUP_NAMES]))
    return jnp.concatenate([groups[group] for group in GROUP_NAMES], axis=-1)[..., order]


def reconstruction_loss(
    group: GroupName,
    reconstruction: jax.Array,
    target: jax.Array,
    rotation_loss: Literal["geodesic", "chordal"] = "geodesic",
) -> jax.Array:
    """Loss of one group's channels (..., channels), both normalised.

    Positions and widths: mean squared error. Rotations: mean over both arms of the geodesic angle in units of pi
    (published form, see `geodesic_angle_as_published`), or of half the squared Frobenius distance, 4 sin^2(angle / 2).
    Each rot6d is orthonormalised first; so the normalizer has to leave rotations as they are.
    """
    if group != "rot":
        return jnp.mean(jnp.square(reconstruction - target))
    arms = (*reconstruction.shape[:-1], 2, 6)
    ours, theirs = rot6d_to_matrix(reconstruction.reshape(arms)), rot6d_to_matrix(target.reshape(arms))
    if rotation_loss == "chordal":
        return jnp.mean(jnp.sum(jnp.square(ours - theirs), axis=(-2, -1))) / 2
    return jnp.mean(geodesic_angle_as_published(ours, theirs)) / jnp.pi


def check_tokens(tokens: np.ndarray, config: ActionTokenizerConfig, where: str = "tokens") -> np.ndarray:
    """Tokens from outside, as int32 (batch, num_tokens).

    Raises:
        DataError: wrong type or shape, or values outside [0, num_codes); names the first offender. Negative tokens
            mark an invalid gripper in the published shards and cannot be decoded.
    """
    tokens = np.asarray(tokens)
    expected = f"integers (batch, {config.num_tokens}) in [0, {config.num_codes})"
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 2 or tokens.shape[-1] != config.num_tokens:
        raise DataError("not a token array", where=where, expected=expected, found=f"{tokens.dtype} {tokens.shape}")
    bad = (tokens < 0) | (tokens >= config.num_codes)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            f"{int(bad.sum())} tokens out of range",
            where=f"{where}[{row}, {column}]",
            expected=expected,
            found=int(tokens[row, column]),
            fix="negative tokens mark an invalid gripper: leave those chunks out" if (tokens < 0).any() else None,
        )
    return tokens.astype(np.int32)


def group_channels(actions: jax.Array, group: GroupName) -> jax.Array:
    return actions[..., np.asarray(GROUP_CHANNELS[group])]


def require_chunks(config: ActionTokenizerConfig, actions: jax.Array) -> None:
    if actions.ndim != 3 or actions.shape[1:] != (config.chunk_length, ACTION_DIM):
        raise DataError(
            "action chunks have the wrong shape",
            expected=f"(batch, {config.chunk_length}, {ACTION_DIM})",
            found=str(actions.shape),
        )
