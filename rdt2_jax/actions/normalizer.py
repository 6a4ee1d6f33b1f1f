"""Per-channel linear maps between actions in physical units and the numbers that networks see.

normalized = x * scale + offset, and back x = (normalized - offset) / scale, in float32. The published normalizer of
RDT2 and our own are both of this form (RDT2 paper, arXiv 2602.03310, and its public code).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from rdt2_jax.actions.arrays import Array, as_arrays, host_array, namespace, read_only_copy
from rdt2_jax.actions.layout import ACTION_DIM, GROUP_CHANNELS
from rdt2_jax.actions.normalizer_files import read_normalizer_file, write_normalizer_file
from rdt2_jax.actions.validation import check_actions
from rdt2_jax.errors import DataError

MIN_RANGE = 1e-7
"""A channel that moves less than this is only shifted, not scaled. Source: the public RDT2 code."""

STATISTIC_NAMES = ("min", "max", "mean", "std")


@dataclass(frozen=True, eq=False)
class FieldStatistics:
    """What the data looked like before normalization: float32 arrays of one common shape, in physical units."""

    min: np.ndarray
    max: np.ndarray
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True, eq=False)
class FieldNormalizer:
    """The map of one field.

    Args:
        scale: float32, shape (C,), (T, C), or with axes of size 1 that are broadcast; never zero.
        offset: float32, the shape of `scale`.
        input_stats: statistics of the same shape.
    """

    scale: np.ndarray
    offset: np.ndarray
    input_stats: FieldStatistics

    @classmethod
    def from_range(
        cls, minimum: Any, maximum: Any, *, mean: Any, std: Any, low: float = -1.0, high: float = 1.0
    ) -> FieldNormalizer:
        """Maps [minimum, maximum] of each channel to [low, high].

        A channel whose range is below `MIN_RANGE` gets scale 1 and offset -minimum, so it becomes zero.

        Args:
            minimum, maximum, mean, std: statistics per channel, shape (C,), in physical units.
            low, high: ends of the normalized range.

        Raises:
            DataError: shapes that differ, values that are not finite, or minimum above maximum.
        """
        stats = FieldStatistics(*(np.asarray(value, np.float32) for value in (minimum, maximum, mean, std)))
        shapes = {getattr(stats, name).shape for name in STATISTIC_NAMES}
        finite = all(np.isfinite(getattr(stats, name)).all() for name in STATISTIC_NAMES)
        if len(shapes) != 1 or not finite or not np.all(stats.min <= stats.max) or not low < high:
            raise DataError(
                "a range must go from a finite minimum up to a finite maximum",
                expected="minimum <= maximum, low < high, mean and std finite and of the same shape",
                found=f"minimum {stats.min}, maximum {stats.max}, mean {stats.mean}, std {stats.std}, to {low}..{high}",
            )
        with np.errstate(over="ignore"):  # an overflow ends as a scale of zero, which is refused
            extent = stats.max - stats.min
        still = extent < np.float32(MIN_RANGE)
        scale = np.float32(high - low) / np.where(still, np.float32(high - low), extent)
        offset = np.where(still, -stats.min, np.float32(low) - scale * stats.min)
        return cls(scale.astype(np.float32), offset.astype(np.float32), stats)


@dataclass(frozen=True)
class RangeReport:
    """How far values leave an interval, per channel (last axis).

    Args:
        fraction: share of values outside, NaN counted as outside, shape (C,).
        minimum, maximum: extremes met, shape (C,); NaN where a value was NaN.
    """

    fraction: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray


class LinearNormalizer:
    """Named fields, each with its own linear map. Immutable; takes numpy and jax arrays, also inside `jax.jit`.

    Args:
        fields: map of each field, such as "action" (right arm, then left arm; see `actions.layout`).

    Raises:
        DataError: no field, or arrays that are not float32, not finite, of differing shapes, or a scale of zero.
    """

    fields: Mapping[str, FieldNormalizer]

    def __init__(self, fields: Mapping[str, FieldNormalizer]) -> None:
        if not fields:
            raise DataError("a normalizer needs at least one field", found="none")
        self.fields = MappingProxyType({name: _checked(name, field) for name, field in fields.items()})

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {field.scale.shape}" for name, field in self.fields.items())
        return f"LinearNormalizer({shapes})"

    def field(self, name: str) -> FieldNormalizer:
        """The map of one field.

        Raises:
            DataError: an unknown name; the message lists the known ones.
        """
        if name not in self.fields:
            raise DataError("the normalizer has no such field", expected=", ".join(self.fields), found=name)
        return self.fields[name]

    def normalize(self, x: Array, field: str = "action", *, passthrough: Array | None = None) -> Array:
        """x * scale + offset, after a cast to float32.

        Args:
            x: shape (..., *scale.shape), physical units (axes of size 1 of the scale fit any size).
            field: which map to use.
            passthrough: boolean mask that broadcasts to the shape of `x`; True keeps the value of `x` as it is.

        Returns:
            float32 array of the shape of `x`.

        Raises:
            DataError: an unknown field, a shape that does not fit, or a mask that is not boolean.
        """
        xp, x, scale, offset = self._operands(x, field, passthrough)
        return _keep(xp, passthrough, x, x * scale + offset)

    def unnormalize(self, x: Array, field: str = "action", *, passthrough: Array | None = None) -> Array:
        """(x - offset) / scale: the inverse of `normalize`, with the same arguments and errors."""
        xp, x, scale, offset = self._operands(x, field, passthrough)
        return _keep(xp, passthrough, x, (x - offset) / scale)

    def out_of_range(
        self, x: Array, field: str = "action", low: float = -1.0, high: float = 1.0, tolerance: float = 1e-6
    ) -> RangeReport:
        """Tells which channels leave [low - tolerance, high + tolerance] once normalized. Nothing is clipped.

        Args:
            x: concrete values in physical units, shape (..., C).
            field: which map to use.
            low, high, tolerance: normalized units.

        Raises:
            DataError: an unknown field, a shape that does not fit, or no values at all.
        """
        values = host_array(self.normalize(x, field), "x", f"field {field}")
        if values.ndim == 0 or values.size == 0:
            raise DataError("there are no values to check", expected="shape (..., C)", found=str(values.shape))
        values = values.reshape(-1, values.shape[-1])
        inside = (values >= low - tolerance) & (values <= high + tolerance)
        return RangeReport(1.0 - inside.mean(axis=0), values.min(axis=0), values.max(axis=0))

    @classmethod
    def from_range(cls, minimum: Any, maximum: Any, *, mean: Any, std: Any, field: str = "action") -> LinearNormalizer:
        """One field that maps [minimum, maximum] to [-1, 1]; see `FieldNormalizer.from_range`."""
        return cls({field: FieldNormalizer.from_range(minimum, maximum, mean=mean, std=std)})

    @classmethod
    def fit_actions(cls, chunks: Any) -> LinearNormalizer:
        """The normalizer of the action tokenizer: positions and widths to [-1, 1], rotations as they are.

        The geodesic loss of the tokenizer needs true rot6d values, so those channels get scale 1 and offset 0.
        Minimum and maximum are taken over all frames of all chunks; mean and (population) standard deviation
        are computed in float64.

        Args:
            chunks: relative actions, shape (..., 20), positions [m], rot6d, widths in policy units.

        Raises:
            DataError: a wrong last axis or type, no frame, values that are not finite, or rot6d that are no rotations.
        """
        frames = check_actions(chunks, name="chunks").reshape(-1, ACTION_DIM)
        if not len(frames):
            raise DataError("there is no frame to fit a normalizer to", expected="(..., 20)", found=np.shape(chunks))
        exact = frames.astype(np.float64)
        fitted = FieldNormalizer.from_range(
            frames.min(axis=0), frames.max(axis=0), mean=exact.mean(axis=0), std=exact.std(axis=0)
        )
        rotation = np.isin(np.arange(ACTION_DIM), GROUP_CHANNELS["rot"])
        scale = np.where(rotation, np.float32(1), fitted.scale)
        offset = np.where(rotation, np.float32(0), fitted.offset)
        return cls({"action": FieldNormalizer(scale, offset, fitted.input_stats)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearNormalizer:
        """Reads a normalizer. No format can run code: see `rdt2_jax.actions.normalizer_files`.

        Args:
            path: a published `.pt` file, or a `.npz` or `.json` file that `save` wrote.

        Raises:
            DataError: another suffix, a missing or damaged file, or content that is no normalizer.
            UnsafeFileError, CheckpointError: a `.pt` file that is refused or damaged.
        """
        tree = read_normalizer_file(Path(path))
        try:
            return cls(_from_tree(tree))
        except DataError as error:
            where = f"{path}, {error.where}" if error.where else path
            raise DataError(
                error.what, where=where, expected=error.expected, found=error.found, fix=error.fix
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the normalizer without loss, atomically.

        Args:
            path: file name ending in `.npz` or `.json`.

        Raises:
            DataError: another suffix.
            Rdt2Error: the folder does not exist.
        """
        write_normalizer_file(Path(path), _to_tree(self))

    def _operands(self, x: Array, field: str, passthrough: Array | None) -> tuple[Any, Array, Array, Array]:
        entry = self.field(field)
        xp = namespace(x, passthrough)
        x = xp.asarray(as_arrays(x)[1]).astype(np.float32)
        if not _broadcasts_into(entry.scale.shape, x.shape):
            raise DataError(
                "the values do not have the shape of the normalizer",
                where=f"field {field}",
                expected="(..., " + ", ".join(map(str, entry.scale.shape)) + ")",
                found=str(x.shape),
            )
        return xp, x, xp.asarray(entry.scale), xp.asarray(entry.offset)


