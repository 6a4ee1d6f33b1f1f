"""A contact sheet of the augmentation: each operation at the end of its published range, and samples of the whole.

`python examples/augmentation_sheet.py` draws docs/augmentation.png from a synthetic pair of wrist images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import click
import jax
import numpy as np
from rdt2_data.augment.config import (
    AffineConfig,
    AugmentConfig,
    BlurConfig,
    BlurWeights,
    ColourConfig,
    JpegConfig,
    NoiseConfig,
    NoiseWeights,
)
from rdt2_data.augment.jpeg import corrupt_jpeg
from rdt2_data.augment.pipeline import augment

from rdt2_jax.config import FrozenConfig
from rdt2_jax.errors import missing_extra
from rdt2_jax.io.files import atomic_write
from rdt2_jax.progress import progress_bar

SIDE_PX = 192
NO_COLOUR = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
LOUD = {"strength": (0.02, 0.02), "per_channel": 1.0}
OFF = {"gaussian": 0.0, "average": 0.0, "median": 0.0, "motion": 0.0}


def parts() -> dict[str, dict[str, FrozenConfig]]:
    """Title -> the parts of the recipe that are on, as strong as the published one allows."""
    colour: dict[str, dict[str, FrozenConfig]] = {
        f"{name}, within {limit:g}": {"colour": ColourConfig(**{**NO_COLOUR, name: limit})}
        for name, limit in (("brightness", 0.3), ("contrast", 0.4), ("saturation", 0.5), ("hue", 0.03))
    }
    silent = {"gaussian": 0.0, "laplace": 0.0, "poisson": 0.0}
    noise: dict[str, dict[str, FrozenConfig]] = {
        f"{kind} noise, 2% of 255": {"noise": NoiseConfig(**LOUD, weights=NoiseWeights(**{**silent, kind: 1.0}))}
        for kind in silent
    }
    blur: dict[str, dict[str, FrozenConfig]] = {
        f"{kind} blur, 5 px": {
            "blur": BlurConfig(
                probability=1.0,
                size_px=(5, 5),
                gaussian_sigma_px=(1.5, 1.5),
                weights=BlurWeights(**{**OFF, kind: 1.0}),
            )
        }
        for kind in OFF
    }
    singles: dict[str, dict[str, FrozenConfig]] = {
        **colour,
        "affine, each wrist image": {"affine": AffineConfig(probability=1.0)},
        **noise,
        **blur,
        "JPEG, quality 50": {"jpeg": JpegConfig(probability=1.0, compression=(50, 50))},
    }
    return singles


def synthetic_composite(side_px: int = SIDE_PX) -> np.ndarray:
    """Two wrist views (side, 2 side, 3) uint8: a table in a round lens, a red, a blue and a green thing, a grid."""
    y, x = np.mgrid[:side_px, :side_px] / side_px
    wrists = []
    for offset in (-0.08, 0.08):
        image = np.stack([0.72 - 0.2 * y, 0.62 - 0.15 * y, 0.5 - 0.1 * x], -1)
        lines = ((x * 8) % 1 < 0.06) | ((y * 8) % 1 < 0.06)
        image[lines] *= 0.75
        image[np.hypot(x - 0.4 - offset, y - 0.45) < 0.12] = (0.85, 0.15, 0.12)
        image[(abs(x - 0.68 - offset) < 0.09) & (abs(y - 0.6) < 0.13)] = (0.15, 0.3, 0.8)
        image[np.hypot((x - 0.45 - offset) / 2, y - 0.72) < 0.05] = (0.2, 0.65, 0.25)
        image[np.hypot(x - 0.5, y - 0.5) > 0.49] = 0.0
        wrists.append(image)
    return np.round(255 * np.concatenate(wrists, 1)).astype(np.uint8)


def sheet() -> dict[str, np.ndarray]:
    """Title -> image, in the order in which they are shown."""
    image = synthetic_composite()
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(3, impl="threefry2x32"), 8)))
    shown = {"original": image}
    singles = parts()
    with progress_bar("augmenting", len(singles) + 1, "recipes") as advance:
        for title, on in singles.items():
            config = AugmentConfig.none().model_copy(update=on)
            shown[title] = np.asarray(augment(corrupt_jpeg(image, keys[0], config)[None], keys[:1], config))[0]
            advance(1)
        published = AugmentConfig()
        corrupted = np.stack([corrupt_jpeg(image, key, published) for key in keys[1:7]])
        whole = np.asarray(augment(corrupted, keys[1:7], published))
        shown |= {f"the whole recipe, key {index + 1}": each for index, each in enumerate(whole)}
        advance(1)
    return shown


def plot(shown: dict[str, np.ndarray], path: Path) -> None:
    """Draws the sheet, four in a row."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "view", "the contact sheet") from error
    rows = -(-len(shown) // 4)
    figure = Figure(figsize=(14, 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 4).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (title, image) in zip(axes, shown.items(), strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=10)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "augmentation.png")
    arguments = parser.parse_args()
    plot(sheet(), arguments.out)
    click.echo(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
