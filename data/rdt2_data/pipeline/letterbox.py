"""Images of any shape in a frame of one shape: scaled to fit, centred, black around."""

from __future__ import annotations

import numpy as np


def letterbox(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The image inside a frame, its aspect ratio kept.

    Args:
        image: uint8 (height, width, 3).
        shape: of the frame.

    Returns:
        uint8 array of that shape. Resized with Pillow's bicubic filter, which is antialiased when it shrinks.
    """
    from PIL import Image

    height, width = image.shape[:2]
    scale = min(shape[0] / height, shape[1] / width)
    rows = min(max(1, round(height * scale)), shape[0])
    columns = min(max(1, round(width * scale)), shape[1])
    if (rows, columns) != (height, width):
        image = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC))
    frame = np.zeros(shape, np.uint8)
    top, left = (shape[0] - rows) // 2, (shape[1] - columns) // 2
    frame[top : top + rows, left : left + columns] = image
    return frame
