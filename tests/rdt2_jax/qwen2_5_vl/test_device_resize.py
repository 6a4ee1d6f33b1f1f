"""The resizing on the accelerator is that of the host, but for sums at the edge between two bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rdt2_jax.errors import DataError
from rdt2_jax.qwen2_5_vl.device_resize import bicubic_matrix, resize_bicubic


def pillow(image, height, width):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("old", "new"),
    [((384, 768), (392, 756)), ((48, 96), (28, 56)), ((48, 96), (140, 84)), ((31, 57), (56, 28)), ((28, 28), (28, 28))],
)
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_as_on_the_host(old, new, kind):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, *old, 3), np.uint8)
    if kind == "smooth":
        small = images[:, :6, :6]
        images = np.stack([np.asarray(Image.fromarray(i).resize(old[::-1], Image.Resampling.BILINEAR)) for i in small])
    found = np.asarray(jax.jit(lambda x: resize_bicubic(x, *new))(jnp.asarray(images))).astype(int)
    expected = np.stack([pillow(image, *new) for image in images]).astype(int)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 5e-3


def test_rows_are_weights():
    for size, new in ((384, 392), (768, 756), (10, 3), (3, 10), (1, 5)):
        matrix = bicubic_matrix(size, new)
        assert matrix.shape == (new, size)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)


def test_refused():
    for images in (jnp.zeros((4, 4, 3)), jnp.zeros((4, 4), jnp.uint8), jnp.zeros((0, 4, 3), jnp.uint8)):
        with pytest.raises(DataError, match="cannot be resized"):
            resize_bicubic(images, 2, 2)
