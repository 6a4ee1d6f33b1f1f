"""Prompts as the language model reads them: chat template, action prompts and their answers, left-padded batches.

The chat template is written out as ids, so that control tokens come from here alone and never from a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdt2_jax.errors import DataError
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer, as_token_id, require_string

DEFAULT_SYSTEM = "You are a helpful assistant."
"""What the published chat template says where the caller gives no system message."""


@dataclass(frozen=True)
class ImageSlot:
    """Where an image stands in a prompt, and how many tokens it takes (`grid.num_tokens`)."""

    num_tokens: int


@dataclass(frozen=True)
class Example:
    """A sequence to learn from.

    Attributes:
        ids: the whole sequence.
        supervised: for each id, whether the model learns to predict it from the ids before it.
    """

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Sequences of different lengths, aligned at their ends.

    Attributes:
        input_ids: int32 (batch, length).
        mask: bool (batch, length), False on padding.
    """

    input_ids: np.ndarray
    mask: np.ndarray


def chat_prompt(
    tokenizer: Tokenizer, content: str | Sequence[str | ImageSlot], *, system: str = DEFAULT_SYSTEM
) -> list[int]:
    """Ids of a conversation that waits for its first answer: the published chat template of Qwen2.5-VL, written out.

    Args:
        tokenizer: of the model.
        content: what the user says: a text, or texts and images in their order.
        system: the message before it.

    Raises:
        DataError: nothing said, a blank text, another type, or an image without tokens.
    """
    control = tokenizer.control
    _require_text(system, "system")
    parts: list[str | int] = [control.im_start, f"system\n{system}", control.im_end, "\n", control.im_start, "user\n"]
    pieces = list(content) if isinstance(content, Sequence) and not isinstance(content, str) else [content]
    if not pieces:
        raise DataError("a prompt without content", expected="a text, or texts and images")
    for i, piece in enumerate(pieces):
        if isinstance(piece, ImageSlot):
            count = _positive(piece.num_tokens, f"content {i}", "an image needs tokens")
            parts += [control.vision_start, *[control.image_pad] * count, control.vision_end]
        else:
            _require_text(piece, f"content {i}")
            parts.append(piece)
    parts += [control.im_end, "\n", control.im_start, "assistant\n"]
    return _encode_parts(tokenizer, parts)


def chat_example(
    tokenizer: Tokenizer, content: str | Sequence[str | ImageSlot], answer: str, *, system: str = DEFAULT_SYSTEM
) -> Example:
    """A question with its answer to learn from; supervised as in `action_example`.

    Raises:
        DataError: as `chat_prompt`; a blank answer.
    """
    _require_text(answer, "answer")
    prompt = chat_prompt(tokenizer, content, system=system)
    target = [*tokenizer.encode(answer), tokenizer.control.im_end]
    return _example(tokenizer, prompt, target, [True] * len(target))


def add_turn(tokenizer: Tokenizer, example: Example, question: str, answer: str) -> Example:
    """A conversation that goes on: the example with one more question and answer, supervised like the first.

    Raises:
        DataError: a blank question or answer.
    """
    _require_text(question, "question")
    _require_text(answer, "answer")
    control = tokenizer.control
    user: list[str | int] = ["\n", control.im_start, f"user\n{question}", control.im_end, "\n"]
    prompt = _encode_parts(tokenizer, [*user, control.im_start, "assistant\n"])
    target = [*tokenizer.encode(answer), control.im_end]
    turn = _example(tokenizer, prompt, target, [True] * len(target))
    return Example(example.ids + turn.ids, example.supervised + turn.supervised)


def action_prompt(tokenizer: Tokenizer, instruction: str, num_image_tokens: int) -> list[int]:
    """Ids that ask for a chunk: the composite image, the instruction, and the beginning of the answer.

    The model goes on with the ids of `action_target`.

    Args:
        tokenizer: of the model.
        instruction: e.g. "Pick up the apple."
        num_image_tokens: of the composite image; 378 as published.

    Raises:
        DataError: a blank instruction, one that is no string, or no image tokens.
    """
    _require_text(instruction, "instruction")
    _positive(num_image_tokens, "num_image_tokens", "the composite image needs tokens")
    prompt = chat_prompt(tokenizer, [ImageSlot(num_image_tokens), instruction])
    return [*prompt, tokenizer.control.quad_start]


