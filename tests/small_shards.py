"""Small shards in the published layout, for tests: real JPEG images, smooth chunks, a few sentences."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import yaml
from rdt2_data.samples import COMPOSITE_SHAPE, Turn, action_members, question_members
from rdt2_data.shards.writer import ShardWriter
from rdt2_data.synthetic import smooth_chunks

SENTENCES = {"0": "Pick up the apple.", "1": "Wipe the table.", "2": "Press the space key."}


@functools.cache
def jpeg(number: int = 0, shape: tuple[int, int, int] = COMPOSITE_SHAPE) -> bytes:
    """A smooth image whose colours say its number; small as a file."""
    rows = np.linspace(0, 1, shape[0])[:, None]
    columns = np.linspace(0, 1, shape[1])[None]
    image = np.stack([np.full(shape[:2], (number * 37) % 256 / 255), rows + 0 * columns, columns + 0 * rows], axis=-1)
    return simplejpeg.encode_jpeg(np.ascontiguousarray((image * 255).astype(np.uint8)), quality=90)


@functools.cache
def chunks(count: int, seed: int = 0) -> np.ndarray:
    return smooth_chunks(count, seed)


def sample(number: int, *, tokens: bool = True, **changes: Any) -> dict[str, bytes]:
    """Members of an action sample; its tokens are its number modulo 1024."""
    values: dict[str, Any] = {
        "image_jpeg": jpeg(number % 7),
        "action": chunks(64)[number % 64],
        "instruction_key": number % 3,
        "action_token": np.full(27, number % 1024, np.int16) if tokens else None,
    }
    return action_members(**(values | changes))


def question(number: int) -> dict[str, bytes]:
    """Members of a question sample; its image has another shape."""
    turns = [Turn(f"What is number {number}?", f"It is {number}."), Turn("Sure?", "Yes.")]
    return question_members(image_jpeg=jpeg(number % 5, (64 + 8 * (number % 3), 48, 3)), turns=turns)


def write_shards(folder: Path, shards: int = 2, samples: int = 5, *, first: int = 0, make: Any = sample) -> Path:
    """`shards` archives of `samples` samples each; keys count through from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with ShardWriter(folder / f"shard-{shard:06d}.tar") as writer:
            for row in range(samples):
                number = first + shard * samples + row
                writer.add(str(number), make(number))
    return folder


def append(path: Path, name: str, data: bytes) -> None:
    """Puts one more member into an archive, as tar would."""
    with tarfile.open(path, "a:") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def write_dataset(folder: Path, shards: int = 2, samples: int = 5, **options: Any) -> Path:
    """Shards with instructions and a dataset file; returns the file."""
    write_shards(folder / "shards", shards, samples, **options)
    (folder / "instructions.json").write_text(json.dumps(SENTENCES))
    config = {
        "name": folder.name,
        "type": "single",
        "shards_dir": "shards",
        "kwargs": {"instruction_path": "instructions.json", "normalizer_path": None},
    }
    file = folder / "dataset.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
