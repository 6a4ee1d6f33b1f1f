"""Does this tokenizer fit these actions? Reconstruction errors, codebook use, range of the statistics, outliers.

Plain numpy on the host, in units that people think in: millimetres, degrees, millimetres of width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rdt2_jax.action_tokenizer.batches import padded_batches
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.action_tokenizer.tokenizer import ActionTokenizerParams, decode, encode
from rdt2_jax.actions.layout import (
    ACTION_DIM,
    ARM_NAMES,
    GROUP_CHANNELS,
    GROUP_NAMES,
    POSITION,
    ROT6D,
    WIDTH,
    ArmName,
    arm_slice,
)
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.rotations import geodesic_angle, rot6d_to_matrix
from rdt2_jax.actions.validation import check_actions
from rdt2_jax.errors import DataError

PERCENTILES = (50.0, 90.0, 99.0, 100.0)
BOUND = 1.0
"""Normalised positions and widths are expected within +-1: the range the published normalizer maps training data to."""

BOUND_TOLERANCE = 0.01
MAX_SHARE_OUTSIDE = 1e-3
"""Data that was not used to fit the normalizer may go a little beyond its extremes: up to this share of the values of a
channel is reported and does not count as a misfit."""

SMALL_ROTATION_DEG = 5.0
OUTLIER_DEG = 5.0
"""A rotation outlier is an arm whose true rotation never exceeds SMALL_ROTATION_DEG while the decoded one is wrong by
more than OUTLIER_DEG: the failure that users report as exploding rotation decoders."""


@dataclass(frozen=True)
class RotationOutlier:
    """One arm of one chunk whose small rotation was decoded as a large error; angles are maxima over the frames."""

    chunk: int
    arm: ArmName
    true_angle_deg: float
    error_deg: float

    def __str__(self) -> str:
        what = f"turns {self.true_angle_deg:.2f} deg, decoded {self.error_deg:.2f} deg off"
        return f"chunk {self.chunk}, {self.arm} arm: {what}"


@dataclass(frozen=True)
class ChannelRange:
    """Normalised extremes of one channel, of these chunks and of the statistics inside the normalizer.

    `outside` is the fraction of the chunks' values beyond the bound.
    """

    channel: int
    low: float
    high: float
    outside: float
    statistics_low: float
    statistics_high: float

    @property
    def fits(self) -> bool:
        """Neither the values nor the normalizer's own statistics leave the bound."""
        extreme = max(abs(self.statistics_low), abs(self.statistics_high))
        return self.outside <= MAX_SHARE_OUTSIDE and extreme <= BOUND + BOUND_TOLERANCE


@dataclass(frozen=True)
class TokenizerReport:
    """What `examine` measured.

    Attributes:
        num_chunks: chunks examined.
        errors: per unit ("position_mm", "rotation_deg", "width_mm") and arm ("both", "right", "left"): percentiles over
            frames, by "p50" ... An arm of its own, because a codec can carry one arm and forget the other.
        code_use: per group and level: fraction of codes that occur.
        code_perplexity: per group and level: exp of the entropy of code frequencies.
        ranges: normalised range of each position and width channel.
        out_of_range: channels whose values, or whose statistics in the normalizer, leave the codec's bounds.
        rotation_outliers: worst first.
        small_rotations: arms with small rotations, the population that outliers come from.
    """

    num_chunks: int
    errors: dict[str, dict[str, dict[str, float]]]
    code_use: dict[str, list[float]]
    code_perplexity: dict[str, list[float]]
    ranges: list[ChannelRange]
    out_of_range: list[int]
    rotation_outliers: list[RotationOutlier]
    small_rotations: int

    @property
    def fits(self) -> bool:
        """No channel out of bounds and no rotation outlier."""
        return not self.out_of_range and not self.rotation_outliers

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Reconstruction:
    """Chunks before and after the tokenizer, in policy units, with errors per (chunk, frame, arm)."""

    actions: np.ndarray
    decoded: np.ndarray
    tokens: np.ndarray
    position_mm: np.ndarray
    rotation_deg: np.ndarray
    width_mm: np.ndarray


def reconstruct(
    params: ActionTokenizerParams,
    config: ActionTokenizerConfig,
    normalizer: LinearNormalizer,
    actions: np.ndarray,
    *,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
    where: str = "actions",
) -> Reconstruction:
    """Passes chunks (chunks, frames, 20) in policy units through encode and decode.

    Args:
        progress: called with the number of chunks done since the last call.
        where: name of the chunks in errors.

    Raises:
        DataError: no chunks, wrong shape, NaN, or degenerate rotations.
    """
    actions = check_chunks(actions, config, where)
    tokens, decoded = [], []
    for batch, count in padded_batches(actions, batch_size):
        batch_tokens = encode(params, config, normalizer.normalize(batch))
        tokens.append(np.asarray(batch_tokens)[:count])
        decoded.append(normalizer.unnormalize(np.asarray(decode(params, config, batch_tokens)))[:count])
        if progress is not None:
            progress(count)
    decoded = np.concatenate(decoded)
    errors = [arm_errors(decoded, actions, arm) for arm in ARM_NAMES]
    position_mm, rotation_deg, width_mm = (np.stack(unit, axis=-1) for unit in zip(*errors, strict=True))
    return Reconstruction(actions, decoded, np.concatenate(tokens), position_mm, rotation_deg, width_mm)


