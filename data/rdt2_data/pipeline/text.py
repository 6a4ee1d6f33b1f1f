"""Instructions and conversations as ids of one length, for training the backbone on them.

Rows are padded on the left, as the policies' prompts are; so the action ids of a chunk stand in the same columns of
every row (`ACTION_COLUMNS`), and a training step that encodes actions itself knows where to put them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rdt2_data.samples import TOKENS_PER_CHUNK, Turn
from rdt2_jax.action_tokenizer.vocabulary import tokens_to_ids
from rdt2_jax.errors import ConfigError
from rdt2_jax.qwen2_5_vl.prompt import (
    Example,
    ImageSlot,
    action_example,
    action_prompt,
    add_turn,
    chat_example,
    left_pad_examples,
)
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer

ACTION_COLUMNS = slice(-TOKENS_PER_CHUNK - 2, -2)
"""Columns of the 27 action ids in a row with an action; the ends of the chunk and of the turn follow."""


@dataclass(frozen=True, eq=False)
class TextRows:
    """Texts as the model reads them.

    Attributes:
        input_ids: int32 (B, length), padded on the left.
        mask: bool (B, length), False on padding.
        supervised: bool (B, length), ids that the model learns to predict from those before them. Where a sample
            carries no tokens, the action ids stand for token 0 and are supervised all the same: whoever puts the true
            ones there decides about invalid grippers.
        truncated: bool (B,), rows whose text had to be shortened.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    supervised: np.ndarray
    truncated: np.ndarray


class TextEncoder:
    """Makes rows of one length. Can be pickled.

    Args:
        tokenizer: of the backbone.
        image_tokens: of the composite image (378 as published).
        length: ids in a row.
        with_answers: with the action or the answers, to learn them; without, rows of actions end where the action
            would begin, nothing is supervised, and there may be no conversations.

    Raises:
        ConfigError: a length in which no instruction has room.
    """

    def __init__(self, tokenizer: Tokenizer, image_tokens: int, length: int, *, with_answers: bool = True) -> None:
        self._tokenizer, self._image_tokens, self.length = tokenizer, image_tokens, length
        self._with_answers = with_answers
        shortest = len(self._action("Go.", np.zeros(TOKENS_PER_CHUNK, np.int32)).ids)
        if length < shortest:
            expected = f"{shortest} or more: {image_tokens} of the image, the rest template and action"
            raise ConfigError("no instruction has room in so few ids", where="length", expected=expected, found=length)

    def encode(
        self, texts: Sequence[str | tuple[Turn, ...]], action_token: np.ndarray, has_tokens: np.ndarray
    ) -> TextRows:
        """Ids of a batch.

        Args:
            texts: instruction, or the turns of a conversation about the image.
            action_token: int (B, 27); negative: not measured, never learnt. Not looked at for conversations.
            has_tokens: bool (B,).

        Texts that are too long lose words at the end of an instruction; the last turns of a conversation, then the end
        of its answer, then of its question. Such rows are marked.
        """
        tokens = np.where(has_tokens[:, None], action_token, 0)
        rows = [
            self._action_row(text, tokens[i]) if isinstance(text, str) else self._conversation_row(text)
            for i, text in enumerate(texts)
        ]
        pad_id = self._tokenizer.control.endoftext
        batch, supervised = left_pad_examples([example for example, _ in rows], pad_id, length=self.length)
        truncated = np.array([was_truncated for _, was_truncated in rows], bool)
        return TextRows(batch.input_ids, batch.mask, supervised, truncated)

    def _action_row(self, instruction: str, tokens: np.ndarray) -> tuple[Example, bool]:
        example = self._action(instruction, tokens)
        if len(example.ids) <= self.length:
            return example, False
        words = instruction.split()
        fits = _largest(len(words), lambda n: len(self._action(" ".join(words[:n]), tokens).ids) <= self.length)
        # A first word that is too long by itself is cut between letters; length was checked to leave room for some.
        shortened = " ".join(words[:fits]) if fits else self._letters(instruction, tokens)
        return self._action(shortened, tokens), True

    def _letters(self, text: str, tokens: np.ndarray) -> str:
        fits = _largest(len(text), lambda n: len(self._action(text[:n], tokens).ids) <= self.length)
        return text[: max(fits, 1)]

    def _action(self, instruction: str, tokens: np.ndarray) -> Example:
        if not self._with_answers:
            ids = action_prompt(self._tokenizer, instruction, self._image_tokens)
            return Example(ids, [False] * len(ids))
        control = self._tokenizer.control
        ids = tokens_to_ids(tokens, self._tokenizer.num_pieces, control.endoftext)
        return action_example(self._tokenizer, instruction, self._image_tokens, ids.tolist())

    def _conversation_row(self, turns: tuple[Turn, ...]) -> tuple[Example, bool]:
        if not self._with_answers:
            raise ConfigError(
                "conversations are there to be answered", where="questions", fix="take them out of the data"
            )
        example = self._first_turn(turns[0].question, turns[0].answer)
        if len(example.ids) > self.length:
            return self._shortened_turn(turns[0]), True
        for turn in turns[1:]:
            longer = add_turn(self._tokenizer, example, turn.question, turn.answer)
            if len(longer.ids) > self.length:
                return example, True
            example = longer
        return example, False

    def _first_turn(self, question: str, answer: str) -> Example:
        return chat_example(self._tokenizer, [ImageSlot(self._image_tokens), question], answer)

    def _shortened_turn(self, turn: Turn) -> Example:
        """At least half of the room for text goes to the answer, whose end is cut off: it does not learn to stop."""
        overhead = len(self._first_turn("a", "a").ids) - 2
        room = self.length - overhead
        words = turn.question.split()
        question_room = max(room - min(len(self._tokenizer.encode(turn.answer)), room // 2), 1)
        fits = _largest(len(words), lambda n: len(self._tokenizer.encode(" ".join(words[:n]))) <= question_room)
        question = " ".join(words[:fits])
        if not fits:  # one word without an end
            letters = _largest(
                len(turn.question), lambda n: len(self._tokenizer.encode(turn.question[:n])) <= question_room
            )
            question = turn.question[: max(letters, 1)]
        example = self._first_turn(question, turn.answer)
        return Example(example.ids[: self.length], example.supervised[: self.length])


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in [0, limit] for which `fits(n)`, when fits(n) implies fits(n - 1); 0 where none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
