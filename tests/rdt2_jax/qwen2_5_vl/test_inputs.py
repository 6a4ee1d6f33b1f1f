"""Images and words to a batch: with the real vocabulary, and through a model of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from qwen_vocabulary import qwen_tokenizer_folder

from rdt2_jax.errors import CheckpointError, ConfigError, DataError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import abstract, initialize
from rdt2_jax.qwen2_5_vl import model, processor
from rdt2_jax.qwen2_5_vl.checkpoint import load_params
from rdt2_jax.qwen2_5_vl.config import preset, to_published
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor, check_inputs


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


def test_one_text_is_no_list_of_texts(preprocessor: Preprocessor) -> None:
    with pytest.raises(DataError, match="a list is needed"):
        preprocessor.chat("Hello.")
    with pytest.raises(DataError, match="a list is needed"):
        preprocessor.actions([composite()], "x")


def test_batches_put_together_by_hand(preprocessor: Preprocessor) -> None:
    config = preprocessor.config
    batch = preprocessor.actions([composite(0), composite(1)], ["Pick up the apple.", "Press the key."])
    check_inputs(config, batch)
    for changes, message in (
        ({"input_ids": np.where(batch.input_ids == config.image_token_id, 5, batch.input_ids)}, "has 0 image tokens"),
        ({"input_ids": batch.input_ids + 200000}, "outside the vocabulary"),
        ({"input_ids": np.where(batch.input_ids > 0, -7, 0)}, "outside the vocabulary"),
        ({"valid": batch.valid[:, ::-1]}, "on the left"),
        ({"patches": np.concatenate([batch.patches] * 2, axis=1)}, "its images need 756"),
    ):
        with pytest.raises(DataError, match=message):
            check_inputs(config, dataclasses.replace(batch, **changes))
    params = abstract(model.param_specs(config))
    for changes, message in (
        ({"grid": None}, "patches and grid belong together"),
        ({"patches": None}, "patches and grid belong together"),
        ({"patches": batch.patches[:1]}, r"needed are \(2, images"),
        ({"patches": np.concatenate([batch.patches] * 3, axis=1)}, "more tokens than a row"),
        ({"input_ids": batch.input_ids[:1]}, "it must be"),
        ({"positions": batch.positions[:2]}, "it must be"),
    ):
        with pytest.raises(DataError, match=message):
            jax.eval_shape(
                lambda p, b: model.embed(p, config, b, Compute()), params, dataclasses.replace(batch, **changes)
            )
    blind = abstract(model.param_specs(config, vision=False))
    with pytest.raises(ConfigError, match="without a vision tower"):
        jax.eval_shape(lambda p: model.embed(p, config, batch, Compute()), blind)


@pytest.mark.torch_peer
def test_pixels_and_words_to_logits_beside_the_peer(tmp_path: Path) -> None:
    """From uint8 images and text through both libraries, their own processors and templates included."""
    import torch
    from tiny_qwen import make_peer, save_peer
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = write_folder(tmp_path / "model")
    peer = make_peer(vocab_size=152064, ids={"image": 151655, "video": 151656, "start": 151652, "end": 151653})
    save_peer(peer, folder)
    preprocessor = Preprocessor.from_folder(folder)
    images = [composite(0), composite(1)]
    texts = ["Pick up the apple.", "Place the red cup on the small plate, please."]
    batch = preprocessor.chat([[image, text] for image, text in zip(images, texts, strict=True)])
    params = load_params(folder).params
    run = jax.jit(model.forward, static_argnums=(1, 3))
    ours = np.asarray(run(params, preprocessor.config, batch, Compute()))

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    pixels = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)(
        images=images, input_data_format="channels_last", return_tensors="pt"
    )
    for row, text in enumerate(texts):
        template = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            f"{'<|image_pad|>' * 378}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = torch.tensor([tokenizer(template)["input_ids"]])
        grid = pixels["image_grid_thw"][row : row + 1]
        with torch.no_grad():
            theirs = peer(
                input_ids=ids,
                pixel_values=pixels["pixel_values"].reshape(2, 1512, 1176)[row],
                image_grid_thw=grid,
                mm_token_type_ids=(ids == 151655).long(),
            ).logits[0]
        found = ours[row][np.asarray(batch.valid[row])]
        assert found.shape == tuple(theirs.shape)
        np.testing.assert_allclose(found, theirs.numpy(), rtol=0, atol=1e-4)


def test_folders_whose_files_contradict_each_other(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    published = to_published(preset("tiny")) | {"image_token_id": 151600}
    (folder / "config.json").write_text(json.dumps(published))
    with pytest.raises(CheckpointError, match="image_token_id is 151600"):
        Preprocessor.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Preprocessor.from_folder(folder)
