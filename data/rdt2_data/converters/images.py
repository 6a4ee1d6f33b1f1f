"""Two camera images -> the composite of a sample, as a JPEG file."""

from __future__ import annotations

import numpy as np

from rdt2_data.converters.options import ImageOptions
from rdt2_data.problems import SampleError
from rdt2_jax.actions.types import IMAGE_SHAPE

PUBLISHED_CROP_ROWS, PUBLISHED_CROP_COLUMNS = (61, 1057), (224, 1235)
"""What the published system keeps of its 1440 x 1080 camera. Source: the public RDT2 code."""


def wrist_image(image: np.ndarray, options: ImageOptions, where: str) -> np.ndarray:
    """One camera's image as the model sees it: uint8 RGB (384, 384, 3).

    The image is cropped, then each output pixel is the mean of the area it covers; where the source is smaller than
    the output in either direction, pixels are interpolated (bilinear) instead. An image that has the size is passed
    through unchanged.

    Raises:
        SampleError: "wrong-image" for an array that is no RGB image or is smaller than the crop, "blank-image" for an
            image of a single colour (which is what a missing frame looks like).
    """
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        found = f"{image.dtype} {image.shape}"
        raise SampleError("wrong-image", where=where, expected="uint8 (rows, columns, 3)", found=found)
    image = _crop(image, options, where)
    height, width, _ = IMAGE_SHAPE
    if image.shape != IMAGE_SHAPE:
        smaller = image.shape[0] < height or image.shape[1] < width
        method = Image.Resampling.BILINEAR if smaller else Image.Resampling.BOX
        image = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), method))
    # A few pixels tell nearly every image from a blank one; only where they agree are all of them compared.
    if (image[::32, ::32] == image[0, 0]).all() and (image == image[0, 0]).all():
        raise SampleError("blank-image", where=where, found=f"every pixel is {image[0, 0].tolist()}")
    return image


def composite_jpeg(left: np.ndarray, right: np.ndarray, quality: int) -> bytes:
    """Left wrist | right wrist, each uint8 (384, 384, 3), as a JPEG file with 4:2:0 colours.

    The same images and quality give the same bytes with the same version of simplejpeg.
    """
    import simplejpeg

    composite = np.ascontiguousarray(np.concatenate([left, right], axis=1))
    return simplejpeg.encode_jpeg(composite, quality, "RGB", "420")


def _crop(image: np.ndarray, options: ImageOptions, where: str) -> np.ndarray:
    for axis, limits in enumerate((options.crop_rows, options.crop_columns)):
        if limits is None:
            continue
        if limits[1] > image.shape[axis]:
            name = ("rows", "columns")[axis]
            expected, found = f"at least {limits[1]} {name} for the crop", f"{image.shape[axis]}"
            raise SampleError("wrong-image", where=where, expected=expected, found=found)
        image = image[slice(*limits)] if axis == 0 else image[:, slice(*limits)]
    return image
