"""Where metrics go besides the run's own log: TensorBoard, and W&B or trackio for those who use them.

Every sink has `write(step, values)` and `close()`. Numbers that are not finite are handed on as they are.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from rdt2_jax.config import FrozenConfig
from rdt2_jax.errors import MissingExtraError, missing_extra
from rdt2_jax.io.files import atomic_write

_FLUSH_SECONDS = 10
"""What a killed run may lose in TensorBoard; `log.jsonl` loses nothing."""

WANDB_ID_FILE = "wandb_id.txt"


class WandbOptions(FrozenConfig):
    """A run in Weights & Biases.

    Attributes:
        project: it belongs to.
        entity: user or team; None: the account's own.
        name: shown; None: that of the folder.
        group: of runs.
        mode: "offline" writes to the folder of the run and sends nothing.
    """

    project: str
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrackioOptions(FrozenConfig):
    """A run in trackio.

    Attributes:
        project: it belongs to.
        name: of the run, under which it is continued; None: that of the folder.
        space_id: of a Hugging Face Space to show it; None: on this machine alone.
    """

    project: str
    name: str | None = None
    space_id: str | None = None


class Sink(Protocol):
    """Takes metrics of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Scalars under `folder`.

    Args:
        folder: of the event files; each sink writes one of its own.
        first_step: TensorBoard forgets what older files say of this step and later ones; None: it forgets nothing.

    Raises:
        MissingExtraError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        writer = _library("tensorboardX")
        self._writer = writer.SummaryWriter(
            logdir=str(folder),
            purge_step=first_step,
            flush_secs=_FLUSH_SECONDS,
            # the library names files by the second; two runs within one would write over each other
            filename_suffix=f".{secrets.token_hex(4)}",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Writes what is still in memory."""
        self._writer.close()


class WandbSink:
    """A run in W&B, continued where `out` has one already.

    The step is a metric of its own with which all others are drawn: W&B's own counter cannot go back to the last
    checkpoint, and would drop what a resumed run says.

    Args:
        out: folder of the run.
        options: see there.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, out: Path, options: WandbOptions) -> None:
        wandb = _library("wandb")
        id_file = out / WANDB_ID_FILE
        if not id_file.exists():
            with atomic_write(id_file) as file:
                file.write(secrets.token_hex(8).encode())
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name or out.resolve().name,
            group=options.group,
            mode=options.mode,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(out),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """All values of a step at once."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


class TrackioSink:
    """A run in trackio, continued where there is one of its name.

    Args:
        out: folder of the run.
        options: see there.

    Raises:
        MissingExtraError: trackio is not installed.
    """

    def __init__(self, out: Path, options: TrackioOptions) -> None:
        trackio = _library("trackio")
        self._run = trackio.init(
            project=options.project,
            name=options.name or out.resolve().name,
            space_id=options.space_id,
            resume="allow",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """All values of a step at once."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


def require_libraries(names: Iterable[str]) -> None:
    """Imports libraries by name, so that what is missing shows before a run and not after its first steps.

    Raises:
        MissingExtraError: one is not installed; says how to install it.
    """
    for name in names:
        _library(name)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        if name == "tensorboardX":
            raise missing_extra(name, "train", "the log for TensorBoard") from error
        # no extra brings the others: they are a matter of taste
        raise MissingExtraError(
            f"a log in {name} needs the library '{name}', which is not installed",
            fix=f"pip install {name}, or leave it out of the log",
        ) from error
