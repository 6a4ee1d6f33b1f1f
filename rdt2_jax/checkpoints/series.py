"""The checkpoints of one training run: numbered by step, pruned as they age, resumed from the newest intact one."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from rdt2_jax.checkpoints.envelope import DamagedCheckpointError, read_metadata
from rdt2_jax.checkpoints.reading import restore
from rdt2_jax.checkpoints.writing import save_arguments, write_failures
from rdt2_jax.errors import CheckpointError
from rdt2_jax.params import PyTree

_DAMAGED_PREFIX = "damaged-"


class DamagedCheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over in favour of an older one."""


class Resumed(NamedTuple):
    """What a run continues from: the step, the restored items by name, and the metadata saved with them."""

    step: int
    items: dict[str, PyTree]
    metadata: dict[str, Any]


class Checkpoints:
    """Checkpoints `<root>/<step>`, each readable by `rdt2_jax.checkpoints`; Orbax's manager does the work.

    A half-written checkpoint never bears a step's name; what an interrupted run left behind is removed
    after opening, in the background, and before the next save.
    Use it as a context manager, or call `close`: a save may still be under way.

    Args:
        root: folder of the series; created if missing.
        keep_last: how many of the newest checkpoints stay.
        keep_best: how many more stay because of `best_metric`.
        best_metric: name in the `metrics` given to `save`.
        best_mode: "min" or "max", which values of the metric are good.
        asynchronous: write in the background; `save` returns once the values are copied.

    Raises:
        CheckpointError: contradictory arguments.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        keep_last: int,
        keep_best: int = 0,
        best_metric: str | None = None,
        best_mode: str = "min",
        asynchronous: bool = False,
    ) -> None:
        if keep_last < 1 or keep_best < 0 or best_mode not in ("min", "max"):
            raise CheckpointError(
                "a checkpoint series cannot be kept like this",
                where=root,
                expected="keep_last >= 1, keep_best >= 0, best_mode 'min' or 'max'",
                found=f"keep_last={keep_last}, keep_best={keep_best}, best_mode={best_mode!r}",
            )
        if (keep_best > 0) != (best_metric is not None):
            raise CheckpointError("keep_best and best_metric belong together", where=root)
        self.root = Path(os.path.abspath(root))
        self.root.mkdir(parents=True, exist_ok=True)
        self._best_metric = best_metric
        self._manager = ocp.CheckpointManager(
            epath.Path(self.root),
            options=_options(keep_last, keep_best, best_metric, best_mode, asynchronous),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves one step and removes those that need not be kept any more.

        Args:
            step: training step, later than all that are there.
            items, metadata: as in the function `save`.
            metrics: the value of `best_metric`, if the series has one.

        Raises:
            CheckpointError: the step is not new, `metrics` are not those of the series, an item cannot be stored, or
                writing failed (this save, or the one before it that ran in the background).
        """
        latest = self._manager.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                "a checkpoint of this step or a later one exists",
                where=self.root,
                expected=f"a step after {latest}",
                found=step,
                fix="resume from it with restore_latest, or use another folder",
            )
        wanted = [] if self._best_metric is None else [self._best_metric]
        if sorted(metrics or {}) != wanted:
            raise CheckpointError(
                "metrics must be exactly what decides which checkpoints are best",
                where=f"step {step}",
                expected=wanted,
                found=sorted(metrics or {}),
                fix="other values belong into the metadata",
            )
        arguments = save_arguments(items, metadata or {})
        with write_failures(self.directory(step)):
            self._manager.save(step, args=arguments, metrics=None if metrics is None else dict(metrics), force=True)

    def steps(self) -> tuple[int, ...]:
        """Steps that have a complete checkpoint, oldest first."""
        self.wait()
        return tuple(sorted(self._manager.all_steps()))

    def best_step(self) -> int | None:
        """The step with the best metric; None while there is no checkpoint.

        Raises:
            CheckpointError: the series tracks no metric.
        """
        if self._best_metric is None:
            raise CheckpointError("this series tracks no best metric", where=self.root)
        self.wait()
        return self._manager.best_step()

    def directory(self, step: int) -> Path:
        """Folder of one step, to be read with `rdt2_jax.checkpoints`."""
        return self.root / str(step)

    def restore_latest(self, targets: Mapping[str, PyTree]) -> Resumed | None:
        """Restores the newest checkpoint that is intact.

        One that is damaged is renamed `damaged-<step>`, with a warning, and the one before it is tried. One that is
        intact but not what `targets` ask for is an error: an older one would not fit either.

        Args:
            targets: item name -> target, as in `restore`.

        Returns:
            None if there is no checkpoint at all.

        Raises:
            CheckpointError: the newest intact checkpoint does not fit `targets`.
            DamagedCheckpointError: no checkpoint is intact; or one is damaged and several processes share the run,
                which could then disagree about where to continue.
        """
        failures: list[str] = []
        for step in reversed(self.steps()):
            directory = self.directory(step)
            try:
                items = {item: restore(directory, item, target) for item, target in targets.items()}
                return Resumed(step, items, read_metadata(directory))
            except DamagedCheckpointError as error:
                if jax.process_count() > 1:
                    raise
                failures.append(f"step {step}: {error}")
                self._set_aside(step, error)
        if failures:
            raise DamagedCheckpointError("no checkpoint is intact", where=self.root, found="\n".join(failures))
        return None

    def wait(self) -> None:
        """Blocks until background saves are complete.

        Raises:
            CheckpointError: one of them failed.
        """
        with write_failures(self.root):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for background saves and releases Orbax's threads.

        Raises:
            CheckpointError: a background save failed.
        """
        with write_failures(self.root):
            self._manager.close()

    def _set_aside(self, step: int, error: DamagedCheckpointError) -> None:
        aside = self.root / f"{_DAMAGED_PREFIX}{step}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.root / f"{_DAMAGED_PREFIX}{step}-{number}"
        os.rename(self.directory(step), aside)
        self._manager.reload()
        warnings.warn(f"{error}\n  set aside as: {aside}", DamagedCheckpointWarning, stacklevel=3)


def _options(
    keep_last: int, keep_best: int, best_metric: str | None, best_mode: str, asynchronous: bool
) -> ocp.CheckpointManagerOptions:
    policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(keep_last)]
    best_fn = None if best_metric is None else operator.itemgetter(best_metric)
    if best_fn is not None:
        policies.append(
            checkpoint_managers.BestN(get_metric_fn=best_fn, reverse=best_mode == "min", n=keep_best),
        )
    return ocp.CheckpointManagerOptions(
        best_fn=best_fn,
        best_mode=best_mode,
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        enable_async_checkpointing=asynchronous,
        cleanup_tmp_directories=True,
    )
