"""Is one sample what it should be?

Every member is looked at on its own, so that a sample with two faults has two problems.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rdt2_data.capture_times import MAX_GAP_S, Moment
from rdt2_data.instructions import Instructions
from rdt2_data.problems import SampleError
from rdt2_data.samples import (
    ACTION,
    ACTION_TOKEN,
    IMAGE,
    INSTRUCTION_KEY,
    META,
    RawSample,
    decode_composite,
    decode_image,
    read_action,
    read_action_token,
    read_conversation,
    read_meta,
    read_state,
    rotation_errors,
)
from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.types import MAX_CAPTURE_SKEW_S
from rdt2_jax.errors import ConfigError

MIN_ENTROPY_BITS = 1.0
"""A picture with less in its histogram of grey levels shows next to nothing: a covered lens, a failed camera."""

MAX_ROTATION_ERROR = 1e-3
"""Recorded rot6d columns are of norm 1 and at right angles, up to float32 and the digits of the source. Our choice."""

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
        shuffled: the samples of an episode do not lie in the order of time, so that gaps are not looked for; found out
            by itself for what `rdt2 data pack --shuffle` has written.
        workers: threads, one per core by default.

    Raises:
        ConfigError: a gap or an entropy that is negative or not a number.
    """

    instructions: Instructions | None = None
    normalizer: LinearNormalizer | None = None
    max_gap_s: float = MAX_GAP_S
    min_entropy_bits: float = MIN_ENTROPY_BITS
    sample: int | None = None
    shuffled: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        if not self.max_gap_s > 0:  # also for what is not a number
            raise ConfigError("this is no gap in time", where="max_gap_s", expected="> 0 s", found=self.max_gap_s)
        if not self.min_entropy_bits >= 0:
            found = self.min_entropy_bits
            raise ConfigError("this is no entropy", where="min_entropy_bits", expected=">= 0 bits", found=found)


@dataclass
class Findings:
    """What was seen of one sample.

    Attributes:
        problems: all of them.
        folder, where: in which its archive lies; archive and key. Empty for a sample that could not be read.
        is_question: an image with a conversation.
        has_tokens: it carries action tokens.
        outside: (20,) values beyond the normalizer's bounds in each channel, None where that was not looked at.
        entropies: camera -> entropy of its image [bits].
        moment: where it lies in time; None for a sample without times.
    """

    problems: list[SampleError] = field(default_factory=list)
    folder: str = ""
    where: str = ""
    is_question: bool = False
    has_tokens: bool = False
    outside: np.ndarray | None = None
    entropies: dict[str, float] = field(default_factory=dict)
    moment: Moment | None = None


def check_sample(raw: RawSample | SampleError, options: CheckOptions) -> Findings:
    """Looks at one sample by itself."""
    if isinstance(raw, SampleError):
        return Findings(problems=[raw])
    findings = Findings(folder=os.path.dirname(raw.shard), where=raw.where, is_question=raw.is_question)
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
    image = decode_composite(raw)
    where = f"{raw.where}, {IMAGE}"
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
    for arm, error in zip(ARM_NAMES, rotation_errors(action).T, strict=True):
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
            episode = (findings.folder, str(meta["episode"])) if "episode" in meta else None
            findings.moment = Moment(raw.where, episode, _whole_number(meta.get("frame")), times)
            skew = max(times.values()) - min(times.values())
            if skew > MAX_CAPTURE_SKEW_S + 1e-9:
                expected, found = f"at most {MAX_CAPTURE_SKEW_S} s", f"{skew:.4f} s"
                yield SampleError("camera-skew", where=where, expected=expected, found=found)
    if options.instructions is not None:
        options.instructions.text(meta[INSTRUCTION_KEY], where)


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
