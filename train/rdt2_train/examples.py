"""What a training step is given: images as bytes, texts as ids, actions; and how it becomes inputs of the backbone.

Images travel as bytes and are augmented, resized and cut into patches on the device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from rdt2_data.augment.config import AugmentConfig
from rdt2_data.augment.pipeline import augment
from rdt2_data.pipeline.batch import Batch
from rdt2_data.pipeline.text import ACTION_COLUMNS

from rdt2_jax.action_tokenizer.vocabulary import tokens_to_ids
from rdt2_jax.actions.layout import ACTION_DIM, ARM_NAMES, WIDTH, arm_slice
from rdt2_jax.errors import ConfigError
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.device_resize import resize_bicubic
from rdt2_jax.qwen2_5_vl.grid import token_positions
from rdt2_jax.qwen2_5_vl.model import ModelInputs
from rdt2_jax.qwen2_5_vl.processor import ProcessorConfig, patchify, smart_resize

GRIPPER_TOKENS = 3
"""The last of a chunk's 27: both grippers together, one for each latent step."""


@struct.dataclass
class Examples:
    """A batch on the device; every array has the batch first.

    Attributes:
        image: uint8 (B, height, width, 3): composites as in the shards.
        key: uint32 (B, 2), data of a PRNG key for each example.
        input_ids: int32 (B, length), padded on the left.
        mask: bool (B, length), False on padding.
        positions: int32 (B, 3, length).
        following: int32 (B,), the position after the last token.
        targets: int32 (B, S), columns of the ids to be learnt; 0 in places that are not used.
        target_weight: float32 (B, S), 1 for a column that is learnt.
        action: float32 (B, 24, 20), physical units.
        gripper_valid: bool (B, 2), right then left: whether the widths of `action` were measured.
        state: float32 (B, 20).
        weight: float32 (B,), 1 for rows that count (actions; not those that fill a batch).
        has_tokens: bool (B,), whether the action ids among `input_ids` are those of the shard.
    """

    image: Any
    key: Any
    input_ids: Any
    mask: Any
    positions: Any
    following: Any
    targets: Any
    target_weight: Any
    action: Any
    gripper_valid: Any
    state: Any
    weight: Any
    has_tokens: Any


def make_examples(batch: Batch, config: Qwen25VLConfig, processor: ProcessorConfig, max_supervised: int) -> Examples:
    """A batch of the stream as numpy arrays.

    Args:
        batch: with texts encoded.
        config, processor: of the backbone.
        max_supervised: S; ids to be learnt beyond it, which only long conversations have, are left out from the front.

    Raises:
        ConfigError: a stream without an encoder.
    """
    if batch.text is None:
        raise ConfigError(
            "a stage that reads texts needs them as ids", where="TrainingStream", fix="give it an encoder"
        )
    height, width = smart_resize(batch.image.shape[1], batch.image.shape[2], processor)
    grid = (1, height // processor.patch_size, width // processor.patch_size)
    positions, following = token_positions(config, batch.text.input_ids, batch.text.mask, [[grid]] * len(batch))
    supervised = batch.text.supervised & batch.valid[:, None]
    targets, target_weight = supervised_columns(supervised, max_supervised)
    return Examples(
        image=batch.image,
        key=batch.key,
        input_ids=batch.text.input_ids,
        mask=batch.text.mask,
        positions=np.ascontiguousarray(np.moveaxis(positions, 0, 1)),
        following=following,
        targets=targets,
        target_weight=target_weight,
        action=batch.action,
        gripper_valid=batch.gripper_valid,
        state=batch.state,
        weight=(batch.valid & batch.is_action).astype(np.float32),
        has_tokens=batch.has_tokens | ~batch.is_action,
    )


def supervised_columns(supervised: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the last `count` True of every row, int32 (B, count), and float32 weights, 0 where there are fewer."""
    rows = len(supervised)
    columns, weights = np.zeros((rows, count), np.int32), np.zeros((rows, count), np.float32)
    for row in range(rows):
        found = np.flatnonzero(supervised[row])[-count:]
        columns[row, : len(found)], weights[row, : len(found)] = found, 1.0
    return columns, weights


def model_inputs(examples: Examples, processor: ProcessorConfig, augmentation: AugmentConfig | None) -> ModelInputs:
    """Inputs of the backbone, inside jit: images augmented, resized and cut into patches."""
    images = examples.image
    if augmentation is not None:
        images = augment(images, examples.key, augmentation)
    height, width = smart_resize(images.shape[1], images.shape[2], processor)
    patches, grid = patchify(resize_bicubic(images, height, width), processor)
    return ModelInputs(
        input_ids=examples.input_ids,
        valid=examples.mask,
        positions=jnp.moveaxis(examples.positions, 0, 1),
        following=examples.following,
        patches=patches[:, None],
        grid=grid,
    )


def with_action_ids(examples: Examples, tokens: jax.Array, vocabulary_size: int) -> Examples:
    """The action ids of rows that came without tokens put in their places.

    Args:
        examples: see there.
        tokens: int32 (B, 27), of all rows.
        vocabulary_size: ids count down from it, see `action_tokenizer.vocabulary`.

    Gripper tokens of a chunk with a width that was not measured are not learnt.
    """
    ids = tokens_to_ids(tokens, vocabulary_size, vocabulary_size).astype(jnp.int32)
    own = examples.input_ids[:, ACTION_COLUMNS]
    chosen = jnp.where(examples.has_tokens[:, None], own, ids)
    length, count = examples.input_ids.shape[1], GRIPPER_TOKENS
    of_gripper = (examples.targets >= length - 2 - count) & (examples.targets < length - 2)
    unknown = ~(examples.has_tokens | examples.gripper_valid.all(axis=1))
    return dataclasses.replace(
        examples,
        input_ids=jnp.asarray(examples.input_ids).at[:, ACTION_COLUMNS].set(chosen),
        target_weight=jnp.where(unknown[:, None] & of_gripper, 0.0, examples.target_weight),
    )


def flow_weights(examples: Examples) -> jax.Array:
    """Weights of the numbers of every chunk, float32 (B, 1, 20): 0 for rows that do not count and widths that were not
    measured."""
    widths = jnp.asarray([arm_slice(arm).start + WIDTH.start for arm in ARM_NAMES])
    channels = (
        jnp.ones((len(examples.weight), ACTION_DIM)).at[:, widths].set(examples.gripper_valid.astype(jnp.float32))
    )
    return (examples.weight[:, None] * channels)[:, None]


def example_keys(examples: Examples, purpose: int) -> jax.Array:
    """One PRNG key for each example, different for every purpose; a batch divided otherwise draws the same."""
    keys = jax.random.wrap_key_data(examples.key)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, purpose)
