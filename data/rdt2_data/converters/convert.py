"""The conversion of a source into a dataset: plan, make what is missing, finish. It may be stopped at any time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdt2_data.converters.manifest import (
    ENTRIES,
    TOKENS,
    ShardEntry,
    is_ours,
    read_entry,
    remove_leftovers,
    shard_name,
    write_dataset,
)
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.plan import Plan, Source, make_plan, read_plan, write_plan
from rdt2_data.converters.recording import RecordingReader
from rdt2_data.converters.runners import LocalRunner, Runner
from rdt2_data.converters.shard import ShardJob, hidden_paths, make_shard
from rdt2_data.converters.tokens import Tokenizing
from rdt2_data.problems import SampleError, Tally
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import make_folder
from rdt2_jax.progress import progress_bar

__all__ = ["ConversionReport", "convert", "make_shard"]


@dataclass(frozen=True, eq=False)
class ConversionReport:
    """What came of a conversion.

    Attributes:
        samples, shards, bytes, seconds: of the whole dataset.
        planned: samples that the plan foresaw.
        made: shards made by this run; the others were finished before.
        instructions: number of sentences.
        left_out: edge of the recordings -> number of frames, see `chunks`.
        notes: episode -> what its reader had to say.
        problems: all of them, by reason.
    """

    samples: int
    shards: int
    bytes: int
    seconds: float
    planned: int
    made: int
    instructions: int
    left_out: dict[str, int]
    notes: dict[str, str]
    problems: Tally

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        names = ("samples", "shards", "bytes", "seconds", "planned", "made", "instructions", "left_out", "notes")
        return {name: getattr(self, name) for name in names} | {"problems": self.problems.report()}


def convert(
    reader: RecordingReader,
    destination: str | os.PathLike[str],
    options: ConvertOptions,
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizing: Tokenizing | None = None,
    runner: Runner | None = None,
    hide: str = "",
) -> ConversionReport:
    """Turns recordings into a dataset of shards, or goes on with a conversion that was stopped.

    Args:
        reader: the source.
        destination: folder of the dataset; its parent must exist.
        options: what is in the dataset.
        settings: format and options of the reader (JSON), compared when a conversion goes on.
        tokenizing: adds action tokens.
        runner: who makes the shards, by default all cores of this machine.
        hide: folder of the source, left away from paths in messages that become part of the dataset.

    Raises:
        DataError: a destination that is missing, in use, of another conversion or not ours; a source without samples;
            shards that could not be made, named one by one (the others are finished).
        SampleError: the first problem, if the options say strict.
    """
    folder = _prepare(Path(destination))
    with _sole_use_of(folder):
        remove_leftovers(folder)
        source = Source(
            fingerprint=reader.fingerprint(),
            settings=dict(settings or {}),
            options=options,
            tokenizer=None if tokenizing is None else tokenizing.fingerprint(),
        )
        plan = read_plan(folder, source) or _new_plan(folder, reader, source, hide)
        for name in (ENTRIES, *([TOKENS] if tokenizing else [])):
            make_folder(folder / name)
        entries = {index: read_entry(folder, index) for index in range(plan.num_shards)}
        missing = [index for index, entry in entries.items() if entry is None]
        jobs = _jobs(folder, plan, missing, reader, options, tokenizing, hide)
        made = _run(runner or LocalRunner(), jobs, plan.num_shards, len(missing), strict=options.strict)
        finished = [entry for entry in (entries | made).values() if entry is not None]
        problems = write_dataset(folder, plan, finished)
    return ConversionReport(
        samples=sum(entry.samples for entry in finished),
        shards=sum(entry.samples > 0 for entry in finished),
        bytes=sum(entry.bytes for entry in finished),
        seconds=round(sum(entry.seconds for entry in finished), 3),
        planned=plan.num_samples,
        made=len(made),
        instructions=len(plan.instructions),
        left_out=plan.left_out(),
        notes=plan.notes(),
        problems=problems,
    )


def _prepare(folder: Path) -> Path:
    folder = folder.absolute()
    fix = "create its parent, or choose another place"
    if not folder.parent.is_dir():
        expected = f"an existing folder {folder.parent}"
        raise DataError("the destination cannot be created", where=folder, expected=expected, fix=fix)
    if folder.exists() and not folder.is_dir():
        raise DataError("the destination is a file", where=folder, expected="a folder")
    make_folder(folder)
    if not is_ours(folder):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        expected = "no folder, an empty one, or one with plan.json of an earlier start"
        what = "the destination is not empty, and not of a conversion"
        raise DataError(what, where=folder, expected=expected, found=found, fix="choose another folder")
    return folder


@contextmanager
def _sole_use_of(folder: Path) -> Iterator[None]:
    """Keeps a second conversion out of the folder; the system takes the lock back when this process ends, however."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what, fix = "another conversion is writing into this folder", "wait for it, or end it"
            raise DataError(what, where=folder, fix=fix) from error
        yield
    finally:
        os.close(descriptor)


def _new_plan(folder: Path, reader: RecordingReader, source: Source, hide: str) -> Plan:
    tally = Tally(strict=source.options.strict)
    with progress_bar("planning", len(reader.episodes()), "episodes") as advance:
        plan = make_plan(reader, source, tally, advance)
    plan = plan.model_copy(update={"problems": hidden_paths(plan.problems, hide)})
    write_plan(folder, plan)
    return plan


def _jobs(
    folder: Path,
    plan: Plan,
    missing: Sequence[int],
    reader: RecordingReader,
    options: ConvertOptions,
    tokenizing: Tokenizing | None,
    hide: str,
) -> Iterator[ShardJob]:
    """The jobs of the missing shards; tokens are computed when a job is drawn."""
    keys = {sentence: str(key) for key, sentence in enumerate(plan.instructions)}
    shards = plan.shards()
    for index in missing:
        tokens = None
        if tokenizing is not None:
            tokens = folder / TOKENS / f"{shard_name(index)}.npy"
            if not tokens.is_file():
                tokenizing.write(tokens, reader, shards[index], options)
        first = index * options.samples_per_shard
        yield ShardJob(index, shards[index], keys, first, reader, options, folder, hide, tokens)


def _run(runner: Runner, jobs: Iterator[ShardJob], shards: int, missing: int, *, strict: bool) -> dict[int, ShardEntry]:
    """Entries of the shards made now.

    Raises:
        SampleError: the first problem, if strict.
        DataError: shards that failed, once all others are made.
    """
    made: dict[int, ShardEntry] = {}
    failures: dict[str, BaseException] = {}
    outcomes = runner.run(jobs)
    try:
        with progress_bar("converting", shards, "shards") as advance:
            advance(shards - missing)
            for job, outcome in outcomes:
                if isinstance(outcome, ShardEntry):
                    made[job.index] = outcome
                elif strict and isinstance(outcome, SampleError):
                    raise outcome
                else:
                    failures[job.name] = outcome
                advance(1, _status(len(failures)))
    finally:
        close: Callable[[], None] = getattr(outcomes, "close", lambda: None)
        close()
    if failures:
        lines = [f"\n    {name}: {type(error).__name__}: {error}" for name, error in sorted(failures.items())[:20]]
        first = next(iter(failures.values()))
        raise DataError(
            f"{len(failures)} of {shards} shards could not be made; the others are finished",
            found="".join(lines),
            fix="start the same command again: it makes only what is missing",
        ) from first
    return made


def _status(failures: int) -> str:
    return f"{failures} failed" if failures else ""
