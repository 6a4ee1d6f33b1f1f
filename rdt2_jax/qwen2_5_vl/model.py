"""The whole model: images and a prompt to hidden states, keys and values, or logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.stack import first_layers
from rdt2_jax.layers.stack import num_layers as stack_size
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl import text as text_model
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.grid import Grid, check_grid, num_tokens
from rdt2_jax.qwen2_5_vl.text import KeysValues, Prefill, TextParams, text_specs
from rdt2_jax.qwen2_5_vl.vision import VisionParams, encode_images, unstack_vision, vision_specs


@struct.dataclass
class Qwen25VLParams:
    """All parameters.

    Attributes:
        vision: the vision tower; None in a model of text alone.
        text: the decoder.
    """

    vision: VisionParams | None
    text: TextParams


@struct.dataclass
class ModelInputs:
    """A batch of prompts with their images, ready for the device.

    Attributes:
        input_ids: int32 (B, length), padded on the left; one image token per token of an image.
        valid: bool (B, length), False for padding.
        positions: int32 (3, B, length), see `grid.token_positions`.
        following: int32 (B,), the position of the token that would come next.
        patches: float32 (B, images, patches, patch_dim), as many images of one grid in every row; None: no images.
        grid: (1, rows, columns) of every image; static.
    """

    input_ids: Any
    valid: Any
    positions: Any
    following: Any
    patches: Any = None
    grid: Grid | None = struct.field(pytree_node=False, default=None)


def param_specs(
    config: Qwen25VLConfig, dtype: Any = jnp.float32, *, vision: bool = True, with_head: bool = True
) -> Qwen25VLParams:
    """The declaration of all parameters.

    Args:
        config: the model; see `Qwen25VLConfig.with_layers` for one with its first layers alone.
        dtype: of the stored parameters.
        vision: with the vision tower.
        with_head: with final norm and output projection.
    """
    return Qwen25VLParams(
        vision=vision_specs(config.vision, dtype) if vision else None,
        text=text_specs(config.text, dtype, with_head=with_head),
    )


def unstacked(params: Qwen25VLParams, *, delete: bool = False) -> Qwen25VLParams:
    """The same parameters with one tree per layer: for inference on one device. Not for use inside jit.

    Args:
        params: stacked parameters.
        delete: free the stacked arrays one by one, so that at most one of them exists twice.
    """
    return Qwen25VLParams(
        vision=None if params.vision is None else unstack_vision(params.vision, delete=delete),
        text=text_model.unstack_text(params.text, delete=delete),
    )


def with_first_layers(params: Qwen25VLParams, count: int) -> Qwen25VLParams:
    """The first decoder layers alone, without final norm and head. Not for use inside jit (a stack is copied)."""
    layers = first_layers(params.text.layers, count)
    decoder = dataclasses.replace(params.text, layers=layers, norm=None, head=None)
    return dataclasses.replace(params, text=decoder)


def embed(params: Qwen25VLParams, config: Qwen25VLConfig, inputs: ModelInputs, compute: Compute) -> jax.Array:
    """(B, length, hidden_size): embedded tokens with the image tokens in their places.

    Raises:
        DataError: the inputs' shapes do not fit each other; see also `inputs.check_inputs`, which looks at values.
        ConfigError: images for a model without a vision tower.
    """
    _require_shapes(config, inputs)
    embeddings = text_model.embed_tokens(params.text, inputs.input_ids, compute)
    if inputs.patches is None or inputs.grid is None:
        return embeddings
    if params.vision is None:
        raise ConfigError(
            "images for a model without a vision tower", where="patches", fix="load the model with vision=True"
        )
    batch, images = inputs.patches.shape[:2]
    patches = inputs.patches.reshape(batch * images, *inputs.patches.shape[2:])
    tokens = encode_images(params.vision, config.vision, patches, inputs.grid, compute)
    tokens = tokens.reshape(batch, -1, tokens.shape[-1])
    return text_model.insert_images(embeddings, inputs.input_ids == config.image_token_id, tokens)


def _require_shapes(config: Qwen25VLConfig, inputs: ModelInputs) -> None:
    """What can be told about a batch from shapes alone, inside jit too."""
    problems = Problems()
    batch, length = inputs.input_ids.shape
    for name, shape in (("valid", (batch, length)), ("positions", (3, batch, length)), ("following", (batch,))):
        found = jnp.shape(getattr(inputs, name))
        if found != shape:
            problems.add(f"{name} is {found}, with input_ids of {(batch, length)} it must be {shape}")
    if (inputs.patches is None) != (inputs.grid is None):
        problems.add("patches and grid belong together: one of them is missing")
    elif inputs.patches is not None and inputs.grid is not None:
        found = inputs.patches.shape
        if len(found) != 4 or found[0] != batch:
            problems.add(f"patches are {found}, needed are ({batch}, images, patches, patch_dim)")
        elif found[1] * num_tokens(config.vision, check_grid(config.vision, inputs.grid)) > length:
            problems.add(f"{found[1]} images of grid {inputs.grid} have more tokens than a row, {length}")
    problems.raise_if_any(DataError, "a batch whose parts do not fit each other", where="ModelInputs")


def prefill(
    params: Qwen25VLParams,
    config: Qwen25VLConfig,
    inputs: ModelInputs,
    compute: Compute,
    *,
    num_layers: int | None = None,
) -> Prefill:
    """Images and prompt through the vision tower and the decoder.

    Args:
        params: the model.
        config: its shape.
        inputs: a batch.
        compute: how to compute it.
        num_layers: run the first layers only. They must be all that `params` has, unless the layers are a tuple:
            taking part of a stack inside jit would copy it. See `with_first_layers`.

    Raises:
        ConfigError: a stack with another number of layers.
    """
    decoder = params.text
    if num_layers is not None:
        if isinstance(decoder.layers, tuple):
            decoder = dataclasses.replace(decoder, layers=first_layers(decoder.layers, num_layers))
        text_model.require_layers(decoder, num_layers)
    embeddings = embed(params, config, inputs, compute)
    return text_model.prefill(decoder, config.text, embeddings, inputs.positions, inputs.valid, compute)


def keys_and_values(
    params: Qwen25VLParams,
    config: Qwen25VLConfig,
    inputs: ModelInputs,
    compute: Compute,
    *,
    num_layers: int | None = None,
    kv_layers: tuple[int, ...] | None = None,
) -> KeysValues | tuple[KeysValues, ...]:
    """What the action expert reads: keys and values of the first layers; no final norm, no head.

    Args:
        params, config, inputs, compute, num_layers: as in `prefill`.
        kv_layers: which layers' keys and values, in this order; None: those of all layers that are run.

    Returns:
        Of each layer, (B, kv_heads, length, head_dim) each: stacked on a leading axis, or a tuple, as the layers are.

    Raises:
        ConfigError: a stack with another number of layers, or a layer is asked for that is not run.
    """
    found = prefill(params, config, inputs, compute, num_layers=num_layers).keys_values
    if kv_layers is None:
        return found
    available = stack_size(found)
    if not kv_layers or not all(0 <= i < available for i in kv_layers):
        raise ConfigError(
            "keys and values of layers that are not run", expected=f"0 to {available - 1}", found=kv_layers
        )
    if isinstance(found, tuple):
        return tuple(found[i] for i in kv_layers)
    return jax.tree.map(lambda x: x[jnp.asarray(kv_layers)], found)


def forward(params: Qwen25VLParams, config: Qwen25VLConfig, inputs: ModelInputs, compute: Compute) -> jax.Array:
    """Logits at every position: float32 (B, length, vocab). Large; training takes only the positions it needs."""
    hidden = prefill(params, config, inputs, compute).hidden
    return text_model.logits(params.text, config.text, hidden, compute=compute)
