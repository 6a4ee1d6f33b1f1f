"""What the augmentation does, how often and how strongly.

Defaults are the published recipe of RDT2 (arXiv 2602.03310 and the public training code). Ranges are pairs
(lowest, highest), from which values are drawn uniformly. Strengths and probabilities of zero switch a part off.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from rdt2_jax.config import FrozenConfig

MAX_BLUR_SIZE_PX = 5
"""Kernels live in windows of 5 x 5 pixels."""

MAX_NOISE_STRENGTH = 0.1
"""The Poisson noise is drawn from a table of cumulative probabilities, whose length grows with the rate."""


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"a range must be [lowest, highest], but {bounds[0]} is above {bounds[1]}")
    return bounds


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
_Size = Annotated[int, Field(ge=3, le=MAX_BLUR_SIZE_PX)]
_Strength = Annotated[float, Field(ge=0.0, le=MAX_NOISE_STRENGTH)]
_Scale = Annotated[float, Field(ge=0.5, le=2.0)]
_Sigma = Annotated[float, Field(ge=0.0, le=3.0)]
_Angle = Annotated[float, Field(ge=-360.0, le=360.0)]
_Direction = Annotated[float, Field(ge=-1.0, le=1.0)]
_Compression = Annotated[int, Field(ge=0, le=99)]


def _some_weight(weights: _Weights) -> _Weights:
    if sum(weights.values()) <= 0.0:
        raise ValueError("at least one weight must be above 0; to switch it off, set its probability to 0")
    return weights


class _Weights(FrozenConfig):
    def values(self) -> tuple[float, ...]:
        """The weights in the order of the fields."""
        return tuple(getattr(self, name) for name in type(self).model_fields)


class NoiseWeights(_Weights):
    """Relative weights with which one kind of noise is chosen; a kind of weight 0 costs nothing."""

    gaussian: Weight = 1.0
    laplace: Weight = 1.0
    poisson: Weight = 1.0


class BlurWeights(_Weights):
    """Relative weights with which one kind of blur is chosen; a kind of weight 0 costs nothing.

    The public code chooses between motion and the rest first, so motion is as likely as the other three together.
    """

    gaussian: Weight = 1.0
    average: Weight = 1.0
    median: Weight = 1.0
    motion: Weight = 3.0


class ColourConfig(FrozenConfig):
    """Colour jitter with the semantics of torchvision's ColorJitter, on the composite of both wrist images.

    Attributes:
        brightness, contrast, saturation: x; the factor is uniform in [1 - x, 1 + x].
        hue: x; the shift is uniform in [-x, x] full turns of the colour circle.
    """

    brightness: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    contrast: Annotated[float, Field(ge=0.0, le=1.0)] = 0.4
    saturation: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.03

    @property
    def enabled(self) -> bool:
        """Whether any colour can change."""
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0.0


class AffineConfig(FrozenConfig):
    """Shift, rotation and scaling of each wrist image on its own.

    Attributes:
        probability: of both wrist images being moved, each in its own way; else neither is.
        shift: x; shifts along both axes are uniform in [-x, x] of the width and height of one wrist image.
        rotation_deg: x; the rotation about the centre is uniform in [-x, x].
        scale: range of the magnification, one value for both axes.
    """

    probability: Probability = 0.5
    shift: Annotated[float, Field(ge=0.0, le=0.5)] = 0.02
    rotation_deg: Annotated[float, Field(ge=0.0, le=180.0)] = 2.0
    scale: Annotated[tuple[_Scale, _Scale], AfterValidator(_ordered)] = (0.98, 1.02)

    @property
    def enabled(self) -> bool:
        """Whether any pixel can move."""
        return self.probability > 0.0 and (self.shift > 0.0 or self.rotation_deg > 0.0 or self.scale != (1.0, 1.0))


class NoiseConfig(FrozenConfig):
    """Additive noise, one value a pixel or one a pixel and channel.

    Attributes:
        probability: of noise at all. The published recipe always adds one of three kinds, with strengths from zero.
        strength: range of the strength, in units of 255. Times 255 it is the standard deviation of Gaussian noise,
            the scale b of Laplace noise (standard deviation sqrt(2) b), the rate of Poisson noise.
        per_channel: probability that the three channels have noise of their own; else they share it.
        weights: of the kinds.
    """

    probability: Probability = 1.0
    strength: Annotated[tuple[_Strength, _Strength], AfterValidator(_ordered)] = (0.0, 0.02)
    per_channel: Probability = 0.5
    weights: Annotated[NoiseWeights, AfterValidator(_some_weight)] = NoiseWeights()

    @property
    def enabled(self) -> bool:
        """Whether any noise can be added."""
        return self.probability > 0.0 and self.strength[1] > 0.0


class BlurConfig(FrozenConfig):
    """One of four blurs, in a window of at most 5 x 5 pixels.

    Attributes:
        probability: of a blur at all.
        size_px: range of the window's side, whole pixels from 3 to 5. Average takes it as it is; median and motion
            need a middle and take the next odd one. Gaussian always fills 5 pixels and has its width from its sigma.
        gaussian_sigma_px: range of the Gaussian's standard deviation.
        motion_angle_deg: range of the direction of motion.
        motion_direction: range of the slope of weights along the motion: 0 is even, -1 and 1 fade to one end.
        weights: of the kinds.
    """

    probability: Probability = 0.168
    size_px: Annotated[tuple[_Size, _Size], AfterValidator(_ordered)] = (3, 5)
    gaussian_sigma_px: Annotated[tuple[_Sigma, _Sigma], AfterValidator(_ordered)] = (0.0, 1.5)
    motion_angle_deg: Annotated[tuple[_Angle, _Angle], AfterValidator(_ordered)] = (0.0, 360.0)
    motion_direction: Annotated[tuple[_Direction, _Direction], AfterValidator(_ordered)] = (-1.0, 1.0)
    weights: Annotated[BlurWeights, AfterValidator(_some_weight)] = BlurWeights()

    @property
    def enabled(self) -> bool:
        """Whether any image can be blurred."""
        return self.probability > 0.0


class JpegConfig(FrozenConfig):
    """JPEG artefacts, made on the host.

    Attributes:
        probability: of compressing at all.
        compression: range of whole numbers c; the JPEG quality is 100 - c.
    """

    probability: Probability = 0.4
    compression: Annotated[tuple[_Compression, _Compression], AfterValidator(_ordered)] = (0, 50)

    @property
    def enabled(self) -> bool:
        """Whether any image can be compressed."""
        return self.probability > 0.0


class AugmentConfig(FrozenConfig):
    """The whole recipe; defaults are the published one, see `configs/data/augment.yaml`."""

    colour: ColourConfig = ColourConfig()
    affine: AffineConfig = AffineConfig()
    noise: NoiseConfig = NoiseConfig()
    blur: BlurConfig = BlurConfig()
    jpeg: JpegConfig = JpegConfig()

    @classmethod
    def none(cls) -> AugmentConfig:
        """Everything switched off: images stay as they are."""
        return cls(
            colour=ColourConfig(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0),
            affine=AffineConfig(probability=0.0),
            noise=NoiseConfig(probability=0.0),
            blur=BlurConfig(probability=0.0),
            jpeg=JpegConfig(probability=0.0),
        )
