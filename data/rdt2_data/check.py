"""Is every sample of a dataset what it should be? Everything that is not is counted and named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdt2_data.capture_times import CaptureTimes
from rdt2_data.check_sample import CheckOptions, Findings, check_sample
from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import RawSample
from rdt2_data.scan import scan_samples
from rdt2_data.shards.source import SampleSource
from rdt2_data.statistics.collect import CHANNEL_NAMES
from rdt2_data.statistics.quantiles import QuantileSketch
from rdt2_jax.actions.layout import ACTION_DIM, CAMERA_NAMES, CHUNK_LENGTH
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.errors import DataError

MAX_SHARE_OUTSIDE = 1e-3
"""Share of a channel's values that may lie beyond the bounds of the normalizer; see `rdt2 tokenizer check`."""


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What was found.

    Attributes:
        samples, checked, questions: in the dataset; looked at; of these, with a conversation instead of a chunk.
        with_tokens, with_times: samples looked at that carry action tokens, and capture times.
        tally: problems of the container and of the samples.
        outside: (20,) share of values beyond the bounds of the normalizer, or None where none was given.
        entropies: camera -> {"min", "median"} of the entropy of its images [bits]; empty without images.
        notes: sentences about what was not looked at.
    """

    samples: int
    checked: int
    questions: int
    with_tokens: int
    with_times: int
    tally: Tally
    outside: np.ndarray | None
    entropies: dict[str, dict[str, float]]
    notes: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Nothing was wrong."""
        return self.tally.total == 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        names = ("samples", "checked", "questions", "with_tokens", "with_times")
        report = {"clean": self.clean, **{name: getattr(self, name) for name in names}}
        if self.outside is not None:
            report["share_outside"] = dict(zip(CHANNEL_NAMES, self.outside.tolist(), strict=True))
        more = {"image_entropy_bits": self.entropies, "notes": list(self.notes), "problems": self.tally.report()}
        return {**report, **more}


def check_dataset(
    source: SampleSource, options: CheckOptions | None = None, *, progress: Callable[[int], None] | None = None
) -> CheckReport:
    """Looks at every sample once, or at some of them, with all cores and in constant memory.

    Args:
        source: the dataset. Problems go to its tally, where those of the container are already.
        options: what to hold samples against.
        progress: called with the number of samples done since the last call.

    Raises:
        SampleError: the first problem, when the tally is strict.
    """
    options = options or CheckOptions()
    indices = chosen_samples(len(source), options.sample)
    totals = _Totals(source.tally, options, whole=len(indices) == len(source))

    def look(_: int, raw: RawSample | SampleError) -> Findings:
        return check_sample(raw, options)

    for batch in scan_samples(source, look, indices=indices, workers=options.workers):
        for findings in batch:
            totals.add(findings)
        if progress is not None:
            progress(len(batch))
    return totals.report(len(source))


def chosen_samples(count: int, wanted: int | None) -> Sequence[int]:
    """All indices, or `wanted` of them evenly spread from the first to the last."""
    if wanted is None or wanted >= count:
        return range(count)
    return [int(i) for i in np.linspace(0, count - 1, wanted).round()]


# ---------------------------------------------------------------------------------------------- all samples


class _Totals:
    """Findings of all samples so far; they grow with folders and episodes, not with samples."""

    def __init__(self, tally: Tally, options: CheckOptions, *, whole: bool) -> None:
        self._tally, self._options, self._whole = tally, options, whole
        self._times = CaptureTimes(options.max_gap_s if whole else None, shuffled=options.shuffled)
        self._kinds: dict[str, tuple[bool, str] | None] = {}  # folder -> is a question, first sample; None: told
        self._checked = self._questions = self._with_tokens = self._with_times = self._chunks = 0
        self._outside = np.zeros(ACTION_DIM)
        self._entropies = {str(camera): QuantileSketch(1, capacity=1024) for camera in CAMERA_NAMES}
        self._least = {str(camera): math.inf for camera in CAMERA_NAMES}

    def add(self, findings: Findings) -> None:
        for problem in findings.problems:
            self._tally.add(problem)
        self._checked += 1
        self._questions += findings.is_question
        self._with_tokens += findings.has_tokens
        if findings.outside is not None:
            self._chunks += 1
            self._outside += findings.outside
        for camera, bits in findings.entropies.items():
            self._entropies[camera].update(np.array([[bits]]))
            self._least[camera] = min(self._least[camera], bits)
        if findings.where:
            self._compare_kinds(findings)
        if findings.moment is not None:
            self._with_times += 1
            for problem in self._times.problems(findings.moment):
                self._tally.add(problem)

    def _compare_kinds(self, findings: Findings) -> None:
        """With the first sample of its folder: the stream reads all of a folder as actions, or all as questions."""
        first = self._kinds.setdefault(findings.folder, (findings.is_question, findings.where))
        if first is None or first[0] == findings.is_question:
            return
        self._kinds[findings.folder] = None  # once is enough
        action, question = (findings.where, first[1]) if first[0] else (first[1], findings.where)
        problem = SampleError(
            "mixed-kinds",
            where=findings.folder or ".",
            expected="actions and questions in folders of their own",
            found=f"an action in {action}, a question in {question}",
            fix="move the questions into another folder, and name it under `questions` of a mixture",
        )
        self._tally.add(problem)

    def report(self, samples: int) -> CheckReport:
        """The totals; channels that leave the normalizer's bounds become problems here."""
        outside = None
        if self._options.normalizer is not None and self._chunks:
            outside = self._outside / (self._chunks * CHUNK_LENGTH)
            for channel in np.flatnonzero(outside > MAX_SHARE_OUTSIDE):
                where = f"channel {channel}, {CHANNEL_NAMES[channel]}"
                expected = f"normalized values within [-1, 1], up to {MAX_SHARE_OUTSIDE:.1%} of them"
                found = f"{outside[channel]:.2%} outside"
                fix = "use the normalizer of this dataset's tokenizer"
                self._tally.add(SampleError("out-of-range", where=where, expected=expected, found=found, fix=fix))
        entropies = {
            camera: {"min": self._least[camera], "median": float(sketch.quantiles([0.5])[0, 0])}
            for camera, sketch in self._entropies.items()
            if sketch.count
        }
        counts = (self._checked, self._questions, self._with_tokens, self._with_times)
        return CheckReport(samples, *counts, self._tally, outside, entropies, tuple(self._notes(samples)))

    def _notes(self, samples: int) -> Iterator[str]:
        if self._options.instructions is None and self._checked > self._questions:
            yield "instruction keys were not looked up: no instructions were given"
        if not self._whole:
            yield f"{samples - self._checked} samples were not looked at, and no gaps in time looked for"
        else:
            for folder in self._times.shuffled_folders:
                yield f"gaps in time were not looked for in {folder or '.'}: its samples are shuffled"


def require_action_field(normalizer: LinearNormalizer, where: object) -> None:
    """Raises DataError unless the normalizer maps whole action frames."""
    shape = normalizer.field("action").scale.shape
    if shape[-1:] != (ACTION_DIM,):
        raise DataError("the normalizer is not of actions", where=where, expected=f"(..., {ACTION_DIM})", found=shape)
