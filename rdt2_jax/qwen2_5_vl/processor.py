"""From a camera's pixels to the patches that the vision tower reads.

Resizing happens on the host, with Pillow's bicubic filter: the published weights were trained on it, and other
libraries' filters differ from it by several grey levels. What follows (`patchify`) is arithmetic on numpy or jax arrays
alike, so that a resized image can travel to a device as uint8, an eighth of the bytes, and become patches inside jit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from rdt2_jax.actions.arrays import Array, host_array, namespace
from rdt2_jax.actions.types import IMAGE_SHAPE
from rdt2_jax.config import FrozenConfig, PositiveInt, parse_config
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.grid import Grid

PROCESSOR_FILE = "preprocessor_config.json"

COMBINED_FILE = "processor_config.json"
"""Where transformers 5.x puts the same, under `image_processor`, when it saves a whole processor."""

MAX_ASPECT_RATIO = 200
"""Longer side over shorter side; images beyond it are refused, as in the published processor."""

PositiveFloat = Annotated[float, Field(gt=0.0)]


class ProcessorConfig(FrozenConfig):
    """How images become patches. Hashable: a static argument of jit.

    Attributes:
        patch_size: pixels along a patch's side.
        temporal_patch_size: frames in a patch; a still image is repeated.
        merge_size: patches along the side of the square that becomes one token.
        min_pixels, max_pixels: bounds of height x width after resizing.
        mean, std: of red, green and blue in the training images, on the scale that `rescale` gives.
        rescale: factor from grey levels 0..255 to that scale.
    """

    patch_size: PositiveInt
    temporal_patch_size: PositiveInt
    merge_size: PositiveInt
    min_pixels: PositiveInt
    max_pixels: PositiveInt
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    rescale: PositiveFloat = 1 / 255

    @property
    def side_multiple(self) -> int:
        """Height and width in pixels are multiples of this, so that patches merge without rest."""
        return self.patch_size * self.merge_size

    @model_validator(mode="after")
    def _consistent(self) -> ProcessorConfig:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")
        if self.side_multiple**2 > self.max_pixels:
            raise ValueError(
                f"max_pixels {self.max_pixels} has no room for one token of {self.side_multiple} x {self.side_multiple}"
            )
        return self

    def check(self, model: Qwen25VLConfig) -> None:
        """Verifies that a model reads patches of this shape.

        Raises:
            ConfigError: names every size that differs.
        """
        vision, problems = model.vision, Problems()
        for name, ours, theirs in (
            ("patch_size", self.patch_size, vision.patch_size),
            ("temporal_patch_size", self.temporal_patch_size, vision.temporal_patch_size),
            ("merge_size", self.merge_size, vision.spatial_merge_size),
            ("channels", len(self.mean), vision.in_channels),
        ):
            if ours != theirs:
                problems.add(f"{name}: the processor has {ours}, the model {theirs}")
        problems.raise_if_any(ConfigError, "the processor does not belong to the model")


PUBLISHED = ProcessorConfig(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=56 * 56,
    max_pixels=14 * 14 * 4 * 16384,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
"""What the published Qwen2.5-VL checkpoints have in their `preprocessor_config.json`; for models made from scratch."""


@dataclass(frozen=True, eq=False)
class Patches:
    """One image as the vision tower reads it.

    Attributes:
        values: float32 (patches, channels x frames x patch_size x patch_size), in merge-block order.
        grid: patches along time, height and width.
    """

    values: np.ndarray
    grid: Grid


def read_processor_config(path: str | Path) -> ProcessorConfig:
    """Reads a published `preprocessor_config.json`, or that of a folder (there also `processor_config.json`).

    Raises:
        ConfigError: there is no such file, it is not JSON, lacks a field, or asks for something this port does not do.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        names = (PROCESSOR_FILE, COMBINED_FILE)
        file = next((path / name for name in names if (path / name).is_file()), path / PROCESSOR_FILE)
    try:
        published = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            "an image processor needs its preprocessor_config.json",
            where=file,
            fix="copy it from where the weights came from",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("a file that cannot be read as JSON", where=file, found=str(error)) from error
    if not isinstance(published, Mapping):
        raise ConfigError("a configuration must be a mapping", where=file, found=type(published).__name__)
    return from_published(published, where=str(file))


