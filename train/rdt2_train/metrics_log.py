"""The log of a run: one JSON line per report, TensorBoard beside it, W&B and trackio where they are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rdt2_jax.errors import DataError, Rdt2Error
from rdt2_jax.io.files import atomic_write, make_folder
from rdt2_train.metrics_sinks import (
    Sink,
    TensorBoardSink,
    TrackioOptions,
    TrackioSink,
    WandbOptions,
    WandbSink,
    require_libraries,
)

LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

_STEP = "step"


@dataclass(frozen=True)
class Resumed:
    """What became of the log of an earlier run.

    Attributes:
        kept: lines up to the step that the run resumes from.
        later: lines dropped because they are of steps that will be taken again.
        damaged: lines at the end dropped because they were not written to their end.
    """

    kept: int
    later: int
    damaged: int

    def __str__(self) -> str:
        dropped = f"{self.later} of later steps and {self.damaged} half-written ones dropped"
        return f"{self.kept} lines of the log kept, {dropped}"


class MetricsLog:
    """A context that writes `out/log.jsonl` and what else is asked for.

    Order: open it, `resume` from the step of the checkpoint (0 for a run that begins), then `write`.

    Args:
        out: folder of the run; made where it is missing.
        tensorboard: scalars under `out/tensorboard`.
        wandb, trackio: None: not used.
        enabled: False in all processes but one: nothing is read, written or imported.

    Raises:
        MissingExtraError: on entering, a library that was asked for is not installed; names it.
    """

    def __init__(
        self,
        out: Path,
        *,
        tensorboard: bool = True,
        wandb: WandbOptions | None = None,
        trackio: TrackioOptions | None = None,
        enabled: bool = True,
    ) -> None:
        self.path = out / LOG_FILE
        self._out, self._enabled = out, enabled
        self._tensorboard, self._wandb, self._trackio = tensorboard, wandb, trackio
        self._opened = ExitStack()
        self._file: BinaryIO | None = None
        self._sinks: list[Sink] | None = None
        self._first_step: int | None = None

    def __enter__(self) -> MetricsLog:
        if self._enabled:
            wanted = {"tensorboardX": self._tensorboard, "wandb": self._wandb, "trackio": self._trackio}
            require_libraries([library for library, options in wanted.items() if options])
            make_folder(self._out)
            self._file = self._opened.enter_context(self._append())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file, self._sinks, self._first_step = None, None, None
        self._opened.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line, to be read by others at once, and hands it to all sinks.

        Args:
            step: optimizer steps taken.
            values: scalars by name. Ones that are not finite become null in the line.

        Raises:
            DataError: a value called "step", or one that is not a scalar.
            Rdt2Error: the log is not open, it holds lines of an earlier run that `resume` has not looked at, or the
                disk refuses the line.
        """
        if not self._enabled:
            return
        file = self._require_open()
        numbers = _numbers(values, where=f"step {step}")
        if self._sinks is None:
            if self._first_step is None and self.path.stat().st_size:
                raise Rdt2Error(
                    "the log holds lines of an earlier run",
                    where=self.path,
                    fix="call resume(step of the checkpoint) first, resume(0) where there is none",
                )
            self._sinks = self._open_sinks()
        line = {_STEP: int(step), **{name: _finite_or_none(number) for name, number in numbers.items()}}
        self._write_line(file, json.dumps(line, allow_nan=False).encode() + b"\n")
        for sink in self._sinks:
            sink.write(step, numbers)

    def resume(self, step: int) -> Resumed:
        """Forgets what an earlier run logged beyond its checkpoint, so that the log becomes that of one run.

        The file is replaced as a whole or not at all. In TensorBoard, what is of later steps is no longer shown.

        Args:
            step: of the checkpoint; 0: everything is forgotten but what was said before the first step.

        Raises:
            DataError: a line that is no line of a log, other than at the end; names it.
            Rdt2Error: the log is not open, or is written already.
        """
        if not self._enabled:
            return Resumed(0, 0, 0)
        self._require_open()
        if self._sinks is not None:
            raise Rdt2Error("the log is written already", where=self.path, fix="call resume before the first write")
        content = self.path.read_bytes()
        lines, damaged = _whole_lines(content, self.path)
        kept = [line for line_step, line in lines if line_step <= step]
        cleaned = b"".join(line + b"\n" for line in kept)
        if cleaned != content:
            self._opened.close()
            with atomic_write(self.path) as file:
                file.write(cleaned)
            self._file = self._opened.enter_context(self._append())
        self._first_step = step + 1
        return Resumed(len(kept), len(lines) - len(kept), damaged)

    def _append(self) -> BinaryIO:
        """Unbuffered: a line is in the file once it is written."""
        return self.path.open("ab", buffering=0)

    def _require_open(self) -> BinaryIO:
        if self._file is None:
            raise Rdt2Error("the log is not open", where=self.path, fix="use it inside `with MetricsLog(...)`")
        return self._file

    def _write_line(self, file: BinaryIO, line: bytes) -> None:
        try:
            written = file.write(line)
            found = None if written == len(line) else f"{written} of {len(line)} bytes fitted"
        except OSError as error:
            found = f"{type(error).__name__}: {error.strerror}"
        if found:
            raise Rdt2Error(
                "a line of the log could not be written",
                where=self.path,
                found=found,
                fix="make room on the disk, then resume: half a line is dropped then",
            )

    def _open_sinks(self) -> list[Sink]:
        """Not before the first write: TensorBoard is told on opening where a run goes on."""
        sinks: list[Sink] = []

        def add(sink: Sink) -> None:
            sinks.append(sink)
            self._opened.callback(sink.close)

        if self._tensorboard:
            add(TensorBoardSink(self._out / TENSORBOARD_FOLDER, self._first_step))
        if self._wandb is not None:
            add(WandbSink(self._out, self._wandb))
        if self._trackio is not None:
            add(TrackioSink(self._out, self._trackio))
        return sinks


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log, in their order; a half-written end is left out.

    Raises:
        DataError: as `MetricsLog.resume`.
    """
    lines, _ = _whole_lines(path.read_bytes(), path)
    return [json.loads(line) for _, line in lines]


def _whole_lines(content: bytes, path: Path) -> tuple[list[tuple[int, bytes]], int]:
    """(step, line without its end) of every whole line, and how many at the end are damaged."""
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    steps = [_step_of(line) for line in lines]
    whole = len(lines)
    while whole and steps[whole - 1] is None:
        whole -= 1
    found: list[tuple[int, bytes]] = []
    for number, (step, line) in enumerate(zip(steps[:whole], lines[:whole], strict=True), start=1):
        if step is None:
            raise DataError(
                "a line in the middle of a log is damaged",
                where=f"{path}, line {number}",
                expected='a JSON object with an integer "step"',
                found=repr(line[:80]),
                fix="remove this line, or move the file away and resume with a new one",
            )
        found.append((step, line))
    return found, len(lines) - whole


def _step_of(line: bytes) -> int | None:
    """None where it is not a line of a log."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    step = values.get(_STEP) if isinstance(values, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _numbers(values: Mapping[str, Any], where: str) -> dict[str, int | float]:
    """Scalars of numpy or jax as Python's."""
    if _STEP in values:
        raise DataError("a value has the name of the step", where=where, found=_STEP, fix="call it something else")
    numbers: dict[str, int | float] = {}
    for name, value in values.items():
        if isinstance(value, int):
            numbers[name] = value
            continue
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                "a value of the log is not a scalar", where=f"{where}, {name}", expected="a number", found=repr(value)
            ) from error
    return numbers


def _finite_or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None
