"""Action tokens of a conversion: those of the tokenizer, with the grippers' marked where a width was not measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from convert_sources import SmallReader, read_samples, save_small_tokenizer
from rdt2_data.converters import tokens as tokens_module
from rdt2_data.converters.convert import convert
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.recording import EpisodeRef, Recording, WidthTrack
from rdt2_data.converters.runners import LocalRunner
from rdt2_data.converters.tokens import Tokenizing
from rdt2_data.samples import read_action, read_action_token, read_meta

from rdt2_jax.errors import DataError

HERE = LocalRunner(workers=1)
TEN = ConvertOptions(name="small", samples_per_shard=10)


@dataclass(frozen=True)
class HalfMeasured(SmallReader):
    """The right width of its second episode was not measured."""

    def load(self, episode: EpisodeRef) -> Recording:
        recording = super().load(episode)
        if episode.index != 1:
            return recording
        track = recording.widths["right"]
        unknown = WidthTrack(track.time_s, np.full_like(track.width, np.nan), np.zeros_like(track.valid))
        return replace(recording, widths={**recording.widths, "right": unknown})


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_tokens_are_those_of_the_tokenizer(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rdt2_jax.action_tokenizer.checkpoint import load_tokenizer
    from rdt2_jax.action_tokenizer.tokenizer import encode

    monkeypatch.setattr(tokens_module, "BATCH", 32)  # as many as there are chunks: one compilation for both
    folder = tmp_path / "dataset"
    options = TEN.model_copy(update={"samples_per_shard": 12})
    convert(HalfMeasured((40, 40)), folder, options, tokenizing=Tokenizing(tokenizer_folder), runner=HERE)
    samples = read_samples(folder)
    chunks = np.stack([read_action(sample) for sample in samples])
    tokens = np.stack([token for sample in samples if (token := read_action_token(sample)) is not None])
    loaded = load_tokenizer(tokenizer_folder)
    expected = np.asarray(encode(loaded.params, loaded.config, loaded.normalize(chunks)))
    assert np.array_equal(tokens[:16], expected[:16])
    assert np.array_equal(tokens[16:, :24], expected[16:, :24])
    assert (tokens[16:, 24:] == -1).all()
    assert "gripper_valid" not in read_meta(samples[15])
    assert read_meta(samples[16])["gripper_valid"] == {"right": False, "left": True}
    assert not (folder / "tokens").exists()
    with pytest.raises(DataError, match="tokenizer"):
        convert(HalfMeasured((40, 40)), folder, options, runner=HERE)


def test_tokens_need_a_whole_checkpoint(tokenizer_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tokenizer_folder / name)
    with pytest.raises(DataError, match="a normalizer"):
        convert(SmallReader((40,)), tmp_path / "one", TEN, tokenizing=Tokenizing(tmp_path), runner=HERE)
    (tmp_path / "config.json").unlink()
    with pytest.raises(DataError, match="missing"):
        convert(SmallReader((40,)), tmp_path / "two", TEN, tokenizing=Tokenizing(tmp_path), runner=HERE)


@dataclass(frozen=True)
class OneRowUnmeasured(SmallReader):
    """The right width of its second episode was not measured at row 30."""

    def load(self, episode: EpisodeRef) -> Recording:
        recording = super().load(episode)
        track = recording.widths["right"]
        valid = np.arange(len(track.time_s)) != (30 if episode.index == 1 else -1)
        return replace(recording, widths={**recording.widths, "right": replace(track, valid=valid)})


def test_unmeasured_widths_and_image_sizes_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "dataset"  # its parents are created
    report = convert(OneRowUnmeasured((40, 40)), folder, TEN, runner=HERE)
    assert report.gripper_unmeasured == 10  # frames 6 to 15 of 16
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["gripper_unmeasured"] == 10
    assert manifest["image_sizes"] == {"64x48": 64}
    (note,) = manifest["image_notes"]
    assert note.startswith("64x48 pixels became a square")
    assert report.image_notes == [note]
    card = (folder / "README.md").read_text()
    assert "| samples without a measured gripper width | 10 |" in card
    assert "| source images | 64 of 64x48 |" in card
    assert note in card
    marked = [read_meta(sample).get("gripper_valid") for sample in read_samples(folder)]
    assert marked == [None] * 22 + [{"right": False, "left": True}] * 10
