"""Making the plan: every episode is looked at by whoever works, and kept at once, so that a kill costs little."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pydantic

from rdt2_data.converters.chunks import select_frames
from rdt2_data.converters.messages import hidden_paths, hidden_text
from rdt2_data.converters.plan import Plan, PlannedEpisode, Source, refuse_kept_problems
from rdt2_data.converters.recording import EpisodeRef, RecordingReader
from rdt2_data.converters.runners import Run, Shared
from rdt2_data.problems import SampleError, Tally
from rdt2_jax.config import FrozenConfig
from rdt2_jax.errors import DataError, Rdt2Error

PARTIAL_FILE = "plan.partial.jsonl"
"""Episodes as they are planned: first what the plan is for, then one line for each. Gone once there is a plan."""

_SYNC_S = 1.0
"""Lines written within the last second may be lost with the machine (not with the process)."""


class Draft(FrozenConfig):
    """What was found in one episode.

    Attributes:
        episode: without its `instructions`, whose keys are known only with all episodes before it.
        sentences: of its samples, in order of first appearance.
        problems: as `Tally.report` gives them.
    """

    episode: PlannedEpisode
    sentences: tuple[str, ...]
    problems: dict[str, Any]


@dataclass(frozen=True)
class EpisodeJob:
    """Planning one episode."""

    reference: EpisodeRef

    @property
    def name(self) -> str:
        """For messages."""
        return f"episode {self.reference.name}"

    def perform(self, shared: Shared) -> Draft:
        """Reads the tracks of the episode and decides what becomes of them.

        Raises:
            SampleError: the first problem, if the options say strict.
        """
        reader, reference = shared.reader, self.reference
        tally = Tally(strict=shared.options.strict)
        selection, sentences = None, ()
        try:
            recording = reader.load(reference)
            selection = select_frames(recording, shared.options.chunks, tally)
            positions = dict.fromkeys(selection.instruction.tolist())
            sentences = tuple(dict.fromkeys(recording.instructions[position][1] for position in positions))
        except SampleError as problem:
            tally.add(problem)
        notes: Mapping[str, str] = getattr(reader, "notes", {})
        note = notes.get(reference.name)
        episode = PlannedEpisode(
            name=reference.name,
            index=reference.index,
            samples=0 if selection is None else len(selection),
            frame_s=0.0 if selection is None else selection.frame_s,
            left_out={} if selection is None else selection.left_out,
            note=None if note is None else hidden_text(note, shared.hide),
        )
        return Draft(episode=episode, sentences=sentences, problems=hidden_paths(tally.report(), shared.hide))


def make_plan(
    reader: RecordingReader,
    source: Source,
    folder: Path,
    run: Run,
    *,
    where: object = "the source",
    bar: Callable[[int], Any],
) -> Plan:
    """Plans every episode that an earlier start has not.

    Args:
        reader: the source.
        source: what the plan is for.
        folder: the destination, in which planned episodes are kept until the plan is complete.
        run: does the work.
        where: name of the source, for messages.
        bar: context manager for this many episodes, which gives a function to call after each.

    Raises:
        DataError: two episodes of one name, an episode that fails, or not a single sample in all of them.
        SampleError: the first problem, for strict options.
    """
    references = reader.episodes()
    twice = [name for name, count in Counter(reference.name for reference in references).items() if count > 1]
    if twice:
        raise DataError("two episodes have the same name", where=where, found=", ".join(twice[:5]))
    with _Kept(folder / PARTIAL_FILE, source) as kept, bar(len(references)) as advance:
        drafts = {name: draft for name, draft in kept.drafts.items() if draft.episode.name == name}
        missing = [reference for reference in references if not _is_of(drafts.get(reference.name), reference)]
        if source.options.strict:
            for draft in drafts.values():
                refuse_kept_problems(draft.problems, folder)
        advance(len(references) - len(missing))
        with closing(run(EpisodeJob(reference) for reference in missing)) as outcomes:
            for job, outcome in outcomes:
                if isinstance(outcome, Rdt2Error):
                    raise outcome
                if isinstance(outcome, BaseException):
                    found = f"{type(outcome).__name__}: {outcome}"
                    raise DataError(f"{job.name} could not be planned", where=where, found=found) from outcome
                drafts[job.reference.name] = outcome
                kept.add(outcome)
                advance(1)
    return _assemble(source, [drafts[reference.name] for reference in references], where)


def _is_of(draft: Draft | None, reference: EpisodeRef) -> bool:
    return draft is not None and draft.episode.index == reference.index


def _assemble(source: Source, drafts: list[Draft], where: object) -> Plan:
    """The plan, the same in whatever order the episodes were planned."""
    tally, keys = Tally(), dict[str, int]()
    episodes = []
    for draft in drafts:
        own = tuple(keys.setdefault(sentence, len(keys)) for sentence in draft.sentences)
        episodes.append(draft.episode.model_copy(update={"instructions": own}))
        tally.merge(draft.problems)
    plan = Plan(source=source, episodes=tuple(episodes), instructions=tuple(keys), problems=tally.report())
    if not plan.num_samples:
        edges = [f"{count} frames {edge}" for edge, count in plan.left_out().items()]
        found = "\n".join([f"{len(episodes)} episodes", *edges, tally.text()]).strip()
        expected = "a frame with 0.8 s of motion"
        raise DataError("the source gives not a single sample", where=where, expected=expected, found=found)
    return plan


class _Kept:
    """The file of planned episodes. What it holds for another source or other options is forgotten.

    A last line that was cut off, and whatever follows a line that cannot be read, is cut away.
    """

    def __init__(self, path: Path, source: Source) -> None:
        self.drafts: dict[str, Draft] = {}
        self._path = path
        self._header = json.dumps(source.compared(), sort_keys=True).encode() + b"\n"
        self._synced_s = time.monotonic()

    def __enter__(self) -> _Kept:
        self._file: BinaryIO = open(self._path, "r+b" if self._path.exists() else "x+b")
        good = self._read()
        self._file.truncate(good)
        self._file.seek(good)
        if not good:
            self._file.write(self._header)
        return self

    def add(self, draft: Draft) -> None:
        """Keeps one more."""
        self._file.write(draft.model_dump_json().encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced_s > _SYNC_S:
            os.fsync(self._file.fileno())
            self._synced_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> int:
        """Takes in the lines that are there; returns where the last good one ends."""
        if self._file.readline() != self._header:
            return 0
        good = self._file.tell()
        for line in self._file:
            try:
                draft = Draft.model_validate_json(line)
            except pydantic.ValidationError:
                break
            if not line.endswith(b"\n"):
                break
            self.drafts[draft.episode.name] = draft
            good += len(line)
        return good
