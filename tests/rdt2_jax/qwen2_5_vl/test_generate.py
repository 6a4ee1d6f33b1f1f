"""Generation beside `transformers.generate`, constrained generation, drawing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qwen
from qwen_stages import model_inputs

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.qwen2_5_vl import model
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, read_config
from rdt2_jax.qwen2_5_vl.generate import Generated, generate_jit
from rdt2_jax.qwen2_5_vl.sampling import GREEDY, Sampling, choose, narrowed
from rdt2_jax.weights.loader import load
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table

pytestmark = pytest.mark.torch_peer

BATCHES, ROWS, NEW_TOKENS = 8, 28, 12
PAD = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    peer = tiny_qwen.make_peer()
    return peer, tiny_qwen.save_peer(peer, tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def config(tiny: tuple[Any, Path]) -> Qwen25VLConfig:
    return read_config(tiny[1])


@pytest.fixture(scope="module")
def params(tiny: tuple[Any, Path], config: Qwen25VLConfig) -> model.Qwen25VLParams:
    stacked, _ = load(qwen2_5_vl_table(config), model.param_specs(config), tiny[1])
    return model.unstacked(stacked)


def random_prompts(seed: int) -> tiny_qwen.Prompts:
    """As many prompts as a batch has rows, of lengths 1 to 9 words behind the image; all batches have one length."""
    random = np.random.default_rng([seed, 77])
    lengths = random.integers(1, 10, ROWS)
    lengths[0] = 9
    return tiny_qwen.make_prompts((1, 4, 6), words=lengths, seed=1000 + seed)


def peer_tokens(peer: Any, prompts: tiny_qwen.Prompts, stop_ids: tuple[int, ...], **options: Any) -> np.ndarray:
    import torch

    rows, patches, _ = prompts.patches.shape
    with torch.no_grad():
        tokens = peer.generate(
            input_ids=torch.tensor(prompts.input_ids),
            attention_mask=torch.tensor(prompts.mask),
            pixel_values=torch.tensor(prompts.patches.reshape(rows * patches, -1)),
            image_grid_thw=torch.tensor([prompts.grid] * rows),
            mm_token_type_ids=torch.tensor((prompts.input_ids == tiny_qwen.IMAGE_ID).astype(np.int64)),
            max_new_tokens=NEW_TOKENS,
            eos_token_id=list(stop_ids),
            pad_token_id=PAD,
            do_sample=False,
            **options,
        ).numpy()[:, prompts.input_ids.shape[1] :]
    return np.pad(tokens, ((0, 0), (0, NEW_TOKENS - tokens.shape[1])), constant_values=PAD)


def port_tokens(
    params: model.Qwen25VLParams,
    config: Qwen25VLConfig,
    prompts: tiny_qwen.Prompts,
    stop_ids: tuple[int, ...],
    **options: Any,
) -> Generated:
    inputs = model_inputs(config, prompts)
    return generate_jit(
        params, config, inputs, Compute(), max_new_tokens=NEW_TOKENS, stop_ids=stop_ids, pad_id=PAD, **options
    )


@pytest.fixture(scope="module")
def stop_ids(tiny: tuple[Any, Path]) -> tuple[int, ...]:
    """Tokens that this model likes to choose, so that rows stop at different times."""
    tokens = peer_tokens(tiny[0], random_prompts(0), (511,))
    values, counts = np.unique(tokens[:, 3:], return_counts=True)
    return tuple(int(token) for token in values[np.argsort(-counts)][:6])


@pytest.mark.parametrize("batch", range(BATCHES))
def test_greedy_tokens_are_those_of_the_peer(
    batch: int, tiny: Any, params: Any, config: Qwen25VLConfig, stop_ids: tuple[int, ...]
) -> None:
    """224 random prompts in all, of different lengths, with an image each."""
    prompts = random_prompts(batch)
    expected = peer_tokens(tiny[0], prompts, stop_ids)
    found = port_tokens(params, config, prompts, stop_ids)
    np.testing.assert_array_equal(found.tokens, expected)
    is_stop = np.isin(expected, stop_ids)
    np.testing.assert_array_equal(found.stopped, is_stop.any(axis=1))
    lengths = np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, NEW_TOKENS)
    np.testing.assert_array_equal(found.lengths, lengths)
    assert 0 < found.stopped.sum() < ROWS, "some rows must stop and some must not"


def test_enough_prompts() -> None:
    assert BATCHES * ROWS >= 200


def test_stacked_layers_generate_the_same(tiny: Any, params: Any, config: Qwen25VLConfig, stop_ids: Any) -> None:
    stacked, _ = load(qwen2_5_vl_table(config), model.param_specs(config), tiny[1])
    prompts = random_prompts(0)
    expected = port_tokens(params, config, prompts, stop_ids)
    np.testing.assert_array_equal(port_tokens(stacked, config, prompts, stop_ids).tokens, expected.tokens)


def test_constrained_choice_is_the_likeliest_of_what_is_allowed(tiny: Any, params: Any, config: Qwen25VLConfig) -> None:
    prompts = random_prompts(1)
    allowed = (*range(100, 140), 511)

    def only_allowed(_: int, __: Any) -> list[int]:
        return list(allowed)

    expected = peer_tokens(tiny[0], prompts, (511,), prefix_allowed_tokens_fn=only_allowed)
    found = port_tokens(params, config, prompts, (511,), allowed_ids=jnp.array(allowed))
    np.testing.assert_array_equal(found.tokens, expected)
    assert set(np.unique(found.tokens)) <= {*allowed, PAD}


def test_drawing_follows_the_key_and_the_probabilities(params: Any, config: Qwen25VLConfig) -> None:
    prompts = random_prompts(2)
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9)
    first = port_tokens(params, config, prompts, (511,), sampling=sampling, key=jax.random.key(1))
    again = port_tokens(params, config, prompts, (511,), sampling=sampling, key=jax.random.key(1))
    other = port_tokens(params, config, prompts, (511,), sampling=sampling, key=jax.random.key(2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).mean() > 0.3
    almost_greedy = port_tokens(
        params, config, prompts, (511,), sampling=Sampling(temperature=1.0, top_k=1), key=jax.random.key(3)
    )
    np.testing.assert_array_equal(almost_greedy.tokens, port_tokens(params, config, prompts, (511,)).tokens)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=7),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=1.3, top_k=12, top_p=0.6),
    ],
    ids=str,
)
def test_narrowed_distribution_is_the_peers(sampling: Sampling) -> None:
    import torch
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    expected = warpers(torch.zeros((5, 1), dtype=torch.long), torch.tensor(logits)).numpy()
    np.testing.assert_allclose(narrowed(jnp.asarray(logits), sampling), expected, rtol=1e-6)


def test_drawn_frequencies() -> None:
    """Empirical frequencies of 20,000 draws against the softmax, within five standard deviations."""
    logits = jnp.array([0.0, 1.0, -0.5, 2.0])
    draws = choose(jnp.broadcast_to(logits, (20000, 4)), Sampling(temperature=1.0), jax.random.key(0))
    expected = np.asarray(jax.nn.softmax(logits))
    found = np.bincount(np.asarray(draws), minlength=4) / 20000
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / 20000))


def test_wrong_arguments(params: Any, config: Qwen25VLConfig) -> None:
    prompts = dataclasses.replace(random_prompts(0))
    with pytest.raises(ConfigError, match="PRNG key"):
        port_tokens(params, config, prompts, (511,), sampling=Sampling(temperature=1.0))
    inputs = model_inputs(config, prompts)
    with pytest.raises(ConfigError, match="nothing to generate"):
        generate_jit(params, config, inputs, Compute(), max_new_tokens=0, stop_ids=(1,), pad_id=0, sampling=GREEDY)
    for options, message in (
        ({"allowed_ids": []}, "allowed_ids"),
        ({"allowed_ids": [5, 512]}, "outside the vocabulary"),
        ({"allowed_ids": [0.5]}, "allowed_ids"),
        ({"stop_ids": (-1,)}, "outside the vocabulary"),
        ({"stop_ids": 511}, "stop_ids"),
        ({"max_new_tokens": 2.0}, "max_new_tokens"),
        ({"pad_id": 600}, "pad_id"),
    ):
        choices = {"max_new_tokens": 2, "stop_ids": (511,), "pad_id": 0, **options}
        with pytest.raises(ConfigError, match=message):
            generate_jit(params, config, inputs, Compute(), **choices)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="top_p"):
        parse(temperature=1.0, top_p=1.5)


def parse(**values: Any) -> Sampling:
    from rdt2_jax.config import parse_config

    return parse_config(Sampling, values, where="sampling")
