"""What a conversion can be told: how images are cut, which frames are taken, how shards are filled.

Everything here is part of the plan that a restarted conversion compares; whatever changes the bytes of the dataset
belongs here, and nothing else (how many processes work on it does not).
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from rdt2_jax.config import FrozenConfig, PositiveInt

NonNegativeFloat = Annotated[float, pydantic.Field(ge=0)]


class Latencies(FrozenConfig):
    """How long after the fact each kind of data was stamped; taken off stamps that are not times of capture already.

    Attributes:
        camera_s: from the middle of the exposure to the image's stamp [s]; none is negative.
        pose_s: from the motion to the pose's stamp [s].
        gripper_s: from the motion to the width's stamp [s].
    """

    camera_s: NonNegativeFloat = 0.0
    pose_s: NonNegativeFloat = 0.0
    gripper_s: NonNegativeFloat = 0.0


class ImageOptions(FrozenConfig):
    """From a camera's image to half of the composite.

    Attributes:
        crop_rows, crop_columns: half-open ranges of the source to keep, None for all. The published system keeps rows
            61:1057 and columns 224:1235 of its 1440 x 1080 camera.
        jpeg_quality: 1 to 100; the colours are stored at half the resolution (4:2:0).
    """

    crop_rows: tuple[int, int] | None = None
    crop_columns: tuple[int, int] | None = None
    jpeg_quality: Annotated[int, pydantic.Field(ge=1, le=100)] = 95

    @pydantic.field_validator("crop_rows", "crop_columns")
    @classmethod
    def _forward(cls, limits: tuple[int, int] | None) -> tuple[int, int] | None:
        if limits is not None and not 0 <= limits[0] < limits[1]:
            raise ValueError("a range must run from a pixel to a later one")
        return limits


class ChunkOptions(FrozenConfig):
    """Which frames become samples. Actions are always 24 frames of 1/30 s.

    Attributes:
        every: take every n-th frame of the reference camera (right_wrist).
        at_end: frames whose last action lies after the end of a track are left out ("drop"), or the last pose and
            width are held ("hold").
        max_gap_s: longest time between two rows of a track inside the window of a chunk [s].
        max_skew_s: longest time between the two images of a composite [s].
    """

    every: PositiveInt = 1
    at_end: Literal["drop", "hold"] = "drop"
    max_gap_s: Annotated[float, pydantic.Field(gt=0)] = 0.1
    max_skew_s: NonNegativeFloat = 0.02


class ConvertOptions(FrozenConfig):
    """Everything that decides what is in the dataset, apart from the source.

    Attributes:
        name: of the dataset, in its configuration and its card.
        samples_per_shard: samples planned for a shard; what turns out to be unreadable is missing from it.
        normalizer_path: written into `dataset.yaml` as it is, None for null.
        strict: the first problem ends the conversion.
    """

    name: Annotated[str, pydantic.Field(min_length=1)] = "dataset"
    samples_per_shard: PositiveInt = 1000
    chunks: ChunkOptions = ChunkOptions()
    images: ImageOptions = ImageOptions()
    normalizer_path: str | None = None
    strict: bool = False
