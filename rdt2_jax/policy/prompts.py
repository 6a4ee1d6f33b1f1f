"""From observations to batches that a backbone takes: composite image, JPEG, prompt, padding. On the host."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rdt2_jax.actions.types import IMAGE_SHAPE, Observation
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.model import ModelInputs
from rdt2_jax.qwen2_5_vl.processor import composite, smart_resize
from rdt2_jax.qwen2_5_vl.prompt import action_prompt

_SHORTEST_INSTRUCTION = "Go."


class Prompts:
    """Makes batches of few lengths, so that few programs are compiled.

    Args:
        preprocessor: of the backbone.
        lengths: tokens that prompts are padded to, ascending.
        jpeg_quality: the composite image goes through JPEG with this quality; None: it does not.

    Raises:
        ConfigError: a length in which no instruction has room.
    """

    def __init__(self, preprocessor: Preprocessor, lengths: Sequence[int], jpeg_quality: int | None) -> None:
        self._preprocessor, self._lengths, self._jpeg_quality = preprocessor, tuple(lengths), jpeg_quality
        processor = preprocessor.processor
        height, width = smart_resize(IMAGE_SHAPE[0], 2 * IMAGE_SHAPE[1], processor)
        self._image_tokens = height * width // processor.side_multiple**2
        shortest = self._length(_SHORTEST_INSTRUCTION)
        self._overhead = shortest - len(preprocessor.tokenizer.encode(_SHORTEST_INSTRUCTION))
        if self._lengths[0] < shortest:
            raise ConfigError(
                "no instruction has room in so few tokens",
                where="prompt_lengths",
                expected=f"{shortest} or more: {self._image_tokens} of the image, the rest of the chat template",
                found=self._lengths[0],
            )

    def lengths(self, observations: Sequence[Observation]) -> list[int]:
        """Tokens of each observation's prompt, without padding.

        Raises:
            DataError: one is longer than the longest prompt length; names all that are.
        """
        counts = [self._length(observation.instruction) for observation in observations]
        problems = Problems()
        for observation, count in zip(observations, counts, strict=True):
            if count > self._lengths[-1]:
                text = observation.instruction
                shown = text if len(text) <= 60 else f"{text[:57]}..."
                problems.add(f"observation {observation.id!r}: {count} tokens, instruction {shown!r}")
        room = self._lengths[-1] - self._overhead
        problems.raise_if_any(
            DataError,
            "a prompt is too long",
            where="instruction",
            expected=f"at most {self._lengths[-1]} tokens, the largest of prompt_lengths: {room} for the instruction",
            fix="shorten the instruction (RDT2 knows short ones: verb and object), or give the policy a larger "
            "prompt length",
        )
        return counts

    def inputs(self, observations: Sequence[Observation], lengths: Sequence[int], size: int) -> ModelInputs:
        """A batch of numpy arrays, padded to the smallest prompt length that fits its longest row.

        Args:
            observations: at least one.
            lengths: of their prompts, see `lengths`.
            size: rows of the batch; the last observation is repeated where there are fewer.

        Raises:
            DataError: as `Preprocessor.actions`.
        """
        length = next(n for n in self._lengths if n >= max(lengths))
        return self.inputs_of_length(observations, length, size)

    def inputs_of_length(self, observations: Sequence[Observation], length: int, size: int) -> ModelInputs:
        """As `inputs`, with the prompt length given."""
        images = [self._image(observation) for observation in observations]
        instructions = [observation.instruction for observation in observations]
        return _repeat_last(self._preprocessor.actions(images, instructions, length=length), size)

    def _length(self, instruction: str) -> int:
        return len(action_prompt(self._preprocessor.tokenizer, instruction, self._image_tokens))

    def _image(self, observation: Observation) -> np.ndarray:
        image = composite(observation.images["left_wrist"], observation.images["right_wrist"])
        return image if self._jpeg_quality is None else through_jpeg(image, self._jpeg_quality)


def blank_observation() -> Observation:
    """Black images and a short instruction: what policies compile with."""
    black = np.zeros(IMAGE_SHAPE, np.uint8)
    return Observation(
        images={"left_wrist": black, "right_wrist": black},
        capture_time_s={"left_wrist": 0.0, "right_wrist": 0.0},
        instruction=_SHORTEST_INSTRUCTION,
        id="blank",
    )


def through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """What JPEG leaves of an image, with colours at half the resolution (4:2:0), as OpenCV's encoder does by default.

    Args:
        image: uint8 (height, width, 3), RGB.
        quality: 1 to 100.
    """
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=quality, subsampling="4:2:0")
    stream.seek(0)
    with Image.open(stream) as decoded:
        return np.asarray(decoded.convert("RGB"))


def _repeat_last(inputs: ModelInputs, size: int) -> ModelInputs:
    count = len(inputs.input_ids)
    if count == size:
        return inputs
    rows = np.minimum(np.arange(size), count - 1)
    return dataclasses.replace(
        inputs,
        input_ids=inputs.input_ids[rows],
        valid=inputs.valid[rows],
        positions=inputs.positions[:, rows],
        following=inputs.following[rows],
        patches=inputs.patches[rows],
    )
