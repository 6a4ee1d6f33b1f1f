"""Two camera images -> the composite of a sample, as a JPEG file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from rdt2_data.converters.options import ImageOptions
from rdt2_data.problems import SampleError
from rdt2_jax.actions.types import IMAGE_SHAPE

PUBLISHED_CROP_ROWS, PUBLISHED_CROP_COLUMNS = (61, 1057), (224, 1235)
"""What the published system keeps of its 1440 x 1080 camera. Source: the public RDT2 code."""

_PUBLISHED_SIZE = (1080, 1440)
_ASPECT_TOLERANCE = 0.02
"""The published crop (1011 x 996) is 1.5% wider than high."""


def wrist_image(image: np.ndarray, options: ImageOptions, where: str) -> np.ndarray:
    """One camera's image as the model sees it: uint8 RGB (384, 384, 3).

    The image is cropped, then resampled, see `resample`. An image that has the size is passed through unchanged.

    Raises:
        SampleError: "wrong-image" for an array that is no RGB image or is smaller than the crop, "blank-image" for an
            image of a single colour (which is what a missing frame looks like).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        found = f"{image.dtype} {image.shape}"
        raise SampleError("wrong-image", where=where, expected="uint8 (rows, columns, 3)", found=found)
    image = resample(_crop(image, options, where), *IMAGE_SHAPE[:2])
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


def shape_notes(sizes: Mapping[str, int], options: ImageOptions) -> list[str]:
    """What to say about source images of these sizes ("COLUMNSxROWS" -> number): each half of a composite is square."""
    notes = []
    for size in sorted(sizes):
        columns, rows = (int(number) for number in size.split("x"))
        kept = [
            source if limits is None else limits[1] - limits[0]
            for source, limits in ((rows, options.crop_rows), (columns, options.crop_columns))
        ]
        aspect = kept[1] / kept[0]
        uncropped = options.crop_rows is None and options.crop_columns is None
        if uncropped and (rows, columns) == _PUBLISHED_SIZE:
            ranges = (f"{low}:{high}" for low, high in (PUBLISHED_CROP_ROWS, PUBLISHED_CROP_COLUMNS))
            crop = "--crop-rows {} --crop-columns {}".format(*ranges)
            notes.append(f"images of {size} were not cropped; the published system crops its own of this size: {crop}")
        elif abs(aspect - 1) > _ASPECT_TOLERANCE:
            found = f"{kept[1]}x{kept[0]} pixels" + ("" if uncropped else f" of {size}")
            notes.append(f"{found} became a square: the scene is squeezed by a factor of {aspect:.2f}")
    return notes


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


# --------------------------------------------------------------------------------------------- resampling


def resample(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """An image uint8 (h, w, 3) in another size.

    Along an axis that shrinks, each new pixel is the mean of the stretch it covers, with pixels at its ends counted by
    the part of them that is covered; along an axis that grows, it is interpolated linearly between pixel centres. All
    weights are fractions of whole numbers, so the arithmetic is exact, and rounded once (halves up): the same bytes on
    every machine.
    """
    sizes = zip((0, 1), image.shape, (rows, columns), strict=False)
    taps = {axis: _taps(size, new) for axis, size, new in sizes if size != new}
    if not taps:
        return image
    scale = math.prod(denominator for _, _, denominator in taps.values())
    number = np.int32 if 256 * scale < 2**31 else np.int64  # large enough for the sums, and fast
    total = image
    for axis, (index, weight, _) in taps.items():
        total = _weighted(total, index, weight.astype(number), axis)
    return ((total + scale // 2) // scale).astype(np.uint8)


@lru_cache(maxsize=32)
def _taps(size: int, new: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Pixels (new, n) behind each of `new` pixels, their weights (new, n), and what the weights of one sum to."""
    if new < size:
        # In units of 1/new of a source pixel: a new pixel is `size` wide, a source pixel `new`.
        start = np.arange(new) * size
        index = start[:, None] // new + np.arange(-(-size // new) + 1)
        weight = np.minimum(start[:, None] + size, (index + 1) * new) - np.maximum(start[:, None], index * new)
        return index.clip(0, size - 1), weight.clip(0), size
    # In units of 1/(2 new) of a source pixel, from the centre of the first one.
    centre = ((2 * np.arange(new) + 1) * size - new).clip(0, (size - 1) * 2 * new)
    first, share = np.divmod(centre, 2 * new)
    index = np.stack([first, np.minimum(first + 1, size - 1)], axis=1)
    return index, np.stack([2 * new - share, share], axis=1), 2 * new


def _weighted(values: np.ndarray, index: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """Sums of rows (axis 0) or columns (axis 1) of (h, w, 3), weighted."""
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    total = np.take(values, index[:, 0], axis=axis) * weight[:, 0].reshape(shape)
    for tap in range(1, index.shape[1]):
        if weight[:, tap].any():
            total += np.take(values, index[:, tap], axis=axis) * weight[:, tap].reshape(shape)
    return total
