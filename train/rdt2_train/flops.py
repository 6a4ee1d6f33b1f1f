"""How much arithmetic a training sample asks for, stage by stage: what MFU and HFU are shares of.

The model. Counted are the products of matrices and convolutions, a multiply-add as two operations, as in
`qwen2_5_vl.cost` and `action_expert.cost`, with which the forward passes here agree exactly. So causal attention counts
the pairs that see each other (half of all), windows count their own pairs, and padding is free. Left out are norms,
rotations, softmax, activations, biases, dropout and the optimizer: less than a percent at the published widths.

*MFU* counts what the mathematics needs: the forward pass; gradients of activations, as far down as something is
trained; gradients of trained weights alone. A product with a weight costs as much again for its input's gradient and as
much again for its weight's; a product of two activations (attention) costs as much again for each operand that has a
gradient. So a network that is trained whole costs three forward passes, one with adapters a little more than two, a
frozen one below everything trained costs one.

*HFU* (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B, names both) adds what rematerialisation computes again:
under "full" every product of a layer that its backward pass reads, under "dots" those of attention, under "none"
nothing. In neither are: what a kernel computes again by itself (fused or chunked attention), masked pairs that it
multiplies all the same, padding, and what scanned layers compute because all of them do the same: gradients below the
first adapter, and the last layer's queries and MLP, although the action expert reads its keys and values alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.cost import sample_flops
from rdt2_jax.action_expert.distill import DistillConfig
from rdt2_jax.action_expert.parameters import BRANCHES, TIME_FREQUENCIES
from rdt2_jax.action_tokenizer.config import CHANNEL_MULTIPLIERS, ActionTokenizerConfig
from rdt2_jax.actions.layout import GROUP_CHANNELS, GROUP_NAMES
from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Remat
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, TextConfig, VisionConfig
from rdt2_jax.qwen2_5_vl.grid import Grid, windows

Trained = Literal["frozen", "lora", "full"]
"""What of a backbone is trained: nothing; adapters of every linear map of the decoder; all of it."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of one sample in one training step.

    Attributes:
        forward: everything computed once, teachers and target networks among it.
        activation_gradients: of what flows between the layers.
        weight_gradients: of what is trained.
        recomputed: forward products that the backward pass computes again.
    """

    forward: float = 0.0
    activation_gradients: float = 0.0
    weight_gradients: float = 0.0
    recomputed: float = 0.0

    @property
    def model(self) -> float:
        """Numerator of MFU."""
        return self.forward + self.activation_gradients + self.weight_gradients

    @property
    def hardware(self) -> float:
        """Numerator of HFU."""
        return self.model + self.recomputed

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(
            self.forward + other.forward,
            self.activation_gradients + other.activation_gradients,
            self.weight_gradients + other.weight_gradients,
            self.recomputed + other.recomputed,
        )


def vq_flops(
    config: Qwen25VLConfig,
    length: int,
    supervised: int,
    grid: Grid | None,
    *,
    num_images: int = 1,
    trained: Trained = "full",
    lora_rank: int = 8,
    vision_trained: bool = True,
    remat: Remat = "none",
    head_recomputed: bool = False,
) -> StepFlops:
    """One example of the VQ stage: next-token prediction of action tokens.

    Args:
        config: the model; all its decoder layers are run.
        length: tokens of the row, those of its images among them. Of rows that are padded, give the mean of what is
            not padding, else MFU flatters itself.
        supervised: positions that get logits.
        grid: (1, rows, columns) of patches of every image; None: no images.
        num_images: images of this grid.
        trained: the whole model, or adapters of the decoder, whose base may be in eight bits.
        lora_rank: of the adapters, where there are any.
        vision_trained: of `trained="full"`: the vision tower too. Adapters leave it as it is.
        remat: of the layers.
        head_recomputed: logits are computed again in the backward pass, whatever `remat` says of the layers.

    Raises:
        ConfigError: an unknown choice, or counts below what makes sense.
    """
    _check(trained, remat, lora_rank, length=length, num_images=num_images)
    if supervised < 0:
        raise ConfigError("a number of positions", where="supervised", expected="0 or more", found=supervised)
    layers = range(config.text.num_layers)
    decoder = _sum(_text_layer(config.text, length, trained, lora_rank, remat, first=i == 0) for i in layers)
    head = _product(
        supervised * config.text.vocab_size * config.text.hidden_size,
        inputs=trained != "frozen",
        weights=trained == "full",
        again=head_recomputed and trained != "frozen",
    )
    return _vision(config.vision, grid, num_images, trained == "full" and vision_trained, remat) + decoder + head


def fm_flops(
    backbone: Qwen25VLConfig,
    expert: ActionExpertConfig,
    length: int,
    grid: Grid | None,
    *,
    num_images: int = 1,
    backbone_trained: Trained = "frozen",
    lora_rank: int = 8,
    vision_trained: bool = True,
    remat: Remat = "none",
) -> StepFlops:
    """One example of the flow-matching stage: the backbone's keys and values, and one velocity.

    Args:
        backbone: its first `expert.num_backbone_layers` layers are run, the last of them for keys and values alone.
        expert: trained whole.
        length, grid, num_images, lora_rank, vision_trained, remat: as in `vq_flops`.
        backbone_trained: frozen (forward alone); adapters or everything, with gradients through keys and values.

    Raises:
        ConfigError: as `vq_flops`, or the expert does not belong to the backbone.
    """
    seen = _backbone(backbone, expert, length, grid, num_images, backbone_trained, lora_rank, vision_trained, remat)
    return seen + _expert(expert, length, remat, condition_trained=backbone_trained != "frozen")


def one_step_flops(
    backbone: Qwen25VLConfig,
    expert: ActionExpertConfig,
    distill: DistillConfig,
    length: int,
    grid: Grid | None,
    *,
    num_images: int = 1,
    with_actions: bool = True,
    remat: Remat = "none",
) -> StepFlops:
    """One example of distillation: frozen backbone, the teacher's steps, the target's velocity, the student's step.

    Args:
        backbone, expert, length, grid, num_images, remat: as in `fm_flops`; teacher and student have one shape.
        distill: regression runs the whole rollout of the teacher; consistency one step of it, or all of them.
        with_actions: of consistency: `distill.loss` gets actions, so that one step of the teacher is enough.

    Raises:
        ConfigError: as `fm_flops`.
    """
    seen = _backbone(backbone, expert, length, grid, num_images, "frozen", 1, False, remat)
    schedule = distill.schedule
    rolled_out, target = schedule.num_velocities, 0.0
    if distill.objective == "consistency":
        target = sample_flops(expert, length, 1)
        if with_actions:
            rolled_out = schedule.num_velocities // schedule.num_steps
    teacher = StepFlops(forward=sample_flops(expert, length, rolled_out) + target)
    return seen + teacher + _expert(expert, length, remat, condition_trained=False)


def tokenizer_flops(config: ActionTokenizerConfig, *, continuous: bool = False) -> StepFlops:
    """One chunk in the training of the action tokenizer: three VQ-VAEs, and the codebooks that follow.

    Zeros at the ends of a convolution are not counted; what `codec` multiplies when it doubles the length is.

    Args:
        config: the tokenizer.
        continuous: without codes, see `quantizer.pass_through`.
    """
    return _sum(_vq_vae(config, len(GROUP_CHANNELS[g]), config.num_levels(g), continuous) for g in GROUP_NAMES)


def _product(multiply_adds: float, *, inputs: bool, weights: bool, again: bool = False) -> StepFlops:
    """A product with a weight: whether its input and its weight have gradients, and whether it is computed twice."""
    flops = 2.0 * multiply_adds
    return StepFlops(flops, flops * inputs, flops * weights, flops * again)


def _pairs(multiply_adds: float, *, operands: int, again: bool) -> StepFlops:
    """Attention's two products, of whose two operands each, none, one or both have a gradient."""
    flops = 2.0 * multiply_adds
    return StepFlops(flops, flops * operands, 0.0, flops * again)


