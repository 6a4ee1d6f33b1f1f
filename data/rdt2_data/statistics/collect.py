"""One pass over all chunks of a dataset: how many, and what every channel looks like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import ACTION, CONVERSATION, RawSample, read_action
from rdt2_data.scan import scan_samples
from rdt2_data.shards.source import SampleSource
from rdt2_data.statistics.histogram import Histograms
from rdt2_data.statistics.moments import Moments
from rdt2_data.statistics.quantiles import QuantileSketch
from rdt2_jax.actions.layout import ACTION_DIM, ACTION_RATE_HZ, ARM_NAMES

CHANNEL_NAMES = tuple(
    f"{arm} {name}" for arm in ARM_NAMES for name in ("x", "y", "z", *(f"rot6d {i}" for i in range(6)), "width")
)
"""Of the twenty channels: position [m], rot6d, width in policy units; right arm, then left arm."""


class ChannelStatistics:
    """Moments, quantiles and histograms of the twenty channels, fed with frames."""

    def __init__(self) -> None:
        self.moments = Moments.none(ACTION_DIM)
        self.sketch = QuantileSketch(ACTION_DIM)
        self.histograms = Histograms(ACTION_DIM)

    def update(self, frames: np.ndarray) -> None:
        """Takes finite action frames (N, 20) float32 in."""
        self.moments = self.moments.merged(Moments.of(frames))
        self.sketch.update(frames)
        self.histograms.update(frames)


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """One sample, as far as its statistics go.

    Attributes:
        problems: what is wrong with it.
        action: its chunk (24, 20); None for a question, or where it cannot be used.
        is_question: an image with a conversation instead of a chunk.
    """

    problems: Sequence[SampleError] = ()
    action: np.ndarray | None = None
    is_question: bool = False


AnySeen = TypeVar("AnySeen", bound=Seen)


@dataclass(frozen=True)
class Look(Generic[AnySeen]):
    """What one pass takes from every sample, besides its chunk.

    Attributes:
        at: what is seen of a sample, or of one that could not be read; called in threads.
        members: extensions that are read.
        take: called with what was seen of each sample, in their order.
    """

    at: Callable[[RawSample | SampleError], AnySeen]
    members: Sequence[str]
    take: Callable[[AnySeen], None]


@dataclass(frozen=True, eq=False)
class DatasetStatistics:
    """What one pass over a dataset found.

    Attributes:
        samples: with a chunk that can be used.
        questions: samples that hold a conversation instead of a chunk.
        channels: statistics of their frames.
        tally: what could not be used, counted.
    """

    samples: int
    questions: int
    channels: ChannelStatistics
    tally: Tally

    @property
    def frames(self) -> int:
        """Action frames seen, 24 a chunk."""
        return self.channels.moments.count

    @property
    def hours(self) -> float:
        """Samples at 30 a second: the recorded time, if every frame became one sample."""
        return self.samples / ACTION_RATE_HZ / 3600


def collect_statistics(
    source: SampleSource, *, workers: int | None = None, progress: Callable[[int], None] | None = None
) -> DatasetStatistics:
    """Reads every chunk once. Memory does not grow with the dataset, and the result is the same in every run.

    Args:
        source: the dataset; its tally takes the problems of samples, too.
        workers: threads, one per core by default.
        progress: called with the number of samples done since the last call.

    Raises:
        SampleError: the first problem, when the tally is strict.
    """
    look = Look(see_action, (ACTION, CONVERSATION), lambda seen: None)
    return collect(source, look, workers=workers, progress=progress)


def collect(
    source: SampleSource,
    look: Look[AnySeen],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DatasetStatistics:
    """`collect_statistics` in a pass that takes more from every sample than its chunk."""
    channels = ChannelStatistics()
    samples = questions = 0
    for batch in scan_samples(source, lambda _, raw: look.at(raw), members=look.members, workers=workers):
        for seen in batch:
            for problem in seen.problems:
                source.tally.add(problem)
            questions += seen.is_question
            look.take(seen)
        chunks = [seen.action for seen in batch if seen.action is not None]
        samples += len(chunks)
        if chunks:
            channels.update(np.concatenate(chunks))
        if progress is not None:
            progress(len(batch))
    return DatasetStatistics(samples, questions, channels, source.tally)


def see_action(raw: RawSample | SampleError) -> Seen:
    """The chunk of a sample, or why there is none."""
    if isinstance(raw, SampleError):
        return Seen(problems=[raw])
    if raw.is_question:
        return Seen(is_question=True)
    try:
        return Seen(action=read_action(raw))
    except SampleError as problem:
        return Seen(problems=[problem])
