"""The convolutional encoder and decoder of one VQ-VAE: 24 frames <-> 3 latent steps.

Arrays are (batch, time, channels). The networks follow the published `RVQActionTokenizer`: 1-D convolutions over
time, three stages of stride 2, one-group GroupNorm, SiLU; the decoder mirrors the encoder with transposed
convolutions. Everything is computed in float32 at the highest matmul precision, because a rounding error in the
encoder is another token.
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.action_tokenizer.config import CHANNEL_MULTIPLIERS, ActionTokenizerConfig
from rdt2_jax.params import LogicalAxes, ParamSpec, PyTree, fan_in_uniform, ones, zeros

KERNEL_WIDTH = 3
_NORM_EPSILON = 1e-6
_PRECISION = jax.lax.Precision.HIGHEST


@struct.dataclass
class Convolution:
    """kernel (width, channels_in, channels_out), bias (channels_out,)."""

    kernel: PyTree
    bias: PyTree


@struct.dataclass
class Norm:
    """scale and bias (channels,)."""

    scale: PyTree
    bias: PyTree


@struct.dataclass
class ConvBlock:
    """Residual block; `shortcut` is a width-1 convolution where the channels change, else None."""

    norm_1: Norm
    conv_1: Convolution
    norm_2: Norm
    conv_2: Convolution
    shortcut: Convolution | None


@struct.dataclass
class Stage:
    """Block, resampling by 2 (down in the encoder, up in the decoder), block."""

    block_1: ConvBlock
    resample: Convolution
    block_2: ConvBlock


@struct.dataclass
class Encoder:
    conv_in: Convolution
    stages: tuple[Stage, ...]
    norm_out: Norm
    conv_out: Convolution


@struct.dataclass
class Decoder:
    norm_in: Norm
    conv_in: Convolution
    stages: tuple[Stage, ...]
    conv_out: Convolution


def encoder_specs(config: ActionTokenizerConfig, channels: int) -> Encoder:
    """Declaration of an encoder for `channels` input channels."""
    widths = [config.hidden_size, *(m * config.hidden_size for m in CHANNEL_MULTIPLIERS)]
    return Encoder(
        conv_in=_conv_specs(channels, widths[0]),
        stages=tuple(
            Stage(
                block_1=_block_specs(narrow, wide),
                resample=_conv_specs(wide, wide),
                block_2=_block_specs(wide, wide),
            )
            for narrow, wide in pairwise(widths)
        ),
        norm_out=_norm_specs(widths[-1]),
        conv_out=_conv_specs(widths[-1], config.latent_size),
    )


def decoder_specs(config: ActionTokenizerConfig, channels: int) -> Decoder:
    """Declaration of a decoder to `channels` output channels."""
    widths = [m * config.hidden_size for m in reversed(CHANNEL_MULTIPLIERS)] + [config.hidden_size]
    return Decoder(
        norm_in=_norm_specs(config.latent_size),
        conv_in=_conv_specs(config.latent_size, widths[0]),
        stages=tuple(
            Stage(
                block_1=_block_specs(wide, wide),
                # torch takes the fan-in of a transposed kernel from its output side; here both sides are equal.
                resample=_conv_specs(wide, wide),
                block_2=_block_specs(wide, narrow),
            )
            for wide, narrow in pairwise(widths)
        ),
        conv_out=_conv_specs(widths[-1], channels),
    )


def encode_latents(encoder: Encoder, actions: jax.Array) -> jax.Array:
    """(batch, frames, channels) -> (batch, frames / 8, latent_size)."""
    x = _convolve(encoder.conv_in, actions)
    for stage in encoder.stages:
        x = _conv_block(stage.block_1, x)
        x = _downsample(stage.resample, x)
        x = _conv_block(stage.block_2, x)
    return _convolve(encoder.conv_out, jax.nn.silu(_group_norm(encoder.norm_out, x)))


def decode_latents(decoder: Decoder, latents: jax.Array) -> jax.Array:
    """(batch, steps, latent_size) -> (batch, 8 steps, channels)."""
    x = _convolve(decoder.conv_in, jax.nn.silu(_group_norm(decoder.norm_in, latents)))
    for stage in decoder.stages:
        x = _conv_block(stage.block_1, x)
        x = _upsample(stage.resample, x)
        x = _conv_block(stage.block_2, x)
    return _convolve(decoder.conv_out, x)


def _conv_block(block: ConvBlock, x: jax.Array) -> jax.Array:
    h = _convolve(block.conv_1, jax.nn.silu(_group_norm(block.norm_1, x)))
    h = _convolve(block.conv_2, jax.nn.silu(_group_norm(block.norm_2, h)))
    return h + (x if block.shortcut is None else _convolve(block.shortcut, x))


def _group_norm(norm: Norm, x: jax.Array) -> jax.Array:
    """GroupNorm with one group: statistics over time and channels of each sample."""
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=(1, 2), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + _NORM_EPSILON) * norm.scale + norm.bias


def _convolve(conv: Convolution, x: jax.Array) -> jax.Array:
    """Stride 1, zero padding that keeps the length."""
    width = conv.kernel.shape[0]
    return _conv(x, conv.kernel, stride=1, padding=(width // 2, width // 2)) + conv.bias


def _downsample(conv: Convolution, x: jax.Array) -> jax.Array:
    """Stride 2 after one zero frame on the right: the length halves."""
    return _conv(x, conv.kernel, stride=2, padding=(0, 1)) + conv.bias


def _upsample(conv: Convolution, x: jax.Array) -> jax.Array:
    """Transposed convolution, stride 2, padding 1, output padding 1: the length doubles.

    Output 2t sees input t through tap 1; output 2t + 1 sees input t through tap 2 and input t + 1 through tap 0. As one
    product per tap, no arithmetic is spent on the zeros between the inputs, and no weight is copied out of its stack.
    """
    batch, length, channels = x.shape
    taps = jnp.matmul(x.reshape(1, batch * length, channels), conv.kernel, precision=_PRECISION)
    before, even, after = taps.reshape(KERNEL_WIDTH, batch, length, -1)
    odd = after + jnp.pad(before[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return jnp.stack([even, odd], axis=2).reshape(batch, 2 * length, -1) + conv.bias


def _conv(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride,),
        padding=(padding,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=_PRECISION,
    )


_KERNEL_AXES: LogicalAxes = ("kernel", "channels_in", "channels_out")


def _conv_specs(channels_in: int, channels_out: int, width: int = KERNEL_WIDTH) -> Convolution:
    init = fan_in_uniform(width * channels_in)
    return Convolution(
        kernel=ParamSpec(
            (width, channels_in, channels_out),
            _KERNEL_AXES,
            init,
            # Twelve rotation channels or two widths do not divide over a mesh: they are replicated.
            fallbacks=(("kernel", "channels_in", None), ("kernel", None, "channels_out"), (None, None, None)),
        ),
        bias=_vector_specs(channels_out, init),
    )


def _norm_specs(channels: int) -> Norm:
    return Norm(scale=_vector_specs(channels, ones), bias=_vector_specs(channels, zeros))


def _vector_specs(channels: int, init) -> ParamSpec:
    return ParamSpec((channels,), ("channels_out",), init, fallbacks=((None,),))


def _block_specs(channels_in: int, channels_out: int) -> ConvBlock:
    return ConvBlock(
        norm_1=_norm_specs(channels_in),
        conv_1=_conv_specs(channels_in, channels_out),
        norm_2=_norm_specs(channels_out),
        conv_2=_conv_specs(channels_out, channels_out),
        shortcut=None if channels_in == channels_out else _conv_specs(channels_in, channels_out, width=1),
    )
