"""JPEG and PNG files come back as RGB, and what is neither is refused by name."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from rdt2_data.converters.encoded_images import decode_image
from rdt2_data.problems import SampleError
from recorded_motion import coded_image, coded_number


def png(mode: str) -> bytes:
    Image.fromarray(coded_image(77)).convert(mode).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def test_colours_and_greys():
    np.testing.assert_array_equal(decode_image(png("RGB"), "x"), coded_image(77))
    grey = np.asarray(Image.fromarray(coded_image(77)).convert("L"))
    np.testing.assert_array_equal(decode_image(png("L"), "x"), np.stack([grey] * 3, axis=-1))
    assert coded_number(decode_image(simplejpeg.encode_jpeg(coded_image(77), 95), "x")) == 77
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(grey[:, :, None]), 95, colorspace="GRAY", colorsubsampling="Gray"
    )
    decoded = decode_image(jpeg, "x")
    assert np.abs(decoded.astype(int) - grey[:, :, None]).max() < 12


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png("RGBA"), "wrong-image"),
        (png("P"), "wrong-image"),
        (b"GIF89a" + bytes(20), "wrong-image"),
        (b"", "wrong-image"),
        (png("RGB")[:60], "corrupt-jpeg"),
        (png("RGB")[:70] + bytes(10) + png("RGB")[80:], "corrupt-jpeg"),
        (simplejpeg.encode_jpeg(coded_image(77), 95)[:300], "corrupt-jpeg"),
        (b"\xff\xd8\xff" + bytes(50), "corrupt-jpeg"),
    ],
)
def test_other_and_damaged_files_are_refused_with_their_place(data, reason):
    with pytest.raises(SampleError, match="row 5 of somewhere") as caught:
        decode_image(data, "row 5 of somewhere")
    assert caught.value.reason == reason
