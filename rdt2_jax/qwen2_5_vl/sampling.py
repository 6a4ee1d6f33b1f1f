"""How the next token is chosen from logits."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
from pydantic import Field

from rdt2_jax.config import FrozenConfig, PositiveInt

_IMPOSSIBLE = -jnp.inf


class Sampling(FrozenConfig):
    """Greedy, or a draw from a narrowed distribution. Narrowing happens in the order of the fields.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least this.
    """

    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None

    @property
    def greedy(self) -> bool:
        """True if nothing is drawn."""
        return self.temperature == 0.0


GREEDY = Sampling()


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array | None) -> jax.Array:
    """One index per row.

    Args:
        logits: float32 (B, n).
        sampling: how.
        key: PRNG key; not used by greedy choice.

    Returns:
        int32 (B,).
    """
    if sampling.greedy or key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, narrowed(logits, sampling), axis=-1).astype(jnp.int32)


def narrowed(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that `sampling` draws from; -inf for tokens that cannot be drawn. float32 (B, n)."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, _IMPOSSIBLE, logits)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # a token stays if those before it do not reach top_p yet; the likeliest always does
        stays = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        smallest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, _IMPOSSIBLE, logits)
    return logits
