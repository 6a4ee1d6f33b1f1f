"""Reading what was generated: stop tokens and padding cut off, and rows that cannot be read set apart."""

from __future__ import annotations

import jax.numpy as jnp
from qwen_vocabulary import byte_ranks, tokenizer_json

from rdt2_jax.qwen2_5_vl.answers import texts_of
from rdt2_jax.qwen2_5_vl.generate import Generated
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tokenizer_json(byte_ranks()))
END, PAD = TOKENIZER.control.im_end, TOKENIZER.control.endoftext


def generated(*rows: list[int], lengths: list[int], stopped: list[bool]) -> Generated:
    return Generated(jnp.asarray(rows), jnp.asarray(lengths), jnp.asarray(stopped))


def test_stop_token_and_padding_are_no_text():
    said = generated(
        [*b"cup", END, PAD], [END, PAD, PAD, PAD, PAD], [*b"apple"], lengths=[4, 1, 5], stopped=[True, True, False]
    )
    assert texts_of(said, TOKENIZER) == ("cup", "", "apple")


def test_a_row_that_cannot_be_read_does_not_cost_the_others():
    unknown = TOKENIZER.vocabulary_size
    said = generated([*b"a", unknown, *b"b"], [*b"cup"], lengths=[3, 3], stopped=[False, False])
    assert texts_of(said, TOKENIZER) == (None, "cup")


def test_an_unknown_id_after_the_end_does_not_matter():
    said = generated([*b"a", END, TOKENIZER.vocabulary_size], lengths=[2], stopped=[True])
    assert texts_of(said, TOKENIZER) == ("a",)
