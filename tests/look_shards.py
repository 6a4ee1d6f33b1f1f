"""Small datasets of shards for the tests that look at them: statistics, check, inspect, view."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from rdt2_data.samples import COMPOSITE_SHAPE, action_members
from rdt2_data.shards.writer import ShardWriter
from rdt2_data.synthetic import smooth_chunks

SENTENCES = {"0": "Pick up the apple.", "1": "Wipe the table."}


def composite_jpeg(seed: int = 0) -> bytes:
    """A picture with enough in it: smooth gradients and noise in blocks, another one for every seed."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (COMPOSITE_SHAPE[0] // 32, COMPOSITE_SHAPE[1] // 32, 3))
    image = np.kron(blocks, np.ones((32, 32, 1))).astype(np.uint8)
    return simplejpeg.encode_jpeg(image, quality=85, colorspace="RGB")


JPEGS = [composite_jpeg(seed) for seed in range(3)]


def meta_times(episode: int, frame: int, start_s: float = 100.0) -> dict[str, Any]:
    """Episode, frame, and capture times at 30 Hz, the right camera 5 ms later."""
    left = start_s + frame / 30
    return {
        "episode": f"episode-{episode}",
        "frame": frame,
        "capture_time_s": {"left_wrist": left, "right_wrist": left + 0.005},
    }


def good_samples(count: int, seed: int = 0) -> list[dict[str, bytes]]:
    """Members of samples without fault: episodes of ten, tokens, times."""
    chunks = smooth_chunks(count, seed)
    generator = np.random.default_rng(seed)
    return [
        action_members(
            image_jpeg=JPEGS[i % len(JPEGS)],
            action=chunks[i],
            instruction_key=i % len(SENTENCES),
            action_token=generator.integers(0, 1024, 27).astype(np.int16),
            meta=meta_times(i // 10, i % 10),
        )
        for i in range(count)
    ]


def write_shards(folder: Path, samples: Sequence[Mapping[str, bytes]], per_shard: int = 10) -> Path:
    """Writes `shard-000000.tar` and so on, and `instructions.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(samples), per_shard)):
        with ShardWriter(folder / f"shard-{number:06d}.tar") as writer:
            for offset, members in enumerate(samples[start : start + per_shard]):
                writer.add(f"{start + offset:09d}", members)
    (folder / "instructions.json").write_text(json.dumps(SENTENCES))
    return folder