def _keep(xp: Any, passthrough: Array | None, x: Array, mapped: Array) -> Array:
    """`mapped`, but `x` where the mask is True."""
    if passthrough is None:
        return mapped
    mask = xp.asarray(passthrough)
    if mask.dtype != np.bool_ or not _broadcasts_into(mask.shape, x.shape):
        raise DataError(
            "passthrough must be a boolean mask that fits the values",
            where="passthrough",
            expected=f"bool, broadcasting to {x.shape}",
            found=f"{mask.dtype}, shape {mask.shape}",
        )
    return xp.where(mask, x, mapped)


def _broadcasts_into(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """True when broadcasting `shape` against `target` gives `target`."""
    trailing = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape, trailing, strict=True))


def _checked(name: str, field: FieldNormalizer) -> FieldNormalizer:
    """The field with read-only copies of its arrays, after all checks."""
    if not isinstance(name, str) or not name or "/" in name:
        raise DataError("a field needs a name without '/'", where=f"field {name!r}")

    def check(key: str, value: Any) -> np.ndarray:
        where = f"field {name}, {key}"
        if not isinstance(value, np.ndarray) or not isinstance(field.scale, np.ndarray):
            raise DataError("a normalizer is made of numpy arrays", where=where, found=type(value).__name__)
        array = read_only_copy(value)
        if array.dtype != np.float32 or array.shape != field.scale.shape:
            raise DataError(
                "the arrays of a normalizer must be float32 and of one shape",
                where=where,
                expected=f"float32, shape {field.scale.shape}",
                found=f"{array.dtype}, shape {array.shape}",
            )
        if not np.isfinite(array).all():
            raise DataError("the arrays of a normalizer must be finite", where=where, found=array)
        return array

    scale, offset = check("scale", field.scale), check("offset", field.offset)
    if not scale.all():
        raise DataError(
            "a scale of zero cannot be inverted",
            where=f"field {name}, scale",
            found=f"zero at {np.argwhere(scale == 0).tolist()}",
        )
    stats = {
        f.name: check(f"input_stats/{f.name}", getattr(field.input_stats, f.name)) for f in fields(FieldStatistics)
    }
    return FieldNormalizer(scale, offset, FieldStatistics(**stats))


