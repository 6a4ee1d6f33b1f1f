"""What one sample is: the members of a published shard, written and read.

A sample is a handful of small files under one key, as `N.image.jpg` in the archive. Two kinds exist. An action sample
holds the composite image, the relative chunk, perhaps its tokens, and which sentence of `instructions.json` it belongs
to. A question sample (stage 1 of the paper mixes vision-language data in) holds an image and a conversation.

Source of the layout: the RDT2 repository (thu-ml/RDT2) and the shards published with it; the question sample is ours.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdt2_data.problems import SampleError
from rdt2_jax.actions.layout import ACTION_DIM, ARM_ACTION_DIM, ARM_NAMES, CHUNK_LENGTH, ROT6D, STATE_DIM
from rdt2_jax.actions.types import IMAGE_SHAPE
from rdt2_jax.actions.validation import check_actions
from rdt2_jax.errors import DataError

IMAGE, ACTION, ACTION_TOKEN, META = "image.jpg", "action.npy", "action_token.npy", "meta.json"
STATE = "state.npy"
"""Proprioception, float32 (20,): not in the published shards, for fine-tuning with it."""

GRIPPER_VALID = "gripper_valid"
"""Entry of `meta.json`: {"right": bool, "left": bool}, whether each width was measured; absent: both were."""

CONVERSATION = "conversation.json"
"""Of a question sample: {"turns": [{"question": ..., "answer": ...}, ...]}."""

INSTRUCTION_KEY = "sub_task_instruction_key"
COMPOSITE_SHAPE = (IMAGE_SHAPE[0], 2 * IMAGE_SHAPE[1], 3)
"""Left wrist | right wrist: rows, columns, RGB."""

_CLEARLY_A_ROTATION = 0.1
"""Up to here from norm 1 and right angles, rot6d columns are far from short or parallel; nearly all are."""

TOKENS_PER_CHUNK = 27
MAX_TOKEN = 1023
"""Largest action token; negative ones stand for a gripper that was not measured."""


@dataclass(frozen=True)
class RawSample:
    """The members of one sample as they lie in the archive.

    Attributes:
        key: name inside the archive, without extension.
        shard: path of the archive.
        members: extension -> bytes.
    """

    key: str
    shard: str
    members: Mapping[str, bytes]

    @property
    def where(self) -> str:
        """Archive and key, for messages."""
        return f"{self.shard}, sample {self.key}"

    @property
    def is_question(self) -> bool:
        """Whether this is an image with a conversation instead of an action."""
        return CONVERSATION in self.members

    def member(self, extension: str) -> bytes:
        """The bytes of one member.

        Raises:
            SampleError: "missing-member".
        """
        if extension not in self.members:
            found = ", ".join(sorted(self.members)) or "nothing"
            raise SampleError("missing-member", where=self.where, expected=extension, found=found)
        return self.members[extension]


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str


# ------------------------------------------------------------------------------------------------ writing


def action_members(
    *,
    image_jpeg: bytes,
    action: np.ndarray,
    instruction_key: str | int,
    action_token: np.ndarray | None = None,
    state: np.ndarray | None = None,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The members of an action sample, in the order in which they are written.

    Args:
        image_jpeg: JPEG file of the composite (384, 768, 3): left wrist | right wrist.
        action: float32 (24, 20), relative chunk in the policy frame.
        instruction_key: key of the sentence in `instructions.json`.
        action_token: int16 (27,), or None.
        state: float32 (20,), or None.
        meta: more entries of `meta.json` (times, episode); must be JSON.

    Raises:
        DataError: an array of another type or shape.
    """
    members = {IMAGE: bytes(image_jpeg), ACTION: _npy(action, np.float32, (CHUNK_LENGTH, ACTION_DIM), ACTION)}
    if action_token is not None:
        members[ACTION_TOKEN] = _npy(action_token, np.int16, (TOKENS_PER_CHUNK,), ACTION_TOKEN)
    if state is not None:
        members[STATE] = _npy(state, np.float32, (STATE_DIM,), STATE)
    document = {INSTRUCTION_KEY: instruction_key, **(meta or {})}
    members[META] = json.dumps(document, allow_nan=False).encode()
    return members


