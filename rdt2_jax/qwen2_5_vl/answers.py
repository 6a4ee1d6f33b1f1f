"""What a model says, read on the host: texts, or action tokens."""

from __future__ import annotations

import dataclasses

import jax

from rdt2_jax.action_tokenizer.vocabulary import ParsedGeneration
from rdt2_jax.errors import DataError
from rdt2_jax.qwen2_5_vl.generate import Generated
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers in words.

    Attributes:
        generated: token ids, and where they end.
        texts: one per row, without stop token; None for a row with an id that the tokenizer does not know (a model
            has more rows than its vocabulary has words). None altogether where the model has no tokenizer.
    """

    generated: Generated
    texts: tuple[str | None, ...] | None


@dataclasses.dataclass(frozen=True)
class ActionAnswers:
    """Answers in action tokens.

    Attributes:
        generated: ids of the language model's vocabulary, and where they end.
        parsed: the action tokens (batch, num_tokens), and which rows are `valid`.
    """

    generated: Generated
    parsed: ParsedGeneration


def texts_of(generated: Generated, tokenizer: Tokenizer) -> tuple[str | None, ...]:
    """The text of every row without its stop token; None where a row has an id without a meaning."""
    tokens, lengths, stopped = jax.device_get((generated.tokens, generated.lengths, generated.stopped))
    ends = lengths - stopped  # where a row stopped, its last token is the stop token
    return tuple(_text(row[:end].tolist(), tokenizer) for row, end in zip(tokens, ends, strict=True))


def _text(ids: list[int], tokenizer: Tokenizer) -> str | None:
    try:
        return tokenizer.decode(ids)
    except DataError:  # said in `Answers`: one row must not cost the others their answers
        return None
