"""From one container to the other, or to shards of another size or order: `rdt2 data pack`.

Every file is a pure function of the source and the options, and takes its name when it is whole; a run that was
interrupted goes on with the files that are missing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rdt2_data.problems import SampleError, Tally
from rdt2_data.shards.array_record import ArrayRecordWriter
from rdt2_data.shards.numbering import ARRAY_RECORD_SUFFIX, TAR_SUFFIX
from rdt2_data.shards.source import Paths, SampleSource, open_source
from rdt2_data.shards.writer import TEMPORARY_SUFFIX, ShardWriter
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import atomic_write, make_folder
from rdt2_jax.progress import progress_bar

PACK_FILE = "pack.json"
_READ_AT_ONCE = 16
_TEMPORARIES = (f".shard-*{TEMPORARY_SUFFIX}", f".{PACK_FILE}.*{TEMPORARY_SUFFIX}")
"""What a run that was killed leaves behind."""


@dataclass(frozen=True)
class PackOptions:
    """What to make.

    Attributes:
        container: "tar" or "array_record".
        samples_per_shard: in every file but the last.
        shuffle_seed: writes the samples in an order drawn from it, so that readers with a small shuffle buffer mix
            episodes too; None keeps the order.
    """

    container: Literal["tar", "array_record"]
    samples_per_shard: int = 1000
    shuffle_seed: int | None = None


@dataclass(frozen=True)
class PackReport:
    """What was made: samples written, files written now, files that were there already, samples left out."""

    samples: int
    written: int
    kept: int
    tally: Tally


def pack(paths: Paths, folder: Path, options: PackOptions, *, strict: bool = False) -> PackReport:
    """Writes the samples of `paths` into `folder`, where nobody else writes meanwhile.

    Keys become the numbers of the samples ("000000042"), as different shards may use the same ones. Samples that cannot
    be read are left out and counted.

    Raises:
        DataError: nothing to read, or a folder with something else in it.
        SampleError: the first problem, when strict.
    """
    tally = Tally(strict=strict)
    source = open_source(paths, tally=tally)
    if options.samples_per_shard < 1 or not len(source):
        found = f"{len(source)} samples, {options.samples_per_shard} in a shard"
        raise DataError("there is nothing to pack", where=paths, found=found)
    _claim(folder, source, options)
    order = np.arange(len(source))
    if options.shuffle_seed is not None:
        np.random.default_rng(options.shuffle_seed).shuffle(order)
    starts = range(0, len(order), options.samples_per_shard)
    written = samples = 0
    with progress_bar("packing", len(order), "samples") as advance:
        for shard, start in enumerate(starts):
            numbers = order[start : start + options.samples_per_shard]
            suffix = TAR_SUFFIX if options.container == "tar" else ARRAY_RECORD_SUFFIX
            path = folder / f"shard-{shard:06d}{suffix}"
            if not path.exists():
                samples += _write(source, numbers, start, path, tally)
                written += 1
            advance(len(numbers))
    return PackReport(samples, written, len(starts) - written, tally)


def _write(source: SampleSource, numbers: np.ndarray, start: int, path: Path, tally: Tally) -> int:
    samples = 0
    with ShardWriter(path) if path.suffix == TAR_SUFFIX else ArrayRecordWriter(path) as writer:
        for first in range(0, len(numbers), _READ_AT_ONCE):
            for offset, raw in enumerate(source.read(numbers[first : first + _READ_AT_ONCE].tolist())):
                if isinstance(raw, SampleError):
                    tally.add(raw)
                else:
                    writer.add(f"{start + first + offset:09d}", raw.members)
                    samples += 1
    return samples


def _claim(folder: Path, source: SampleSource, options: PackOptions) -> None:
    """Makes sure that the folder is empty, or begun with the same source and options; removes what a killed run left.

    The modification times of the source belong to it: a source replaced by one of the same sizes is another one.
    """
    wanted = {"source": source.fingerprint(), "source_state": source.state(), **asdict(options)}
    record = folder / PACK_FILE
    make_folder(folder)
    temporaries = [path for pattern in _TEMPORARIES for path in folder.glob(pattern)]
    if record.is_file():
        found = _read_claim(record)
        if found != wanted:
            fix = "choose another folder, or remove this one"
            raise DataError("the folder was packed otherwise", where=folder, expected=wanted, found=found, fix=fix)
    elif set(folder.iterdir()) != set(temporaries):
        raise DataError("the folder is not empty", where=folder, fix="choose another, or an empty one")
    for path in temporaries:
        path.unlink(missing_ok=True)
    if not record.is_file():
        with atomic_write(record) as file:
            file.write(json.dumps(wanted, indent=1).encode())


def _read_claim(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError("the record of an earlier run cannot be read", where=record, found=str(error)) from error
