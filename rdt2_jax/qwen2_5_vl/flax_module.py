"""The model as an `nnx.Module`: what Flax users expect to hold, over the same pure functions.

Every parameter is an `nnx.Param` whose path is its dotted name (`text.layers.mlp.gate.weight`), so that `nnx.split`,
`nnx.state`, `nnx.jit`, `nnx.grad` and optimizers find it. Configuration, choices of computation and preprocessor are
static. Whoever trains on a mesh is better served by the functions themselves.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rdt2_jax.action_tokenizer.vocabulary import parse_generation
from rdt2_jax.errors import CheckpointError, ConfigError
from rdt2_jax.host_arrays import host_value
from rdt2_jax.layers.compute import Compute, default_compute
from rdt2_jax.params import PyTree, initialize, named_leaves
from rdt2_jax.qwen2_5_vl import model as functions
from rdt2_jax.qwen2_5_vl.answers import ActionAnswers, Answers, texts_of
from rdt2_jax.qwen2_5_vl.checkpoint import load_params, write_published
from rdt2_jax.qwen2_5_vl.config import CONFIG_FILE, Qwen25VLConfig, to_published
from rdt2_jax.qwen2_5_vl.folder import small_files
from rdt2_jax.qwen2_5_vl.generate import action_ids, generate_jit
from rdt2_jax.qwen2_5_vl.inputs import Content, Preprocessor, check_inputs
from rdt2_jax.qwen2_5_vl.int8 import load_quantized
from rdt2_jax.qwen2_5_vl.model import ModelInputs, Qwen25VLParams, param_specs
from rdt2_jax.qwen2_5_vl.processor import PROCESSOR_FILE
from rdt2_jax.qwen2_5_vl.sampling import GREEDY, Sampling
from rdt2_jax.qwen2_5_vl.text import KeysValues
from rdt2_jax.qwen2_5_vl.tokenizer import TOKENIZER_FILE
from rdt2_jax.sharding import Layout
from rdt2_jax.weights.loader import ExportReport
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table

_NUM_TOKENS, _NUM_CODES = 27, 1024
"""Tokens of a chunk and codes of a codebook, as the published action tokenizer has them."""

_MULTIPLE = 64

_forward = jax.jit(functions.forward, static_argnums=(1, 3))
_keys_and_values = jax.jit(
    functions.keys_and_values, static_argnums=(1, 3), static_argnames=("num_layers", "kv_layers")
)


class Int8Values(nnx.Variable):
    """Integers of an `Int8Weight`: no `nnx.Param`, since there is no gradient with respect to them."""


class Qwen25VL(nnx.Module):
    """Qwen2.5-VL.

    Attributes:
        config: its shape; as many decoder layers as there are.
        compute: dtype of activations, attention kernel, rematerialisation, mesh.
        vision, text: the trees of `Qwen25VLParams` with an `nnx.Param` in the place of every array (`Int8Values`
            where the array is of integers); see `params`.
    """

    def __init__(
        self,
        config: Qwen25VLConfig,
        params: Qwen25VLParams,
        *,
        compute: Compute | None = None,
        preprocessor: Preprocessor | None = None,
        folder: Path | None = None,
    ) -> None:
        """Wraps parameters; they are not copied.

        Args:
            config: the shape of `params`.
            params: stacked, or with a tree per layer; in floats, or as `int8.quantize_decoder` gives them.
            compute: how to compute; None: `default_compute()`.
            preprocessor: makes batches of words and images; None: the model takes `ModelInputs` alone.
            folder: where the model is from; `save_pretrained` copies tokenizer and processor from there.
        """
        self.config = config
        self.compute = default_compute() if compute is None else compute
        self._preprocessor = preprocessor
        self._folder = folder
        self.vision = nnx.data(jax.tree.map(_variable, params.vision))
        self.text = nnx.data(jax.tree.map(_variable, params.text))

    @classmethod
    def from_config(
        cls,
        config: Qwen25VLConfig,
        key: jax.Array,
        *,
        dtype: Any = jnp.float32,
        layout: Layout | None = None,
        unstacked: bool | None = None,
        compute: Compute | None = None,
        preprocessor: Preprocessor | None = None,
    ) -> Qwen25VL:
        """A model with random parameters.

        Args:
            config: its shape.
            key: PRNG key.
            dtype: of the parameters.
            layout: mesh and rules; each parameter is computed where it will live. None: the default device.
            unstacked, compute, preprocessor: as in `from_pretrained` and `__init__`.

        Raises:
            ConfigError: `compute` has another layout.
            ShardingError: the mesh does not fit the model.
        """
        compute = _with_layout(compute, layout)
        specs = param_specs(config, dtype)
        params = initialize(specs, key, None if compute.layout is None else compute.layout.shardings(specs)[0])
        return cls(config, _as_asked(params, unstacked, compute), compute=compute, preprocessor=preprocessor)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        dtype: Any = None,
        num_layers: int | None = None,
        vision: bool = True,
        layout: Layout | None = None,
        quantize: bool = False,
        quantize_head: bool = False,
        unstacked: bool | None = None,
        compute: Compute | None = None,
        preprocessor: Preprocessor | None = None,
    ) -> Qwen25VL:
        """A published or converted model.

        Args:
            name_or_folder: a folder, or a hub name; see `checkpoint.load_params`.
            dtype: of the parameters; None keeps the stored one. Activations have that of `compute`.
            num_layers: only the first decoder layers, without head: for `keys_and_values`.
            vision: with the vision tower; without it the model takes words alone.
            layout: mesh and rules over which parameters and activations are laid out; None: one device.
            quantize: the decoder's linear layers in eight bits. They are loaded and rounded in the host's memory, so
                that the device never holds the model in floats.
            quantize_head: with `quantize`, the output projection too.
            unstacked: a tree per layer instead of stacks; None: on one device, where it is faster, but not over a
                mesh.
            compute: how to compute; None: `default_compute(layout=layout)`.
            preprocessor: makes batches of words and images; None: the folder's own, where it has a tokenizer (and, of
                a model without a vision tower, a processor).

        Raises:
            CheckpointError: no such model, one whose files are missing, damaged or contradictory, or one that was
                converted without what is asked for.
            ConfigError: no usable configuration, an impossible `num_layers`, `compute` has another layout, or
                `quantize_head` without `quantize`, or without a head.
            DataError: a weight to quantise with NaN or infinity.
            ShardingError: the mesh does not fit the model.
        """
        compute = _with_layout(compute, layout)
        if quantize_head and not quantize:
            raise ConfigError("the head is quantised with the decoder", where="quantize_head", fix="pass quantize=True")
        mesh, parts = compute.layout, {"num_layers": num_layers, "vision": vision, "dtype": dtype}
        if quantize:
            loaded = load_quantized(name_or_folder, head=quantize_head, layout=mesh, **parts)
        else:
            places = None if mesh is None else lambda specs: mesh.shardings(specs)[0]
            loaded = load_params(name_or_folder, shardings=places, **parts)
        if preprocessor is None and _speaks(loaded.folder, vision):
            preprocessor = Preprocessor.from_folder(loaded.folder)
        params = _as_asked(loaded.params, unstacked, compute)
        return cls(loaded.config, params, compute=compute, preprocessor=preprocessor, folder=loaded.folder)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, max_shard_bytes: int | None = None, overwrite: bool = False
    ) -> ExportReport:
        """Writes a folder as published, which transformers and `from_pretrained` load.

        Beside the weights stand config.json and the small files of the folder that the model is from; a model that
        is from none has no others. The new folder appears only when it is complete; one leaf is copied at a time.

        Args:
            folder: the new folder; missing parents are created.
            max_shard_bytes: largest amount of data in one file; None: a single file.
            overwrite: allow the folder of a published model to be replaced if there is nothing else in it.

        Raises:
            CheckpointError: only part of a model, weights in eight bits, or `folder` exists.
            Rdt2Error: `folder` cannot be created.
        """
        params = self.params
        self._require_whole(params)
        specs = named_leaves(param_specs(self.config))
        leaves = {
            name: jax.ShapeDtypeStruct(spec.shape, _stacked(params, name, _first).dtype) for name, spec in specs.items()
        }
        dtypes = {str(leaf.dtype) for leaf in leaves.values()}
        if self._folder is None:
            files = {CONFIG_FILE: json.dumps(to_published(self.config, min(dtypes)), indent=2).encode()}
        else:
            files = small_files(self._folder, dtypes)
        return write_published(
            folder,
            qwen2_5_vl_table(self.config),
            leaves,
            lambda name: host_value(_stacked(params, name, _stack_on_host)),
            files,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
        )

    @property
    def params(self) -> Qwen25VLParams:
        """The parameters as the functions of `model`, `text` and `generate` take them. Shared, not copied."""
        return Qwen25VLParams(vision=_values(self.vision), text=_values(self.text))

    @property
    def preprocessor(self) -> Preprocessor:
        """Makes batches of words and images.

        Raises:
            ConfigError: the model was made without one.
        """
        if self._preprocessor is None:
            raise ConfigError(
                "this model has no tokenizer",
                expected=f"{TOKENIZER_FILE} and preprocessor_config.json in the model's folder",
                fix="load it from a folder that has them, or pass preprocessor=Preprocessor.from_folder(...)",
            )
        return self._preprocessor

    def __call__(self, inputs: ModelInputs) -> jax.Array:
        """Logits at every position: float32 (B, length, vocab).

        Raises:
            ConfigError: the model was loaded without its head.
        """
        return _forward(self.params, self.config, inputs, self.compute)

    def keys_and_values(
        self, inputs: ModelInputs, num_layers: int | None = None, kv_layers: Sequence[int] | None = None
    ) -> KeysValues | tuple[KeysValues, ...]:
        """What the action expert reads, as `model.keys_and_values`: (B, kv_heads, length, head_dim) of each layer.

        Args:
            inputs: a batch.
            num_layers: run the first layers only; None: all of them.
            kv_layers: which layers' keys and values, in this order; None: those of all layers that are run.

        Raises:
            ConfigError: more layers than there are, part of a stack, or a layer that is not run.
        """
        chosen = None if kv_layers is None else tuple(kv_layers)
        return _keys_and_values(self.params, self.config, inputs, self.compute, num_layers=num_layers, kv_layers=chosen)

    def generate(
        self,
        prompts: ModelInputs | Sequence[Content],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        allowed_ids: Sequence[int] | np.ndarray | jax.Array | None = None,
        sampling: Sampling = GREEDY,
        key: jax.Array | None = None,
        multiple: int = _MULTIPLE,
    ) -> Answers:
        """Continues prompts. On the host, not inside jit.

        Args:
            prompts: what users say, a list with one entry per row, see `Preprocessor.chat`; or a batch that is ready.
            max_new_tokens: tokens at most.
            stop_ids: a row is finished with the first of these; None: `<|im_end|>` and `<|endoftext|>`.
            pad_id: fills a row after its stop token; None: `<|endoftext|>`.
            allowed_ids, sampling, key: as in `generate.generate`.
            multiple: prompts of words are padded to a multiple of so many tokens: every length is compiled anew.

        Raises:
            ConfigError: words, or no `stop_ids` or `pad_id`, for a model without tokenizer; or as
                `generate.generate_jit`.
            DataError: prompts that cannot be used: see `Preprocessor.chat` and `inputs.check_inputs`.
        """
        if stop_ids is None or pad_id is None:
            control = self.preprocessor.tokenizer.control
            stop_ids = (control.im_end, control.endoftext) if stop_ids is None else stop_ids
            pad_id = control.endoftext if pad_id is None else pad_id
        if isinstance(prompts, ModelInputs):
            inputs = prompts
            check_inputs(self.config, inputs)
        else:
            inputs = self.preprocessor.chat(prompts, multiple=multiple)
        generated = generate_jit(
            self.params,
            self.config,
            inputs,
            self.compute,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            pad_id=pad_id,
            allowed_ids=allowed_ids,
            sampling=sampling,
            key=key,
        )
        known = self._preprocessor
        return Answers(generated, None if known is None else texts_of(generated, known.tokenizer))

    def actions(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        *,
        num_tokens: int = _NUM_TOKENS,
        num_codes: int = _NUM_CODES,
        multiple: int = _MULTIPLE,
    ) -> ActionAnswers:
        """The action tokens that follow images and instructions. On the host, not inside jit.

        Greedy, among the action tokens and the end of a chunk alone, until that end comes or nothing well-formed can
        come any more.

        Args:
            images: uint8 (height, width, 3) composites of both wrist cameras, see `processor.composite`; of one size.
            instructions: one per image.
            num_tokens: tokens of a chunk (the action tokenizer's `num_tokens`).
            num_codes: codes of each of its codebooks.
            multiple: as in `generate`.

        Raises:
            ConfigError: the model has no tokenizer, or was loaded without its head.
            DataError: as `Preprocessor.actions`.
        """
        tokenizer = self.preprocessor.tokenizer
        generated = generate_jit(
            self.params,
            self.config,
            self.preprocessor.actions(images, instructions, multiple=multiple),
            self.compute,
            max_new_tokens=num_tokens + 1,
            stop_ids=(tokenizer.control.quad_end,),
            pad_id=tokenizer.control.endoftext,
            allowed_ids=action_ids(tokenizer, num_codes),
        )
        parsed = parse_generation(
            jax.device_get(generated.tokens),
            num_tokens,
            num_codes,
            vocabulary_size=tokenizer.num_pieces,
            chunk_end_id=tokenizer.control.quad_end,
        )
        return ActionAnswers(generated, parsed)

    def _require_whole(self, params: Qwen25VLParams) -> None:
        problem, fix = None, None
        if params.vision is None or params.text.norm is None:
            problem, fix = "a model without vision tower, or without final norm and head", "load all of it"
        elif nnx.state(self, Int8Values):
            problem, fix = "weights in eight bits, which have no published layout", "save it before quantising"
        if problem is not None:
            raise CheckpointError("only a whole model in floats can be saved as published", found=problem, fix=fix)


def _variable(array: jax.Array) -> nnx.Variable:
    return nnx.Param(array) if jnp.issubdtype(array.dtype, jnp.floating) else Int8Values(array)


def _values(tree: PyTree) -> PyTree:
    """Arrays in the place of variables."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda variable: variable.get_value(), tree, is_leaf=is_variable)


def _with_layout(compute: Compute | None, layout: Layout | None) -> Compute:
    if compute is None:
        return default_compute(layout=layout)
    if layout is not None and compute.layout not in (None, layout):
        raise ConfigError(
            "compute has another layout", where="compute.layout", expected=layout.mesh, found=compute.layout
        )
    return compute if layout is None else dataclasses.replace(compute, layout=layout)


def _as_asked(params: Qwen25VLParams, unstacked: bool | None, compute: Compute) -> Qwen25VLParams:
    """Stacked parameters, taken apart where that is wanted."""
    wanted = compute.layout is None if unstacked is None else unstacked
    return functions.unstacked(params, delete=True) if wanted else params


def _speaks(folder: Path, vision: bool) -> bool:
    """Whether a folder should have a preprocessor; a tokenizer without a processor is half of what a model needs to
    see, and all that a model of text alone has."""
    return (folder / TOKENIZER_FILE).is_file() and (vision or (folder / PROCESSOR_FILE).is_file())


def _stacked(tree: Any, name: str, join: Callable[[list[Any]], Any]) -> Any:
    """A leaf by the name that it has in stacked parameters; `join` makes one of what is a tuple here."""
    if isinstance(tree, tuple):
        return join([_stacked(part, name, join) for part in tree])
    if not name:
        return tree
    first, _, rest = name.partition(".")
    return _stacked(getattr(tree, first), rest, join)


def _first(parts: list[Any]) -> Any:
    return parts[0]


def _stack_on_host(parts: list[Any]) -> np.ndarray:
    return np.stack([host_value(part) for part in parts])
