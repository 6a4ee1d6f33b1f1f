"""What a conversion is going to do, decided before the first image is read.

The plan lists episodes with their numbers of samples; shards are consecutive stretches of that list. It is written once
and kept: a conversion that is started again follows it, and refuses a source or options that are not those of the plan.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from rdt2_data.converters.chunks import select_frames
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.recording import EpisodeRef, RecordingReader
from rdt2_data.problems import SampleError, Tally
from rdt2_jax.config import FrozenConfig
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import atomic_write

PLAN_FILE = "plan.json"
VERSION = 1


class Source(FrozenConfig):
    """What the plan was made for; everything that must be the same after a restart.

    Attributes:
        fingerprint: `RecordingReader.fingerprint()`.
        settings: format and options of the reader, JSON.
        options: of the conversion.
        tokenizer: fingerprint of the tokenizer's files, None without tokens.
    """

    fingerprint: str
    settings: dict[str, Any]
    options: ConvertOptions
    tokenizer: str | None = None


class PlannedEpisode(FrozenConfig):
    """One episode: its samples are those of `chunks.select_frames`, in that order.

    Attributes:
        name, index: as in `EpisodeRef`.
        samples: how many.
        frame_s: time between two samples [s].
        left_out: edge of the recording -> number of frames, see `chunks`.
        note: what the reader had to say about the episode, such as why it ends early.
    """

    name: str
    index: int
    samples: int
    frame_s: float = 0.0
    left_out: dict[str, int] = pydantic.Field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class ShardPart:
    """The samples `start` up to `stop` of one episode."""

    episode: PlannedEpisode
    start: int
    stop: int


class Plan(FrozenConfig):
    """The whole conversion.

    Attributes:
        version: of this file.
        source: see `Source`.
        episodes: all of them, also those without samples.
        instructions: sentences in order of first appearance; the key of a sentence is its position, as text.
        problems: what was left out while planning, as `Tally.report` gives it.
    """

    version: int = VERSION
    source: Source
    episodes: tuple[PlannedEpisode, ...]
    instructions: tuple[str, ...]
    problems: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """Samples planned; those with unreadable images will be missing."""
        return sum(episode.samples for episode in self.episodes)

    @property
    def num_shards(self) -> int:
        """Archives planned."""
        return -(-self.num_samples // self.source.options.samples_per_shard)

    def shards(self) -> list[tuple[ShardPart, ...]]:
        """The parts of every shard, in order."""
        size = self.source.options.samples_per_shard
        shards: list[list[ShardPart]] = [[] for _ in range(self.num_shards)]
        first = 0
        for episode in self.episodes:
            start = 0
            while start < episode.samples:
                shard, within = divmod(first + start, size)
                stop = min(episode.samples, start + size - within)
                shards[shard].append(ShardPart(episode, start, stop))
                start = stop
            first += episode.samples
        return [tuple(parts) for parts in shards]

    def left_out(self) -> dict[str, int]:
        """Frames at the edges of all recordings."""
        total: Counter[str] = Counter()
        for episode in self.episodes:
            total.update(episode.left_out)
        return dict(total)

    def notes(self) -> dict[str, str]:
        """Episode -> what its reader had to say."""
        return {episode.name: episode.note for episode in self.episodes if episode.note}


def make_plan(
    reader: RecordingReader, source: Source, tally: Tally, advance: Callable[..., None] = lambda *_, **__: None
) -> Plan:
    """Reads the tracks of every episode and decides what becomes of them.

    Args:
        reader: the source.
        source: what the plan is for.
        tally: gets the problems; it may be strict.
        advance: called after each episode.

    Raises:
        DataError: two episodes of one name, or not a single sample in all of them.
        SampleError: the first problem, for a strict tally.
    """
    references = reader.episodes()
    twice = [name for name, count in Counter(reference.name for reference in references).items() if count > 1]
    if twice:
        raise DataError("two episodes have the same name", where="the source", found=", ".join(twice[:5]))
    sentences: dict[str, None] = {}
    episodes = []
    for reference in references:
        episodes.append(_plan_episode(reader, reference, source.options, sentences, tally))
        advance(1)
    plan = Plan(source=source, episodes=tuple(episodes), instructions=tuple(sentences), problems=tally.report())
    if not plan.num_samples:
        edges = [f"{count} frames {edge}" for edge, count in plan.left_out().items()]
        found = "\n".join([f"{len(episodes)} episodes", *edges, tally.text()]).strip()
        raise DataError("the source gives not a single sample", expected="a frame with 0.8 s of motion", found=found)
    return plan


def _plan_episode(
    reader: RecordingReader,
    reference: EpisodeRef,
    options: ConvertOptions,
    sentences: dict[str, None],
    tally: Tally,
) -> PlannedEpisode:
    try:
        recording = reader.load(reference)
        selection = select_frames(recording, options.chunks, tally)
    except SampleError as problem:
        tally.add(problem)
        return PlannedEpisode(name=reference.name, index=reference.index, samples=0, note=_note(reader, reference))
    for position in dict.fromkeys(selection.instruction.tolist()):
        sentences.setdefault(recording.instructions[position][1])
    return PlannedEpisode(
        name=reference.name,
        index=reference.index,
        samples=len(selection),
        frame_s=selection.frame_s,
        left_out=selection.left_out,
        note=_note(reader, reference),
    )


def _note(reader: RecordingReader, reference: EpisodeRef) -> str | None:
    """Readers may keep `notes` (episode -> sentence) about what they loaded."""
    notes: Mapping[str, str] = getattr(reader, "notes", {})
    return notes.get(reference.name)


# -------------------------------------------------------------------------------------------------- files


def write_plan(folder: Path, plan: Plan) -> None:
    """Writes the plan, whole or not at all."""
    with atomic_write(folder / PLAN_FILE) as file:
        file.write(json.dumps(plan.model_dump(mode="json"), indent=1).encode() + b"\n")


def read_plan(folder: Path, source: Source) -> Plan | None:
    """The plan of an earlier start, or None where there is none.

    Raises:
        DataError: a plan that cannot be read, or one that was made for another source or other options; the message
            names everything that differs.
    """
    path = folder / PLAN_FILE
    fix = "choose another destination, or delete this one"
    if not path.is_file():
        return None
    try:
        plan = Plan.model_validate_json(path.read_bytes())
    except (pydantic.ValidationError, OSError) as error:
        raise DataError("the plan cannot be read", where=path, found=str(error), fix=fix) from error
    before, now = plan.source.model_dump(mode="json"), source.model_dump(mode="json")
    # `strict` decides when to stop, not what is written; so a strict conversion may be finished without it.
    before["options"].pop("strict")
    now["options"].pop("strict")
    differences = _differences(before, now)
    if plan.version != VERSION:
        differences.insert(0, f"version: {plan.version} before, {VERSION} now")
    if differences:
        what = "the destination holds a conversion of another source, or with other options"
        raise DataError(what, where=path, found="; ".join(differences), fix=fix)
    return plan


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(name for name in now if name not in before)]
        parts = [_differences(before.get(name), now.get(name), f"{key}.{name}" if key else name) for name in keys]
        return [line for part in parts for line in part]
    return [] if before == now else [f"{key}: {before!r} before, {now!r} now"]
