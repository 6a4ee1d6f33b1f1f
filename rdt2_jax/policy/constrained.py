"""Action tokens after a prompt, and nothing else: the loop that VQ runs by default.

Only the head's rows of action and stop tokens are multiplied. A chunk has a fixed number of tokens, so what follows
them is known, and the decoder does not run for it: 27 tokens need 26 steps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.layers.compute import Compute
from rdt2_jax.qwen2_5_vl import text as text_model
from rdt2_jax.qwen2_5_vl.config import TextConfig
from rdt2_jax.qwen2_5_vl.generate import Prompt, append_token
from rdt2_jax.qwen2_5_vl.text import TextParams


@struct.dataclass
class Decoded:
    """Action tokens of a batch.

    Attributes:
        codes: int32 (B, num_tokens): which of the action rows was chosen.
        probabilities: float32 (B, num_tokens), of the chosen token among all action and stop tokens; NaN where the
            network gave no numbers.
        stop_mass: float32 (B, num_tokens), probability of all stop tokens together.
    """

    codes: jax.Array
    probabilities: jax.Array
    stop_mass: jax.Array


def decode_actions(
    params: TextParams,
    config: TextConfig,
    prompt: Prompt,
    rows: Any,
    action_ids: jax.Array,
    compute: Compute,
    num_tokens: int,
) -> Decoded:
    """The likeliest action token, again and again. Under jit, config, compute and num_tokens are static.

    Args:
        params: the decoder; its head is not read.
        config: its shape.
        prompt: what `generate.read_prompt` gives.
        rows: the head's rows (n + stops, embed) of the action tokens, then of the stop tokens, see `text.output_rows`.
            Stop tokens cannot be chosen; their probability is recorded.
        action_ids: int32 (n,), ids of the action tokens.
        compute: how to compute it.
        num_tokens: of a chunk.
    """
    num_codes, capacity = action_ids.shape[0], prompt.valid.shape[1] + num_tokens - 1

    def choose(hidden: jax.Array) -> Decoded:
        logits = text_model.logits(params, config, hidden, rows, compute=compute)
        probabilities = jax.nn.softmax(logits, axis=-1)
        code = jnp.argmax(logits[:, :num_codes], axis=-1).astype(jnp.int32)
        chosen = jnp.take_along_axis(probabilities, code[:, None], axis=-1)[:, 0]
        return Decoded(code, chosen, jnp.sum(probabilities[:, num_codes:], axis=-1))

    def advance(state: tuple[jax.Array, Any], index: jax.Array) -> tuple[tuple[jax.Array, Any], Decoded]:
        code, cache = state
        hidden, cache = append_token(params, config, prompt, action_ids[code], index, cache, capacity, compute)
        decoded = choose(hidden)
        return (decoded.codes, cache), decoded

    first = choose(prompt.hidden)
    cache = text_model.new_cache(prompt.keys_values, capacity)
    _, rest = jax.lax.scan(advance, (first.codes, cache), jnp.arange(num_tokens - 1))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[:, None], b.T], axis=1), first, rest)
