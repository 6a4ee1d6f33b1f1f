"""The nnx.Module face: Flax's tools see every parameter, and it computes what the functions compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwen_vocabulary import qwen_tokenizer_folder
from small_qwen import small_config, small_inputs, small_params

from rdt2_jax.action_tokenizer.vocabulary import CHUNK_END_ID, VOCABULARY_SIZE, tokens_to_ids
from rdt2_jax.errors import CheckpointError, ConfigError, DataError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import count_parameters, named_leaves
from rdt2_jax.qwen2_5_vl import flax_module, processor
from rdt2_jax.qwen2_5_vl.checkpoint import convert
from rdt2_jax.qwen2_5_vl.config import preset
from rdt2_jax.qwen2_5_vl.flax_module import Int8Values, Qwen25VL
from rdt2_jax.qwen2_5_vl.generate import Generated, action_ids, generate_jit
from rdt2_jax.qwen2_5_vl.int8 import int8_weights, quantize_decoder
from rdt2_jax.qwen2_5_vl.model import ModelInputs, Qwen25VLParams, forward, keys_and_values, unstacked
from rdt2_jax.sharding import Layout, make_mesh

CONFIG = small_config().with_layers(2)
COMPUTE = Compute()

_forward = jax.jit(forward, static_argnums=(1, 3))
_scaled = jax.jit(lambda tree, factor: jax.tree.map(lambda leaf: leaf * factor, tree))


@pytest.fixture(scope="module")
def params() -> Qwen25VLParams:
    return small_params(CONFIG)


@pytest.fixture(scope="module")
def inputs() -> ModelInputs:
    return small_inputs(CONFIG)


@pytest.fixture(scope="module")
def folder(params: Qwen25VLParams, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as published."""
    target = tmp_path_factory.mktemp("flax") / "published"
    Qwen25VL(CONFIG, params).save_pretrained(target)
    return target


def same(first: Any, second: Any) -> None:
    """Fails unless both trees have the same names and the same bits."""
    first, second = named_leaves(first), named_leaves(second)
    assert list(first) == list(second)
    for name, leaf in first.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(second[name]), err_msg=name, strict=True)


def dotted(model: Qwen25VL, kind: Any) -> set[str]:
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, kind))}


# --- what Flax sees ---


@pytest.mark.parametrize("layout", [lambda params: params, unstacked])
def test_every_parameter_is_a_param_under_its_dotted_name(params, layout):
    tree = layout(params)
    model = Qwen25VL(CONFIG, tree)
    assert dotted(model, nnx.Param) == set(named_leaves(tree))
    state = nnx.state(model, nnx.Param)
    assert count_parameters(nnx.to_pure_dict(state)) == count_parameters(params)
    same(model.params, tree)


def test_integers_are_no_params(params):
    """An optimizer or nnx.grad that asks for nnx.Param must not meet what has no gradient."""
    quantized, _ = quantize_decoder(params)
    model = Qwen25VL(CONFIG, quantized)
    assert dotted(model, Int8Values) == {f"{name}.values" for name in int8_weights(params)}
    assert dotted(model, (nnx.Param, Int8Values)) == set(named_leaves(quantized))
    assert dotted(model, nnx.Param) & dotted(model, Int8Values) == set()


def test_split_and_merge(params, inputs):
    model = Qwen25VL(CONFIG, params)
    graph, state = nnx.split(model)
    doubled = nnx.merge(graph, _scaled(state, 2.0))
    same(doubled.params, _scaled(params, 2.0))
    assert doubled.config == CONFIG
    assert hash(graph) == hash(nnx.graphdef(Qwen25VL(CONFIG, params)))


def test_it_computes_what_the_functions_compute(params, inputs):
    model = Qwen25VL(CONFIG, params, compute=COMPUTE)
    expected = _forward(params, CONFIG, inputs, COMPUTE)
    np.testing.assert_array_equal(model(inputs), expected)
    np.testing.assert_allclose(nnx.jit(lambda model, inputs: model(inputs))(model, inputs), expected, atol=1e-5)