def action_target(tokenizer: Tokenizer, action_ids: Iterable[int]) -> list[int]:
    """Ids that the model is to answer `action_prompt` with: action ids, end of the chunk, end of the turn.

    Args:
        tokenizer: of the model.
        action_ids: of one chunk, as `action_tokenizer.vocabulary.tokens_to_ids` gives them; `<|endoftext|>` for
            tokens of an invalid gripper.

    Raises:
        DataError: none at all, or one that is neither a piece of the vocabulary nor `<|endoftext|>`.
    """
    ids = [as_token_id(token_id) for token_id in action_ids]
    if not ids:
        raise DataError("a chunk without action tokens", where="action_ids", expected="one id or more")
    for i, token_id in enumerate(ids):
        if not tokenizer.is_piece(token_id) and token_id != tokenizer.control.endoftext:
            raise DataError(
                "not the id of an action token",
                where=f"action_ids[{i}]",
                expected=f"a piece of the vocabulary, or {tokenizer.control.endoftext} where the gripper is invalid",
                found=token_id,
            )
    return [*ids, tokenizer.control.quad_end, tokenizer.control.im_end]


def action_example(tokenizer: Tokenizer, instruction: str, num_image_tokens: int, action_ids: Iterable[int]) -> Example:
    """An instruction with its chunk to learn from.

    Supervised are, as published, the ids from the `<|im_start|>` of the answer on: the forced beginning of the answer
    too, and the end of the turn. Ids of an invalid gripper stay in the sequence but are not learnt.

    Raises:
        DataError: as `action_prompt` and `action_target`.
    """
    prompt = action_prompt(tokenizer, instruction, num_image_tokens)
    target = action_target(tokenizer, action_ids)
    return _example(tokenizer, prompt, target, [token_id != tokenizer.control.endoftext for token_id in target])


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int, *, length: int | None = None, multiple: int = 1
) -> PaddedBatch:
    """Pads sequences of ids on the left to one length.

    Args:
        rows: the sequences.
        pad_id: `control.endoftext` in the published model.
        length: of the result; None takes the longest row's, rounded up to `multiple`.
        multiple: one compilation serves all batches of the same length, so few lengths are better than many.

    Raises:
        DataError: no rows, an empty row, a row longer than `length`, or a length that is not a multiple.
    """
    _positive(multiple, "multiple", "lengths are rounded up to it")
    if not len(rows) or not all(map(len, rows)):
        raise DataError(
            "nothing to pad", expected="one row or more, each of one id or more", found=list(map(len, rows))
        )
    longest = max(map(len, rows))
    width = -(-longest // multiple) * multiple if length is None else _positive(length, "length", "of padded rows")
    if width % multiple:
        raise DataError(
            "a length that is not a multiple", where="length", expected=f"a multiple of {multiple}", found=width
        )
    problems = Problems()
    for i, row in enumerate(rows):
        if len(row) > width:
            problems.add(f"row {i} has {len(row)} ids, {len(row) - width} more than fit")
    problems.raise_if_any(
        DataError,
        "a prompt is too long",
        expected=f"at most {width} ids",
        fix="shorten the instruction, give the image fewer tokens (max_pixels), or raise the length",
    )
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int32)
    mask = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        input_ids[i, width - len(row) :] = [as_token_id(token_id) for token_id in row]
        mask[i, width - len(row) :] = True
    return PaddedBatch(input_ids, mask)


def left_pad_examples(
    examples: Sequence[Example], pad_id: int, *, length: int | None = None, multiple: int = 1
) -> tuple[PaddedBatch, np.ndarray]:
    """`left_pad` for training: the batch, and where ids are supervised, bool (batch, length), False on padding."""
    batch = left_pad([example.ids for example in examples], pad_id, length=length, multiple=multiple)
    supervised = np.zeros_like(batch.mask)
    for i, example in enumerate(examples):
        supervised[i, supervised.shape[1] - len(example.ids) :] = example.supervised
    return batch, supervised


def _example(tokenizer: Tokenizer, prompt: list[int], target: list[int], supervised_target: list[bool]) -> Example:
    """Joins prompt and target; of the prompt, what follows the last `<|im_start|>` (with it) is supervised."""
    answer = len(prompt) - 1 - prompt[::-1].index(tokenizer.control.im_start)
    supervised = [i >= answer for i in range(len(prompt))]
    return Example([*prompt, *target], [*supervised, *supervised_target])


def _encode_parts(tokenizer: Tokenizer, parts: Iterable[str | int]) -> list[int]:
    """Ids of texts and control ids. Texts that touch are encoded as one, as where a whole template is tokenized."""
    ids: list[int] = []
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        ids += tokenizer.encode(text)
        ids.append(part)
        text = ""
    return [*ids, *tokenizer.encode(text)]


def _require_text(text: Any, where: str) -> None:
    require_string(text, where)
    if not text.strip():
        raise DataError(f"{where} is blank", where=where, expected="a text with words", found=repr(text))


def _positive(value: Any, where: str, purpose: str) -> int:
    count = as_token_id(value)
    if count < 1:
        raise DataError(f"not a count: {purpose}", where=where, expected="1 or more", found=value)
    return count
