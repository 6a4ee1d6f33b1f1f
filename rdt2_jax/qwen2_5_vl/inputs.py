"""From images and words to a batch that the model takes: processor, tokenizer and positions together, on the host."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rdt2_jax.errors import DataError
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, read_config
from rdt2_jax.qwen2_5_vl.grid import token_positions
from rdt2_jax.qwen2_5_vl.model import ModelInputs
from rdt2_jax.qwen2_5_vl.processor import Patches, ProcessorConfig, process, read_processor_config
from rdt2_jax.qwen2_5_vl.prompt import ImageSlot, action_prompt, chat_prompt, left_pad, num_image_tokens
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

        Raises:
            ConfigError, CheckpointError: a file is missing or cannot be read, or they contradict each other.
        """
        path = Path(folder)
        return cls(read_config(path), Tokenizer.from_folder(path), read_processor_config(path))

    def actions(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        *,
        length: int | None = None,
        multiple: int = 1,
    ) -> ModelInputs:
        """Prompts that ask for the action that follows, one composite image each.

        Args:
            images: uint8 (height, width, 3) composites, see `processor.composite`; of one size.
            instructions: one per image.
            length: tokens to pad every row to; the longest row by default.
            multiple: round the length up to a multiple, to compile fewer shapes.

        Returns:
            Inputs of numpy arrays.

        Raises:
            DataError: an image or an instruction that cannot be used, rows that do not fit each other, or a row longer
                than `length`.
        """
        if len(images) != len(instructions):
            raise DataError("one image per instruction is needed", expected=len(instructions), found=len(images))
        patches = [[process(image, self.processor)] for image in images]
        rows = [
            action_prompt(self.tokenizer, instruction, self._num_tokens(image))
            for instruction, (image,) in zip(instructions, patches, strict=True)
        ]
        return self._batch(rows, patches, length, multiple)

    def chat(self, contents: Sequence[Content], *, length: int | None = None, multiple: int = 1) -> ModelInputs:
        """Conversations that wait for their first answer.

        Args:
            contents: one per row; the same number of images in every row, all of which give one grid of patches.
            length, multiple: as in `actions`.

        Raises:
            DataError: as in `actions`.
        """
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
        return num_image_tokens(image.grid, self.config.vision.spatial_merge_size)

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
        batch = left_pad(rows, self.tokenizer.control.endoftext, length=length, multiple=multiple)
        row_grids = [[image.grid for image in images] for images in patches]
        positions, following = token_positions(self.config, batch.input_ids, batch.mask, row_grids)
        values = np.stack([[image.values for image in images] for images in patches]) if grids else None
        return ModelInputs(batch.input_ids, batch.mask, positions, following, values, grids.pop() if grids else None)
