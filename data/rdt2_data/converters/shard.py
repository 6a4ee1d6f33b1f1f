"""One shard of a conversion: a function of the source and the plan, run in any process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from rdt2_data.converters.chunks import OTHER, REFERENCE, Chunks, Selection, cut_chunks, select_frames
from rdt2_data.converters.images import composite_jpeg, wrist_image
from rdt2_data.converters.manifest import ShardEntry, file_sha256, shard_name, write_entry
from rdt2_data.converters.messages import hidden_paths
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.plan import ShardPart
from rdt2_data.converters.recording import EpisodeRef, Frames, Recording, RecordingReader
from rdt2_data.converters.runners import Shared
from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import TOKENS_PER_CHUNK, action_members
from rdt2_data.shards.writer import ShardWriter
from rdt2_jax.actions.layout import ARM_NAMES
from rdt2_jax.errors import DataError
from rdt2_jax.io.arrays import read_array

KEY_DIGITS = 9
GRIPPER_TOKENS = slice(24, 27)
"""Of the 27 tokens, those of the grippers' widths (both arms share them)."""

_INVALID = -1


@dataclass(frozen=True, eq=False)
class ShardJob:
    """What a process needs to make one shard, besides what all shards share.

    Attributes:
        index: of the shard.
        parts: its samples.
        keys: sentence -> key in `instructions.json`, of its episodes.
        first_sample: place of its first sample in the plan.
        tokens: int16 (samples, 27) in an `.npy` file, or None.
    """

    index: int
    parts: tuple[ShardPart, ...]
    keys: Mapping[str, str]
    first_sample: int
    tokens: Path | None = None

    @property
    def name(self) -> str:
        """Name of the archive, without its suffix."""
        return shard_name(self.index)

    def perform(self, shared: Shared) -> ShardEntry:
        """See `make_shard`."""
        return make_shard(self, shared)


@dataclass(eq=False)
class _Found:
    """What turns up while a shard is made."""

    tally: Tally
    counts: Counter[str] = field(default_factory=Counter)
    image_sizes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    gripper_unmeasured: int = 0


def make_shard(job: ShardJob, shared: Shared) -> ShardEntry:
    """Makes one shard: the archive, its index, and at last its entry, which declares it finished.

    Raises:
        DataError: the source is not what it was when the plan was made.
        SampleError: the first problem, if the options say strict.
    """
    found = _Found(Tally(strict=shared.options.strict))
    path = shared.folder / f"{job.name}.tar"
    with ExitStack() as stack:
        writer: ShardWriter | None = None
        for key, members in _samples(job, shared, found):
            # An archive without samples would itself be a problem for whoever reads it.
            writer = writer or stack.enter_context(ShardWriter(path))
            writer.add(key, members)
    if writer is None:
        path.unlink(missing_ok=True)
    entry = ShardEntry(
        shard=path.name,
        samples=found.counts.total(),
        seconds=round(found.seconds, 6),
        bytes=path.stat().st_size if writer else 0,
        sha256=file_sha256(path) if writer else "",
        instructions={key: found.counts[key] for key in sorted(found.counts, key=int)},
        gripper_unmeasured=found.gripper_unmeasured,
        image_sizes=dict(sorted(found.image_sizes.items())),
        problems=hidden_paths(found.tally.report(), shared.hide),
    )
    write_entry(shared.folder, job.index, entry)
    return entry


def load_part(reader: RecordingReader, part: ShardPart, options: ConvertOptions) -> tuple[Recording, Selection, Chunks]:
    """The recording of a part, its frames and its chunks, without images.

    Raises:
        DataError: the recording gives another number of samples than planned.
    """
    recording = reader.load(EpisodeRef(part.episode.name, part.episode.index))
    selection = select_frames(recording, options.chunks, Tally())  # its problems were counted with the plan
    if len(selection) != part.episode.samples:
        expected, found = f"{part.episode.samples} samples as planned", len(selection)
        fix = "convert again, into another destination"
        raise DataError("the source has changed", where=part.episode.name, expected=expected, found=found, fix=fix)
    selection = selection.part(part.start, part.stop)
    return recording, selection, cut_chunks(recording, selection)


# ------------------------------------------------------------------------------------------------ samples


