"""JPEG artefacts, made on the host by compressing an image and reading it back; needs no jax.

The published recipe does this in a random place among affine transform, noise and blur. Those run on the accelerator,
and a JPEG codec does not: here the artefacts come first, before the colour jitter, while the image is on the host
anyway. In its random place every batch would travel to the host and back in the middle of a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rdt2_data.augment.config import AugmentConfig
from rdt2_jax.errors import DataError, missing_extra
from rdt2_jax.problems import Problems

_STREAM = 0x4A504547
"""Keeps these numbers apart from others that are drawn from the same key: "JPEG" in ASCII."""


def draw_quality(key: np.ndarray, config: AugmentConfig) -> int | None:
    """The JPEG quality for one sample, or None where it is left as it is.

    Args:
        key: (2,) uint32, the key that `augment` uses for the same sample.
        config: the recipe.

    Raises:
        DataError: a key of another shape or type.
    """
    _require_key(key)
    word = int(key[0]) | int(key[1]) << 32
    generator = np.random.Generator(np.random.Philox(key=np.array([word, _STREAM], np.uint64)))
    if generator.random() >= config.jpeg.probability:
        return None
    low, high = config.jpeg.compression
    return 100 - int(generator.integers(low, high + 1))


def corrupt_jpeg(image: np.ndarray, key: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """Compresses a composite image and reads it back, or returns it as it is, as the key says.

    The colours are kept at half resolution (4:2:0), in blocks of 16 pixels: where the wrist images are a multiple of
    16 wide, as they are in composites of 384 x 768, no block holds pixels of both.

    Args:
        image: (384, 768, 3) uint8 RGB, left wrist beside right wrist; other sizes work too.
        key: (2,) uint32, the key that `augment` uses for the same sample; the two draw independent numbers from it.
        config: the recipe; only its JPEG part matters here.

    Returns:
        Like `image`: a new array where it was compressed, else `image` itself.

    Raises:
        DataError: image or key of another shape or type.
        MissingExtraError: simplejpeg is not installed.
    """
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise DataError(
            "an image cannot be compressed",
            where="corrupt_jpeg",
            expected="(H, 2W, 3) uint8",
            found=f"{image.shape} {image.dtype}",
            fix="pass one composite at a time, with whole levels from 0 to 255",
        )
    quality = draw_quality(key, config)
    return image if quality is None else _recompress(image, quality)


def _recompress(image: np.ndarray, quality: int) -> np.ndarray:
    try:
        import simplejpeg
    except ModuleNotFoundError as error:
        raise missing_extra("simplejpeg", "data", "making JPEG artefacts") from error
    # The fast variants of the transform lose a little more than the quality asks for.
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)


def _require_key(key: Any) -> None:
    problems = Problems()
    if not isinstance(key, np.ndarray) or key.shape != (2,) or key.dtype != np.uint32:
        found = f"{key.shape} {key.dtype}" if isinstance(key, np.ndarray) else type(key).__name__
        problems.add(f"expected a numpy array (2,) uint32, found {found}")
    problems.raise_if_any(
        DataError, "the key of a sample cannot be used", where="key", fix="pass one row of the keys of the batch"
    )
