"""A batch on the host, and how samples become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rdt2_data.instructions import Instructions
from rdt2_data.pipeline.letterbox import letterbox
from rdt2_data.pipeline.text import TextEncoder, TextRows
from rdt2_data.samples import (
    COMPOSITE_SHAPE,
    INSTRUCTION_KEY,
    TOKENS_PER_CHUNK,
    RawSample,
    Turn,
    decode_composite,
    decode_image,
    read_action,
    read_action_token,
    read_conversation,
    read_gripper_valid,
    read_meta,
    read_state,
)
from rdt2_jax.actions.layout import ACTION_DIM, CHUNK_LENGTH, STATE_DIM

Corruption = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(uint8 (height, width, 3), key uint32 (2,)) -> an image of the same shape: JPEG corruption, for one."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples side by side; of several hosts, each holds its own rows of the global batch.

    Attributes:
        image: uint8 (B, 384, 768, 3), RGB: left wrist | right wrist, or a question's image, letterboxed.
        action: float32 (B, 24, 20), relative chunks in physical units; zeros for questions.
        action_token: int32 (B, 27); -1 where a gripper was not measured or the sample has no tokens.
        gripper_valid: bool (B, 2), right then left: whether the widths of `action` were measured.
        state: float32 (B, 20); zeros where the sample has none.
        is_action: bool (B,), False for questions.
        has_tokens: bool (B,), whether the sample carried its tokens.
        valid: bool (B,), False for rows that only fill the last batch of an evaluation.
        replaced: bool (B,), rows that stand in for a bad sample.
        key: uint32 (B, 2), keys of the augmentation; depend on seed and position in the stream alone.
        sample: int64 (B, 2), component of the mixture and number of the sample in it.
        texts: instruction, or turns of the conversation.
        text: ids of the texts when the stream has an encoder.
    """

    image: np.ndarray
    action: np.ndarray
    action_token: np.ndarray
    gripper_valid: np.ndarray
    state: np.ndarray
    is_action: np.ndarray
    has_tokens: np.ndarray
    valid: np.ndarray
    replaced: np.ndarray
    key: np.ndarray
    sample: np.ndarray
    texts: tuple[str | tuple[Turn, ...], ...]
    text: TextRows | None = None

    def __len__(self) -> int:
        return len(self.image)


class BatchBuilder:
    """Decodes samples into the rows of one batch.

    Args:
        size: rows.
        encoder: makes ids of the texts, or None.
        corrupt: changes images on the host, or None.
    """

    def __init__(self, size: int, encoder: TextEncoder | None, corrupt: Corruption | None) -> None:
        self._encoder, self._corrupt = encoder, corrupt
        self._texts: list[str | tuple[Turn, ...]] = [""] * size
        self._arrays: dict[str, np.ndarray] = {
            "image": np.empty((size, *COMPOSITE_SHAPE), np.uint8),
            "action": np.zeros((size, CHUNK_LENGTH, ACTION_DIM), np.float32),
            "action_token": np.full((size, TOKENS_PER_CHUNK), -1, np.int32),
            "gripper_valid": np.ones((size, 2), bool),
            "state": np.zeros((size, STATE_DIM), np.float32),
            "is_action": np.ones(size, bool),
            "has_tokens": np.zeros(size, bool),
            "valid": np.ones(size, bool),
            "replaced": np.zeros(size, bool),
            "key": np.zeros((size, 2), np.uint32),
            "sample": np.zeros((size, 2), np.int64),
        }

    def fill(self, row: int, raw: RawSample, instructions: Instructions | None, key: np.ndarray) -> None:
        """Decodes one sample into a row.

        Raises:
            SampleError: whatever is wrong with it; the row may then hold part of it, and is to be filled anew.
        """
        arrays = self._arrays
        if instructions is None:
            self._texts[row] = read_conversation(raw)
            arrays["image"][row] = letterbox(decode_image(raw), COMPOSITE_SHAPE)
            arrays["is_action"][row] = False
        else:
            meta = read_meta(raw)
            self._texts[row] = instructions.text(meta[INSTRUCTION_KEY], raw.where)
            arrays["gripper_valid"][row] = read_gripper_valid(meta, raw.where)
            arrays["action"][row] = read_action(raw)
            token, state = read_action_token(raw), read_state(raw)
            arrays["action_token"][row] = -1 if token is None else token
            arrays["has_tokens"][row] = token is not None
            arrays["state"][row] = 0 if state is None else state
            arrays["is_action"][row] = True
            decode_composite(raw, arrays["image"][row])
        if self._corrupt is not None:
            arrays["image"][row] = self._corrupt(arrays["image"][row], key)
        arrays["key"][row] = key

    def mark(self, row: int, sample: tuple[int, int], *, replaced: bool, valid: bool) -> None:
        """Says where a row came from."""
        self._arrays["sample"][row] = sample
        self._arrays["replaced"][row], self._arrays["valid"][row] = replaced, valid

    def build(self) -> Batch:
        """The batch; the builder is not to be used afterwards."""
        arrays: Mapping[str, np.ndarray] = self._arrays
        text = None
        if self._encoder is not None:
            text = self._encoder.encode(self._texts, arrays["action_token"], arrays["has_tokens"])
        return Batch(**arrays, texts=tuple(self._texts), text=text)