def _sum(parts: Iterable[StepFlops]) -> StepFlops:
    total = StepFlops()
    for part in parts:
        total += part
    return total


def _text_layer(
    config: TextConfig,
    length: int,
    trained: Trained,
    rank: int,
    remat: Remat,
    *,
    first: bool,
    keys_values_only: bool = False,
) -> StepFlops:
    """One decoder layer. What enters the first one has a gradient only where the embedding is trained."""
    width, head_dim = config.hidden_size, config.head_dim
    heads_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
    maps = {"key": (width, kv_width), "value": (width, kv_width)}
    if not keys_values_only:
        gate, down = (width, config.intermediate_size), (config.intermediate_size, width)
        maps |= {"query": (width, heads_width), "out": (heads_width, width), "gate": gate, "up": gate, "down": down}
    backward, again = trained != "frozen", remat == "full" and trained != "frozen"
    total = StepFlops()
    for name, (inputs, outputs) in maps.items():
        at_the_bottom = first and trained != "full" and name in ("query", "key", "value")
        # nothing in the layer's backward pass reads what it ends with
        read = again and not keys_values_only and name != "down"
        gradient = backward and not at_the_bottom
        total += _product(length * inputs * outputs, inputs=gradient, weights=trained == "full", again=read)
        if trained == "lora":
            total += _product(length * inputs * rank, inputs=gradient, weights=True, again=again)
            total += _product(length * rank * outputs, inputs=True, weights=True, again=read)
    if keys_values_only:
        return total
    seen = length * (length + 1) / 2 * 2 * heads_width
    return total + _pairs(seen, operands=2 * backward, again=backward and remat != "none")


