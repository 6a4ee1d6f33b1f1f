"""The conversion of a source into a dataset: plan, make what is missing, finish. It may be stopped at any time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rdt2_data.converters.failures import Failures, disk_errors_stop
from rdt2_data.converters.manifest import (
    ENTRIES,
    TOKENS,
    ShardEntry,
    image_notes,
    is_ours,
    read_entry,
    remove_leftovers,
    remove_manifest,
    shard_name,
    write_dataset,
)
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.plan import Plan, Source, read_plan, refuse_kept_problems, source_settings, write_plan
from rdt2_data.converters.planning import PARTIAL_FILE, make_plan
from rdt2_data.converters.recording import RecordingReader
from rdt2_data.converters.runners import LocalRunner, Run, Runner, Shared
from rdt2_data.converters.shard import ShardJob
from rdt2_data.converters.tokens import Tokenizing
from rdt2_data.problems import SampleError, Tally
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import make_folder
from rdt2_jax.progress import progress_bar


@dataclass(frozen=True, eq=False)
class ConversionReport:
    """What came of a conversion.

    Attributes:
        samples, shards, bytes, seconds: of the whole dataset.
        planned: samples that the plan foresaw.
        made: shards made by this run; the others were finished before.
        instructions: number of sentences.
        gripper_unmeasured: samples behind which a width was not measured.
        left_out: edge of the recordings -> number of frames, see `chunks`.
        notes: episode -> what its reader had to say.
        image_notes: what there is to say about the shapes of the source images.
        problems: all of them, by reason.
    """

    samples: int
    shards: int
    bytes: int
    seconds: float
    planned: int
    made: int
    instructions: int
    gripper_unmeasured: int
    left_out: dict[str, int]
    notes: dict[str, str]
    image_notes: list[str]
    problems: Tally

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"problems": self.problems.report()}


def convert(
    reader: RecordingReader,
    destination: str | os.PathLike[str],
    options: ConvertOptions,
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizing: Tokenizing | None = None,
    runner: Runner | None = None,
    hide: str = "",
    where: object = "the source",
    verify: bool = False,
) -> ConversionReport:
    """Turns recordings into a dataset of shards, or goes on with a conversion that was stopped.

    Args:
        reader: the source.
        destination: folder of the dataset; it is created with its parents.
        options: what is in the dataset.
        settings: format and options of the reader (JSON), compared when a conversion goes on, together with those that
            the reader itself names.
        tokenizing: adds action tokens.
        runner: who does the work, by default all cores of this machine.
        hide: folder of the source, left away from paths in messages that become part of the dataset.
        where: name of the source, for messages.
        verify: read finished shards again and compare their checksums; by default their size is enough.

    Raises:
        DataError: a destination that cannot be created, is in use, of another conversion or not ours; a source without
            samples; shards that could not be made, named one by one.
        StoppedError: a disk that is full, cannot be written to, or is broken.
        SampleError: the first problem, if the options say strict; those of earlier starts as DataError.
    """
    folder = Path(destination).absolute()
    _check_place(folder)
    named = {**(settings or {}), **getattr(reader, "settings", dict)()}
    source = Source(
        fingerprint=reader.fingerprint(),
        settings=source_settings(named, hide),
        options=options,
        tokenizer=None if tokenizing is None else tokenizing.fingerprint(),
    )
    make_folder(folder)
    shared = Shared(reader, options, folder, hide)
    with disk_errors_stop(folder), _sole_use_of(folder), (runner or LocalRunner()).start(shared) as run:
        plan = read_plan(folder, source)  # before anything is removed: the folder may be of another conversion
        remove_leftovers(folder)
        plan = plan or _new_plan(shared, source, run, where)
        (folder / PARTIAL_FILE).unlink(missing_ok=True)
        entries = _finished(folder, plan, verify)
        if options.strict:
            for problems in (plan.problems, *(entry.problems for entry in entries.values())):
                refuse_kept_problems(problems, folder)
        made = _make_missing(shared, plan, entries, tokenizing, run)
        finished = [entries[index] if index in entries else made[index] for index in range(plan.num_shards)]
        problems = write_dataset(folder, plan, finished)
    return ConversionReport(
        samples=sum(entry.samples for entry in finished),
        shards=sum(entry.samples > 0 for entry in finished),
        bytes=sum(entry.bytes for entry in finished),
        seconds=round(sum(entry.seconds for entry in finished), 3),
        planned=plan.num_samples,
        made=len(made),
        instructions=len(plan.instructions),
        gripper_unmeasured=sum(entry.gripper_unmeasured for entry in finished),
        left_out=plan.left_out(),
        notes=plan.notes(),
        image_notes=image_notes(plan, finished),
        problems=problems,
    )


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError("the destination is a file", where=folder, expected="a folder")
    if folder.is_dir() and not is_ours(folder):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        expected = "no folder, an empty one, or one with plan.json of an earlier start"
        what = "the destination is not empty, and not of a conversion"
        raise DataError(what, where=folder, expected=expected, found=found, fix="choose another folder")


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


def _new_plan(shared: Shared, source: Source, run: Run, where: object) -> Plan:
    def bar(episodes: int) -> AbstractContextManager[Callable[..., None]]:
        return progress_bar("planning", episodes, "episodes")

    plan = make_plan(shared.reader, source, shared.folder, run, where=where, bar=bar)
    write_plan(shared.folder, plan)
    return plan


def _finished(folder: Path, plan: Plan, verify: bool) -> dict[int, ShardEntry]:
    """Entries of the shards that need not be made."""
    entries = {}
    with progress_bar("verifying" if verify else "looking", plan.num_shards, "shards") as advance:
        for index in range(plan.num_shards):
            entry = read_entry(folder, index, verify=verify)
            if entry is not None:
                entries[index] = entry
            advance(1)
    return entries


def _make_missing(
    shared: Shared, plan: Plan, entries: Mapping[int, ShardEntry], tokenizing: Tokenizing | None, run: Run
) -> dict[int, ShardEntry]:
    """Entries of the shards made now.

    Raises:
        SampleError: the first problem, if strict.
        DataError: shards that failed, once all others are made, or when too many failed in a row.
    """
    missing = [index for index in range(plan.num_shards) if index not in entries]
    if not missing:
        return {}
    remove_manifest(shared.folder)
    for name in (ENTRIES, *([TOKENS] if tokenizing else [])):
        make_folder(shared.folder / name)
    made: dict[int, ShardEntry] = {}
    failures = Failures(plan.num_shards, len(entries))
    with (
        closing(run(_jobs(shared, plan, missing, tokenizing))) as outcomes,
        progress_bar("converting", plan.num_shards, "shards") as advance,
    ):
        advance(len(entries))
        for job, outcome in outcomes:
            if isinstance(outcome, ShardEntry):
                made[job.index] = outcome
                failures.success()
            elif shared.options.strict and isinstance(outcome, SampleError):
                raise outcome
            else:
                failures.failure(job.name, outcome)
            advance(1, f"{len(failures)} failed" if failures else "")
    failures.stop()
    return made


def _jobs(shared: Shared, plan: Plan, missing: Sequence[int], tokenizing: Tokenizing | None) -> Iterator[ShardJob]:
    """The jobs of the missing shards; tokens are computed when a job is drawn."""
    shards = plan.shards()
    for index in missing:
        tokens = None
        if tokenizing is not None:
            tokens = shared.folder / TOKENS / f"{shard_name(index)}.npy"
            if not tokens.is_file():
                tokenizing.write(tokens, shared.reader, shards[index], shared.options)
        first = index * shared.options.samples_per_shard
        yield ShardJob(index, shards[index], plan.keys(shards[index]), first, tokens)