def _to_tree(normalizer: LinearNormalizer) -> dict[str, dict[str, Any]]:
    """field -> scale, offset, input_stats -> min, max, mean, std: the tree of the published `.pt` files."""
    return {
        name: {
            "scale": field.scale,
            "offset": field.offset,
            "input_stats": {key: getattr(field.input_stats, key) for key in STATISTIC_NAMES},
        }
        for name, field in normalizer.fields.items()
    }


def _from_tree(tree: Any) -> dict[str, FieldNormalizer]:
    """Fields from the tree of `_to_tree`, refusing missing and unknown entries."""
    _require_keys(tree, None, "the fields")
    result = {}
    for name, entry in tree.items():
        _require_keys(entry, ("scale", "offset", "input_stats"), f"field {name}")
        stats = entry["input_stats"]
        _require_keys(stats, STATISTIC_NAMES, f"field {name}, input_stats")
        statistics = FieldStatistics(**{key: stats[key] for key in STATISTIC_NAMES})
        result[name] = FieldNormalizer(entry["scale"], entry["offset"], statistics)
    return result


def _require_keys(entry: Any, keys: tuple[str, ...] | None, where: str) -> None:
    if not isinstance(entry, Mapping) or (keys is not None and set(entry) != set(keys)):
        raise DataError(
            "the content is no normalizer",
            where=where,
            expected="a mapping of names" if keys is None else ", ".join(keys),
            found=", ".join(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__,
        )