def test_gradients_are_those_of_the_functions(params):
    params, inputs = params.replace(vision=None), small_inputs(CONFIG, images=False)
    targets = jnp.asarray(inputs.input_ids)

    def loss(logits: jax.Array) -> jax.Array:
        likelihoods = jax.nn.log_softmax(logits)[jnp.arange(2)[:, None], jnp.arange(targets.shape[1]), targets]
        return -jnp.mean(jnp.where(jnp.asarray(inputs.valid), likelihoods, 0))

    expected = jax.jit(jax.grad(lambda params: loss(forward(params, CONFIG, inputs, COMPUTE))))(params)
    model = Qwen25VL(CONFIG, params, compute=COMPUTE)
    found = nnx.jit(nnx.grad(lambda model: loss(model(inputs))))(model)
    pure = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(found)}
    assert set(pure) == set(named_leaves(expected))
    for name, gradient in named_leaves(expected).items():
        np.testing.assert_allclose(pure[name], gradient, atol=1e-5 * float(jnp.abs(gradient).max()), err_msg=name)
        assert float(jnp.abs(gradient).max()) > 0, name


def test_a_step_changes_the_parameters_in_place(params):
    model = Qwen25VL(CONFIG, params)
    nnx.update(model, _scaled(nnx.state(model, nnx.Param), 0.5))
    same(model.params, _scaled(params, 0.5))


def test_keys_and_values(params, inputs):
    run = jax.jit(keys_and_values, static_argnums=(1, 3))
    whole = run(unstacked(params), CONFIG, inputs, COMPUTE)
    model = Qwen25VL(CONFIG, unstacked(params), compute=COMPUTE)
    same(model.keys_and_values(inputs), whole)
    (first,) = model.keys_and_values(inputs, num_layers=1)
    np.testing.assert_allclose(first.key, whole[0].key, atol=1e-5)
    (second,) = model.keys_and_values(inputs, kv_layers=[1])
    np.testing.assert_allclose(second.key, whole[1].key, atol=1e-5)
    with pytest.raises(ConfigError, match="another number of layers"):
        Qwen25VL(CONFIG, params).keys_and_values(inputs, num_layers=1)


# --- words in, words out ---


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Qwen25VL:
    """A model with Qwen's own vocabulary, from its folder."""
    folder = tmp_path_factory.mktemp("speaker") / "model"
    tiny = preset("tiny").with_layers(1)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small_params(tiny))
    Qwen25VL(tiny, halved).save_pretrained(folder)
    (folder / "tokenizer.json").symlink_to(qwen_tokenizer_folder() / "tokenizer.json")
    config = processor.ProcessorConfig(
        patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=3136, max_pixels=12544,
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    )  # fmt: skip
    (folder / processor.PROCESSOR_FILE).write_text(json.dumps(processor.to_published(config)))
    return Qwen25VL.from_pretrained(folder, compute=COMPUTE)


def test_words_are_answered_in_words(speaker):
    tokenizer = speaker.preprocessor.tokenizer
    (word,), end = tokenizer.encode(" apple"), tokenizer.control.im_end
    image = np.full((56, 84, 3), 90, np.uint8)
    prompts = [[image, "What is it?"], [image, "Where is the cup?"]]
    talks = speaker.generate(prompts, max_new_tokens=3, allowed_ids=jnp.asarray([word]))
    assert talks.texts == (" apple apple apple",) * 2
    assert not np.asarray(talks.generated.stopped).any()
    stops = speaker.generate(prompts, max_new_tokens=3, allowed_ids=jnp.asarray([end]))
    assert stops.texts == ("", "")
    np.testing.assert_array_equal(stops.generated.tokens[0], [end, *[tokenizer.control.endoftext] * 2])


