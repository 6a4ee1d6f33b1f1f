"""Wrist images out of files, and stand-ins for them."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rdt2_jax.actions.types import IMAGE_SHAPE
from rdt2_jax.errors import DataError

_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""What Pillow turns into RGB without loss of range."""


def read_wrist_image(path: str | Path, *, resize: bool = False) -> tuple[np.ndarray, str | None]:
    """One wrist image from a file that Pillow can open, turned as its EXIF data say, any alpha channel dropped.

    Cropping and scaling of the published system belong to its camera (off-centre, and not of equal scale in both
    directions) and are no business of an image file: an image is expected as the camera's processing left it.

    Args:
        path: the file.
        resize: scale an image of another size to the expected one (bicubic); its proportions are not kept.

    Returns:
        uint8 (384, 384, 3), RGB, and what is to be said about it, if anything.

    Raises:
        DataError: no such file, no image, more than eight bits a channel, or another size without `resize`.
    """
    path = Path(path)
    image = _opened(path)
    height, width = IMAGE_SHAPE[:2]
    if image.size == (width, height):
        return np.asarray(image), None
    found = f"{image.size[0]} x {image.size[1]}"
    if not resize:
        raise DataError(
            "a wrist image of another size",
            where=path,
            expected=f"{width} x {height} pixels, cropped and scaled as for training",
            found=f"{found} pixels",
            fix="crop and scale it as your camera's images were for training; or pass --resize (resize=True) to scale "
            "the whole image, whatever its proportions",
        )
    remark = f"{path}: scaled from {found} to {width} x {height} as a whole; no crop of a camera was applied"
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)), remark


def grey_noise(seed: int, name: str) -> np.ndarray:
    """An image that shows nothing: uint8 (384, 384, 3), the same random grey in all three channels.

    Args:
        seed: 0 or more.
        name: of the camera; different ones see different noise.
    """
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    grey = random.integers(0, 256, (*IMAGE_SHAPE[:2], 1), np.uint8)
    return np.repeat(grey, IMAGE_SHAPE[2], axis=2)


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode not in _EIGHT_BIT_MODES:
                    raise DataError(
                        "not an image of eight bits a channel",
                        where=path,
                        expected="RGB or grey levels 0 to 255",
                        found=f"mode {image.mode}",
                        fix="convert it first, on purpose: how to scale its range is yours to say",
                    )
                return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise DataError("no such image", where=path) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError("not an image that can be read", where=path, found=str(error)) from error
