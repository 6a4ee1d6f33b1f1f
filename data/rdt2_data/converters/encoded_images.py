"""JPEG and PNG files inside recordings, decoded."""

from __future__ import annotations

import io
import warnings

import numpy as np

from rdt2_data.problems import SampleError

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def decode_image(data: bytes, where: str) -> np.ndarray:
    """The image of a JPEG or PNG file, uint8 (height, width, 3), RGB. Grey images get three equal channels.

    Raises:
        SampleError: "corrupt-jpeg" for a file that cannot be decoded, "wrong-image" for one of another kind, with
            more than 8 bits a channel, or with transparency.
    """
    if data.startswith(_JPEG):
        return _decode_jpeg(data, where)
    if data.startswith(_PNG):
        return _decode_png(data, where)
    raise SampleError("wrong-image", what="not a JPEG or PNG file", where=where, found=f"{data[:8]!r} ...")


def _decode_jpeg(data: bytes, where: str) -> np.ndarray:
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        raise SampleError("corrupt-jpeg", where=where, found=str(error)) from error


def _decode_png(data: bytes, where: str) -> np.ndarray:
    from PIL import Image

    try:
        # Pillow warns of images that are too large to be meant, and refuses larger ones: neither is wanted here.
        with warnings.catch_warnings(action="error"), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode not in ("L", "RGB"):
                expected = "8-bit grey or RGB, without transparency"
                raise SampleError("wrong-image", where=where, expected=expected, found=f"a PNG of mode {image.mode}")
            return np.array(image.convert("RGB"))
    except SampleError:
        raise
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise SampleError("corrupt-jpeg", where=where, found=f"{type(error).__name__}: {error}") from error