def test_ids_without_a_meaning_cost_a_row_its_text_and_nothing_else(speaker):
    """A model has more rows than its vocabulary has words, and an untrained one may choose any of them."""
    answers = speaker.generate(["Hello", "Good evening"], max_new_tokens=2, allowed_ids=[152000])
    assert answers.texts == (None, None)
    np.testing.assert_array_equal(answers.generated.tokens, 152000)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prompts that reach the model; every new one is compiled."""
    found: list[int] = []

    def spy(params: Any, config: Any, inputs: ModelInputs, *arguments: Any, **choices: Any) -> Any:
        found.append(inputs.input_ids.shape[1])
        return generate_jit(params, config, inputs, *arguments, **choices)

    monkeypatch.setattr(flax_module, "generate_jit", spy)
    return found


def test_prompts_of_many_lengths_are_compiled_once(speaker, lengths):
    (word,) = speaker.preprocessor.tokenizer.encode(" apple")
    for words in (1, 2, 17):
        speaker.generate([" apple" * words], max_new_tokens=1, allowed_ids=[word])
    assert lengths == [64, 64, 64]


def test_padding_to_a_multiple_changes_no_answer(speaker, lengths):
    choices = {"max_new_tokens": 2, "allowed_ids": range(1000)}
    one, other = (speaker.generate(["Pick up the cup."], multiple=multiple, **choices) for multiple in (1, 64))
    assert lengths[0] < lengths[1] == 64
    assert one.texts == other.texts


WRONG_CHOICES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing allowed": ({"allowed_ids": []}, "allowed_ids"),
    "allowed fractions": ({"allowed_ids": [1.5]}, "allowed_ids"),
    "allowed ids that are none": ({"allowed_ids": [5, 152064]}, r"allowed_ids(.|\n)*0 to 152063(.|\n)*152064"),
    "a negative allowed id": ({"allowed_ids": jnp.asarray([-1, 3])}, r"allowed_ids(.|\n)*-1"),
    "one stop id": ({"stop_ids": 5}, "stop_ids"),
    "a stop id that is none": ({"stop_ids": [1, -2]}, r"stop_ids(.|\n)*-2"),
    "a stop word": ({"stop_ids": "end"}, "stop_ids"),
    "a fraction of a token": ({"max_new_tokens": 2.0}, "max_new_tokens"),
    "no token": ({"max_new_tokens": 0}, "max_new_tokens"),
    "padding that is none": ({"pad_id": 10**6}, "pad_id"),
}


@pytest.mark.parametrize("kind", WRONG_CHOICES)
def test_choices_that_make_no_sense(speaker, kind):
    wrong, message = WRONG_CHOICES[kind]
    with pytest.raises(ConfigError, match=message):
        speaker.generate(["Hello"], **{"max_new_tokens": 2, **wrong})


def test_one_text_is_not_a_batch_of_letters(speaker):
    with pytest.raises(DataError, match=r"one text where a list is needed(.|\n)*found: 'Hello'"):
        speaker.generate("Hello", max_new_tokens=1)


def test_batches_put_together_by_hand_are_looked_at(params, inputs):
    model = Qwen25VL(CONFIG, params, compute=COMPUTE)
    ids = np.array(inputs.input_ids)
    ids[0, 0] = 512
    with pytest.raises(DataError, match=r"ids outside the vocabulary of 512: \[512\]"):
        model.generate(inputs.replace(input_ids=ids), max_new_tokens=1, stop_ids=(509,), pad_id=510)


# --- images and instructions in, action tokens out ---


def test_actions_are_action_tokens_that_parse(speaker, lengths):
    tokenizer = speaker.preprocessor.tokenizer
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 56, 112, 3), np.uint8)
    answers = speaker.actions(images, ["Pick up the red cup.", "Open the drawer.", "Pour."], num_tokens=9)
    tokens = np.asarray(answers.generated.tokens)
    assert tokens.shape == (3, 10)
    written = np.arange(10) < np.asarray(answers.generated.lengths)[:, None]
    assert np.isin(tokens[written], action_ids(tokenizer)).all()
    assert (tokens[~written] == tokenizer.control.endoftext).all()
    assert lengths == [64]
    for row, parsed in enumerate(answers.parsed.tokens):
        ends = np.flatnonzero(tokens[row] == tokenizer.control.quad_end)
        assert answers.parsed.well_formed[row] == (list(ends) == [9])
        if not len(ends):
            np.testing.assert_array_equal(tokenizer.num_pieces - 1 - tokens[row, :9], parsed)
            assert answers.parsed.foreign_ids[row] == 0


def test_a_model_that_writes_a_whole_chunk_gives_valid_tokens(speaker, monkeypatch):
    """What a trained model would say, put in the place of what this one says."""
    tokenizer = speaker.preprocessor.tokenizer
    chunk = np.arange(27) * 37
    ids = np.array([[*tokens_to_ids(chunk, tokenizer.num_pieces), tokenizer.control.quad_end]])
    said = Generated(jnp.asarray(ids), jnp.asarray([28]), jnp.asarray([True]))
    asked: dict[str, Any] = {}

    def trained(*arguments: Any, **choices: Any) -> Generated:
        asked.update(choices)
        return said

    monkeypatch.setattr(flax_module, "generate_jit", trained)
    parsed = speaker.actions([np.zeros((56, 112, 3), np.uint8)], ["Pour."]).parsed
    assert parsed.valid.tolist() == [True]
    np.testing.assert_array_equal(parsed.tokens, [chunk])
    assert asked["max_new_tokens"] == 28
    assert asked["stop_ids"] == (tokenizer.control.quad_end,) == (CHUNK_END_ID,)
    assert set(asked["allowed_ids"].tolist()) == {*range(VOCABULARY_SIZE - 1024, VOCABULARY_SIZE), CHUNK_END_ID}


def test_actions_need_a_tokenizer(params):
    with pytest.raises(ConfigError, match="no tokenizer"):
        Qwen25VL(CONFIG, params).actions([np.zeros((56, 112, 3), np.uint8)], ["Pour."])


def test_a_saved_model_keeps_its_tokenizer(speaker, tmp_path):
    speaker.save_pretrained(tmp_path / "again")
    again = Qwen25VL.from_pretrained(tmp_path / "again", compute=COMPUTE)
    same(again.params, speaker.params)
    assert again.preprocessor.processor == speaker.preprocessor.processor
    assert again.preprocessor.tokenizer.control == speaker.preprocessor.tokenizer.control
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_tokenizer_it_takes_and_gives_ids(params, inputs):
    model = Qwen25VL(CONFIG, params, compute=COMPUTE)
    choices = {"max_new_tokens": 4, "stop_ids": (509,), "pad_id": 510}
    answers = model.generate(inputs, **choices)
    assert answers.texts is None
    same(answers.generated, generate_jit(params, CONFIG, inputs, COMPUTE, **choices))
    for prompts, wrong in ((["Hello"], choices), (inputs, {**choices, "stop_ids": None})):
        with pytest.raises(ConfigError, match=r"no tokenizer(.|\n)*preprocessor=Preprocessor.from_folder"):
            model.generate(prompts, **wrong)
    with pytest.raises(ConfigError, match="no tokenizer"):
        _ = model.preprocessor


# --- from and into folders ---


@pytest.mark.parametrize("layout", [lambda params: params, unstacked])
def test_what_is_saved_is_what_is_loaded(params, layout, tmp_path):
    report = Qwen25VL(CONFIG, layout(params)).save_pretrained(tmp_path / "new" / "model")
    assert [file.is_file() for file in report.files] == [True]
    assert report.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    loaded = Qwen25VL.from_pretrained(tmp_path / "new" / "model", unstacked=False)
    assert loaded.config == CONFIG
    same(loaded.params, params)


def test_loading_in_another_dtype_with_fewer_layers(folder, params, inputs):
    model = Qwen25VL.from_pretrained(folder, dtype=jnp.bfloat16, num_layers=1, compute=COMPUTE)
    assert (model.config.text.num_layers, len(model.params.text.layers)) == (1, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    assert model.keys_and_values(inputs)[0].key.shape == (2, 2, 16, 16)
    with pytest.raises(ConfigError, match="no head"):
        model(inputs)


def test_loading_without_the_vision_tower(folder, params, inputs, tmp_path):
    """A model that was converted without it opens, and takes words alone."""
    convert(folder, tmp_path / "blind", vision=False)
    with pytest.raises(CheckpointError, match=r"less of the model(.|\n)*no vision tower(.|\n)*vision=False"):
        Qwen25VL.from_pretrained(tmp_path / "blind")
    for source in (folder, tmp_path / "blind"):
        for quantize in (False, True):
            expected = params.replace(vision=None)
            expected = quantize_decoder(expected)[0] if quantize else expected
            model = Qwen25VL.from_pretrained(source, vision=False, quantize=quantize, unstacked=False, compute=COMPUTE)
            same(model.params, expected)
    words = small_inputs(CONFIG, images=False)
    assert model(words).shape == (2, 16, 512)
    with pytest.raises(ConfigError, match=r"without a vision tower"):
        model(inputs)


def test_without_a_vision_tower_words_are_still_understood(speaker, tmp_path):
    speaker.save_pretrained(tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "blind", vision=False)
    word = speaker.preprocessor.tokenizer.encode(" apple")
    for processor_is_there in (True, False):
        model = Qwen25VL.from_pretrained(tmp_path / "blind", vision=False, compute=COMPUTE)
        if processor_is_there:
            assert model.generate(["Hello"], max_new_tokens=1, allowed_ids=word).texts == (" apple",)
            (tmp_path / "blind" / processor.PROCESSOR_FILE).unlink()
        else:
            with pytest.raises(ConfigError, match=r"no tokenizer(.|\n)*preprocessor_config.json"):
                model.generate(["Hello"], max_new_tokens=1)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_loading_in_eight_bits(folder, params, stacked, head):
    expected, _ = quantize_decoder(params, head=head)
    model = Qwen25VL.from_pretrained(folder, quantize=True, quantize_head=head, unstacked=not stacked)
    same(model.params, expected if stacked else unstacked(expected))
    assert {device for leaf in jax.tree.leaves(model.params) for device in leaf.devices()} == {jax.devices()[0]}


def test_a_head_in_eight_bits_has_to_be_there(folder):
    with pytest.raises(ConfigError, match=r"quantised with the decoder(.|\n)*quantize=True"):
        Qwen25VL.from_pretrained(folder, quantize_head=True)
    with pytest.raises(ConfigError, match="no head to quantise"):
        Qwen25VL.from_pretrained(folder, quantize=True, quantize_head=True, num_layers=1)


def test_eight_bits_need_the_hosts_memory(folder, monkeypatch):
    def no_cpu(backend: str) -> list[Any]:
        raise RuntimeError(f"unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", no_cpu)
    with pytest.raises(ConfigError, match=r"no CPU backend(.|\n)*unknown backend cpu(.|\n)*JAX_PLATFORMS"):
        Qwen25VL.from_pretrained(folder, quantize=True)


@pytest.mark.parametrize(("quantize", "head"), [(False, False), (True, True)])
def test_loading_over_a_mesh(eight_devices, folder, params, inputs, quantize, head):
    layout = Layout(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, eight_devices))
    model = Qwen25VL.from_pretrained(folder, layout=layout, quantize=quantize, quantize_head=head, compute=COMPUTE)
    expected = quantize_decoder(params, head=head)[0] if quantize else params
    same(model.params, expected)
    up = model.params.text.layers.mlp.up.weight
    up = up.values if quantize else up
    assert up.addressable_shards[0].data.size == up.size // 4
    batch = small_inputs(CONFIG, rows=4)
    found = model(batch)
    valid = np.asarray(batch.valid)
    alone = _forward(expected, CONFIG, batch, COMPUTE)
    np.testing.assert_allclose(np.asarray(found)[valid], np.asarray(alone)[valid], atol=1e-3)


def test_random_parameters_over_a_mesh(eight_devices):
    layout = Layout(make_mesh({"fsdp": 4, "tensor": 2}, eight_devices))
    model = Qwen25VL.from_config(CONFIG, jax.random.key(5), layout=layout)
    assert model.compute.layout == layout
    assert model.params.text.embedding.addressable_shards[0].data.shape == (256, 16)
    other = Compute(layout=Layout(make_mesh({"fsdp": 2}, eight_devices)))
    with pytest.raises(ConfigError, match="compute has another layout"):
        Qwen25VL.from_config(CONFIG, jax.random.key(5), layout=layout, compute=other)


def test_what_has_no_published_form_is_not_saved(params, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"eight bits(.|\n)*before quantising"):
        Qwen25VL(CONFIG, quantize_decoder(params)[0]).save_pretrained(tmp_path / "int8")
    with pytest.raises(CheckpointError, match=r"without final norm and head(.|\n)*load all of it"):
        Qwen25VL.from_pretrained(folder, num_layers=1).save_pretrained(tmp_path / "part")
    assert not list(tmp_path.iterdir())


def test_another_model_is_overwritten_on_request_only(params, folder, tmp_path):
    model = Qwen25VL(CONFIG, params)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="exists"):
        model.save_pretrained(tmp_path / "model")
    other = Qwen25VL(CONFIG, _scaled(params, -1.0))
    other.save_pretrained(tmp_path / "model", overwrite=True)
    same(Qwen25VL.from_pretrained(tmp_path / "model", unstacked=False).params, other.params)
    (tmp_path / "model" / "checkpoint-500").mkdir()
    with pytest.raises(CheckpointError, match=r"other things in it(.|\n)*found: checkpoint-500/"):
        model.save_pretrained(tmp_path / "model", overwrite=True)
    same(Qwen25VL.from_pretrained(tmp_path / "model", unstacked=False).params, other.params)
