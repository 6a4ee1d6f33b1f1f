"""The backbone of a policy, and its stages on the device, each compiled on its own.

Stages are called one after the other and nothing waits between them. Each takes only the parameters that it needs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.stack import first_layers
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl import model
from rdt2_jax.qwen2_5_vl import text as text_model
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, TextConfig
from rdt2_jax.qwen2_5_vl.generate import Prompt
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.model import ModelInputs, Qwen25VLParams
from rdt2_jax.qwen2_5_vl.text import KeysValues, TextParams


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A vision-language model on one device.

    Attributes:
        config: its shape; as many decoder layers as there are.
        params: parameters with a tree per layer (`model.unstacked`), in floats or with the decoder in eight bits.
        preprocessor: makes batches of images and words.
        compute: how to compute it.

    Raises:
        ConfigError: on construction, where the parts do not fit each other; names everything.
        CheckpointError: the tokenizer is that of another model.
    """

    config: Qwen25VLConfig
    params: Qwen25VLParams
    preprocessor: Preprocessor
    compute: Compute

    def __post_init__(self) -> None:
        self.preprocessor.tokenizer.check(self.config)
        self.preprocessor.processor.check(self.config)
        problems, layers = Problems(), self.params.text.layers
        if self.params.vision is None:
            problems.add("the parameters have no vision tower: load them with vision=True")
        if not isinstance(layers, tuple):
            problems.add("the layers are stacked: take them apart with qwen2_5_vl.model.unstacked")
        elif len(layers) != self.config.text.num_layers:
            problems.add(f"the configuration has {self.config.text.num_layers} layers, the parameters {len(layers)}")
        embedding: Any = self.params.text.embedding
        if not isinstance(embedding, jax.Array) or len(embedding.devices()) != 1:
            problems.add("the parameters are not jax arrays on one device")
        if self.compute.layout is not None:
            problems.add("compute has a mesh: policies run on one device")
        problems.raise_if_any(ConfigError, "the parts of a backbone do not fit each other", where="Backbone")

    @property
    def device(self) -> Any:
        """Where the parameters are."""
        embedding: Any = self.params.text.embedding
        (device,) = embedding.devices()
        return device

    @property
    def embedders(self) -> Qwen25VLParams:
        """Vision tower and embedding, without the decoder."""
        return Qwen25VLParams(self.params.vision, TextParams(self.params.text.embedding, ()))

    def decoder(self, num_layers: int | None = None) -> TextParams:
        """The decoder without its head: all layers with embedding and norm, or the first layers with nothing else."""
        text = self.params.text
        if num_layers is None:
            return dataclasses.replace(text, head=None)
        return TextParams(None, first_layers(text.layers, num_layers))


@functools.partial(jax.jit, static_argnums=(1, 3))
def embed(params: Qwen25VLParams, config: Qwen25VLConfig, inputs: ModelInputs, compute: Compute) -> jax.Array:
    """Stage "vision": (B, length, embed), words and images; see `Backbone.embedders`."""
    return model.embed(params, config, inputs, compute)


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def read_keys_values(
    params: TextParams,
    config: TextConfig,
    embeddings: jax.Array,
    inputs: ModelInputs,
    compute: Compute,
    kv_layers: tuple[int, ...],
) -> tuple[KeysValues, ...]:
    """Stage "prefill" of the flow policies: keys and values of some layers; no final norm, no head.

    Args:
        params: the layers that have to run, in a tuple, see `Backbone.decoder`.
        config: their shape.
        embeddings: (B, length, embed).
        inputs: the batch; its images are not read.
        compute: how to compute it.
        kv_layers: whose keys and values, in this order.
    """
    done = text_model.prefill(params, config, embeddings, inputs.positions, inputs.valid, compute)
    found: Any = done.keys_values
    return tuple(found[i] for i in kv_layers)


@functools.partial(jax.jit, static_argnums=(1, 4))
def read_prompt(
    params: TextParams, config: TextConfig, embeddings: jax.Array, inputs: ModelInputs, compute: Compute
) -> Prompt:
    """Stage "prefill" of VQ: all that is needed to go on; arguments as of `read_keys_values`."""
    done = text_model.prefill(params, config, embeddings, inputs.positions, inputs.valid, compute)
    return Prompt(done.hidden[:, -1], done.keys_values, inputs.valid, inputs.following)


def without_images(inputs: ModelInputs) -> ModelInputs:
    """What the decoder needs of a batch: its images are among the embeddings already."""
    return dataclasses.replace(inputs, patches=None, grid=None)
