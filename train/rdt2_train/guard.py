"""Stopping where numbers are no longer numbers, with the batch kept that made them so."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rdt2_jax.errors import DataError, Rdt2Error
from rdt2_jax.io.files import atomic_write, make_folder

FINITE = "finite"
"""Entry of a step's report that says whether loss and gradient are numbers (`step.train_step`)."""


def save_offending_batch(
    folder: Path,
    step: int,
    batch: Mapping[str, np.ndarray],
    report: Mapping[str, float],
    *,
    process: int = 0,
) -> Path:
    """Keeps a batch: `step_XXXXXXXX_process_X.npz`, and a `.json` of the same name that describes it.

    The `.npz` is read with `numpy.load(..., allow_pickle=False)`. Floats that numpy does not know (bfloat16) are
    written as float32, which holds them exactly; arrays that only pickle could write are left out. The `.json` says
    both, and holds the report of the step and, array by array, shape, dtype, range, and how many values are not finite.

    Args:
        folder: made where it is missing.
        step: the step that the batch was used in.
        batch: arrays of this process, by name.
        report: what the step reported.
        process: number of this process; every one keeps its own part of the batch.

    Returns:
        The `.npz`.

    Raises:
        Rdt2Error: the folder cannot be made.
        OSError: the disk refuses.
    """
    make_folder(folder)
    path = folder / f"step_{step:08d}_process_{process}.npz"
    arrays = {name: np.asarray(values) for name, values in batch.items()}
    left_out = {name: str(array.dtype) for name, array in arrays.items() if array.dtype.hasobject}
    kept = {name: array for name, array in arrays.items() if name not in left_out}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in kept.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _as_numpy_knows(array), allow_pickle=False)
    description = {
        "step": step,
        "process": process,
        "report": {name: _for_json(value) for name, value in report.items()},
        "arrays": {name: _describe(array) for name, array in kept.items()},
        "left_out": left_out,
    }
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(json.dumps(description, indent=2, allow_nan=False).encode() + b"\n")
    return path


def not_finite(report: Mapping[str, Any]) -> list[str]:
    """Names of a report's entries that are NaN or infinite, and `finite` where that is False."""
    return [
        name
        for name, value in report.items()
        if not math.isfinite(float(value)) or (name == FINITE and not bool(value))
    ]


def stop_on_nonfinite(
    step: int,
    report: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    folder: Path,
    *,
    process: int = 0,
    last_checkpoint: int | None = None,
) -> None:
    """Returns where all of a report is finite; else keeps the batch and stops.

    Args:
        step: of the report.
        report: scalars of the step, on the host.
        batch: that of the same step.
        folder: for the batch, see `save_offending_batch`.
        process: number of this process.
        last_checkpoint: step of the last checkpoint, which the message names; None: there is none.

    Raises:
        DataError: names the step, what is not finite, where the batch is (or why it could not be kept), and what to do.
    """
    bad = not_finite(report)
    if not bad:
        return
    try:
        kept = f"the batch is in {save_offending_batch(folder, step, batch, report, process=process)}"
    except (OSError, Rdt2Error) as error:  # the reason to stop must not be lost behind this one
        kept = f"the batch could not be kept: {error}"
    spoilt = sorted(name for name, values in batch.items() if _count_not_finite(np.asarray(values)))
    cause = f"; in the batch itself: {', '.join(spoilt)}" if spoilt else "; the batch itself is finite"
    resume = "start again" if last_checkpoint is None else f"resume from the checkpoint of step {last_checkpoint}"
    remedy = "leave out the examples that hold them" if spoilt else "a lower learning rate, or a lower clip"
    raise DataError(
        "training met numbers that are not finite",
        where=f"step {step}; {kept}",
        found=", ".join(f"{name} = {_for_json(report[name])}" for name in bad) + cause,
        fix=f"{resume} with {remedy}" if not spoilt else f"{remedy}, then {resume}",
    )


def _as_numpy_knows(array: np.ndarray) -> np.ndarray:
    """bfloat16 and other floats of few bits as float32; everything else as it is."""
    return array.astype(np.float32) if array.dtype.kind == "V" and array.dtype.names is None else array


def _describe(array: np.ndarray) -> dict[str, Any]:
    values = _as_numpy_knows(array)
    description: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if values.dtype != array.dtype:
        description["written_as"] = str(values.dtype)
    if values.dtype.kind in "iuf" and values.size:
        finite = values[np.isfinite(values)]
        description["not_finite"] = _count_not_finite(array)
        if finite.size:
            description["smallest"], description["largest"] = finite.min().item(), finite.max().item()
    return description


def _count_not_finite(array: np.ndarray) -> int:
    values = _as_numpy_knows(array)
    return int(values.size - np.isfinite(values).sum()) if values.dtype.kind in "fc" else 0


def _for_json(value: Any) -> Any:
    """A number as JSON has it; "nan", "inf" and "-inf" as words."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)
