"""Traces of a few steps, for TensorBoard's profiler, Perfetto or XProf."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import jax
from pydantic import Field

from rdt2_jax.config import FrozenConfig, PositiveInt
from rdt2_jax.errors import Rdt2Error
from rdt2_jax.io.files import make_folder


class ProfilerOptions(FrozenConfig):
    """Which steps are traced.

    Attributes:
        first_step: number of the first one, counted from the beginning of the whole run; not 0, which compiles.
        steps: how many.
        python: record Python's calls too. They cost time and make traces large.
    """

    first_step: Annotated[int, Field(ge=0)] = 10
    steps: PositiveInt = 3
    python: bool = False

    def covers(self, step: int) -> bool:
        """Whether a step is traced."""
        return self.first_step <= step < self.first_step + self.steps


class StepProfiler:
    """Traces the steps that `options` names, as far as the run takes them; a context.

    A run that resumes in the middle of these steps traces the rest of them, one that ends there what there was.

    Args:
        options: None: nothing is ever traced, and calls cost nothing.
        out: folder of the run; traces go to `out/profile`.
    """

    def __init__(self, options: ProfilerOptions | None, out: Path) -> None:
        self._options, self._folder = options, out / "profile"
        self._tracing = False

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Around the dispatch of a step; starts the trace where it is due.

        Args:
            number: of the step, from 0.

        Raises:
            Rdt2Error: the trace cannot be started, for instance because another one is running.
        """
        if self._options is None or not self._options.covers(number):
            return contextlib.nullcontext()
        if not self._tracing:
            self._start(self._options)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, result: Any) -> None:
        """After a step; ends the trace after the last one, once the device is done with it.

        Args:
            number: of the step.
            result: anything that the step computes; it is waited for where the trace ends.
        """
        if self._tracing and self._options is not None and not self._options.covers(number + 1):
            jax.block_until_ready(result)
            self._stop()

    def _start(self, options: ProfilerOptions) -> None:
        make_folder(self._folder)
        details = jax.profiler.ProfileOptions()
        details.python_tracer_level = int(options.python)
        try:
            jax.profiler.start_trace(self._folder, profiler_options=details)
        except RuntimeError as error:
            raise Rdt2Error(
                "the profiler cannot be started",
                where=self._folder,
                found=str(error),
                fix="stop the other trace, or train without profiler options",
            ) from error
        self._tracing = True

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
