"""What the training stream is measured against: webdataset with torch's DataLoader, and decoding alone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from data_workload import BATCH, THREADS
from PIL import Image
from rdt2_data.samples import COMPOSITE_SHAPE
from rdt2_data.shards.source import open_source

_SHUFFLE_BUFFER = 1000
"""The published loader shuffles among 8192 samples; less memory to fill is to the peer's advantage."""


def with_simplejpeg(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB")


def with_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


_DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {"simplejpeg": with_simplejpeg, "Pillow": with_pillow}


class _Decode:
    """A sample's members as arrays."""

    def __init__(self, decoder: str) -> None:
        self._decoder = decoder

    def __call__(self, sample: dict[str, Any]) -> dict[str, np.ndarray]:
        return {
            "image": _DECODERS[self._decoder](sample["image.jpg"]),
            "action": np.load(io.BytesIO(sample["action.npy"])),
            "action_token": np.load(io.BytesIO(sample["action_token.npy"])),
        }


def webdataset_batches(shards: Path, decoder: str, workers: int) -> Iterator[Any]:
    """Endless batches, shards drawn with replacement and samples shuffled in a buffer, as the published loader does."""
    count = len(list(shards.glob("*.tar")))
    pattern = str(shards / f"shard-{{000000..{count - 1:06d}}}.tar")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers in excess of processors
        samples = webdataset.WebDataset(pattern, resampled=True, shardshuffle=False)
        samples = samples.shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_BUFFER // 4).map(_Decode(decoder))
        loader = torch.utils.data.DataLoader(samples, batch_size=BATCH, num_workers=workers)
        yield from loader


def decode_and_collate(shards: Path) -> Iterator[np.ndarray]:
    """The least a loader does: JPEG files in memory, decoded by as many threads into the arrays of a batch."""
    source = open_source(shards)
    files = [raw.members["image.jpg"] for raw in source.read(range(min(4 * BATCH, len(source))))]  # type: ignore[union-attr]

    def batch(number: int) -> np.ndarray:
        images = np.empty((BATCH, *COMPOSITE_SHAPE), np.uint8)
        for row in range(BATCH):
            simplejpeg.decode_jpeg(files[(number * BATCH + row) % len(files)], "RGB", buffer=images[row])
        return images

    with ThreadPoolExecutor(THREADS) as pool:
        ahead = [pool.submit(batch, number) for number in range(THREADS + 1)]
        number = len(ahead)
        while True:
            done = ahead.pop(0).result()
            ahead.append(pool.submit(batch, number))
            number += 1
            yield done
