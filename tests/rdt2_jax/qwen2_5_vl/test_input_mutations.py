"""Known mistakes on the host side, made on purpose: in images and in prompts. Each must be noticed by a parity row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from qwen_vocabulary import qwen_tokenizer_folder

from rdt2_jax.qwen2_5_vl import processor, prompt
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED, process
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer

pytestmark = pytest.mark.torch_peer

PIXEL_TOLERANCE = 1e-6
IMAGE = np.random.default_rng(3).integers(0, 256, (100, 333, 3), np.uint8)


@pytest.fixture(scope="module")
def expected_pixels() -> np.ndarray:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    peer = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    return peer(images=IMAGE, input_data_format="channels_last", return_tensors="np")["pixel_values"]


def pixel_difference(values: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(values - expected).max()) if values.shape == expected.shape else float("inf")


def test_without_a_mistake(expected_pixels: np.ndarray) -> None:
    assert pixel_difference(process(IMAGE, PUBLISHED).values, expected_pixels) <= PIXEL_TOLERANCE


def other_filter(patch: pytest.MonkeyPatch) -> np.ndarray:
    right = Image.Image.resize

    def bilinear(self: Image.Image, size: tuple[int, int], *_: Any, **__: Any) -> Image.Image:
        return right(self, size, Image.Resampling.BILINEAR)

    patch.setattr(Image.Image, "resize", bilinear)
    return process(IMAGE, PUBLISHED).values


def swapped_colours(_: pytest.MonkeyPatch) -> np.ndarray:
    return process(IMAGE[:, :, ::-1], PUBLISHED).values


def other_statistics(_: pytest.MonkeyPatch) -> np.ndarray:
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return process(IMAGE, PUBLISHED.model_copy(update=half)).values


def one_grey_level_off(patch: pytest.MonkeyPatch) -> np.ndarray:
    right = processor.patchify
    patch.setattr(processor, "patchify", lambda pixels, config: right(np.minimum(pixels, 254) + np.uint8(1), config))
    return process(IMAGE, PUBLISHED).values


def patches_row_by_row(_: pytest.MonkeyPatch) -> np.ndarray:
    values, (_, rows, columns) = (found := process(IMAGE, PUBLISHED)).values, found.grid
    tiles = values.reshape(rows // 2, columns // 2, 2, 2, -1)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(values.shape)


def colours_last_in_a_patch(_: pytest.MonkeyPatch) -> np.ndarray:
    values = process(IMAGE, PUBLISHED).values
    return np.moveaxis(values.reshape(-1, 3, 2 * 14 * 14), 1, 2).reshape(values.shape)


def second_frame_black(_: pytest.MonkeyPatch) -> np.ndarray:
    values = process(IMAGE, PUBLISHED).values.copy()
    values.reshape(-1, 3, 2, 14, 14)[:, :, 1] = 0
    return values


@pytest.mark.parametrize(
    "mistake",
    [
        other_filter,
        swapped_colours,
        other_statistics,
        one_grey_level_off,
        patches_row_by_row,
        colours_last_in_a_patch,
        second_frame_black,
    ],
)
def test_a_mistake_with_images_is_caught(
    mistake: Callable[[pytest.MonkeyPatch], np.ndarray], expected_pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pixel_difference(mistake(monkeypatch), expected_pixels) > 100 * PIXEL_TOLERANCE


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(qwen_tokenizer_folder())


@pytest.fixture(scope="module")
def expected_ids() -> list[int]:
    """The rendered template, tokenised by transformers with its control tokens read as such."""
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast(tokenizer_file=str(qwen_tokenizer_folder() / "tokenizer.json"))
    rendered = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        "<|image_pad|><|image_pad|><|vision_end|>Press the key.<|im_end|>\n<|im_start|>assistant\n<|quad_start|>"
    )
    return peer(rendered)["input_ids"]


def test_the_prompt_without_a_mistake(tokenizer: Tokenizer, expected_ids: list[int]) -> None:
    assert prompt.action_prompt(tokenizer, "Press the key.", 2) == expected_ids


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        ("\n", ""),
        ("user\n", "user"),
        ("assistant\n", "assistant"),
        ("system\nYou are a helpful assistant.", "system\nYou are helpful."),
        ("Press the key.", " Press the key."),
        ("Press the key.", "Press the key"),
    ],
)
def test_a_mistake_in_the_template_is_caught(
    found: str, instead: str, tokenizer: Tokenizer, expected_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = prompt._encode_parts
    monkeypatch.setattr(
        prompt, "_encode_parts", lambda t, parts: right(t, [instead if part == found else part for part in parts])
    )
    assert prompt.action_prompt(tokenizer, "Press the key.", 2) != expected_ids


def test_the_image_behind_the_words_is_caught(tokenizer: Tokenizer, expected_ids: list[int]) -> None:
    swapped = prompt.chat_prompt(tokenizer, ["Press the key.", prompt.ImageSlot(2)])
    assert [*swapped, tokenizer.control.quad_start] != expected_ids
    assert sorted([*swapped, tokenizer.control.quad_start]) == sorted(expected_ids)
