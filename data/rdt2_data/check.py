"""Is every sample of a dataset what it should be? Everything that is not is counted and named.

Every member of a sample is looked at on its own, so that a sample with two faults is counted under both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rdt2_data.instructions import Instructions
from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import (
    ACTION,
    ACTION_TOKEN,
    COMPOSITE_SHAPE,
    IMAGE,
    INSTRUCTION_KEY,
    META,
    RawSample,
    decode_image,
    read_action,
    read_action_token,
    read_conversation,
    read_meta,
    read_state,
)
from rdt2_data.scan import scan_samples
from rdt2_data.shards.source import SampleSource
from rdt2_data.statistics.collect import CHANNEL_NAMES
from rdt2_data.statistics.quantiles import QuantileSketch
from rdt2_jax.actions.layout import ACTION_DIM, ARM_NAMES, CAMERA_NAMES, CHUNK_LENGTH, ROT6D, arm_slice
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.types import MAX_CAPTURE_SKEW_S
from rdt2_jax.errors import DataError

MAX_GAP_S = 0.1
"""Consecutive samples of an episode further apart than this lack frames between them; three frames at 30 a second."""

MIN_ENTROPY_BITS = 1.0
"""A picture with less in its histogram of grey levels shows next to nothing: a covered lens, a failed camera."""

MAX_ROTATION_ERROR = 1e-3
"""Recorded rot6d columns are of norm 1 and at right angles, up to float32 and the digits of the source. Our choice."""

MAX_SHARE_OUTSIDE = 1e-3
"""Share of a channel's values that may lie beyond the bounds of the normalizer; see `rdt2 tokenizer check`."""