def from_published(published: Mapping[str, Any], where: str = PROCESSOR_FILE) -> ProcessorConfig:
    """The configuration that a published file describes, in the spelling of transformers 4.x or 5.x.

    4.x names the bounds `min_pixels` and `max_pixels`, 5.x `size: {shortest_edge, longest_edge}` (in pixels all the
    same). Where a file has both, the former count, as they do there. `rescale_factor` may be missing and is then 1/255.

    Raises:
        ConfigError: a field is missing or wrong, or the file asks for something this port does not do.
    """
    inner = published.get("image_processor")
    fields = inner if isinstance(inner, Mapping) else published
    for key, only in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
        found = fields.get(key)
        if found is not None and found != only:
            raise ConfigError("this port does not do that", where=f"{where}: {key}", expected=only, found=found)
    size = fields.get("size")
    edges = size if isinstance(size, Mapping) else {}
    values = {
        "patch_size": fields.get("patch_size"),
        "temporal_patch_size": fields.get("temporal_patch_size"),
        "merge_size": fields.get("merge_size"),
        "min_pixels": next((v for v in (fields.get("min_pixels"), edges.get("shortest_edge")) if v is not None), None),
        "max_pixels": next((v for v in (fields.get("max_pixels"), edges.get("longest_edge")) if v is not None), None),
        "mean": fields.get("image_mean"),
        "std": fields.get("image_std"),
        "rescale": fields.get("rescale_factor"),
    }
    return parse_config(ProcessorConfig, {k: v for k, v in values.items() if v is not None}, where=where)


