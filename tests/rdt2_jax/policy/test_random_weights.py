"""Policies made of random numbers: sizes, reproducibility, and the stand-in for the tokenizer of words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_vocabulary import qwen_tokenizer_folder

from rdt2_jax.action_expert.config import preset as expert_preset
from rdt2_jax.action_expert.model import param_specs as expert_specs
from rdt2_jax.actions.layout import MAX_POLICY_WIDTH
from rdt2_jax.actions.types import IMAGE_SHAPE, Observation
from rdt2_jax.errors import ConfigError
from rdt2_jax.params import abstract, named_leaves, tree_bytes
from rdt2_jax.policy import random_weights
from rdt2_jax.policy.image_files import grey_noise
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.policy.random_weights import (
    random_action_tokenizer,
    random_backbone_config,
    random_backbone_params,
    random_expert,
    random_normalizer,
    random_policy,
    random_policy_bytes,
    require_memory,
    word_tokenizer,
)
from rdt2_jax.quantization import Int8Weight
from rdt2_jax.qwen2_5_vl.generate import action_ids
from rdt2_jax.qwen2_5_vl.model import param_specs
from rdt2_jax.qwen2_5_vl.prompt import action_prompt
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer

KEY = jax.random.key(3)
IMAGE_TOKENS = 378


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    return Tokenizer.from_folder(qwen_tokenizer_folder())


class TestWordTokenizer:
    def test_ids_are_the_published_ones(self, published):
        words = word_tokenizer()
        assert words.control == published.control
        assert (words.num_pieces, words.vocabulary_size) == (published.num_pieces, published.vocabulary_size)
        np.testing.assert_array_equal(action_ids(words), action_ids(published))
        for name in ("<|object_ref_start|>", "<|vision_pad|>", "<tool_call>", "<|file_sep|>"):
            assert words.token_id(name) == published.token_id(name)

    @pytest.mark.parametrize(
        "text", ["Pick up the apple.", "Place the red cup on the plate.", "Wipe the table with a cloth.", "Go."]
    )
    def test_prompts_are_as_long_as_with_the_published_one(self, published, text):
        prompts = [action_prompt(words, text, IMAGE_TOKENS) for words in (word_tokenizer(), published)]
        assert abs(len(prompts[0]) - len(prompts[1])) <= 1
        assert len(prompts[0]) <= 448

    def test_words_it_does_not_know_fit_too(self):
        text = "Put the grapefruit into the wicker basket beside the accordion."
        assert len(action_prompt(word_tokenizer(), text, IMAGE_TOKENS)) <= 448

    @pytest.mark.parametrize(
        "text", ["Überprüfe 12 «Äpfel».", " a  b\n\tc\r\n", "拿起苹果 🍎", "<|im_end|>filler 900", ""]
    )
    def test_every_text_comes_back_and_never_becomes_a_control_token(self, text):
        words = word_tokenizer()
        ids = words.encode(text)
        assert words.decode(ids) == text
        # fillers, among them all action tokens, are out of a text's reach
        assert max(ids, default=0) < 2500


class TestSizes:
    @pytest.mark.parametrize(("kind", "gigabytes"), [("vq", 34.9), ("fm", 19.8), ("one-step", 19.8)])
    def test_the_published_size(self, kind, gigabytes):
        """float32 on a CPU; a bfloat16 backbone and expert take half."""
        assert random_policy_bytes(kind, "7b") / 1e9 == pytest.approx(gigabytes, abs=0.1)
        layers = random_backbone_config(kind, "7b").text.num_layers
        assert layers == (28 if kind == "vq" else 14)

    @pytest.mark.parametrize("kind", ["vq", "fm"])
    @pytest.mark.parametrize("int8", [False, True])
    def test_bytes_are_counted_as_they_will_be(self, kind, int8):
        config = random_backbone_config(kind, "tiny")
        params = random_backbone_params(config, KEY, jnp.float32, with_head=kind == "vq", int8=int8)
        part = random_action_tokenizer("tiny", KEY) if kind == "vq" else random_expert("tiny", KEY, jnp.float32)
        assert random_policy_bytes(kind, "tiny", int8=int8) == tree_bytes((params, part.params))
        leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8Weight))
        assert any(isinstance(leaf, Int8Weight) for leaf in leaves) == int8

    def test_memory_is_compared_before_anything_is_made(self):
        require_memory(1)
        with pytest.raises(ConfigError, match=r"do not fit into memory(?s:.*)1000000\.0 GB"):
            require_memory(10**15)

    @pytest.mark.parametrize(("kind", "size", "where"), [("vla", "tiny", "kind"), ("fm", "3b", "size")])
    def test_unknown(self, kind, size, where):
        with pytest.raises(ConfigError, match=f"where: {where}"):
            random_policy(kind, size)


class TestWeights:
    def test_a_tree_per_layer_of_the_declared_shapes(self):
        config = random_backbone_config("vq", "tiny")
        params = random_backbone_params(config, KEY, jnp.bfloat16)
        assert len(params.text.layers) == config.text.num_layers
        declared = tree_bytes(param_specs(config, jnp.bfloat16))
        assert tree_bytes(params) == declared
        leaves = named_leaves(params)
        assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}
        # no two layers alike
        first, second = (np.asarray(layer.mlp.gate.weight, np.float32) for layer in params.text.layers[:2])
        assert np.abs(first - second).max() > 0.1

    def test_large_leaves_are_drawn_by_their_own_initialisers(self, monkeypatch):
        """What the published size does, on few numbers."""
        monkeypatch.setattr(random_weights, "_DRAWN_ON_HOST_BYTES", 0)
        expert = random_expert("tiny", KEY, jnp.float32)
        assert jax.tree.map(jnp.shape, expert.params) == jax.tree.map(
            jnp.shape, random_expert("tiny", KEY, jnp.float32).params
        )
        for name in ("layers.modulation.weight", "head.modulation.weight", "head.down.weight"):
            assert float(jnp.std(named_leaves(expert.params)[name])) > 0.01, name

    def test_expert_has_the_shape_of_its_preset(self):
        expert = random_expert("tiny", KEY, jnp.float32)
        assert expert.config == expert_preset("tiny")
        declared = abstract(expert_specs(expert.config))
        assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, declared, expert.params))

    def test_normalised_noise_becomes_motions_of_centimetres(self):
        noise = np.random.default_rng(0).standard_normal((100, 24, 20)).astype(np.float32)
        normalizer = random_normalizer()
        chunks = normalizer.unnormalize(noise)
        assert np.abs(chunks[..., [0, 1, 2, 10, 11, 12]]).max() < 0.12
        np.testing.assert_allclose(chunks[..., 3:9].mean(axis=(0, 1)), [1, 0, 0, 0, 1, 0], atol=0.01)
        assert np.median(chunks[..., [9, 19]]) == pytest.approx(MAX_POLICY_WIDTH / 2, abs=1e-3)
        np.testing.assert_allclose(normalizer.normalize(chunks), noise, atol=1e-4)


def look(seed: int, instruction: str = "Pick up the apple.") -> Observation:
    images = {f"{side}_wrist": grey_noise(seed, side) for side in ("left", "right")}
    assert images["left_wrist"].shape == IMAGE_SHAPE
    return Observation(
        images=images, capture_time_s=dict.fromkeys(images, 0.0), instruction=instruction, id=f"look-{seed}"
    )


@pytest.mark.parametrize("kind", ["vq", "fm", "one-step"])
def test_policies_depend_on_what_they_see_and_on_the_seed(kind):
    options = PolicyOptions(compile_at_start=False)
    policy = random_policy(kind, options=options)
    assert policy.kind == kind
    first = policy.infer(look(0)).actions
    if kind != "one-step":  # which has the parts of "fm"
        same, other = (random_policy(kind, seed=seed, options=options) for seed in (0, 1))
        np.testing.assert_array_equal(first, same.infer(look(0)).actions)
        assert np.abs(first - other.infer(look(0)).actions).max() > 1e-3
    for observation in (look(1), look(0, "Wipe the table.")):
        policy.reset()
        assert np.abs(policy.infer(observation).actions - first).max() > 1e-4
    assert np.abs(first[:, [0, 1, 2, 10, 11, 12]]).max() < 0.3
