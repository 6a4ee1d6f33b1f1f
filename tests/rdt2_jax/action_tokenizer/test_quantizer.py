"""Properties of the residual quantizer and the codec."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.action_tokenizer.codec import _upsample, decode_latents, encode_latents
from rdt2_jax.action_tokenizer.quantizer import dequantize, draw, nearest, quantize, quantize_and_update
from rdt2_jax.action_tokenizer.tokenizer import check_tokens, decode, encode, merge_groups
from rdt2_jax.actions.layout import GROUP_CHANNELS, GROUP_NAMES
from rdt2_jax.errors import DataError


@pytest.fixture(scope="module")
def latents(small_config):
    return jax.random.normal(jax.random.key(1), (5, small_config.num_latents, small_config.latent_size))


def test_dequantize_gives_what_quantize_summed(small_params, latents):
    for group in GROUP_NAMES:
        projections, codes = small_params.networks[group].projections, small_params.codebooks[group].codes
        quantized = quantize(projections, codes, latents)
        chex.assert_shape(quantized.indices, (5, 3, codes.shape[0]))
        again = dequantize(projections, codes, quantized.indices)
        np.testing.assert_allclose(again, quantized.latents, rtol=0, atol=1e-5)


def test_nearest_ignores_length(small_params):
    codes = small_params.codebooks["pos"].codes[0]
    scales = jnp.linspace(0.1, 50, codes.shape[0])[:, None]
    np.testing.assert_array_equal(nearest(codes * scales, codes[::-1]), np.arange(codes.shape[0])[::-1])


def test_zero_vectors_are_finite(small_params):
    codes = small_params.codebooks["pos"].codes[0].at[3].set(0.0)
    index = nearest(codes, jnp.zeros((2, codes.shape[1])))
    np.testing.assert_array_equal(index, [0, 0])


def test_updates_are_deterministic_in_the_key(small_config, small_params, latents):
    def update(seed):
        choices = draw(jax.random.key(seed), 3, 15, small_config.num_codes)
        group = small_params.networks["pos"].projections, small_params.codebooks["pos"]
        return quantize_and_update(*group, latents, choices, small_config)[1]

    chex.assert_trees_all_equal(update(0), update(0))
    assert not np.array_equal(update(0).codes, update(1).codes)


def test_unused_codes_stay_finite_over_many_updates(small_config, small_params, latents):
    book = small_params.codebooks["pos"]
    for seed in range(12):
        choices = draw(jax.random.key(seed), 3, 15, small_config.num_codes)
        _, book = quantize_and_update(small_params.networks["pos"].projections, book, latents, choices, small_config)
        chex.assert_tree_all_finite(book.codes)
    assert np.linalg.norm(book.codes, axis=-1).min() > 1e-3


def test_upsampling_is_the_transposed_convolution(small_params):
    convolution = small_params.networks["pos"].decoder.stages[0].resample
    x = jax.random.normal(jax.random.key(0), (2, 3, convolution.kernel.shape[1]))
    # Zeros between the inputs, then a convolution with the mirrored kernel: the definition.
    stuffed = jnp.zeros((2, 8, x.shape[-1])).at[:, 1:7:2].set(x)
    mirrored = convolution.kernel[::-1]
    expected = sum(stuffed[:, k : k + 6] @ mirrored[k] for k in range(3)) + convolution.bias
    np.testing.assert_allclose(_upsample(convolution, x), expected, rtol=0, atol=1e-5)


def test_shapes(small_config, small_params, chunks):
    for group in GROUP_NAMES:
        channels = len(GROUP_CHANNELS[group])
        latents = encode_latents(small_params.networks[group].encoder, jnp.zeros((2, 24, channels)))
        chex.assert_shape(latents, (2, small_config.num_latents, small_config.latent_size))
        chex.assert_shape(decode_latents(small_params.networks[group].decoder, latents), (2, 24, channels))
    tokens = encode(small_params, small_config, chunks)
    chex.assert_shape(tokens, (len(chunks), small_config.num_tokens))
    chex.assert_type(tokens, jnp.int32)
    chex.assert_shape(decode(small_params, small_config, tokens), chunks.shape)


def test_merge_groups_inverts_the_split(chunks):
    groups = {group: jnp.asarray(chunks[..., list(GROUP_CHANNELS[group])]) for group in GROUP_NAMES}
    np.testing.assert_array_equal(merge_groups(groups), chunks)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 26), np.int64), "not a token array"),
        (np.zeros((2, 27), np.float32), "not a token array"),
        (np.full((2, 27), 1024), r"tokens\[0, 0\]"),
        (np.full((2, 27), -1), "invalid gripper"),
    ],
)
def test_tokens_from_outside_are_checked(tiny, tokens, message):
    config = tiny.config.model_copy(update={"num_codes": 1024})
    with pytest.raises(DataError, match=message):
        check_tokens(tokens, config)


def test_wrong_shapes_are_refused(small_config, small_params, chunks):
    with pytest.raises(DataError, match="action chunks have the wrong shape"):
        encode(small_params, small_config, chunks[:, :, :19])
    with pytest.raises(DataError, match="tokens have the wrong shape"):
        decode(small_params, small_config, np.zeros((2, 5), np.int32))
