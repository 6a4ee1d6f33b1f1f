"""Text after a prompt, token by token, in one compiled loop of static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rdt2_jax.action_tokenizer.vocabulary import tokens_to_ids
from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.qwen2_5_vl import text as text_model
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, TextConfig
from rdt2_jax.qwen2_5_vl.model import ModelInputs, Qwen25VLParams, prefill
from rdt2_jax.qwen2_5_vl.sampling import GREEDY, Sampling, choose
from rdt2_jax.qwen2_5_vl.text import TextParams
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer


@struct.dataclass
class Generated:
    """What was generated.

    Attributes:
        tokens: int32 (B, max_new_tokens); `pad_id` after a row's stop token.
        lengths: int32 (B,): tokens of each row, its stop token included.
        stopped: bool (B,): False where `max_new_tokens` came before a stop token.
        finite: bool (B,): whether all logits were finite that a row's tokens were chosen by; None: not known.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    finite: jax.Array | None = None


@struct.dataclass
class Prompt:
    """A batch of prompts after the decoder: all that is needed to go on.

    Attributes:
        hidden: (B, embed) of the last token, after the last layer.
        keys_values: of every layer, see `text.KeysValues`.
        valid: bool (B, length), False for padding.
        following: int32 (B,), the position of the token that comes next.
    """

    hidden: jax.Array
    keys_values: Any
    valid: jax.Array
    following: jax.Array


@struct.dataclass
class _State:
    """Carried from one token to the next. `token` is the last one chosen, not yet run through the decoder."""

    step: jax.Array
    token: jax.Array
    tokens: jax.Array
    stopped: jax.Array
    finite: jax.Array
    cache: Any
    key: jax.Array | None


def generate(
    params: Qwen25VLParams,
    config: Qwen25VLConfig,
    inputs: ModelInputs,
    compute: Compute,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    allowed_ids: jax.Array | None = None,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
) -> Generated:
    """Continues a batch of prompts. Under jit (`generate_jit`), all but params, inputs, allowed_ids and key is static.

    Args:
        params: the model; with a tree per layer (`model.unstacked`) it is fastest on one device.
        config: its shape.
        inputs: prompts, padded on the left.
        compute: how to compute it.
        max_new_tokens: tokens at most.
        stop_ids: a row is finished with the first of these.
        pad_id: fills a row after its stop token.
        allowed_ids: int (n,): nothing else can be chosen, and only the logits of these are computed. Name the stop
            tokens among them.
        sampling: greedy, or how to draw.
        key: PRNG key for drawing.

    Raises:
        ConfigError: no tokens are asked for, or drawing without a key.
    """
    _require_choices(max_new_tokens, sampling, key)
    prompt = read_prompt(params, config, inputs, compute)
    return continue_prompt(
        params.text,
        config.text,
        prompt,
        compute,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
        allowed_ids=allowed_ids,
        sampling=sampling,
        key=key,
    )


def read_prompt(params: Qwen25VLParams, config: Qwen25VLConfig, inputs: ModelInputs, compute: Compute) -> Prompt:
    """Runs images and prompt through the model; arguments as of `generate`."""
    done = prefill(params, config, inputs, compute)
    return Prompt(done.hidden[:, -1], done.keys_values, inputs.valid, inputs.following)


def continue_prompt(
    params: TextParams,
    config: TextConfig,
    prompt: Prompt,
    compute: Compute,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    allowed_ids: jax.Array | None = None,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
) -> Generated:
    """What `generate` does after the prompt; arguments as there, of the decoder alone.

    Raises:
        ConfigError: as `generate`.
    """
    _require_choices(max_new_tokens, sampling, key)
    batch, length = prompt.valid.shape
    rows = None if allowed_ids is None else text_model.output_rows(params, allowed_ids)

    def next_token(hidden: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        key, now = (None, None) if key is None else jax.random.split(key)
        logits = text_model.logits(params, config, hidden, rows, compute=compute)
        chosen = choose(logits, sampling, now)
        finite = jnp.all(jnp.isfinite(logits), axis=-1)
        return (chosen if allowed_ids is None else allowed_ids[chosen].astype(jnp.int32)), finite, key

    def record(state: _State) -> _State:
        """Writes the chosen token down; rows that stopped earlier get padding."""
        token = jnp.where(state.stopped, pad_id, state.token)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        stopped = state.stopped | jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))
        return dataclasses.replace(state, step=state.step + 1, token=token, tokens=tokens, stopped=stopped)

    def advance(state: _State) -> _State:
        hidden, cache = append_token(
            params, config, prompt, state.token, state.step - 1, state.cache, length + max_new_tokens, compute
        )
        token, finite, key = next_token(hidden, state.key)
        finite = state.finite & (finite | state.stopped)
        return record(dataclasses.replace(state, token=token, finite=finite, cache=cache, key=key))

    token, finite, key = next_token(prompt.hidden, key)
    first = _State(
        step=jnp.zeros((), jnp.int32),
        token=token,
        tokens=jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        finite=finite,
        cache=text_model.new_cache(prompt.keys_values, length + max_new_tokens),
        key=key,
    )
    last = jax.lax.while_loop(
        lambda state: (state.step < max_new_tokens) & ~jnp.all(state.stopped), advance, record(first)
    )
    is_stop = jnp.isin(last.tokens, jnp.asarray(stop_ids, jnp.int32))
    until_stop = jnp.where(is_stop.any(axis=1), jnp.argmax(is_stop, axis=1) + 1, max_new_tokens)
    return Generated(last.tokens, until_stop.astype(jnp.int32), last.stopped, last.finite)