def to_published(config: ProcessorConfig) -> dict[str, Any]:
    """The content of a `preprocessor_config.json` that transformers 4.x and 5.x read, and `from_published` too."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": config.rescale,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.merge_size,
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "size": {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
    }


def smart_resize(height: int, width: int, config: ProcessorConfig) -> tuple[int, int]:
    """The size in pixels, (height, width), to which an image is brought: multiples of `side_multiple`.

    Each side goes to the nearest multiple (halves to the even one). Only if the area then leaves [min_pixels,
    max_pixels] is the image scaled to the bound, its sides rounded outwards from too small and inwards from too large;
    a very elongated image may still end above max_pixels, since no side falls below one multiple. The published rule.

    Raises:
        DataError: a side below 1, or an aspect ratio beyond 200.
    """
    if min(height, width) < 1:
        raise DataError("an image without pixels", expected="height and width of 1 or more", found=(height, width))
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise DataError(
            "an image too elongated for the model",
            expected=f"a longer side of at most {MAX_ASPECT_RATIO} times the shorter",
            found=f"{height} x {width}",
            fix="crop or pad it first",
        )
    multiple, area = config.side_multiple, height * width
    sides = [multiple * round(side / multiple) for side in (height, width)]
    # The operations below are in the published order: another one would round some sides differently.
    if math.prod(sides) > config.max_pixels:
        shrink = math.sqrt(area / config.max_pixels)
        sides = [multiple * max(1, math.floor(side / shrink / multiple)) for side in (height, width)]
    elif math.prod(sides) < config.min_pixels:
        grow = math.sqrt(config.min_pixels / area)
        sides = [multiple * math.ceil(side * grow / multiple) for side in (height, width)]
    return sides[0], sides[1]


def resize(image: Array, config: ProcessorConfig) -> np.ndarray:
    """Brings an image to the size that `smart_resize` names, on the host.

    Args:
        image: uint8 (height, width, 3), RGB.
        config: patch sizes and bounds.

    Returns:
        uint8 (new height, new width, 3); a view of the image where its size fits already.

    Raises:
        DataError: not such an image, no pixels, or too elongated.
    """
    pixels = host_array(image, "an image")
    _require_pixels(pixels)
    if pixels.ndim != 3:
        raise DataError("images are resized one by one", expected="(height, width, 3)", found=pixels.shape)
    height, width = smart_resize(pixels.shape[0], pixels.shape[1], config)
    if pixels.shape[:2] == (height, width):
        return pixels
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def patchify(pixels: Array, config: ProcessorConfig) -> tuple[Array, Grid]:
    """Normalises resized images and cuts them into patches; numpy or jax, also inside jit with a static config.

    Patches come in merge-block order: the squares of merge_size x merge_size patches row by row, and within a square
    its patches row by row, so that consecutive patches become one token. The numbers of a patch are ordered channel,
    frame, row, column; all frames of a still image are the same.

    Args:
        pixels: uint8 (..., height, width, 3), RGB, sides multiples of `config.side_multiple`.
        config: patch sizes, mean and deviation.

    Returns:
        float32 (..., patches, 3 x frames x patch_size x patch_size), and the grid (1, rows, columns) of one image.

    Raises:
        DataError: another type or shape.
    """
    _require_pixels(pixels)
    *batch, height, width, channels = pixels.shape
    if height % config.side_multiple or width % config.side_multiple:
        raise DataError(
            "an image that does not divide into merged patches",
            expected=f"height and width that are multiples of {config.side_multiple}",
            found=f"{height} x {width}",
            fix="resize() it first",
        )
    xp = namespace(pixels)
    patch, merge = config.patch_size, config.merge_size
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(*batch, rows // merge, merge, patch, columns // merge, merge, patch, channels)
    # (block row, merge row, y, block column, merge column, x, channel) -> (block row, block column, merge row,
    # merge column, channel, y, x); still bytes, so that little is moved
    axes = [len(batch) + axis for axis in (0, 3, 1, 4, 6, 2, 5)]
    stacked = xp.transpose(blocks, (*range(len(batch)), *axes)).reshape(*batch, rows * columns, channels, 1, patch**2)
    mean, std = (xp.asarray(values, dtype=xp.float32)[:, None, None] for values in (config.mean, config.std))
    normalized = (stacked.astype(xp.float32) * xp.float32(config.rescale) - mean) / std
    shape = (*batch, rows * columns, channels, config.temporal_patch_size, patch**2)
    return xp.broadcast_to(normalized, shape).reshape(*batch, rows * columns, -1), (1, rows, columns)


def process(image: Array, config: ProcessorConfig) -> Patches:
    """Resizes an image and cuts it into patches, on the host.

    Args:
        image: uint8 (height, width, 3), RGB.
        config: the processor.

    Raises:
        DataError: not such an image, no pixels, or too elongated.
    """
    values, grid = patchify(resize(image, config), config)
    return Patches(values, grid)


def composite(left: Array, right: Array) -> Array:
    """The one image that the model sees of both wrists: left wrist on the left, right wrist on the right.

    Mind the order: actions list the right arm first, the picture shows the left wrist first, as published.

    Args:
        left: left wrist camera, uint8 (..., 384, 384, 3), RGB.
        right: right wrist camera, the same shape.

    Returns:
        uint8 (..., 384, 768, 3).

    Raises:
        DataError: another type or shape.
    """
    for image, name in ((left, "left_wrist"), (right, "right_wrist")):
        _require_pixels(image, name)
        if tuple(image.shape[-3:]) != IMAGE_SHAPE:
            raise DataError(
                "a wrist image of another size",
                where=name,
                expected=f"(..., {', '.join(map(str, IMAGE_SHAPE))})",
                found=image.shape,
            )
    if left.shape != right.shape:
        raise DataError("the wrist images do not belong together", expected=left.shape, found=right.shape)
    return namespace(left, right).concatenate([left, right], axis=-2)


def _require_pixels(image: Array, where: str | None = None) -> None:
    """Raises DataError unless the argument is uint8 (..., height, width, 3) with at least one pixel."""
    found = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".rstrip()
    if getattr(image, "dtype", None) != np.uint8:
        raise DataError(
            "not an image of grey levels 0 to 255",
            where=where,
            expected="uint8 (..., height, width, 3)",
            found=found,
            fix="convert it, e.g. (image * 255).round().astype(np.uint8) for floats in 0..1",
        )
    if image.ndim < 3 or image.shape[-1] != 3:
        raise DataError(
            "not an RGB image",
            where=where,
            expected="uint8 (..., height, width, 3)",
            found=found,
            fix="put channels last, drop the alpha channel, repeat a grey one three times",
        )
    if 0 in image.shape:
        raise DataError("an image without pixels", where=where, expected="height and width of 1 or more", found=found)
