"""A batch: every sample depends on its own key alone, to the bit; order of operations; refused input."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rdt2_data.augment import pipeline
from rdt2_data.augment.affine import affine_motion, move_halves
from rdt2_data.augment.blur import MEDIAN, filter_bank
from rdt2_data.augment.blur import blur as blur_wrists
from rdt2_data.augment.config import AffineConfig, AugmentConfig, BlurConfig, ColourConfig
from rdt2_data.augment.noise import noise_values
from rdt2_data.augment.pipeline import AFFINE, BLUR, NOISE, augment

from rdt2_jax.errors import DataError
from rdt2_jax.sharding import batch_sharding, make_mesh

CONFIG = AugmentConfig(blur=BlurConfig(probability=0.5))
COUNT = 16


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 24, 48, 3), dtype=np.uint8)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0, impl="threefry2x32"), COUNT)))
    return images, keys


@pytest.fixture(scope="module")
def augmented(batch):
    return np.asarray(augment(*batch, CONFIG))


def test_it_does_something_to_every_sample(batch, augmented):
    images, keys = batch
    assert augmented.shape == images.shape
    assert augmented.dtype == np.uint8
    assert all((before != after).mean() > 0.3 for before, after in zip(images, augmented, strict=True))
    again = np.asarray(augment(images, keys[::-1].copy(), CONFIG))
    assert (again != augmented).mean() > 0.5, "another key, another result"


def test_permuted_batch(batch, augmented):
    images, keys = batch
    order = np.random.default_rng(1).permutation(COUNT)
    np.testing.assert_array_equal(augment(images[order], keys[order], CONFIG), augmented[order])


def test_batches_of_one(batch, augmented):
    images, keys = batch
    parts = [augment(images[i : i + 1], keys[i : i + 1], CONFIG) for i in range(COUNT)]
    np.testing.assert_array_equal(np.concatenate(parts), augmented)


def test_within_another_program(batch, augmented):
    def step(images, keys):
        return augment(images, keys, CONFIG).astype(jnp.float32) / 255.0

    np.testing.assert_array_equal(np.round(np.asarray(jax.jit(step)(*batch)) * 255.0), augmented)


def test_eight_devices(batch, augmented, eight_devices):
    mesh = make_mesh({"data": 8}, eight_devices)
    images, keys = (jax.device_put(part, batch_sharding(mesh)) for part in batch)
    result = augment(images, keys, CONFIG)
    np.testing.assert_array_equal(result, augmented)
    assert result.sharding.shard_shape(result.shape) == (2, 24, 48, 3)
    program = pipeline._augment.lower(images, keys, CONFIG).compile().as_text()
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if name in program]


def test_no_augmentation_is_the_identity(batch):
    np.testing.assert_array_equal(augment(*batch, AugmentConfig.none()), batch[0])


def test_zero_strengths_are_the_identity(batch):
    still = AugmentConfig(
        colour=ColourConfig(brightness=0.0, contrast=0.0, saturation=0.0, hue=1e-9),
        affine=AffineConfig(shift=0.0, rotation_deg=1e-6, scale=(1.0, 1.0)),
        noise=AugmentConfig.none().noise,
        blur=BlurConfig(probability=1e-9),
    )
    np.testing.assert_array_equal(augment(*batch, still), batch[0])


def test_halves_never_mix(batch):
    """Without the colour jitter, whose contrast takes the mean of the composite."""
    images, keys = batch
    config = CONFIG.model_copy(update={"colour": AugmentConfig.none().colour})
    painted = images.copy()
    painted[:, :, 24:] = 255
    np.testing.assert_array_equal(augment(painted, keys, config)[:, :, :24], augment(images, keys, config)[:, :, :24])


@pytest.mark.parametrize("order", list(itertools.permutations((AFFINE, NOISE, BLUR))))
def test_order(batch, order):
    image = jnp.asarray(batch[0][0], jnp.float32).reshape(24, 2, 24, 3).transpose(1, 3, 0, 2)
    drawn = pipeline.draw_sample(jnp.asarray(batch[1][0]), CONFIG, 24, 24)
    motion = affine_motion(np.array([[3, 1], [-2, 2]]), np.array([0.1, -0.2]), np.array([1.1, 0.9]))
    median = jnp.int32(np.flatnonzero(filter_bank(CONFIG.blur).kind == MEDIAN)[0])
    strong = drawn.noise._replace(strength=jnp.int32(1024))
    drawn = drawn._replace(affine=motion, blur=median, noise=strong, order=jnp.array(order, jnp.int32))
    steps = {
        AFFINE: lambda image: move_halves(image, motion),
        NOISE: lambda image: pipeline.on_grid(image + noise_values(strong, 24, 24, CONFIG.noise)),
        BLUR: lambda image: blur_wrists(image, median, CONFIG.blur),
    }
    expected = image
    for operation in order:
        expected = steps[operation](expected)
    np.testing.assert_array_equal(ordered(image, drawn), expected)


ordered = jax.jit(lambda image, drawn: pipeline._in_order(image, drawn, CONFIG))


def test_orders_are_equally_likely():
    keys = jax.random.key_data(jax.random.split(jax.random.key(5), 3000))
    orders = jax.jit(jax.vmap(lambda key: pipeline.draw_sample(key, CONFIG, 24, 24).order))(keys)
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5, "chi-square, 5 degrees of freedom, 0.1%"


@pytest.mark.parametrize(
    ("images", "keys", "message"),
    [
        (np.zeros((2, 24, 48, 3), np.float32), np.zeros((2, 2), np.uint32), r"uint8, found \(2, 24, 48, 3\) float32"),
        (np.zeros((24, 48, 3), np.uint8), np.zeros((2, 2), np.uint32), r"found \(24, 48, 3\) uint8"),
        (np.zeros((2, 24, 47, 3), np.uint8), np.zeros((2, 2), np.uint32), "width 47"),
        (np.zeros((2, 2, 48, 3), np.uint8), np.zeros((2, 2), np.uint32), "height 2"),
        (np.zeros((2, 24, 1030, 3), np.uint8), np.zeros((2, 2), np.uint32), "width 1030"),
        (np.zeros((2, 24, 48, 3), np.uint8), np.zeros((3, 2), np.uint32), r"keys: expected \(2, 2\) uint32"),
        (np.zeros((2, 24, 48, 3), np.uint8), np.zeros((2, 2), np.int32), r"found \(2, 2\) int32"),
        ([[1]], None, "found list"),
    ],
)
def test_refused(images, keys, message):
    with pytest.raises(DataError, match=message):
        augment(images, keys, CONFIG)