def append_token(
    params: TextParams,
    config: TextConfig,
    prompt: Prompt,
    token: jax.Array,
    index: jax.Array,
    cache: Any,
    capacity: int,
    compute: Compute,
) -> tuple[jax.Array, Any]:
    """Runs one more token per row through the decoder.

    Args:
        params: the decoder.
        config: its shape.
        prompt: what came before the first new token.
        token: int32 (B,).
        index: int (): how many new tokens came before this one.
        cache: keys and values of prompt and new tokens, see `text.new_cache`.
        capacity: tokens for which the cache has room.
        compute: how to compute it.

    Returns:
        (B, embed) after the last layer, and the cache.
    """
    batch, length = prompt.valid.shape
    slot = length + index
    embeddings = text_model.embed_tokens(params, token[:, None], compute)
    position = jnp.broadcast_to((prompt.following + index)[None, :, None], (3, batch, 1))
    valid = jnp.concatenate([prompt.valid, jnp.ones((batch, capacity - length), bool)], axis=1)
    valid &= jnp.arange(capacity) <= slot
    hidden, cache = text_model.decode_step(params, config, embeddings, position, valid, cache, slot, compute)
    return hidden[:, -1], cache


def _require_choices(max_new_tokens: int, sampling: Sampling, key: jax.Array | None) -> None:
    if max_new_tokens < 1:
        raise ConfigError("nothing to generate", where="max_new_tokens", expected="1 or more", found=max_new_tokens)
    if not sampling.greedy and key is None:
        raise ConfigError("drawing needs a PRNG key", where="key", fix="pass key=jax.random.key(seed)")


_compiled = jax.jit(
    generate,
    static_argnums=(1, 3),
    static_argnames=("max_new_tokens", "stop_ids", "pad_id", "sampling"),
)


def generate_jit(
    params: Qwen25VLParams,
    config: Qwen25VLConfig,
    inputs: ModelInputs,
    compute: Compute,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    allowed_ids: Sequence[int] | np.ndarray | jax.Array | None = None,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
) -> Generated:
    """`generate`, compiled once for every shape of the inputs, with choices that are checked first.

    Raises:
        ConfigError: also for token ids outside the vocabulary, or nothing allowed.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise ConfigError("not a number of tokens", where="max_new_tokens", expected="an int", found=max_new_tokens)
    vocabulary = config.text.vocab_size
    stops = tuple(_checked_ids(stop_ids, "stop_ids", vocabulary).tolist())
    allowed = None if allowed_ids is None else jnp.asarray(_checked_ids(allowed_ids, "allowed_ids", vocabulary))
    (pad_id,) = _checked_ids((pad_id,), "pad_id", vocabulary).tolist()
    return _compiled(
        params,
        config,
        inputs,
        compute,
        max_new_tokens=max_new_tokens,
        stop_ids=stops,
        pad_id=pad_id,
        allowed_ids=allowed,
        sampling=sampling,
        key=key,
    )


def action_ids(tokenizer: Tokenizer, num_codes: int = 1024) -> np.ndarray:
    """What may follow an action prompt: the ids of all action tokens, and the end marker `<|quad_end|>`.

    Args:
        tokenizer: of the model; action tokens are its last pieces, see `action_tokenizer.vocabulary`.
        num_codes: codes of a codebook of the action tokenizer.

    Returns:
        int32 (num_codes + 1,), the end marker last.
    """
    ids = tokens_to_ids(np.arange(num_codes), tokenizer.num_pieces)
    return np.append(ids, tokenizer.control.quad_end).astype(np.int32)


def _checked_ids(ids: Any, where: str, vocabulary: int) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError("not a list of token ids", where=where, expected="a list of one integer or more", found=ids)
    outside = array[(array < 0) | (array >= vocabulary)]
    if outside.size:
        raise ConfigError(
            "token ids outside the vocabulary", where=where, expected=f"0 to {vocabulary - 1}", found=outside.tolist()
        )
    return array.astype(np.int32)