def _samples(job: ShardJob, shared: Shared, found: _Found) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of every sample that can be made."""
    tokens = None if job.tokens is None else _read_tokens(job.tokens, job.parts)
    offset = 0
    for part in job.parts:
        recording, selection, chunks = load_part(shared.reader, part, shared.options)
        for row, image in enumerate(_composites(recording, selection, shared.options, found)):
            if image is None:
                continue
            sentence = recording.instructions[int(selection.instruction[row])][1]
            members = action_members(
                image_jpeg=image,
                action=chunks.actions[row],
                instruction_key=job.keys[sentence],
                action_token=None if tokens is None else _masked(tokens[offset + row], chunks.gripper_valid[row]),
                meta=_meta(recording, selection, chunks, row),
            )
            found.counts[job.keys[sentence]] += 1
            found.seconds += selection.frame_s
            found.gripper_unmeasured += not chunks.gripper_valid[row].all()
            yield f"{job.first_sample + offset + row:0{KEY_DIGITS}d}", members
        offset += len(selection)


def _read_tokens(path: Path, parts: Sequence[ShardPart]) -> np.ndarray:
    tokens = read_array(path)
    expected = (sum(part.stop - part.start for part in parts), TOKENS_PER_CHUNK)
    if tokens.dtype != np.int16 or tokens.shape != expected:
        found = f"{tokens.dtype} {tokens.shape}"
        raise DataError("the tokens do not fit", where=path, expected=f"int16 {expected}", found=found)
    return tokens


def _masked(tokens: np.ndarray, gripper_valid: np.ndarray) -> np.ndarray:
    """Tokens whose gripper part is marked invalid unless both widths were measured."""
    tokens = np.array(tokens)
    if not gripper_valid.all():
        tokens[GRIPPER_TOKENS] = _INVALID
    return tokens


def _meta(recording: Recording, selection: Selection, chunks: Chunks, row: int) -> dict[str, Any]:
    right, left = int(selection.right_frame[row]), int(selection.left_frame[row])
    meta: dict[str, Any] = {
        "episode": recording.name,
        "frame": right,
        "capture_time_s": {
            OTHER: float(recording.cameras[OTHER].time_s[left]),
            REFERENCE: float(recording.cameras[REFERENCE].time_s[right]),
        },
    }
    valid = chunks.gripper_valid[row]
    if not valid.all():
        meta["gripper_valid"] = {arm: bool(valid[column]) for column, arm in enumerate(ARM_NAMES)}
    return meta


def _composites(
    recording: Recording, selection: Selection, options: ConvertOptions, found: _Found
) -> Iterator[bytes | None]:
    """The JPEG file of each sample, or None where an image cannot be used, which is counted."""
    left = _wrist_images(recording, OTHER, selection.left_frame, options, found)
    right = _wrist_images(recording, REFERENCE, selection.right_frame, options, found)
    for left_image, right_image in zip(left, right, strict=True):
        problem = next((image for image in (left_image, right_image) if isinstance(image, SampleError)), None)
        if problem is not None:
            found.tally.add(problem)
            yield None
        elif isinstance(left_image, np.ndarray) and isinstance(right_image, np.ndarray):
            yield composite_jpeg(left_image, right_image, options.images.jpeg_quality)


def _wrist_images(
    recording: Recording, camera: str, indices: np.ndarray, options: ConvertOptions, found: _Found
) -> Iterator[np.ndarray | SampleError]:
    """One image, or what is wrong with it, for each index; an index may come twice in a row."""
    unique, repeats = np.unique(indices, return_counts=True)
    where = f"{recording.name}, {camera}"
    images = read_each(recording.cameras[camera].frames, unique.tolist(), where)
    for index, count, image in zip(unique, repeats, images, strict=True):
        if isinstance(image, np.ndarray) and image.ndim == 3:
            found.image_sizes[f"{image.shape[1]}x{image.shape[0]}"] += 1
        yield from repeat(_checked(image, options, f"{where} image {index}"), count)


def _checked(image: np.ndarray | SampleError, options: ConvertOptions, where: str) -> np.ndarray | SampleError:
    if isinstance(image, SampleError):
        return image
    try:
        return wrist_image(image, options.images, where)
    except SampleError as problem:
        return problem


def read_each(frames: Frames, indices: Sequence[int], where: str) -> Iterator[np.ndarray | SampleError]:
    """As many answers as indices: an image, or the problem in its place, after which reading goes on.

    Readers that raise a problem are asked again for what follows it; better ones yield it.
    """
    done = 0
    while done < len(indices):
        try:
            for image in frames.read(indices[done:]):
                done += 1
                yield image
        except SampleError as problem:
            done += 1
            yield problem
        else:
            for index in indices[done:]:
                expected = "an image for every time"
                yield SampleError("bad-recording", where=f"{where} image {index}", expected=expected, found="no image")
            return
