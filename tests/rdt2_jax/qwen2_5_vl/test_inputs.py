"""Images and words to a batch: with the real vocabulary, and through a model of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from qwen_vocabulary import qwen_tokenizer_folder

from rdt2_jax.errors import CheckpointError, DataError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import initialize
from rdt2_jax.qwen2_5_vl import model, processor
from rdt2_jax.qwen2_5_vl.config import preset, to_published
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor


def write_folder(folder: Path) -> Path:
    """A model folder without weights."""
    folder.mkdir()
    shutil.copy(qwen_tokenizer_folder() / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps(to_published(preset("tiny"))))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor.to_published(processor.PUBLISHED)))
    return folder


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory: pytest.TempPathFactory) -> Preprocessor:
    return Preprocessor.from_folder(write_folder(tmp_path_factory.mktemp("inputs") / "model"))


def composite(seed: int = 0) -> np.ndarray:
    left, right = np.random.default_rng(seed).integers(0, 256, (2, 384, 384, 3), np.uint8)
    return processor.composite(left, right)


def test_a_batch_of_action_prompts(preprocessor: Preprocessor) -> None:
    instructions = ["Pick up the apple.", "Place the red cup on the small plate."]
    batch = preprocessor.actions([composite(0), composite(1)], instructions, multiple=16)
    assert batch.grid == (1, 28, 54)
    assert batch.patches.shape == (2, 1, 1512, 1176)
    assert batch.input_ids.shape[1] % 16 == 0
    assert ((batch.input_ids == preprocessor.config.image_token_id).sum(axis=1) == 378).all()
    assert not batch.valid[0].all(), "the shorter instruction is padded"
    assert batch.valid[:, -1].all(), "on the left"
    tokenizer = preprocessor.tokenizer
    for row, instruction in enumerate(instructions):
        ids = batch.input_ids[row][batch.valid[row]].tolist()
        assert instruction in tokenizer.decode(ids)
        assert ids[-1] == tokenizer.control.quad_start
        assert batch.positions[0, row][batch.valid[row]][-1] + 1 == batch.following[row]


def test_conversations_with_and_without_images(preprocessor: Preprocessor) -> None:
    image = composite()[:, :384]
    seen = preprocessor.chat([["What is this? ", image], [image, "And this? Say it in one word."]])
    assert seen.patches.shape[:2] == (2, 1)
    plain = preprocessor.chat(["Hello.", "Good morning to you."])
    assert plain.patches is None
    assert plain.grid is None


def test_a_model_of_the_published_vocabulary_takes_the_batch(preprocessor: Preprocessor) -> None:
    config = preprocessor.config
    params = initialize(model.param_specs(config), jax.random.key(0))
    batch = preprocessor.actions([composite()], ["Press the key."])
    run = jax.jit(model.keys_and_values, static_argnums=(1, 3))
    keys = run(params, config, batch, Compute())
    assert keys.key.shape == (4, 1, 2, batch.input_ids.shape[1], 16)
    assert np.isfinite(keys.key).all()


def test_batches_that_do_not_fit_together(preprocessor: Preprocessor) -> None:
    image = composite()
    with pytest.raises(DataError, match="one image per instruction"):
        preprocessor.actions([image], ["Pick.", "Place."])
    with pytest.raises(DataError, match="as many images each, all of one grid"):
        preprocessor.actions([image, image[:, :384]], ["Pick.", "Place."])
    with pytest.raises(DataError, match="as many images each, all of one grid"):
        preprocessor.chat([[image, "A"], "B"])
    with pytest.raises(DataError, match=r"long"):
        preprocessor.actions([image], ["Pick up the apple."], length=200)
    with pytest.raises(DataError, match=r"uint8"):
        preprocessor.actions([image.astype(np.float32)], ["Pick."])
    with pytest.raises(DataError, match=r"instruction"):
        preprocessor.actions([image], ["  "])


def test_folders_whose_files_contradict_each_other(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    published = to_published(preset("tiny")) | {"image_token_id": 151600}
    (folder / "config.json").write_text(json.dumps(published))
    with pytest.raises(CheckpointError, match="image_token_id is 151600"):
        Preprocessor.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Preprocessor.from_folder(folder)
