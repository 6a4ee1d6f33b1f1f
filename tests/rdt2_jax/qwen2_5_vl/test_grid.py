"""Window order and rotary positions: properties, and what is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from rdt2_jax.errors import DataError
from rdt2_jax.qwen2_5_vl.config import preset
from rdt2_jax.qwen2_5_vl.grid import check_grid, num_tokens, patch_positions, token_positions, windows

CONFIG = preset("7b")
IMAGE = CONFIG.image_token_id
sides = st.integers(1, 15).map(lambda n: 2 * n)


@given(sides, sides)
def test_windows_hold_every_patch_once(rows: int, columns: int) -> None:
    grid = (1, rows, columns)
    table = windows(CONFIG.vision, grid)
    count = rows * columns
    np.testing.assert_array_equal(np.sort(table.patch_order), np.arange(count))
    np.testing.assert_array_equal(table.token_order[table.token_restore], np.arange(count // 4))
    np.testing.assert_array_equal(table.members[table.valid], np.arange(count))
    np.testing.assert_array_equal(table.members.reshape(-1)[table.places], np.arange(count))
    np.testing.assert_array_equal(table.valid.sum(axis=1), np.diff(table.boundaries))
    assert table.all_whole == (rows % 8 == 0 and columns % 8 == 0)


@given(sides, sides)
def test_a_window_is_a_square_of_neighbours(rows: int, columns: int) -> None:
    grid = (1, rows, columns)
    table = windows(CONFIG.vision, grid)
    positions = patch_positions(CONFIG.vision, grid)[table.patch_order]
    for start, end in zip(table.boundaries[:-1], table.boundaries[1:], strict=True):
        window = positions[start:end]
        assert len({tuple(corner) for corner in window // 8}) == 1
        assert len({tuple(place) for place in window}) == end - start


def test_the_composite_image() -> None:
    """28 x 54 patches: 28 windows of 24 to 64 patches, 378 tokens; text goes on 27 later, not 378."""
    table = windows(CONFIG.vision, (1, 28, 54))
    sizes = np.diff(table.boundaries)
    assert (len(sizes), sizes.min(), sizes.max()) == (28, 24, 64)
    assert num_tokens(CONFIG.vision, (1, 28, 54)) == 378
    ids = np.array([[5, 6, *[IMAGE] * 378, 7, 8]])
    positions, following = token_positions(CONFIG, ids, np.ones_like(ids), [[(1, 28, 54)]])
    np.testing.assert_array_equal(positions[:, 0, :2], [[0, 1]] * 3)
    np.testing.assert_array_equal(positions[0, 0, 2:380], 2)
    np.testing.assert_array_equal(positions[1, 0, 2:380], 2 + np.repeat(np.arange(14), 27))
    np.testing.assert_array_equal(positions[2, 0, 2:380], 2 + np.tile(np.arange(27), 14))
    np.testing.assert_array_equal(positions[:, 0, 380:], [[29, 30]] * 3)
    assert following.tolist() == [31]


def test_several_images_and_none() -> None:
    mask = np.array([[1] * 6, [0, 0, 0, 1, 1, 1]])
    ids = np.array([[1, IMAGE, IMAGE, 9, IMAGE, 2], [0, 0, 0, 1, 2, 3]])
    positions, following = token_positions(CONFIG, ids, mask, [[(1, 2, 4), (1, 2, 2)], []])
    np.testing.assert_array_equal(positions[:, 0], [[0, 1, 1, 3, 4, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(positions[:, 1], [[0, 0, 0, 0, 1, 2]] * 3)
    assert following.tolist() == [6, 3]


@pytest.mark.parametrize("grid", [(2, 4, 4), (1, 3, 4), (1, 4, 0), (1, 4), (4, 4, 1, 1)])
def test_grids_that_are_no_image(grid: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="not the grid of an image"):
        check_grid(CONFIG.vision, grid)


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, IMAGE, 2], [[(1, 4, 4)]], "image tokens and images do not agree"),
        ([1, IMAGE, 2], [[]], "image tokens and images do not agree"),
        ([1, IMAGE, 2, IMAGE, 3], [[(1, 2, 4)]], "consecutive"),
        ([1, CONFIG.video_token_id, 2], [[]], "videos are not supported"),
        ([1, 2], [], "one list of grids per row"),
    ],
)
def test_rows_that_contradict_their_images(
    ids: list[int], grids: list[list[tuple[int, int, int]]], message: str
) -> None:
    array = np.array([ids])
    with pytest.raises(DataError, match=message):
        token_positions(CONFIG, array, np.ones_like(array), grids)