def question_members(*, image_jpeg: bytes, turns: Sequence[Turn]) -> dict[str, bytes]:
    """The members of a question sample: a JPEG file of any size, and at least one question with its answer.

    Raises:
        DataError: no turn, or a blank question or answer.
    """
    if not turns or any(not turn.question.strip() or not turn.answer.strip() for turn in turns):
        raise DataError("a conversation needs questions and answers", where=CONVERSATION, found=list(turns))
    document = {"turns": [{"question": turn.question, "answer": turn.answer} for turn in turns]}
    return {IMAGE: bytes(image_jpeg), CONVERSATION: json.dumps(document).encode()}


def _npy(array: np.ndarray, dtype: Any, shape: tuple[int, ...], name: str) -> bytes:
    if array.dtype != dtype or array.shape != shape:
        expected, found = f"{np.dtype(dtype).name} {shape}", f"{array.dtype} {array.shape}"
        raise DataError("a sample's array has another type or shape", where=name, expected=expected, found=found)
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------ reading


def read_action(raw: RawSample) -> np.ndarray:
    """The chunk, float32 (24, 20).

    Raises:
        SampleError: "missing-member", "corrupt-npy", "wrong-dtype", "wrong-shape", "not-finite" or "bad-rotation".
    """
    action = _read_npy(raw, ACTION, np.float32, (CHUNK_LENGTH, ACTION_DIM))
    if not np.isfinite(action).all():
        index = np.argwhere(~np.isfinite(action))[0].tolist()
        raise SampleError("not-finite", where=f"{raw.where}, {ACTION}", found=f"{action[tuple(index)]} at {index}")
    _require_rotations(action, f"{raw.where}, {ACTION}")
    return action


def read_action_token(raw: RawSample) -> np.ndarray | None:
    """The tokens, int16 (27,), or None where the sample carries none.

    Raises:
        SampleError: "corrupt-npy", "wrong-dtype", "wrong-shape" or "bad-token".
    """
    if ACTION_TOKEN not in raw.members:
        return None
    token = _read_npy(raw, ACTION_TOKEN, np.int16, (TOKENS_PER_CHUNK,))
    if token.max() > MAX_TOKEN:
        where = f"{raw.where}, {ACTION_TOKEN}"
        raise SampleError("bad-token", where=where, expected=f"at most {MAX_TOKEN}", found=int(token.max()))
    return token


def read_state(raw: RawSample) -> np.ndarray | None:
    """Proprioception, float32 (20,), or None where the sample carries none.

    Raises:
        SampleError: "corrupt-npy", "wrong-dtype", "wrong-shape" or "not-finite".
    """
    if STATE not in raw.members:
        return None
    state = _read_npy(raw, STATE, np.float32, (STATE_DIM,))
    if not np.isfinite(state).all():
        raise SampleError("not-finite", where=f"{raw.where}, {STATE}", found=state)
    return state


def read_meta(raw: RawSample) -> dict[str, Any]:
    """`meta.json`, whose instruction key is text.

    Raises:
        SampleError: "missing-member" or "bad-meta".
    """
    text = raw.member(META)
    where = f"{raw.where}, {META}"
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad-meta", where=where, expected="JSON", found=str(error)) from error
    key = meta.get(INSTRUCTION_KEY) if isinstance(meta, dict) else None
    if not isinstance(key, (str, int)) or isinstance(key, bool):
        expected = f"an object with {INSTRUCTION_KEY}, a text or a whole number"
        raise SampleError("bad-meta", where=where, expected=expected, found=text[:80])
    return {**meta, INSTRUCTION_KEY: str(key)}


def read_gripper_valid(meta: Mapping[str, Any], where: str) -> tuple[bool, bool]:
    """Whether the widths of the right and of the left arm were measured.

    Args:
        meta: see `read_meta`.
        where: of the sample, for messages.

    Raises:
        SampleError: "bad-meta".
    """
    stated = meta.get(GRIPPER_VALID, dict.fromkeys(ARM_NAMES, True))
    known = isinstance(stated, dict) and set(stated) == set(ARM_NAMES)
    if not known or not all(isinstance(value, bool) for value in stated.values()):
        expected = '{"right": bool, "left": bool}'
        raise SampleError("bad-meta", where=f"{where}, {META}, {GRIPPER_VALID}", expected=expected, found=stated)
    return stated["right"], stated["left"]