def _vision(config: VisionConfig, grid: Grid | None, num_images: int, trained: bool, remat: Remat) -> StepFlops:
    """The vision tower over all images; below it are pixels, which have no gradient."""
    if grid is None:
        return StepFlops()
    table = windows(config, grid)  # pyright: ignore[reportArgumentType]
    patches, width, inner = num_images * len(table.patch_order), config.hidden_size, config.intermediate_size
    tokens, merged = patches // config.merge_unit, width * config.merge_unit
    in_windows = num_images * float(np.sum(np.diff(table.boundaries).astype(np.float64) ** 2))
    in_images = num_images * float(len(table.patch_order)) ** 2
    seen = (config.depth - config.num_groups) * in_windows + config.num_groups * in_images
    read = config.depth * patches * (4 * width**2 + 2 * width * inner)
    last = config.depth * patches * width * inner  # nothing in a block's backward pass reads what it ends with
    return (
        _product(patches * config.patch_dim * width, inputs=False, weights=trained)
        + _product(read, inputs=trained, weights=trained, again=trained and remat == "full")
        + _product(last, inputs=trained, weights=trained)
        + _pairs(2 * width * seen, operands=2 * trained, again=trained and remat != "none")
        + _product(tokens * merged * (merged + config.out_hidden_size), inputs=trained, weights=trained)
    )


def _backbone(
    backbone: Qwen25VLConfig,
    expert: ActionExpertConfig,
    length: int,
    grid: Grid | None,
    num_images: int,
    trained: Trained,
    rank: int,
    vision_trained: bool,
    remat: Remat,
) -> StepFlops:
    """Keys and values for the expert."""
    _check(trained, remat, rank, length=length, num_images=num_images)
    expert.check_backbone(backbone.text)
    count = expert.num_backbone_layers
    decoder = _sum(
        _text_layer(backbone.text, length, trained, rank, remat, first=i == 0, keys_values_only=i == count - 1)
        for i in range(count)
    )
    return _vision(backbone.vision, grid, num_images, trained == "full" and vision_trained, remat) + decoder


def _expert(config: ActionExpertConfig, length: int, remat: Remat, *, condition_trained: bool) -> StepFlops:
    """One velocity, all of the expert trained. State, time's features and noisy actions have no gradient.

    The gates of a block read what its last products give, so that "full" computes all of them again. Modulations are
    computed outside of the blocks.
    """
    width, tokens, heads_width = config.hidden_size, config.num_tokens, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    entries = TIME_FREQUENCIES + config.state_dim + config.chunk_length * config.action_dim
    modulations = (3 * BRANCHES * config.num_layers + 2) * 2 * width
    around = (
        width * (1 + 2 + config.chunk_length * 2) + modulations + config.chunk_length * 4 * (width + config.action_dim)
    )
    block = 4 * width * heads_width + 2 * width * kv_width + 3 * width * config.mlp_size
    pairs = config.num_layers * tokens * 2 * heads_width
    again = remat != "none"
    return (
        _product(entries * width, inputs=False, weights=True)
        + _product(around * width, inputs=True, weights=True)
        + _product(config.num_layers * tokens * block, inputs=True, weights=True, again=remat == "full")
        + _pairs(pairs * tokens, operands=2, again=again)
        + _pairs(pairs * length, operands=2 if condition_trained else 1, again=again)
    )


def _vq_vae(config: ActionTokenizerConfig, channels: int, levels: int, continuous: bool) -> StepFlops:
    """One channel group: encoder, quantizer, decoder."""
    frames, latents, base = config.chunk_length, config.num_latents, config.hidden_size
    embedding = config.embedding_dim
    widths = [base, *(m * base for m in CHANNEL_MULTIPLIERS)]
    inner, steps = 0.0, frames
    for narrow, wide in pairwise(widths):
        inner += _block(steps, narrow, wide) + (3 * (steps // 2) - 1) * wide**2
        steps //= 2
        inner += _block(steps, wide, wide)
    inner += _taps(latents) * config.latent_size * widths[-1] * 2  # the encoder's end, the decoder's beginning
    for wide, narrow in pairwise([*reversed(widths[1:]), base]):
        inner += _block(steps, wide, wide) + 3 * steps * wide**2
        steps *= 2
        inner += _block(steps, wide, narrow)
    inner += _taps(frames) * base * channels + latents * levels * 2 * config.latent_size * embedding
    compared = 0.0 if continuous else 2.0 * latents * levels * config.num_codes * embedding
    return (
        _product(_taps(frames) * channels * base, inputs=False, weights=True)
        + _product(inner, inputs=True, weights=True)
        + _product(compared, inputs=False, weights=False)
    )


def _taps(steps: int) -> int:
    """How often a kernel of width 3 meets one of so many steps, the length kept."""
    return 3 * steps - 2


def _block(steps: int, channels_in: int, channels_out: int) -> float:
    """Multiply-adds of a residual block of the tokenizer."""
    shortcut = 0 if channels_in == channels_out else steps * channels_in * channels_out
    return _taps(steps) * (channels_in + channels_out) * channels_out + shortcut


def _check(trained: Trained, remat: Remat, rank: int, **counts: int) -> None:
    for name, value, known in (("trained", trained, get_args(Trained)), ("remat", remat, get_args(Remat))):
        if value not in known:
            raise ConfigError("no such choice", where=name, expected=" or ".join(known), found=value)
    for name, value in {"lora_rank": rank, **counts}.items():
        if value < 1:
            raise ConfigError("a count that must be positive", where=name, expected="1 or more", found=value)
