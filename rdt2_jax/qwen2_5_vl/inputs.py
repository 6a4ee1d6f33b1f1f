"""From images and words to a batch that the model takes: processor, tokenizer and positions together, on the host."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from rdt2_jax.errors import DataError
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, read_config
from rdt2_jax.qwen2_5_vl.folder import find_preprocessor
from rdt2_jax.qwen2_5_vl.grid import check_grid, num_tokens, token_positions
from rdt2_jax.qwen2_5_vl.model import ModelInputs
from rdt2_jax.qwen2_5_vl.processor import Patches, ProcessorConfig, process, read_processor_config
from rdt2_jax.qwen2_5_vl.prompt import ImageSlot, action_prompt, chat_prompt, left_pad
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer

Content = str | Sequence[str | np.ndarray]
"""What a user says: a text, or texts and images (uint8, height x width x 3, RGB) in their order."""


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """Everything between raw inputs and the model.

    Attributes:
        config: the model.
        tokenizer: its tokenizer; checked against the model's control tokens.
        processor: how images are resized and cut.
    """

    config: Qwen25VLConfig
    tokenizer: Tokenizer
    processor: ProcessorConfig

    def __post_init__(self) -> None:
        self.tokenizer.check(self.config)
        self.processor.check(self.config)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Preprocessor:
        """Reads `config.json`, `tokenizer.json` and `preprocessor_config.json`.

        Args:
            folder: a model folder, or a name on the hub, of which these files alone are fetched.

        Raises:
            ConfigError, CheckpointError: a file is missing or cannot be read, or they contradict each other.
        """
        path = find_preprocessor(folder)
        return cls(read_config(path), Tokenizer.from_folder(path), read_processor_config(path))

    def actions(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        *,
        length: int | None = None,
        multiple: int = 16,
    ) -> ModelInputs:
        """Prompts that ask for the action that follows, one composite image each.

        Args:
            images: uint8 (height, width, 3) composites, see `processor.composite`; of one size.
            instructions: one per image.
            length: tokens to pad every row to; the longest row by default.
            multiple: without `length`, round up to a multiple of this: every length is compiled anew.

        Returns:
            Inputs of numpy arrays.

        Raises:
            DataError: an image or an instruction that cannot be used, rows that do not fit each other, or a row longer
                than `length`.
        """
        _refuse_single_text(instructions, "instructions")
        if len(images) != len(instructions):
            raise DataError("one image per instruction is needed", expected=len(instructions), found=len(images))
        patches = [[process(image, self.processor)] for image in images]
        rows = [
            action_prompt(self.tokenizer, instruction, self._num_tokens(image))
            for instruction, (image,) in zip(instructions, patches, strict=True)
        ]
        return self._batch(rows, patches, length, multiple)

    def chat(self, contents: Sequence[Content], *, length: int | None = None, multiple: int = 16) -> ModelInputs:
        """Conversations that wait for their first answer.

        Args:
            contents: one per row; the same number of images in every row, all of which give one grid of patches.
            length, multiple: as in `actions`.

        Raises:
            DataError: as in `actions`.
        """
        _refuse_single_text(contents, "contents")
        rows, patches = [], []
        for content in contents:
            parts: list[str | ImageSlot] = []
            images: list[Patches] = []
            for part in [content] if isinstance(content, str) else content:
                if isinstance(part, str):
                    parts.append(part)
                else:
                    images.append(process(part, self.processor))
                    parts.append(ImageSlot(self._num_tokens(images[-1])))
            rows.append(chat_prompt(self.tokenizer, parts))
            patches.append(images)
        return self._batch(rows, patches, length, multiple)

    def _num_tokens(self, image: Patches) -> int:
        return num_tokens(self.config.vision, image.grid)

    def _batch(
        self, rows: Sequence[list[int]], patches: Sequence[Sequence[Patches]], length: int | None, multiple: int
    ) -> ModelInputs:
        found = {tuple(image.grid for image in images) for images in patches}
        grids = {grid for images in found for grid in images}
        if len({len(images) for images in found}) > 1 or len(grids) > 1:
            raise DataError(
                "the rows of a batch need as many images each, all of one grid",
                expected="one grid",
                found=sorted(found),
                fix="resize or letterbox the images to one size, or split the batch",
            )
        pad_id = self.tokenizer.control.endoftext
        batch = left_pad(rows, pad_id, length=length, multiple=multiple if length is None else 1)
        row_grids = [[image.grid for image in images] for images in patches]
        positions, following = token_positions(self.config, batch.input_ids, batch.mask, row_grids)
        values = np.stack([[image.values for image in images] for images in patches]) if grids else None
        return ModelInputs(batch.input_ids, batch.mask, positions, following, values, grids.pop() if grids else None)


def check_inputs(config: Qwen25VLConfig, inputs: ModelInputs) -> None:
    """Looks at the values of a batch that was put together by hand. On the host, not inside jit.

    Raises:
        DataError: ids outside the vocabulary, padding that is not on the left, image tokens that are not as many as
            the images need, or a video; lists everything.
    """
    problems = Problems()
    ids, valid = np.asarray(inputs.input_ids), np.asarray(inputs.valid)
    outside = np.unique(ids[(ids < 0) | (ids >= config.text.vocab_size)])
    if outside.size:
        problems.add(f"ids outside the vocabulary of {config.text.vocab_size}: {outside[:5].tolist()}")
    if (valid[:, :-1] & ~valid[:, 1:]).any():
        problems.add("padding must be on the left of every row")
    needed = 0
    if inputs.patches is not None and inputs.grid is not None:
        needed = inputs.patches.shape[1] * num_tokens(config.vision, check_grid(config.vision, inputs.grid))
    found = (ids == config.image_token_id).sum(axis=1)
    for row in np.flatnonzero((found != needed) & valid.any(axis=1)):
        problems.add(f"row {row} has {found[row]} image tokens, its images need {needed}")
    if (ids == config.video_token_id).any():
        problems.add("videos are not supported")
    problems.raise_if_any(DataError, "a batch that is no prompt of this model", where="ModelInputs")


def _refuse_single_text(texts: object, where: str) -> None:
    """A string is a sequence of strings too: one prompt would become as many as it has letters."""
    if isinstance(texts, str):
        raise DataError("one text where a list is needed", where=where, expected="a list of texts", found=repr(texts))
