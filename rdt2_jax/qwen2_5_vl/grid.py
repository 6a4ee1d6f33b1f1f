"""Where patches and tokens are: window order and rotary positions of patches, multimodal positions of tokens.

Everything here is numpy on the host. A grid is (frames, rows, columns) of patches; patches come in merge order: the
`spatial_merge_size`^2 patches of a token are consecutive, tokens row by row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from rdt2_jax.errors import DataError
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, VisionConfig

Grid = tuple[int, int, int]
"""(frames, rows, columns) of patches."""


def check_grid(config: VisionConfig, grid: Sequence[int]) -> Grid:
    """The grid as a tuple.

    Raises:
        DataError: not three numbers, more than one frame (videos are not supported), or rows and columns that do not
            divide by the merge size.
    """
    merge = config.spatial_merge_size
    values = tuple(int(n) for n in grid)
    if len(values) != 3 or values[0] != 1 or any(n < merge or n % merge for n in values[1:]):
        raise DataError(
            "not the grid of an image",
            where="grid",
            expected=f"(1, rows, columns), rows and columns multiples of {merge}",
            found=values,
        )
    return values[0], values[1], values[2]


def num_tokens(config: VisionConfig, grid: Grid) -> int:
    """Image tokens that a grid of patches becomes."""
    return grid[0] * grid[1] * grid[2] // config.merge_unit


def patch_positions(config: VisionConfig, grid: Grid) -> np.ndarray:
    """Row and column of every patch in merge order, int32 (patches, 2)."""
    _, height, width = check_grid(config, grid)
    merge = config.spatial_merge_size
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")

    def merge_order(values: np.ndarray) -> np.ndarray:
        tiles = values.reshape(height // merge, merge, width // merge, merge)
        return tiles.transpose(0, 2, 1, 3).reshape(-1)

    return np.stack([merge_order(rows), merge_order(columns)], axis=-1).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """How the patches of one grid fall into windows. Windows are squares of tokens; those at the edges are smaller.

    Attributes:
        token_order: int32 (tokens,): tokens in window order.
        patch_order: int32 (patches,): the same for patches, which stay with their token.
        token_restore: int32 (tokens,): inverse of `token_order`.
        boundaries: int32 (windows + 1,): where windows begin and end among the ordered patches (`cu_seqlens`).
        members: int32 (windows, window_patches): ordered patches of every window, padded with the window's first.
        valid: bool (windows, window_patches): False where padded.
        places: int32 (patches,): where each ordered patch is in the flattened `members`.
    """

    token_order: np.ndarray
    patch_order: np.ndarray
    token_restore: np.ndarray
    boundaries: np.ndarray
    members: np.ndarray
    valid: np.ndarray
    places: np.ndarray

    @property
    def all_whole(self) -> bool:
        """True if no window is padded: ordered patches are then whole windows, one after the other."""
        return bool(self.valid.all())


@functools.lru_cache(maxsize=256)
def windows(config: VisionConfig, grid: Grid) -> Windows:
    """The windows of a grid."""
    _, height, width = check_grid(config, grid)
    merge, side, unit = config.spatial_merge_size, config.window_tokens, config.merge_unit
    rows, columns = height // merge, width // merge
    tokens = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    squares = [
        tokens[top : top + side, left : left + side].reshape(-1)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    order = np.concatenate(squares)
    sizes = np.array([square.size for square in squares]) * unit
    boundaries = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    offsets = np.arange(config.window_patches)
    valid = offsets[None, :] < sizes[:, None]
    members = np.where(valid, boundaries[:-1, None] + offsets, boundaries[:-1, None]).astype(np.int32)
    return Windows(
        token_order=order,
        patch_order=(order[:, None] * unit + np.arange(unit)).reshape(-1).astype(np.int32),
        token_restore=np.argsort(order).astype(np.int32),
        boundaries=boundaries,
        members=members,
        valid=valid,
        places=np.flatnonzero(valid).astype(np.int32),
    )


def token_positions(
    config: Qwen25VLConfig, input_ids: np.ndarray, mask: np.ndarray, grids: Sequence[Sequence[Grid]]
) -> tuple[np.ndarray, np.ndarray]:
    """Multimodal rotary positions of every token: time, row and column.

    Text counts on from what precedes it, alike in all three. The tokens of an image share one time; their rows and
    columns count from the same number; the text after it goes on at that number plus the longer side of the image in
    tokens. Padding is at 0.

    Args:
        config: the model.
        input_ids: (batch, length); an image has one `image_token_id` per token.
        mask: bool (batch, length), False for padding.
        grids: per row, the grids of its images in order.

    Returns:
        int32 (3, batch, length) positions, and int32 (batch,): the position of the token that would come next.

    Raises:
        DataError: image tokens and grids do not agree, or a video token; names the row.
    """
    positions = np.zeros((3, *input_ids.shape), np.int32)
    following = np.zeros(input_ids.shape[0], np.int32)
    if len(grids) != input_ids.shape[0]:
        raise DataError("one list of grids per row is needed", expected=input_ids.shape[0], found=len(grids))
    for row, (ids, valid) in enumerate(zip(input_ids, mask.astype(bool), strict=True)):
        values, following[row] = _row_positions(config, ids[valid], grids[row], row)
        positions[:, row, valid] = values
    return positions, following


def _row_positions(config: Qwen25VLConfig, ids: np.ndarray, grids: Sequence[Grid], row: int) -> tuple[np.ndarray, int]:
    """Positions (3, length) of a row without padding, and the next one."""
    merge = config.vision.spatial_merge_size
    if (ids == config.video_token_id).any():
        raise DataError("videos are not supported", where=f"row {row}", found=f"token {config.video_token_id}")
    is_image = ids == config.image_token_id
    needed = sum(num_tokens(config.vision, check_grid(config.vision, grid)) for grid in grids)
    if int(is_image.sum()) != needed:
        raise DataError(
            "image tokens and images do not agree",
            where=f"row {row}",
            expected=f"{needed} tokens {config.image_token_id} for {len(grids)} images of grids {list(grids)}",
            found=int(is_image.sum()),
        )
    parts: list[np.ndarray] = []
    position = start = 0
    for _, height, width in grids:
        rows, columns = height // merge, width // merge
        first = start + int(np.argmax(is_image[start:]))
        if not is_image[first : first + rows * columns].all():
            raise DataError("the tokens of an image must be consecutive", where=f"row {row}", found=f"token {first}")
        parts.append(np.broadcast_to(position + np.arange(first - start), (3, first - start)))
        position += first - start
        row_of, column_of = np.divmod(np.arange(rows * columns), columns)
        parts.append(position + np.stack([np.zeros_like(row_of), row_of, column_of]))
        position += max(rows, columns)
        start = first + rows * columns
    rest = len(ids) - start
    parts.append(np.broadcast_to(position + np.arange(rest), (3, rest)))
    return np.concatenate(parts, axis=1).astype(np.int32), position + rest
