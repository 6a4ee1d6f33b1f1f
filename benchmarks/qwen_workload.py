"""What the benchmarks of Qwen2.5-VL run: one prompt with a composite image, and the passes that policies make."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.layers.compute import Compute
from rdt2_jax.qwen2_5_vl import text as text_model
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.grid import token_positions
from rdt2_jax.qwen2_5_vl.model import ModelInputs, Qwen25VLParams, keys_and_values, prefill
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED, process
from rdt2_jax.qwen2_5_vl.vision import encode_images


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt.

    Attributes:
        image: uint8 (height, width, 3).
        inputs: what the model takes, batch 1, on the device.
    """

    image: np.ndarray
    inputs: ModelInputs

    @property
    def length(self) -> int:
        """Tokens, those of the image among them."""
        return self.inputs.input_ids.shape[1]

    @property
    def without_image(self) -> ModelInputs:
        """The same tokens for the decoder alone: image tokens are looked up like words."""
        return dataclasses.replace(self.inputs, patches=None, grid=None)


def make_prompt(config: Qwen25VLConfig, image_size: tuple[int, int], num_words: int, seed: int = 0) -> Prompt:
    """Random pixels and words: half of the words, the image between its marks, the other half.

    Args:
        config: the model.
        image_size: height and width in pixels, before resizing.
        num_words: tokens beside those of the image, its two marks included.
        seed: of pixels and words.
    """
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (*image_size, 3), dtype=np.uint8)
    patches = process(image, PUBLISHED)
    tokens = len(patches.values) // config.vision.merge_unit
    plain = min(config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
    words = random.integers(0, plain, num_words - 2).tolist()
    middle = len(words) // 2
    marked = [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]
    ids = np.array([[*words[:middle], *marked, *words[middle:]]], np.int32)
    mask = np.ones_like(ids, bool)
    positions, following = token_positions(config, ids, mask, [[patches.grid]])
    inputs = ModelInputs(ids, mask, positions, following, patches.values[None, None], patches.grid)
    return Prompt(image, jax.device_put(inputs))


@functools.partial(jax.jit, static_argnums=(1, 3))
def vision_tokens(params: Qwen25VLParams, config: Qwen25VLConfig, inputs: ModelInputs, compute: Compute) -> jax.Array:
    """(1, tokens, embed): the vision tower alone."""
    if params.vision is None or inputs.grid is None:
        raise SystemExit("the vision tower needs its parameters and an image")
    return encode_images(params.vision, config.vision, inputs.patches[:, 0], inputs.grid, compute)


first_keys_values = jax.jit(keys_and_values, static_argnums=(1, 3), static_argnames="num_layers")
"""What the action expert reads."""


@functools.partial(jax.jit, static_argnums=(1, 3))
def full_prefill(
    params: Qwen25VLParams, config: Qwen25VLConfig, inputs: ModelInputs, compute: Compute
) -> tuple[jax.Array, Any]:
    """Logits (1, vocab) of the token that comes next, and keys and values of all layers."""
    done = prefill(params, config, inputs, compute)
    return text_model.logits(params.text, config.text, done.hidden[:, -1]), done.keys_values


@functools.partial(jax.jit, static_argnums=(1, 3), static_argnames="steps")
def decode_tokens(
    params: Qwen25VLParams,
    config: Qwen25VLConfig,
    inputs: ModelInputs,
    compute: Compute,
    token: jax.Array,
    cache: Any,
    *,
    steps: int,
) -> jax.Array:
    """Greedy tokens after a prompt, one compiled loop as in `generate`, without the prefill.

    Args:
        params, config, inputs, compute: as of the prefill.
        token: int32 (1,), the first token after the prompt.
        cache: keys and values with room for `steps` more tokens.
        steps: tokens to run.

    Returns:
        int32 (steps,): what was chosen after each of them.
    """
    length = inputs.input_ids.shape[1]

    def step(i: jax.Array, state: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
        token, tokens, cache = state
        embeddings = text_model.embed_tokens(params.text, token[:, None], compute)
        position = jnp.broadcast_to((inputs.following + i)[None, :, None], (3, 1, 1))
        valid = jnp.arange(length + steps)[None] <= length + i
        hidden, cache = text_model.decode_step(
            params.text, config.text, embeddings, position, valid, cache, length + i, compute
        )
        token = jnp.argmax(text_model.logits(params.text, config.text, hidden[:, -1]), axis=-1).astype(jnp.int32)
        return token, tokens.at[i].set(token[0]), cache

    return jax.lax.fori_loop(0, steps, step, (token, jnp.zeros(steps, jnp.int32), cache))[1]


def start_decoding(logits: jax.Array, keys_values: Any, length: int, steps: int) -> tuple[jax.Array, Any]:
    """The first token (1,) and a cache with room for `steps` tokens, from a prefill."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), text_model.new_cache(keys_values, length + steps)
