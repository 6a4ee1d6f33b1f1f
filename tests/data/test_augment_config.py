"""The recipe: published values in code and file, refused values, and what loads without jax."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rdt2_data.augment.config import AugmentConfig

from rdt2_jax.config import load_config
from rdt2_jax.errors import ConfigError


def test_the_file_holds_the_published_recipe():
    config = load_config(AugmentConfig, "data/augment.yaml")
    assert config == AugmentConfig()
    assert (config.colour.brightness, config.colour.contrast, config.colour.saturation) == (0.3, 0.4, 0.5)
    assert (config.colour.hue, config.affine.probability, config.affine.shift) == (0.03, 0.5, 0.02)
    assert (config.affine.rotation_deg, config.affine.scale) == (2.0, (0.98, 1.02))
    assert (config.noise.probability, config.noise.strength, config.noise.per_channel) == (1.0, (0.0, 0.02), 0.5)
    assert (config.blur.probability, config.blur.size_px) == (0.168, (3, 5))
    assert (config.jpeg.probability, config.jpeg.compression) == (0.4, (0, 50))


def test_nothing_is_enabled_in_none():
    config = AugmentConfig.none()
    parts = (config.colour, config.affine, config.noise, config.blur, config.jpeg)
    assert not any(part.enabled for part in parts)
    assert all(part.enabled for part in (AugmentConfig().colour, AugmentConfig().affine, AugmentConfig().noise))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("affine.probability=1.5", r"affine\.probability"),
        ("affine.scale=[1.1, 0.9]", "lowest, highest"),
        ("affine.shift=-0.1", r"affine\.shift"),
        ("noise.strength=[0, 0.2]", r"noise\.strength"),
        ("noise.weights={gaussian: 0, laplace: 0, poisson: 0}", "at least one weight"),
        ("blur.size_px=[3, 7]", r"blur\.size_px"),
        ("blur.weights.box=1", "unknown key"),
        ("colour.hue=0.6", r"colour\.hue"),
        ("jpeg.compression=[0, 100]", r"jpeg\.compression"),
        ("jpeg.quality=3", "unknown key"),
    ],
)
def test_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(AugmentConfig, "data/augment.yaml", [override])


def test_the_host_part_needs_no_jax():
    code = (
        "import sys, rdt2_data.augment.jpeg, rdt2_data.augment.config; "
        "print([m for m in ('jax', 'flax', 'torch', 'scipy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
