"""Shards like the published ones to measure loaders with: 384 x 768 images of about 106 KB, chunks, tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from rdt2_data.dataset_config import Component, Dataset
from rdt2_data.instructions import Instructions
from rdt2_data.pipeline.stream import StreamConfig, TrainingStream
from rdt2_data.samples import COMPOSITE_SHAPE, action_members
from rdt2_data.shards.writer import ShardWriter
from rdt2_data.synthetic import smooth_chunks

BATCH = 32
THREADS = 2
_IMAGES = 32
SENTENCES = {"0": "Pick up the apple.", "1": "Wipe the table."}


def images(count: int) -> list[bytes]:
    """JPEG files with edges, gradients and noise, of about the size of the published ones."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[: COMPOSITE_SHAPE[0], : COMPOSITE_SHAPE[1]]
    found = []
    for _ in range(count):
        image = np.empty(COMPOSITE_SHAPE)
        for channel in range(3):
            frequency = generator.uniform(0.02, 0.2, 2)
            image[..., channel] = 127 + 60 * np.sin(frequency[0] * rows + frequency[1] * columns)
        image[(rows // 48 + columns // 64) % 3 == 0] *= 0.5
        image += generator.normal(0, 7, COMPOSITE_SHAPE)
        pixels = np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))
        found.append(simplejpeg.encode_jpeg(pixels, quality=92, colorsubsampling="420"))
    return found


def make_shards(folder: Path, shards: int, samples: int) -> dict[str, Any]:
    """Writes shards; says what is in them."""
    folder.mkdir(parents=True)
    jpegs, chunks = images(_IMAGES), smooth_chunks(shards * samples, 0)
    for shard in range(shards):
        with ShardWriter(folder / f"shard-{shard:06d}.tar") as writer:
            for row in range(samples):
                number = shard * samples + row
                members = action_members(
                    image_jpeg=jpegs[number % _IMAGES],
                    action=chunks[number],
                    instruction_key=number % len(SENTENCES),
                    action_token=np.full(27, number % 1024, np.int16),
                )
                writer.add(f"{number:09d}", members)
    kilobytes = float(np.mean([len(data) for data in jpegs])) / 1000
    return {"shards": shards, "samples": shards * samples, "jpeg_kb": kilobytes}


def many_shards(folder: Path, original: Path, count: int, samples: int | None) -> list[Path]:
    """`count` names for the first shard of `original`; not indexed when `samples` is given (as many are then in it)."""
    folder.mkdir()
    source = original / "shard-000000.tar"
    if samples is not None:
        source = folder.parent / f"plain-{samples}" / "shard-000000.tar"
        if not source.exists():
            make_shards(source.parent, 1, samples)
    paths = [folder / f"shard-{number:06d}.tar" for number in range(count)]
    for path in paths:
        os.link(source, path)
        if samples is None:
            os.link(f"{source}.idx", f"{path}.idx")
    return paths


def our_dataset(shards: Path) -> Dataset:
    """The shards as a dataset."""
    return Dataset("benchmark", (Component("benchmark", str(shards), 1.0, Instructions(SENTENCES)),), None)


def print_memory(folder: str, batches: int) -> None:
    """Loads, and prints the peak of this process's memory as JSON."""
    imported = peak_mb()
    stream = TrainingStream(our_dataset(Path(folder)), StreamConfig(batch_size=BATCH, threads=THREADS))
    iterator = iter(stream)
    samples = int(stream._starts[-1])
    for _ in range(batches):
        next(iterator)
    iterator.close()
    print(json.dumps({"samples": samples, "imported_mb": imported, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Of resident memory since this program began; getrusage would count that of the process it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
