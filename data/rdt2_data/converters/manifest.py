"""What has been done: an entry for every finished shard, and the files that turn a folder of shards into a dataset."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from rdt2_data.converters.card import dataset_card
from rdt2_data.converters.images import shape_notes
from rdt2_data.converters.plan import PLAN_FILE, Plan
from rdt2_data.converters.planning import PARTIAL_FILE
from rdt2_data.problems import Tally
from rdt2_jax.config import FrozenConfig
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import atomic_write

ENTRIES, TOKENS = "manifest", "tokens"
"""Folders of work files inside the destination."""

MANIFEST_FILE, INSTRUCTIONS_FILE, DATASET_FILE, CARD_FILE = (
    "manifest.json",
    "instructions.json",
    "dataset.yaml",
    "README.md",
)
_FINAL_FILES = (PLAN_FILE, MANIFEST_FILE, INSTRUCTIONS_FILE, DATASET_FILE, CARD_FILE)
_SHARD = r"shard-\d{6,}"
_NAMES = {
    "": rf"{_SHARD}\.tar(\.idx)?|" + "|".join(map(re.escape, _FINAL_FILES)),
    ENTRIES: rf"{_SHARD}\.json",
    TOKENS: rf"{_SHARD}\.npy",
}
_LEFTOVERS = {place: re.compile(rf"\.({names})\.[0-9a-f]{{16}}\.tmp") for place, names in _NAMES.items()}
"""By folder: temporary names of the files that are written there."""


class ShardEntry(FrozenConfig):
    """A finished shard.

    Attributes:
        shard: name of the archive.
        samples: in the archive; 0 where no sample of it could be made, and then there is no archive.
        seconds: of recorded time that its samples stand for.
        bytes, sha256: of the archive.
        instructions: key -> number of samples.
        gripper_unmeasured: samples behind which a width was not measured, of either arm.
        image_sizes: "COLUMNSxROWS" of source images, before cropping -> how many were read.
        problems: what was left out while making it, as `Tally.report` gives it.
    """

    shard: str
    samples: int
    seconds: float
    bytes: int
    sha256: str
    instructions: dict[str, int]
    gripper_unmeasured: int
    image_sizes: dict[str, int]
    problems: dict[str, Any]


def shard_name(index: int) -> str:
    """Name of the archive with this number, without its suffix."""
    return f"shard-{index:06d}"


def entry_path(folder: Path, index: int) -> Path:
    """Where the entry of a shard lies."""
    return folder / ENTRIES / f"{shard_name(index)}.json"


def write_entry(folder: Path, index: int, entry: ShardEntry) -> None:
    """Declares a shard finished; its archive must be complete by then."""
    _write_json(entry_path(folder, index), entry.model_dump(mode="json"))


def read_entry(folder: Path, index: int, *, verify: bool = False) -> ShardEntry | None:
    """The entry of a shard, or None while it is not finished: no entry, or no archive of the size in the entry.

    With `verify` the whole archive is read, and its checksum must be that of the entry as well.
    """
    try:
        entry = ShardEntry.model_validate_json(entry_path(folder, index).read_bytes())
    except (FileNotFoundError, pydantic.ValidationError):
        return None
    archive = folder / entry.shard
    if not entry.samples:
        return entry
    if not archive.is_file() or archive.stat().st_size != entry.bytes:
        return None
    return entry if not verify or file_sha256(archive) == entry.sha256 else None


def file_sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or was begun by a conversion."""
    names = [path.name for path in folder.iterdir()]
    if PLAN_FILE in names:
        return True
    return all(name == PARTIAL_FILE or _LEFTOVERS[""].fullmatch(name) for name in names)


def remove_leftovers(folder: Path) -> list[str]:
    """Removes the hidden temporary files of a conversion that was killed, and no others; returns their names."""
    removed = []
    for name, leftover in _LEFTOVERS.items():
        place = folder / name
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if leftover.fullmatch(path.name) and path.is_file():
                path.unlink()
                removed.append(path.name)
    return removed


# ------------------------------------------------------------------------------------------- the dataset


def remove_manifest(folder: Path) -> None:
    """Removes what says that the dataset is complete, before any of it is made again."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


def image_notes(plan: Plan, entries: Iterable[ShardEntry]) -> list[str]:
    """What there is to say about the shapes of the source images."""
    return shape_notes(_sum_counts(entry.image_sizes for entry in entries), plan.source.options.images)


def write_dataset(folder: Path, plan: Plan, entries: Sequence[ShardEntry]) -> Tally:
    """Writes everything but the shards; the manifest last. The same plan and entries give the same bytes.

    Returns:
        All problems of planning and of making the shards.

    Raises:
        DataError: not a single sample could be made.
    """
    tally = Tally()
    tally.merge(plan.problems)
    for entry in entries:
        tally.merge(entry.problems)
    if not any(entry.samples for entry in entries):
        raise DataError("not a single sample could be made", where=folder, found=tally.text())
    sentences = {str(key): sentence for key, sentence in enumerate(plan.instructions)}
    _write_json(folder / INSTRUCTIONS_FILE, sentences)
    with atomic_write(folder / DATASET_FILE) as file:
        file.write(_dataset_yaml(plan).encode())
    document = _manifest(plan, entries, tally)
    with atomic_write(folder / CARD_FILE) as file:
        file.write(dataset_card(plan.source.options.name, document, sentences).encode())
    if (folder / TOKENS).is_dir():
        shutil.rmtree(folder / TOKENS)
    _write_json(folder / MANIFEST_FILE, document)
    return tally


def _dataset_yaml(plan: Plan) -> str:
    options = plan.source.options
    kwargs = {"instruction_path": INSTRUCTIONS_FILE, "normalizer_path": options.normalizer_path}
    document = {"name": options.name, "type": "single", "shards_dir": ".", "kwargs": kwargs}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _manifest(plan: Plan, entries: Sequence[ShardEntry], tally: Tally) -> dict[str, Any]:
    options = plan.source.options.model_dump(mode="json", exclude={"strict", "normalizer_path"})
    return {
        "version": plan.version,
        "samples": sum(entry.samples for entry in entries),
        "seconds": _seconds(entry.seconds for entry in entries),
        "bytes": sum(entry.bytes for entry in entries),
        "action_tokens": plan.source.tokenizer is not None,
        "options": options,
        "episodes": sum(episode.samples > 0 for episode in plan.episodes),
        "instructions": _sum_counts((entry.instructions for entry in entries), order=int),
        "gripper_unmeasured": sum(entry.gripper_unmeasured for entry in entries),
        "image_sizes": _sum_counts(entry.image_sizes for entry in entries),
        "image_notes": image_notes(plan, entries),
        "left_out": plan.left_out(),
        "notes": plan.notes(),
        "problems": tally.report(),
        "shards": [
            entry.model_dump(mode="json", include={"shard", "samples", "bytes", "sha256"})
            for entry in entries
            if entry.samples
        ],
    }


def _sum_counts(counts: Iterable[Mapping[str, int]], order: Callable[[str], Any] = str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return {key: total[key] for key in sorted(total, key=order)}


def _seconds(values: Iterable[float]) -> float:
    return round(sum(values), 3)


def _write_json(path: Path, document: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")