def read_conversation(raw: RawSample) -> tuple[Turn, ...]:
    """The turns of a question sample.

    Raises:
        SampleError: "missing-member" or "bad-conversation".
    """
    text = raw.member(CONVERSATION)
    where = f"{raw.where}, {CONVERSATION}"
    try:
        turns = tuple(Turn(turn["question"], turn["answer"]) for turn in json.loads(text)["turns"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise SampleError("bad-conversation", where=where, expected="turns", found=found) from error
    texts = [part for turn in turns for part in (turn.question, turn.answer)]
    if not texts or not all(isinstance(part, str) and part.strip() for part in texts):
        raise SampleError("bad-conversation", where=where, expected="questions and answers", found=text[:80])
    return turns


def decode_composite(raw: RawSample, out: np.ndarray | None = None) -> np.ndarray:
    """The composite of an action sample, uint8 (384, 768, 3), RGB: left wrist | right wrist.

    Args:
        raw: the sample.
        out: contiguous uint8 array of this shape to decode into.

    Raises:
        SampleError: "missing-member", "corrupt-jpeg", or "wrong-image" for another size.
    """
    return decode_image(raw, np.empty(COMPOSITE_SHAPE, np.uint8) if out is None else out)


def decode_image(raw: RawSample, out: np.ndarray | None = None) -> np.ndarray:
    """The image of a sample, uint8 (height, width, 3), RGB.

    Args:
        raw: the sample.
        out: contiguous uint8 array to decode into; the image must then have its shape.

    Raises:
        SampleError: "missing-member", "corrupt-jpeg", or "wrong-image" for a shape other than that of `out`.
    """
    import simplejpeg

    data = raw.member(IMAGE)
    where = f"{raw.where}, {IMAGE}"
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if out is not None and out.shape != (height, width, 3):
            raise SampleError("wrong-image", where=where, expected=out.shape, found=(height, width, 3))
        return simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except ValueError as error:
        raise SampleError("corrupt-jpeg", where=where, found=str(error)) from error


def _read_npy(raw: RawSample, extension: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    data, where = raw.member(extension), f"{raw.where}, {extension}"
    header = _npy_header(dtype, shape)
    if data.startswith(header) and len(data) == len(header) + np.dtype(dtype).itemsize * math.prod(shape):
        return np.frombuffer(data, dtype, offset=len(header)).reshape(shape)  # as numpy.save writes it: nearly all
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, RecursionError, MemoryError, OverflowError) as error:
        raise SampleError("corrupt-npy", where=where, found=str(error)) from error
    if array.dtype != dtype:
        raise SampleError("wrong-dtype", where=where, expected=np.dtype(dtype).name, found=array.dtype)
    if array.shape != shape:
        raise SampleError("wrong-shape", where=where, expected=shape, found=array.shape)
    return array


@functools.cache
def _npy_header(dtype: Any, shape: tuple[int, ...]) -> bytes:
    """How a `.npy` file of this type and shape begins."""
    stream = io.BytesIO()
    np.save(stream, np.zeros(shape, dtype), allow_pickle=False)
    return stream.getvalue()[: -np.dtype(dtype).itemsize * math.prod(shape)]


def rotation_errors(action: np.ndarray) -> np.ndarray:
    """How far the rot6d of a chunk are from orthonormal columns.

    Args:
        action: finite, (24, 20).

    Returns:
        float64 (24, 2), per frame and arm (right, left): the larger of | norm - 1 | of both columns and the absolute
        value of their scalar product.
    """
    columns = action.reshape(CHUNK_LENGTH, len(ARM_NAMES), ARM_ACTION_DIM)[..., ROT6D].astype(np.float64)
    first, second = columns[..., :3], columns[..., 3:]
    norms = np.sqrt((first * first).sum(-1)), np.sqrt((second * second).sum(-1))
    return np.maximum(np.maximum(abs(norms[0] - 1), abs(norms[1] - 1)), abs((first * second).sum(-1)))


def _require_rotations(action: np.ndarray, where: str) -> None:
    """The limits are those of the action space; it is asked only about a chunk that is not clearly fine."""
    if rotation_errors(action).max() <= _CLEARLY_A_ROTATION:
        return
    try:
        check_actions(action, name="the action")
    except DataError as error:
        what, expected, found = error.what, error.expected, error.found
        raise SampleError("bad-rotation", where=where, what=what, expected=expected, found=found) from error
