"""What a conversion is going to do, decided before the first image is read.

The plan lists episodes with their numbers of samples; shards are consecutive stretches of that list. It is written once
and kept: a conversion that is started again follows it, and refuses a source or options that are not those of the plan.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from rdt2_data.converters.options import ConvertOptions
from rdt2_data.problems import Tally
from rdt2_jax.config import FrozenConfig
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import atomic_write

PLAN_FILE = "plan.json"
VERSION = 2


class Source(FrozenConfig):
    """What the plan was made for; everything that must be the same after a restart.

    Attributes:
        fingerprint: `RecordingReader.fingerprint()`.
        settings: format and options of the reader by name, JSON; see `source_settings`.
        options: of the conversion.
        tokenizer: fingerprint of the tokenizer's files, None without tokens.
    """

    fingerprint: str
    settings: dict[str, Any]
    options: ConvertOptions
    tokenizer: str | None = None

    def compared(self) -> dict[str, Any]:
        """What must be the same. `strict` decides when to stop, not what is written, so it may change."""
        document = self.model_dump(mode="json")
        document["options"].pop("strict")
        return document


class PlannedEpisode(FrozenConfig):
    """One episode: its samples are those of `chunks.select_frames`, in that order.

    Attributes:
        name, index: as in `EpisodeRef`.
        samples: how many.
        frame_s: time between two samples [s].
        instructions: keys of the sentences of its samples, in order of first appearance.
        left_out: edge of the recording -> number of frames, see `chunks`.
        note: what the reader had to say about the episode, such as why it ends early.
    """

    name: str
    index: int
    samples: int
    frame_s: float = 0.0
    instructions: tuple[int, ...] = ()
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

    def keys(self, parts: Sequence[ShardPart]) -> dict[str, str]:
        """Sentence -> key in `instructions.json`, of those that the parts need."""
        needed = dict.fromkeys(key for part in parts for key in part.episode.instructions)
        return {self.instructions[key]: str(key) for key in needed}

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
        document = json.loads(path.read_bytes())
        version = document.get("version") if isinstance(document, dict) else None
        if version is not None and version != VERSION:
            expected, found = f"version {VERSION}", f"version {version}"
            raise DataError("the plan is of another release", where=path, expected=expected, found=found, fix=fix)
        plan = Plan.model_validate(document)
    except (ValueError, OSError) as error:
        raise DataError("the plan cannot be read", where=path, found=str(error), fix=fix) from error
    differences = _differences(plan.source.compared(), source.compared())
    if differences:
        what = "the destination holds a conversion of another source, or with other options"
        raise DataError(what, where=path, found="; ".join(differences), fix=fix)
    return plan


def source_settings(given: Mapping[str, Any], hide: str) -> dict[str, Any]:
    """Settings as they are kept: what is given, without absolute paths, which differ between machines.

    Of a path below the folder `hide` the rest is kept, of any other its last part.
    """

    def portable(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): portable(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [portable(entry) for entry in value]
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str) or not os.path.isabs(text) or not os.path.exists(text):
            return text
        below = bool(hide) and Path(text).is_relative_to(hide)
        return Path(text).relative_to(hide).as_posix() if below else Path(text).name

    return portable(given)


def refuse_kept_problems(problems: Mapping[str, Any], where: Path) -> None:
    """Raises DataError if an earlier start, which was not strict, counted problems (`Tally.report`)."""
    tally = Tally()
    tally.merge(problems)
    if tally.total:
        what = "an earlier start without --strict counted problems and went on"
        fix = "start without --strict to accept them, or repair the source and choose another destination"
        raise DataError(what, where=where, found="\n" + tally.text(), fix=fix)


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(name for name in now if name not in before)]
        parts = [_differences(before.get(name), now.get(name), f"{key}.{name}" if key else name) for name in keys]
        return [line for part in parts for line in part]
    if before == now:
        return []
    if key == "fingerprint":
        return ["the files of the source have changed (names, sizes or times)"]
    if key == "tokenizer":
        return [f"tokenizer: {'another' if before and now else 'with' if before else 'without'} before"]
    return [f"{key}: {before!r} before, {now!r} now"]
