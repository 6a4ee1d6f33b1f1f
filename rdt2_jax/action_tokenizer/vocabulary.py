"""Action tokens as ids of the language model's vocabulary, and back from what it generated.

The published RDT2-VQ writes token k as id `VOCABULARY_SIZE - (k + 1)`: the rarest BPE entries of Qwen's vocabulary,
151642 downwards. A chunk is its tokens followed by `<|quad_end|>`. Functions take numpy or jax arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rdt2_jax.actions.arrays import Array, namespace
from rdt2_jax.errors import DataError

VOCABULARY_SIZE = 151643
"""Ranks of Qwen's BPE; action ids count down from here."""

PAD_ID = 151643
"""`<|endoftext|>`; stands in for the tokens of an invalid gripper."""

CHUNK_END_ID = 151651
"""`<|quad_end|>`."""


def tokens_to_ids(tokens: Array, vocabulary_size: int = VOCABULARY_SIZE, pad_id: int = PAD_ID) -> Array:
    """Token ids of the language model, same shape; negative tokens (invalid gripper) become `pad_id`."""
    xp = namespace(tokens)
    tokens = xp.asarray(tokens)
    return xp.where(tokens < 0, pad_id, vocabulary_size - 1 - tokens)


def ids_to_tokens(ids: Array, num_codes: int, vocabulary_size: int = VOCABULARY_SIZE) -> tuple[Array, Array]:
    """Tokens clamped into [0, num_codes), and where an id was not an action id at all.

    The public code clamps silently; here the second result says which entries were.
    """
    xp = namespace(ids)
    tokens = vocabulary_size - 1 - xp.asarray(ids)
    return xp.clip(tokens, 0, num_codes - 1), (tokens < 0) | (tokens >= num_codes)


@dataclass(frozen=True)
class ParsedGeneration:
    """What a batch of generated sequences says.

    Attributes:
        tokens: (batch, num_tokens) int32, clamped into range; rows that are not `valid` mean nothing.
        well_formed: (batch,) bool, whether exactly `num_tokens` ids come before the first chunk end.
        foreign_ids: (batch,) int, how many of those ids are no action ids.
    """

    tokens: np.ndarray
    well_formed: np.ndarray
    foreign_ids: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """(batch,) bool: well formed, and nothing but action ids."""
        return self.well_formed & (self.foreign_ids == 0)


def parse_generation(
    generated: np.ndarray,
    num_tokens: int,
    num_codes: int,
    *,
    vocabulary_size: int = VOCABULARY_SIZE,
    chunk_end_id: int = CHUNK_END_ID,
) -> ParsedGeneration:
    """Reads chunks out of generated ids (batch, length), the prompt cut off; every row is judged on its own.

    Raises:
        DataError: not a two-dimensional integer array.
    """
    generated = np.asarray(generated)
    if generated.ndim != 2 or not np.issubdtype(generated.dtype, np.integer):
        raise DataError(
            "not a batch of generated ids",
            expected="integers (batch, length)",
            found=f"{generated.dtype} {generated.shape}",
        )
    missing = max(0, num_tokens + 1 - generated.shape[1])
    generated = np.pad(generated, ((0, 0), (0, missing)), constant_values=-1)
    is_end = generated == chunk_end_id
    well_formed = is_end.any(axis=1) & (is_end.argmax(axis=1) == num_tokens)
    tokens, foreign = ids_to_tokens(generated[:, :num_tokens], num_codes, vocabulary_size)
    return ParsedGeneration(tokens.astype(np.int32), well_formed, foreign.sum(axis=1))
