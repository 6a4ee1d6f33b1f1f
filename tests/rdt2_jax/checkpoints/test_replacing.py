"""What overwriting may delete: a checkpoint that can be read as one, alone in its folder, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.checkpoints import Checkpoints, read_metadata, save, save_streamed, stored_items
from rdt2_jax.errors import CheckpointError, Rdt2Error

LEAF = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}


def write_at_once(path: Path, **options: Any) -> None:
    save(path, {"params": {"w": jnp.ones(3)}}, {"new": True}, overwrite=True, **options)


def write_streamed(path: Path, **options: Any) -> None:
    read = options.pop("read", lambda _: np.ones(3, np.float32))
    save_streamed(path, "params", LEAF, read, {"new": True}, overwrite=True, **options)


WRITERS = pytest.mark.parametrize("write", [write_at_once, write_streamed])


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder by its path, with the bytes of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@WRITERS
@pytest.mark.parametrize("envelope", [None, b"", b"{}", b"not JSON", b'{"format": "another", "crc32": 1}'])
def test_a_folder_named_metadata_makes_no_checkpoint(tmp_path, write, envelope):
    recording = tmp_path / "recording"
    (recording / "metadata").mkdir(parents=True)
    (recording / "episode.bin").write_bytes(b"hours of work")
    if envelope is not None:
        (recording / "metadata" / "metadata").write_bytes(envelope)
    before = content(recording)
    with pytest.raises(CheckpointError, match=r"only a checkpoint is ever overwritten, and this is none, or a damaged"):
        write(recording)
    assert content(recording) == before
    assert [path.name for path in tmp_path.iterdir()] == ["recording"]


@WRITERS
def test_a_checkpoint_whose_envelope_was_altered_is_kept(tmp_path, write):
    write(tmp_path / "c")
    file = tmp_path / "c" / "metadata" / "metadata"
    file.write_bytes(file.read_bytes().replace(b"true", b"null"))
    before = content(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"or a damaged one(.|\n)*not the metadata that was saved"):
        write(tmp_path / "c")
    assert content(tmp_path / "c") == before


STRANGERS: dict[str, Callable[[Path], object]] = {
    "episode.bin": lambda folder: (folder / "episode.bin").write_bytes(b"x"),
    "checkpoint-500": lambda folder: (folder / "checkpoint-500").mkdir(),
    ".git": lambda folder: (folder / ".git").mkdir(),
    "config.json": lambda folder: (folder / "config.json").write_text("{}"),
    "metadata/notes.txt": lambda folder: (folder / "metadata" / "notes.txt").write_text("mine"),
}


@WRITERS
@pytest.mark.parametrize("name", STRANGERS)
def test_what_else_lies_in_the_folder_is_named_and_kept(tmp_path, write, name):
    write(tmp_path / "c")
    STRANGERS[name](tmp_path / "c")
    before = content(tmp_path / "c")
    with pytest.raises(CheckpointError, match=rf"other things in it(.|\n)*found: {name}\n"):
        write(tmp_path / "c")
    assert content(tmp_path / "c") == before


def test_a_stranger_among_the_parts_of_an_item_is_kept(tmp_path):
    write_streamed(tmp_path / "c")
    (tmp_path / "c" / "params" / "old").mkdir()
    with pytest.raises(CheckpointError, match=r"other things in it(.|\n)*found: params/old"):
        write_streamed(tmp_path / "c")
    assert (tmp_path / "c" / "params" / "old").is_dir()


def test_all_strangers_are_listed(tmp_path):
    write_at_once(tmp_path / "c")
    for name in ("checkpoint-500", "episode.bin"):
        STRANGERS[name](tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"found: checkpoint-500, episode\.bin"):
        write_at_once(tmp_path / "c")


@WRITERS
def test_what_was_written_with_the_checkpoint_is_replaced_with_it(tmp_path, write):
    write_streamed(tmp_path / "c", files={"config.json": b"{}", "words.txt": b"a"})
    write(tmp_path / "c")
    assert not (tmp_path / "c" / "config.json").exists()
    assert read_metadata(tmp_path / "c") == {"new": True}


@WRITERS
def test_a_step_of_a_series_is_a_checkpoint(tmp_path, write):
    with Checkpoints(tmp_path, keep_last=1, keep_best=1, best_metric="loss") as series:
        series.save(3, {"params": {"w": jnp.zeros(2)}, "lora": {"a": jnp.zeros(1)}}, metrics={"loss": 1.0})
    assert (tmp_path / "3" / "metrics").is_dir()
    write(tmp_path / "3")
    assert stored_items(tmp_path / "3") == ("params",)


def test_what_came_while_the_new_one_was_written_is_kept(tmp_path):
    """Writing a large model takes long: the folder is looked at again before it is replaced."""
    write_streamed(tmp_path / "c")

    def read(name: str) -> np.ndarray:
        STRANGERS["episode.bin"](tmp_path / "c")
        return np.zeros(3, np.float32)

    with pytest.raises(CheckpointError, match=r"found: episode\.bin"):
        write_streamed(tmp_path / "c", read=read)
    assert (tmp_path / "c" / "episode.bin").read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@WRITERS
@pytest.mark.parametrize("place", ["/proc/x/checkpoint", "/proc/x/deep/checkpoint"])
def test_a_place_where_no_folder_can_be(write, place):
    with pytest.raises(Rdt2Error, match=r"a folder cannot be created\n  where: /proc/x(.|\n)*FileNotFoundError"):
        write(Path(place))
