"""Normalizers from the statistics of a dataset: rotations stay as they are, the tokenizer needs true ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rdt2_data.statistics.collect import CHANNEL_NAMES, ChannelStatistics
from rdt2_jax.actions.layout import ACTION_DIM, GROUP_CHANNELS
from rdt2_jax.actions.normalizer import MIN_RANGE, FieldNormalizer, FieldStatistics, LinearNormalizer
from rdt2_jax.errors import DataError

NormalizerKind = Literal["limits", "gaussian"]


@dataclass(frozen=True, eq=False)
class Fit:
    """A normalizer, and what it leaves out.

    Attributes:
        normalizer: its field is "action".
        kind: "limits" or "gaussian".
        quantiles: the shares that were mapped to -1 and 1, None for the extremes.
        outside: float64 (20,), share of a channel's values beyond [-1, 1] once normalized, as the sketch tells it;
            None for "gaussian", which has no bounds.
    """

    normalizer: LinearNormalizer
    kind: NormalizerKind
    quantiles: tuple[float, float] | None
    outside: np.ndarray | None


def fit_normalizer(
    channels: ChannelStatistics, kind: NormalizerKind = "limits", quantiles: tuple[float, float] | None = None
) -> Fit:
    """Makes a normalizer of statistics.

    "limits" maps the range of positions and widths to [-1, 1] and equals `LinearNormalizer.fit_actions` on all chunks
    at once: scale, offset, minimum and maximum bit for bit, mean and standard deviation to float32 rounding.
    "gaussian" maps mean and standard deviation of positions and widths to 0 and 1. Both leave rot6d as it is. The
    statistics inside are those of the data, also where quantiles were used as limits.

    Args:
        channels: at least one frame.
        kind: which map.
        quantiles: for "limits": shares in [0, 1] whose quantiles are used instead of the extremes.

    Raises:
        DataError: no frames; quantiles that do not fit; or a channel that moves, but not between its quantiles.
    """
    require_quantiles(kind, quantiles)
    if not channels.moments.count:
        raise DataError("there is no frame to fit a normalizer to", fix="look at the problems that were counted")
    moments = channels.moments
    statistics = FieldStatistics(
        *(np.asarray(v, np.float32) for v in (moments.minimum, moments.maximum, moments.mean, moments.std))
    )
    if kind == "gaussian":
        return Fit(_normalizer(*_gaussian(statistics), statistics), kind, None, None)
    low, high = statistics.min, statistics.max
    if quantiles is not None:
        low, high = _quantile_limits(channels, quantiles)
    ranged = FieldNormalizer.from_range(low, high, mean=statistics.mean, std=statistics.std)
    outside = channels.sketch.share_below(low, inclusive=False) + 1 - channels.sketch.share_below(high, inclusive=True)
    outside = np.where(_is_rotation(), 0.0, outside if quantiles is not None else 0.0)
    return Fit(_normalizer(ranged.scale, ranged.offset, statistics), kind, quantiles, outside)


def require_quantiles(kind: NormalizerKind, quantiles: tuple[float, float] | None) -> None:
    """Raises DataError unless a normalizer of this kind can be made with these quantiles; before any data is read."""
    if quantiles is None:
        return
    if kind == "gaussian":
        raise DataError("quantiles are limits", where="quantiles", fix="leave them out, or choose kind limits")
    if not 0 <= quantiles[0] < quantiles[1] <= 1:
        raise DataError("these are no quantiles", where="quantiles", expected="0 <= low < high <= 1", found=quantiles)


def _is_rotation() -> np.ndarray:
    return np.isin(np.arange(ACTION_DIM), GROUP_CHANNELS["rot"])


def _normalizer(scale: np.ndarray, offset: np.ndarray, statistics: FieldStatistics) -> LinearNormalizer:
    rotation = _is_rotation()
    scale = np.where(rotation, np.float32(1), scale)
    offset = np.where(rotation, np.float32(0), offset)
    return LinearNormalizer({"action": FieldNormalizer(scale, offset, statistics)})


def _gaussian(statistics: FieldStatistics) -> tuple[np.ndarray, np.ndarray]:
    """A channel that does not move is only shifted."""
    still = statistics.std < np.float32(MIN_RANGE)
    scale = np.float32(1) / np.where(still, np.float32(1), statistics.std)
    return scale, -statistics.mean * scale


def _quantile_limits(channels: ChannelStatistics, quantiles: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    low, high = channels.sketch.quantiles(quantiles)
    moves = np.asarray(channels.moments.maximum - channels.moments.minimum) >= MIN_RANGE
    stuck = np.flatnonzero(moves & (high - low < MIN_RANGE) & ~_is_rotation())
    if stuck.size:
        names = ", ".join(CHANNEL_NAMES[channel] for channel in stuck)
        raise DataError(
            "a channel moves, but not between its quantiles",
            where=names,
            expected="quantiles that differ",
            found=f"{quantiles[0]:g} and {quantiles[1]:g} give the same value",
            fix="take quantiles further apart, or the extremes",
        )
    return low, high
