"""What one pass over a dataset tells about it: sizes, instructions, channels, and a few samples for the gallery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rdt2_data.inspection.overlay import draw_paths
from rdt2_data.instructions import Instructions
from rdt2_data.problems import SampleError
from rdt2_data.samples import (
    ACTION,
    ACTION_TOKEN,
    CONVERSATION,
    INSTRUCTION_KEY,
    META,
    RawSample,
    decode_composite,
    read_action,
    read_action_token,
    read_meta,
)
from rdt2_data.shards.source import SampleSource
from rdt2_data.shards.storage import storage_for
from rdt2_data.statistics.collect import DatasetStatistics, Look, Seen, collect, see_action
from rdt2_jax.actions.layout import ArmName
from rdt2_jax.errors import DataError
from rdt2_jax.fisheye import WristCameraConfig

JPEG_QUALITY = 88

_MEMBERS = (ACTION, ACTION_TOKEN, META, CONVERSATION)
"""What the summary reads of each sample: not the image."""


@dataclass(frozen=True, eq=False)
class DatasetSummary:
    """The dataset as a whole.

    Attributes:
        shards, total_bytes: archives, and their bytes.
        statistics: samples, questions, channels, problems.
        instruction_counts: key -> samples, the most frequent first.
        with_tokens: samples that carry action tokens.
        instructions: the sentences, or None where they were not given.
    """

    shards: int
    total_bytes: int
    statistics: DatasetStatistics
    instruction_counts: Mapping[str, int]
    with_tokens: int
    instructions: Instructions | None


@dataclass(frozen=True, eq=False)
class GallerySample:
    """One sample for the page.

    Attributes:
        index: in the dataset.
        where: archive and key.
        problem: why there is nothing to show, or None.
        instruction_key: or None, for a question or a broken sample.
        picture_jpeg: the composite with the paths of both arms drawn in.
        frames_in_picture: per arm, how many of the 24 frames of its path lie inside.
        action: (24, 20).
        token: (27,) int16, or None.
    """

    index: int
    where: str
    problem: str | None = None
    instruction_key: str | None = None
    picture_jpeg: bytes = b""
    frames_in_picture: Mapping[ArmName, int] | None = None
    action: np.ndarray | None = None
    token: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen(Seen):
    """One sample, as far as the summary goes."""

    instruction_key: str | None = None
    has_token: bool = False


def summarize(
    source: SampleSource,
    shards: Sequence[str],
    instructions: Instructions | None,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DatasetSummary:
    """Reads every sample once, without decoding images.

    Args:
        source: the dataset; its tally takes the problems.
        shards: its archives, as `find_shards` tells them.
        instructions: the sentences; a key that is not among them is a problem.
        workers: threads, one per core by default.
        progress: called with the number of samples done since the last call.

    Raises:
        SampleError: the first problem, when the tally is strict.
    """
    counts, with_tokens = Counter[str](), 0

    def take(seen: _Seen) -> None:
        nonlocal with_tokens
        with_tokens += seen.has_token
        if seen.instruction_key is not None:
            counts[seen.instruction_key] += 1

    look = Look(lambda raw: _see(raw, instructions), _MEMBERS, take)
    statistics = collect(source, look, workers=workers, progress=progress)
    total_bytes = sum(map(_size, shards))
    return DatasetSummary(len(shards), total_bytes, statistics, dict(counts.most_common()), with_tokens, instructions)


def _size(shard: str) -> int:
    """Bytes of an archive; none of one that cannot be opened, which the source has counted."""
    try:
        return storage_for(shard).stamp(shard).size
    except DataError:
        return 0


def gallery(
    source: SampleSource, count: int, seed: int, cameras: Mapping[str, WristCameraConfig]
) -> list[GallerySample]:
    """Some samples, drawn without replacement and shown in the order of the dataset.

    Args:
        source: the dataset; its tally takes what is wrong with the images shown. What else is wrong with a sample has
            been counted by `summarize`.
        count: how many; all, where there are fewer.
        seed: of the draw.
        cameras: by name, for the paths.

    Raises:
        DataError: a camera of another image size.
        SampleError: the first image that cannot be shown, when the tally is strict.
    """
    size = min(count, len(source))
    chosen = np.sort(np.random.default_rng(seed).choice(len(source), size, replace=False)) if size else []
    indices = [int(index) for index in chosen]
    results = zip(indices, source.read(indices), strict=True)
    return [_show(index, raw, cameras, source) for index, raw in results]


def _see(raw: RawSample | SampleError, instructions: Instructions | None) -> _Seen:
    seen = see_action(raw)
    problems = list(seen.problems)
    if isinstance(raw, SampleError) or raw.is_question:
        return _Seen(problems=problems, is_question=seen.is_question)
    key, has_token = None, False
    try:
        has_token = read_action_token(raw) is not None
    except SampleError as problem:
        problems.append(problem)
    try:
        key = read_meta(raw)[INSTRUCTION_KEY]
        if instructions is not None:
            instructions.text(key, raw.where)
    except SampleError as problem:
        problems.append(problem)
    return _Seen(problems=problems, action=seen.action, instruction_key=key, has_token=has_token)


def _show(
    index: int, raw: RawSample | SampleError, cameras: Mapping[str, WristCameraConfig], source: SampleSource
) -> GallerySample:
    import simplejpeg

    if isinstance(raw, SampleError):
        # the whole sample cannot be read: either the pass has met and counted that, or it lies in the image alone
        (rest,) = source.read([index], _MEMBERS)
        if not isinstance(rest, SampleError):
            source.tally.add(raw)
        return GallerySample(index, str(raw.where), problem=raw.line())
    if raw.is_question:
        return GallerySample(index, raw.where, problem="a question: an image with a conversation, not a chunk")
    try:
        image = decode_composite(raw)
    except SampleError as problem:
        source.tally.add(problem)
        return GallerySample(index, raw.where, problem=problem.line())
    try:
        key, action, token = read_meta(raw)[INSTRUCTION_KEY], read_action(raw), read_action_token(raw)
    except SampleError as problem:
        return GallerySample(index, raw.where, problem=problem.line())
    picture, seen = draw_paths(image, action, cameras)
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=JPEG_QUALITY, colorspace="RGB")
    return GallerySample(index, raw.where, None, key, jpeg, seen, action, token)