FIRST_GRIPPER_TOKEN = 24
"""Only from here on may tokens be negative, for a gripper that was not measured."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What samples are held against.

    Attributes:
        instructions: every instruction key must be in them; None does not ask.
        normalizer: normalized chunks must stay within [-1, 1]; None does not ask.
        max_gap_s: longest time between consecutive samples of an episode [s].
        min_entropy_bits: of each wrist image.
        sample: look at about so many samples, evenly spread, instead of all; gaps in time are not looked for then.
        workers: threads, one per core by default.
    """

    instructions: Instructions | None = None
    normalizer: LinearNormalizer | None = None
    max_gap_s: float = MAX_GAP_S
    min_entropy_bits: float = MIN_ENTROPY_BITS
    sample: int | None = None
    workers: int | None = None


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What was found.

    Attributes:
        samples, checked, questions: in the dataset; looked at; of these, with a conversation instead of a chunk.
        with_tokens, with_times: samples looked at that carry action tokens, and capture times.
        tally: problems of the container and of the samples.
        outside: (20,) share of values beyond the bounds of the normalizer, or None where none was given.
        entropies: camera -> {"min", "median"} of the entropy of its images [bits]; empty without images.
    """

    samples: int
    checked: int
    questions: int
    with_tokens: int
    with_times: int
    tally: Tally
    outside: np.ndarray | None
    entropies: dict[str, dict[str, float]]

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
        return {**report, "image_entropy_bits": self.entropies, "problems": self.tally.report()}


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


# ----------------------------------------------------------------------------------------------- one sample


@dataclass
class Findings:
    """What was seen of one sample.

    Attributes:
        problems: all of them.
        is_question: an image with a conversation.
        has_tokens: it carries action tokens.
        outside: (20,) values beyond the normalizer's bounds in each channel, None where that was not looked at.
        entropies: camera -> entropy of its image [bits].
        moment: where it lies in time; None for a sample without times.
    """

    problems: list[SampleError] = field(default_factory=list)
    is_question: bool = False
    has_tokens: bool = False
    outside: np.ndarray | None = None
    entropies: dict[str, float] = field(default_factory=dict)
    moment: Moment | None = None


@dataclass(frozen=True)
class Moment:
    """When a sample was taken: folder and name of its episode (None: of none), capture time of each camera [s]."""

    where: str
    episode: tuple[str, str] | None
    capture_time_s: dict[str, float]


def check_sample(raw: RawSample | SampleError, options: CheckOptions) -> Findings:
    """Looks at one sample by itself."""
    if isinstance(raw, SampleError):
        return Findings(problems=[raw])
    findings = Findings(is_question=raw.is_question)
    parts = [_check_conversation, _check_picture] if raw.is_question else [_check_image, _check_action, _check_token]
    for part in (*parts, *(() if raw.is_question else (_check_state, _check_meta))):
        try:
            for problem in part(raw, options, findings):
                findings.problems.append(problem)
        except SampleError as problem:
            findings.problems.append(problem)
    return findings


def grey_entropy_bits(image: np.ndarray) -> float:
    """Entropy of the histogram of the 256 grey levels of an RGB image (height, width, 3) uint8: 0 to 8 bits."""
    # luma of ITU-R BT.601 in 256ths: at most 255 * 256, which 16 bits hold
    red, green, blue = (image[..., channel] for channel in range(3))
    grey = np.multiply(green, 150, dtype=np.uint16)
    grey += np.multiply(red, 77, dtype=np.uint16)
    grey += np.multiply(blue, 29, dtype=np.uint16)
    grey >>= 8
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    share = share[share > 0]
    return max(float(-(share * np.log2(share)).sum()), 0.0)  # without the minus of -0.0


def _check_image(raw: RawSample, options: CheckOptions, findings: Findings) -> Iterator[SampleError]:
    image = decode_image(raw)
    where = f"{raw.where}, {IMAGE}"
    if image.shape != COMPOSITE_SHAPE:
        yield SampleError("wrong-image", where=where, expected=COMPOSITE_SHAPE, found=image.shape)
        return
    for camera, half in zip(CAMERA_NAMES, np.split(image, 2, axis=1), strict=True):
        bits = findings.entropies[camera] = grey_entropy_bits(half)
        if bits < options.min_entropy_bits:
            expected, found = f"at least {options.min_entropy_bits:g} bits of entropy", f"{bits:.3f}"
            yield SampleError("blank-image", where=f"{where}, {camera}", expected=expected, found=found)


def _check_picture(raw: RawSample, _: CheckOptions, __: Findings) -> Iterator[SampleError]:
    decode_image(raw)  # of any size
    yield from ()


def _check_conversation(raw: RawSample, _: CheckOptions, __: Findings) -> Iterator[SampleError]:
    read_conversation(raw)
    yield from ()


def _check_state(raw: RawSample, _: CheckOptions, __: Findings) -> Iterator[SampleError]:
    read_state(raw)
    yield from ()


def _check_action(raw: RawSample, options: CheckOptions, findings: Findings) -> Iterator[SampleError]:
    action = read_action(raw)
    where = f"{raw.where}, {ACTION}"
    for arm in ARM_NAMES:
        columns = action[:, arm_slice(arm)][:, ROT6D].astype(np.float64).reshape(-1, 2, 3)
        norm_error = np.abs(np.linalg.norm(columns, axis=-1) - 1).max(axis=-1)
        error = np.maximum(norm_error, np.abs((columns[:, 0] * columns[:, 1]).sum(axis=-1)))
        worst = int(error.argmax())
        if error[worst] > MAX_ROTATION_ERROR:
            expected = f"columns of norm 1 at right angles, up to {MAX_ROTATION_ERROR:g}"
            found = f"{error[worst]:.4f} off in frame {worst}"
            yield SampleError("bad-rotation", where=f"{where}, {arm} arm", expected=expected, found=found)
    if options.normalizer is not None:
        findings.outside = options.normalizer.out_of_range(action).fraction * len(action)


def _check_token(raw: RawSample, _: CheckOptions, findings: Findings) -> Iterator[SampleError]:
    findings.has_tokens = ACTION_TOKEN in raw.members
    token = read_action_token(raw)
    if token is None:
        return
    negative = np.flatnonzero(token[:FIRST_GRIPPER_TOKEN] < 0)
    if negative.size:
        expected = f"negative tokens only from place {FIRST_GRIPPER_TOKEN} on, for grippers"
        found = f"{token[negative[0]]} at place {negative[0]}"
        yield SampleError("bad-token", where=f"{raw.where}, {ACTION_TOKEN}", expected=expected, found=found)


def _check_meta(raw: RawSample, options: CheckOptions, findings: Findings) -> Iterator[SampleError]:
    meta = read_meta(raw)
    where = f"{raw.where}, {META}"
    if "capture_time_s" in meta:
        times = meta["capture_time_s"]
        if not isinstance(times, dict) or not times or not all(_is_time(time) for time in times.values()):
            expected, found = "capture_time_s: camera -> seconds", repr(times)[:80]
            yield SampleError("bad-meta", where=where, expected=expected, found=found)
        else:
            episode = (os.path.dirname(raw.shard), str(meta["episode"])) if "episode" in meta else None
            findings.moment = Moment(raw.where, episode, times)
            skew = max(times.values()) - min(times.values())
            if skew > MAX_CAPTURE_SKEW_S + 1e-9:
                expected, found = f"at most {MAX_CAPTURE_SKEW_S} s", f"{skew:.4f} s"
                yield SampleError("camera-skew", where=where, expected=expected, found=found)
    if options.instructions is not None:
        options.instructions.text(meta[INSTRUCTION_KEY], where)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------- all samples


class _Totals:
    """Findings of all samples so far."""

    def __init__(self, tally: Tally, options: CheckOptions, *, whole: bool) -> None:
        self._tally, self._options, self._whole = tally, options, whole
        self._checked = self._questions = self._with_tokens = self._with_times = self._chunks = 0
        self._outside = np.zeros(ACTION_DIM)
        self._entropies = {str(camera): QuantileSketch(1, capacity=1024) for camera in CAMERA_NAMES}
        self._least = {str(camera): math.inf for camera in CAMERA_NAMES}
        self._last: dict[tuple[str, str], Moment] = {}  # of each episode: as long as there are episodes, not samples

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
        if findings.moment is not None:
            self._with_times += 1
            self._compare(findings.moment)

    def _compare(self, now: Moment) -> None:
        """With the sample before it in its episode."""
        if now.episode is None:
            return
        last = self._last.get(now.episode)
        self._last[now.episode] = now
        if last is None:
            return
        for camera in now.capture_time_s.keys() & last.capture_time_s.keys():
            step = now.capture_time_s[camera] - last.capture_time_s[camera]
            where = f"{now.where}, {META}, {camera}, episode {now.episode[1]!r}"
            if step <= 0:
                found = f"{step:.4f} s after {last.where}"
                self._tally.add(SampleError("bad-time", where=where, expected="a later time", found=found))
            elif self._whole and step > self._options.max_gap_s + 1e-9:
                expected, found = f"at most {self._options.max_gap_s:g} s", f"{step:.4f} s after {last.where}"
                self._tally.add(SampleError("time-gap", where=where, expected=expected, found=found))

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
        return CheckReport(samples, *counts, self._tally, outside, entropies)


def require_action_field(normalizer: LinearNormalizer, where: object) -> None:
    """Raises DataError unless the normalizer maps whole action frames."""
    shape = normalizer.field("action").scale.shape
    if shape[-1:] != (ACTION_DIM,):
        raise DataError("the normalizer is not of actions", where=where, expected=f"(..., {ACTION_DIM})", found=shape)
