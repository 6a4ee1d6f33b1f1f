"""The augmentation of a batch on the accelerator: colours, then affine, noise and blur in random order.

A sample's augmentation depends on its own key alone. Samples are mapped with `vmap`, so a batch that is split over
devices stays split: nothing is communicated. Under `vmap` a branch is computed for every sample, so the work is
arranged to need few: instead of the 6 orders, or of three rounds in which each of three operations is computed,

    noise?  affine?  noise?  blur?  noise?  affine?  noise?

holds every order. The noise is drawn once and added in one of the four gaps, the blur is computed once, and the affine
transform, the cheapest of the three, twice, with the identity in one place or in both. A loop over samples with real
branches could skip some of this, but it would serialise the batch and gather it from all devices.

Rounds of colour are a loop of four, and noise and spatial operations loop over the two wrist images. The compiler fuses
nothing across a loop: fused, a pixel of one operation was computed again for each neighbour that the next one looks at.

What departs from the published recipe:

- JPEG artefacts are made on the host before everything else (`rdt2_data.augment.jpeg`), so the order is random among
  the other three alone. In its random place it would take every batch from the accelerator to the host and back in
  the middle of a step.
- Between operations levels are kept in sixteenths, and rounded to whole ones at the end. Every operation clips to
  [0, 255], as published: an image has no other values.
- The blur mirrors each wrist image at the middle of the composite instead of reaching across it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_data.augment.affine import MAX_SIDE_PX, AffineDraw, draw_affine, move_halves, unless_still
from rdt2_data.augment.blur import blur, draw_blur
from rdt2_data.augment.colour import ColourDraw, draw_colour, jitter_colour
from rdt2_data.augment.config import AugmentConfig
from rdt2_data.augment.fixed_point import on_grid
from rdt2_data.augment.noise import NoiseDraw, draw_noise, noise_values
from rdt2_jax.errors import DataError
from rdt2_jax.problems import Problems

AFFINE, NOISE, BLUR = range(3)
"""Names of the operations in `SampleDraw.order`."""

_MIN_SIDE_PX = 3
"""A blur reaches two pixels beyond the edge, mirrored."""


class SampleDraw(NamedTuple):
    """Everything that is random about one sample, except the noise itself.

    Attributes:
        colour, affine, noise: what each operation does.
        blur: () int32, entry of the filter bank.
        order: (3,) int32, AFFINE, NOISE and BLUR in the order in which they are done.
    """

    colour: ColourDraw
    affine: AffineDraw
    noise: NoiseDraw
    blur: jax.Array
    order: jax.Array


def augment(images: jax.Array | np.ndarray, keys: jax.Array | np.ndarray, config: AugmentConfig) -> jax.Array:
    """Augments a batch of composite images; jitted, and usable within a jitted function.

    The same image, key and configuration give the same result whatever else is in the batch and however the batch is
    laid out over devices.

    Args:
        images: (B, H, 2W, 3) uint8 RGB, left wrist beside right wrist; H and W from 3 to 512, published: 384.
        keys: (B, 2) uint32, the data of one threefry key a sample, for example
            `jax.random.key_data(jax.random.split(key, B))`. A key must not be used again for another image.
        config: the recipe. Its JPEG part is not done here, see `rdt2_data.augment.jpeg.corrupt_jpeg`.

    Returns:
        (B, H, 2W, 3) uint8.

    Raises:
        DataError: images or keys of another shape or type.
    """
    _require_batch(images, keys)
    return _augment(images, keys, config)


def draw_sample(key: jax.Array, config: AugmentConfig, height: int, width: int) -> SampleDraw:
    """Draws what happens to one sample, two wrist images (height, width), from its key (2,) uint32."""
    wrapped = jax.random.wrap_key_data(key, impl="threefry2x32")
    colour_key, affine_key, noise_key, blur_key, order_key = jax.random.split(wrapped, 5)
    return SampleDraw(
        colour=draw_colour(colour_key, config.colour),
        affine=draw_affine(affine_key, config.affine, height, width),
        noise=draw_noise(noise_key, config.noise),
        blur=draw_blur(blur_key, config.blur),
        order=jax.random.permutation(order_key, 3).astype(jnp.int32),
    )


def apply_draw(image: jax.Array, drawn: SampleDraw, config: AugmentConfig) -> jax.Array:
    """Does to one composite image (H, 2W, 3) uint8 what was drawn; what `config` switches off is not computed."""
    height, width = image.shape[0], image.shape[1] // 2
    wrists = image.astype(jnp.float32).reshape(height, 2, width, 3).transpose(1, 3, 0, 2)
    if config.colour.enabled:
        wrists = jitter_colour(wrists, drawn.colour)
    wrists = _in_order(wrists, drawn, config)
    composite = wrists.transpose(2, 0, 3, 1).reshape(image.shape)
    return jnp.clip(jnp.round(composite), 0.0, 255.0).astype(jnp.uint8)


@partial(jax.jit, static_argnames="config")
def _augment(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> jax.Array:
    height, width = images.shape[1], images.shape[2] // 2

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        return apply_draw(image, draw_sample(key, config, height, width), config)

    return jax.vmap(one)(images, keys)


def _in_order(image: jax.Array, drawn: SampleDraw, config: AugmentConfig) -> jax.Array:
    """Affine, noise and blur of one sample (2, 3, H, W) float32 in the order drawn."""
    rank = jnp.argsort(drawn.order)
    affine_first = rank[AFFINE] < rank[BLUR]
    between = jnp.where(affine_first, 1, 2)
    gap = jnp.where(rank[NOISE] == 0, 0, jnp.where(rank[NOISE] == 1, between, 3))
    height, width = image.shape[-2:]
    noise = noise_values(drawn.noise, height, width, config.noise) if config.noise.enabled else None

    def noisy(image: jax.Array, place: int) -> jax.Array:
        if noise is None:
            return image
        return on_grid(image + jnp.where(gap == place, noise, 0.0))

    def moved(image: jax.Array, moves: jax.Array) -> jax.Array:
        if not config.affine.enabled:
            return image
        return move_halves(image, unless_still(moves, drawn.affine))

    image = moved(noisy(image, 0), affine_first)
    image = noisy(image, 1)
    image = blur(image, drawn.blur, config.blur) if config.blur.enabled else image
    image = moved(noisy(image, 2), ~affine_first)
    return noisy(image, 3)


def _require_batch(images: Any, keys: Any) -> None:
    problems = Problems()
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if shape is None or len(shape) != 4 or shape[-1] != 3 or dtype != jnp.uint8:
        problems.add(f"images: expected (B, H, 2W, 3) uint8, found {_described(images)}")
    elif shape[2] % 2 or not all(_MIN_SIDE_PX <= side <= MAX_SIDE_PX for side in (shape[1], shape[2] // 2)):
        problems.add(
            f"images: expected two wrist images with sides of {_MIN_SIDE_PX} to {MAX_SIDE_PX} pixels beside each "
            f"other, found height {shape[1]} and width {shape[2]}"
        )
    key_shape, key_dtype = getattr(keys, "shape", None), getattr(keys, "dtype", None)
    batch = shape[0] if shape else "B"
    if key_shape is None or key_dtype != jnp.uint32 or tuple(key_shape) != (batch, 2):
        problems.add(f"keys: expected ({batch}, 2) uint32, one key an image, found {_described(keys)}")
    problems.raise_if_any(
        DataError,
        "a batch cannot be augmented",
        where="augment",
        fix="pass composites left | right as uint8, and jax.random.key_data(jax.random.split(key, B))",
    )


def _described(value: Any) -> str:
    if not hasattr(value, "shape"):
        return type(value).__name__
    return f"{tuple(value.shape)} {value.dtype}"