def examine(
    reconstruction: Reconstruction, config: ActionTokenizerConfig, normalizer: LinearNormalizer
) -> TokenizerReport:
    """Summarises a reconstruction."""
    ranges = _channel_ranges(reconstruction.actions, normalizer)
    outliers, small = _rotation_outliers(reconstruction)
    use, perplexity = _code_use(reconstruction.tokens, config)
    return TokenizerReport(
        num_chunks=len(reconstruction.actions),
        errors={
            unit: _percentiles_by_arm(getattr(reconstruction, unit))
            for unit in ("position_mm", "rotation_deg", "width_mm")
        },
        code_use=use,
        code_perplexity=perplexity,
        ranges=ranges,
        out_of_range=[r.channel for r in ranges if not r.fits],
        rotation_outliers=outliers,
        small_rotations=small,
    )


def check_chunks(
    actions: np.ndarray, config: ActionTokenizerConfig, where: str = "actions", *, normalized: bool = False
) -> np.ndarray:
    """Chunks from outside, as float32 (chunks, frames, 20); `normalized` ones need not hold rotations.

    Raises:
        DataError: empty, wrong shape or type, NaN, degenerate rotations; names the first offender.
    """
    expected = f"(chunks, {config.chunk_length}, {ACTION_DIM}), at least one chunk"
    shape = np.shape(actions)
    if len(shape) != 3 or shape[1:] != (config.chunk_length, ACTION_DIM) or shape[0] == 0:
        raise DataError("not an array of action chunks", where=where, expected=expected, found=str(shape))
    return check_actions(actions, where=where, normalized=normalized)


def arm_errors(decoded: np.ndarray, actions: np.ndarray, arm: ArmName) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position error [mm], rotation error [deg], width error [mm] of one arm, each (chunks, frames)."""
    ours, theirs = (np.asarray(a[..., arm_slice(arm)], np.float64) for a in (decoded, actions))
    position = 1e3 * np.linalg.norm(ours[..., POSITION] - theirs[..., POSITION], axis=-1)
    rotation = np.degrees(geodesic_angle(rot6d_to_matrix(ours[..., ROT6D]), rot6d_to_matrix(theirs[..., ROT6D])))
    width = 1e3 * np.abs(ours[..., WIDTH] - theirs[..., WIDTH])[..., 0]
    return position, rotation, width


def _percentiles_by_arm(errors: np.ndarray) -> dict[str, dict[str, float]]:
    """Errors (chunks, frames, arms)."""

    def percentiles(values: np.ndarray) -> dict[str, float]:
        found = np.percentile(values, PERCENTILES)
        return {f"p{p:g}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}

    arms = {arm: percentiles(errors[..., index]) for index, arm in enumerate(ARM_NAMES)}
    return {"both": percentiles(errors), **arms}


def _code_use(
    tokens: np.ndarray, config: ActionTokenizerConfig
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    use: dict[str, list[float]] = {}
    perplexity: dict[str, list[float]] = {}
    for group in GROUP_NAMES:
        levels = tokens[:, config.token_slice(group)].reshape(-1, config.num_levels(group)).T
        counts = [np.bincount(level, minlength=config.num_codes) for level in levels]
        frequencies = [count[count > 0] / count.sum() for count in counts]
        use[group] = [float(np.mean(count > 0)) for count in counts]
        perplexity[group] = [float(np.exp(-np.sum(f * np.log(f)))) for f in frequencies]
    return use, perplexity


def _channel_ranges(actions: np.ndarray, normalizer: LinearNormalizer) -> list[ChannelRange]:
    normalized = normalizer.normalize(actions)
    statistics = normalizer.field("action").input_stats
    # A normalizer may hold one set of statistics, or one for each frame.
    extremes = np.stack([normalizer.normalize(statistics.min), normalizer.normalize(statistics.max)])
    extremes = extremes.reshape(-1, ACTION_DIM)
    ranges = []
    for channel in sorted(GROUP_CHANNELS["pos"] + GROUP_CHANNELS["grip"]):
        values = normalized[..., channel]
        ranges.append(
            ChannelRange(
                channel=channel,
                low=float(values.min()),
                high=float(values.max()),
                outside=float(np.mean(np.abs(values) > BOUND + BOUND_TOLERANCE)),
                statistics_low=float(extremes[:, channel].min()),
                statistics_high=float(extremes[:, channel].max()),
            )
        )
    return ranges


def _rotation_outliers(reconstruction: Reconstruction) -> tuple[list[RotationOutlier], int]:
    outliers, population = [], 0
    for index, arm in enumerate(ARM_NAMES):
        rotations = rot6d_to_matrix(np.asarray(reconstruction.actions[..., arm_slice(arm)][..., ROT6D], np.float64))
        turned = np.degrees(geodesic_angle(rotations, np.eye(3))).max(axis=1)
        error = reconstruction.rotation_deg[..., index].max(axis=1)
        small = turned <= SMALL_ROTATION_DEG
        population += int(small.sum())
        outliers += [
            RotationOutlier(int(chunk), arm, float(turned[chunk]), float(error[chunk]))
            for chunk in np.flatnonzero(small & (error > OUTLIER_DEG))
        ]
    return sorted(outliers, key=lambda outlier: -outlier.error_deg), population
