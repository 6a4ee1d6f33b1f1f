"""The loop that all stages share: batches in, checkpoints and a log out, taken up where it was left.

A run is a folder: `state/` (checkpoints), `log.jsonl`, `tensorboard/`, `run.json` (its configuration). What is random
about a step follows from the run's key and the step's number, and which samples it sees from the stream's position; so
a run that was killed continues as if it had not been, to the bit on the same machine, devices and flags.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import optax
from pydantic import Field

from rdt2_jax.checkpoints import Checkpoints
from rdt2_jax.config import FrozenConfig, PositiveInt
from rdt2_jax.errors import ConfigError
from rdt2_jax.params import PyTree, named_leaves
from rdt2_jax.progress import progress_bar
from rdt2_jax.sharding import Layout
from rdt2_train.flops import StepFlops
from rdt2_train.guard import stop_on_nonfinite
from rdt2_train.metrics_log import MetricsLog
from rdt2_train.metrics_sinks import TrackioOptions, WandbOptions
from rdt2_train.placement import abstract_state, place_batch
from rdt2_train.profiler import ProfilerOptions, StepProfiler
from rdt2_train.step import TrainState, train_step
from rdt2_train.task import Task
from rdt2_train.watch import StepWatch, device_memory, peak_of_devices

Metrics = Mapping[str, float]


class CheckpointsConfig(FrozenConfig):
    """What of a run is kept.

    Attributes:
        every: steps between checkpoints; the last step has one in any case.
        keep_last: newest ones kept.
        keep_best: more of them, by `best_metric`.
        best_metric: of the evaluation.
        best_mode: which of its values are good.
        asynchronous: write while training goes on.
    """

    every: PositiveInt = 1000
    keep_last: PositiveInt = 2
    keep_best: int = Field(default=0, ge=0)
    best_metric: str | None = None
    best_mode: str = "min"
    asynchronous: bool = True


class LogConfig(FrozenConfig):
    """What is written down while a run goes on.

    Attributes:
        every: steps between lines.
        tensorboard: scalars for TensorBoard.
        wandb, trackio: None: not used.
        profile: steps to trace; None: none.
    """

    every: PositiveInt = 20
    tensorboard: bool = True
    wandb: WandbOptions | None = None
    trackio: TrackioOptions | None = None
    profile: ProfilerOptions | None = None


class LoopConfig(FrozenConfig):
    """How a run goes, whatever it trains.

    Attributes:
        steps: of the optimizer.
        accumulation: parts that a batch is worked through in.
        evaluate_every: steps between evaluations; None: never.
        checkpoints, log: see there.
    """

    steps: PositiveInt
    accumulation: PositiveInt = 1
    evaluate_every: PositiveInt | None = None
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    log: LogConfig = LogConfig()


class Batches(Protocol):
    """Batches of this process: trees of numpy arrays, in an order that a state takes up."""

    def __next__(self) -> PyTree: ...

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON; the same on every process."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken."""
        ...


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, on what, and what for.

    Attributes:
        task: the stage.
        optimizer: of its parameters.
        layout: mesh and rules.
        frozen: on the mesh.
        initial: makes the state before the first step, on the mesh.
        batches: of this process.
        batch_size: samples of a step, over all processes.
        tokens: of a sample; 0 where there are none.
        evaluate: metrics of a state, from held-out samples; None: no evaluation.
        sample_flops: for MFU.
    """

    task: Task
    optimizer: optax.GradientTransformation
    layout: Layout
    frozen: PyTree
    initial: Callable[[], TrainState]
    batches: Batches
    batch_size: int
    tokens: int = 0
    evaluate: Callable[[TrainState], Metrics] | None = None
    sample_flops: StepFlops | None = None


def train(run: Run, config: LoopConfig, out: Path) -> TrainState:
    """Trains until `config.steps`, from the latest intact checkpoint under `out` if there is one.

    SIGTERM and SIGINT end the run after the present step, with a checkpoint.

    Raises:
        ConfigError: an evaluation that is wanted and cannot be had, or a metric that it does not give.
        DataError: numbers that are not finite; names where the batch is.
        CheckpointError: a checkpoint that cannot be read or written.
    """
    _check(run, config)
    kept = config.checkpoints
    with (
        Checkpoints(
            out / "state",
            keep_last=kept.keep_last,
            keep_best=kept.keep_best,
            best_metric=kept.best_metric if kept.keep_best else None,
            best_mode=kept.best_mode,
            asynchronous=kept.asynchronous,
        ) as checkpoints,
        MetricsLog(
            out,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            trackio=config.log.trackio,
            enabled=jax.process_index() == 0,
        ) as log,
        StepProfiler(config.log.profile, out) as profiler,
        _stop_signals() as stop,
    ):
        return _Loop(run, config, out, checkpoints, log, profiler, stop).run()


class _Loop:
    """One run while it goes on."""

    def __init__(
        self,
        run: Run,
        config: LoopConfig,
        out: Path,
        checkpoints: Checkpoints,
        log: MetricsLog,
        profiler: StepProfiler,
        stop: threading.Event,
    ) -> None:
        self._run, self._config, self._out = run, config, out
        self._checkpoints, self._log, self._profiler, self._stop = checkpoints, log, profiler, stop
        devices = list(run.layout.mesh.devices.flat)
        self._watch = StepWatch(sample_flops=run.sample_flops, peak_flops=peak_of_devices(devices))
        self._step = jax.jit(
            functools.partial(
                train_step,
                task=run.task,
                optimizer=run.optimizer,
                parts=config.accumulation,
                layout=run.layout,
            ),
            donate_argnums=0,
        )
        self._saved: int | None = None
        self._metrics: Metrics = {}

    def run(self) -> TrainState:
        """All steps that are left."""
        state, first = self._restore_or_begin()
        steps = self._config.steps
        pending: tuple[int, Mapping[str, jax.Array], PyTree] | None = None
        with progress_bar(f"training {self._run.task.name}", steps, "steps") as advance:
            advance(first, status="compiling")
            for step in range(first, steps):
                with self._watch.waiting():
                    batch = next(self._run.batches)
                with self._profiler.step(step):
                    state, report = self._step(state, self._run.frozen, place_batch(batch, self._run.layout))
                self._profiler.done(step, report)
                if pending is not None:  # of the step before, which is done by now: the device is not kept waiting
                    self._guard(*pending)
                pending = (step + 1, report, batch)
                self._watch.step(self._run.batch_size, self._run.tokens * self._run.batch_size)
                stopping = self._stop.is_set()
                if self._is_due(step + 1, stopping):
                    self._guard(*pending)
                    self._after(step + 1, state, report, stopping)
                advance(1, status=self._status(step + 1, report))
                if stopping:
                    break
        self._checkpoints.wait()
        return state

    def _restore_or_begin(self) -> tuple[TrainState, int]:
        target = abstract_state(self._run.task, self._run.optimizer, self._run.layout)
        items = _items(target)
        resumed = self._checkpoints.restore_latest(items)
        if resumed is None:
            self._log.resume(0)
            return self._run.initial(), 0
        self._run.batches.set_state(resumed.metadata["data"])
        self._log.resume(resumed.step)
        self._saved = resumed.step
        self._metrics = resumed.metadata["metrics"]
        step = jax.device_put(np.int32(resumed.step), target.step.sharding)
        found = {name: resumed.items.get(name) for name in ("params", "optimizer", "carried", "key")}
        return TrainState(step=step, **found), resumed.step

    def _is_due(self, done: int, stopping: bool) -> bool:
        config = self._config
        every = [config.log.every, config.checkpoints.every, config.evaluate_every or config.steps]
        return stopping or done == config.steps or any(done % period == 0 for period in every)

    def _after(self, done: int, state: TrainState, report: Mapping[str, jax.Array], stopping: bool) -> None:
        """Log, evaluation and checkpoint of a step."""
        config = self._config
        last = done == config.steps
        line = {name: float(value) for name, value in report.items() if name != "finite"}
        line |= self._watch.report()
        line |= {f"memory_{name}": value for name, value in device_memory().items() if value is not None}
        with self._watch.pausing():
            if config.evaluate_every and (last or done % config.evaluate_every == 0) and self._run.evaluate:
                self._metrics = dict(self._run.evaluate(state))
                line |= {f"evaluation_{name}": value for name, value in self._metrics.items()}
            self._log.write(done, line)
            if last or stopping or done % config.checkpoints.every == 0:
                self._save(done, state)

    def _save(self, done: int, state: TrainState) -> None:
        kept = self._config.checkpoints
        metrics = None
        if kept.keep_best and kept.best_metric is not None:
            worst = np.inf if kept.best_mode == "min" else -np.inf
            metrics = {kept.best_metric: float(self._metrics.get(kept.best_metric, worst))}
        metadata = {"data": self._run.batches.get_state(), "metrics": dict(self._metrics), "stage": self._run.task.name}
        self._checkpoints.save(done, _items(state), metadata, metrics)
        self._saved = done

    def _guard(self, step: int, report: Mapping[str, jax.Array], batch: PyTree) -> None:
        """Stops where a step was not finite."""
        if bool(report["finite"]):
            return
        arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(batch).items()}
        found = {name: float(value) for name, value in report.items()}
        folder, process = self._out / "not_finite", jax.process_index()
        self._checkpoints.wait()
        stop_on_nonfinite(step, found, arrays, folder, process=process, last_checkpoint=self._saved)

    def _status(self, done: int, report: Mapping[str, jax.Array]) -> str:
        return f"loss {float(report['loss']):.4f}" if done % self._config.log.every == 0 else ""


def _items(state: TrainState) -> dict[str, PyTree]:
    """What a checkpoint holds of a state, by name; the step is its own."""
    items = {"params": state.params, "optimizer": state.optimizer, "key": state.key}
    return items if state.carried is None else {**items, "carried": state.carried}


def _check(run: Run, config: LoopConfig) -> None:
    kept = config.checkpoints
    if (config.evaluate_every or kept.keep_best) and run.evaluate is None:
        raise ConfigError("nothing to evaluate on", where="evaluate_every", fix="name held-out data, or leave it out")
    if kept.keep_best and (kept.best_metric is None or config.evaluate_every is None):
        raise ConfigError(
            "the best checkpoints need a metric", where="checkpoints.keep_best", expected="best_metric, evaluate_every"
        )
    shards = run.layout.mesh.shape["data"] * run.layout.mesh.shape["fsdp"]
    if run.batch_size % (shards * config.accumulation):
        raise ConfigError(
            "the batch does not divide over the mesh",
            where="batch_size",
            expected=f"a multiple of {shards} (data x fsdp) x {config.accumulation} (accumulation)",
            found=run.batch_size,
        )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second one of them ends the process as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: Any) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
