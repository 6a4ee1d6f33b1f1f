"""Recordings for tests of the converters: smooth motion, small images, everything reproducible."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rdt2_data.converters.chunks import cut_chunks, select_frames
from rdt2_data.converters.options import ChunkOptions
from rdt2_data.converters.recording import CameraTrack, EpisodeRef, PoseTrack, Recording, WidthTrack
from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import RawSample
from rdt2_data.shards.source import open_source
from rdt2_data.synthetic import smooth_arm_motion

from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES
from rdt2_jax.actions.poses import make_pose

RATE_HZ = 30.0


@dataclass(frozen=True)
class SmallFrames:
    """Images of `size` pixels that tell camera and index; those in `black` are black.

    Those in `unreadable` are yielded as problems or, as older readers do, raised.
    """

    seed: int
    size: tuple[int, int] = (48, 64)
    unreadable: tuple[int, ...] = ()
    black: tuple[int, ...] = ()
    raising: bool = False

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray | SampleError]:
        assert list(indices) == sorted(set(indices))
        for index in indices:
            if index in self.unreadable:
                problem = SampleError("corrupt-jpeg", where=f"image {index}")
                if self.raising:
                    raise problem
                yield problem
            elif index in self.black:
                yield np.zeros((*self.size, 3), np.uint8)
            else:
                yield small_image(self.seed, index, self.size)


def small_image(seed: int, index: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A coarse random pattern, so that it survives JPEG."""
    coarse = np.random.default_rng((seed, index)).integers(0, 256, (4, 4, 3), np.uint8)
    rows, columns = (np.arange(count) * 4 // count for count in size)
    return np.ascontiguousarray(coarse[rows][:, columns])


def smooth_recording(
    name: str = "episode", seed: int = 0, rows: int = 60, start_s: float = 0.0, **frames: Any
) -> Recording:
    """Both arms and cameras at 30 Hz, all on the same times."""
    time_s = start_s + np.arange(rows) / RATE_HZ
    poses, widths = {}, {}
    for arm, generator in zip(ARM_NAMES, np.random.default_rng(seed).spawn(2), strict=True):
        position, rotation, width = smooth_arm_motion(generator, rows)
        poses[arm] = PoseTrack(time_s, make_pose(rotation, position))
        widths[arm] = WidthTrack(time_s, width, np.ones(rows, bool))
    cameras = {
        camera: CameraTrack(time_s, SmallFrames(2 * seed + number, **frames))
        for number, camera in enumerate(CAMERA_NAMES)
    }
    return Recording(name, poses, widths, cameras, [(start_s, f"Do {seed % 3}.")])


@dataclass(frozen=True)
class SmallReader:
    """Synthetic episodes; `rows` of each."""

    rows: tuple[int, ...]
    size: tuple[int, int] = (48, 64)
    unreadable: tuple[int, ...] = ()
    version: str = "1"
    raising: bool = False

    def episodes(self) -> list[EpisodeRef]:
        return [EpisodeRef(f"episode_{index}", index) for index in range(len(self.rows))]

    def load(self, episode: EpisodeRef) -> Recording:
        rows = self.rows[episode.index]
        frames: dict[str, Any] = {"size": self.size, "unreadable": self.unreadable, "raising": self.raising}
        return smooth_recording(episode.name, episode.index, rows, start_s=100.0 * episode.index, **frames)

    def fingerprint(self) -> str:
        return f"{self.rows} {self.version}"


def with_tracks(recording: Recording, **changes: Any) -> Recording:
    """The recording with other fields."""
    return replace(recording, **changes)


def dataset_files(folder: Path) -> dict[str, str]:
    """Every file of a dataset and its checksum, without the indexes, which hold the times of their archives."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".idx"
    }


def read_samples(folder: Path) -> list[RawSample]:
    """All samples of a dataset; none of them may be unreadable."""
    source = open_source(str(folder))
    samples = source.read(range(len(source)))
    assert not [sample for sample in samples if isinstance(sample, SampleError)]
    return [sample for sample in samples if isinstance(sample, RawSample)]


def save_small_tokenizer(folder: Path) -> Path:
    """The small published-format action tokenizer, with a normalizer fitted to smooth motion."""
    from rdt2_jax.action_tokenizer.checkpoint import load_tokenizer, save_tokenizer
    from rdt2_jax.actions.normalizer import LinearNormalizer

    recording = smooth_recording(rows=200)
    chunks = cut_chunks(recording, select_frames(recording, ChunkOptions(), Tally())).actions
    published = load_tokenizer(Path(__file__).parent / "golden" / "rvq_tiny")
    save_tokenizer(replace(published, normalizer=LinearNormalizer.fit_actions(chunks)), folder)
    return folder
