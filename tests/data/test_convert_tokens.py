"""Action tokens of a conversion: those of the tokenizer, with the grippers' marked where a width was not measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from convert_sources import SmallReader, read_samples, smooth_recording
from rdt2_data.converters import tokens as tokens_module
from rdt2_data.converters.chunks import cut_chunks, select_frames
from rdt2_data.converters.convert import convert
from rdt2_data.converters.options import ChunkOptions, ConvertOptions
from rdt2_data.converters.recording import EpisodeRef, Recording, WidthTrack
from rdt2_data.converters.runners import LocalRunner
from rdt2_data.converters.tokens import Tokenizing
from rdt2_data.problems import Tally
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
    from rdt2_jax.action_tokenizer.checkpoint import load_tokenizer, save_tokenizer
    from rdt2_jax.actions.normalizer import LinearNormalizer

    folder = tmp_path_factory.mktemp("tokenizer")
    recording = smooth_recording(rows=200)
    chunks = cut_chunks(recording, select_frames(recording, ChunkOptions(), Tally())).actions
    published = load_tokenizer(Path(__file__).parents[1] / "golden" / "rvq_tiny")
    save_tokenizer(replace(published, normalizer=LinearNormalizer.fit_actions(chunks)), folder)
    return folder


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
