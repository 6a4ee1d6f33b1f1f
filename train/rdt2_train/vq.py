"""Stage 1, RDT2-VQ: the backbone learns to answer an instruction with the tokens of a chunk.

The loss is the cross-entropy of the supervised ids, from the `<|im_start|>` of the answer on; the output projection is
computed at these positions alone. Trainable is everything, or adapters of the decoder (over weights in floats or in
eight bits). Shards without tokens are encoded by the frozen action tokenizer inside the step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import model_validator
from rdt2_data.augment.config import AugmentConfig

from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer, load_tokenizer
from rdt2_jax.action_tokenizer.tokenizer import encode
from rdt2_jax.config import PositiveInt
from rdt2_jax.layers.compute import Compute
from rdt2_jax.lora import LoraConfig, adapter_specs, attach
from rdt2_jax.params import PyTree
from rdt2_jax.policy.vq import check_tokenizer
from rdt2_jax.qwen2_5_vl.checkpoint import load_params
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.int8 import int8_weights, load_quantized
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams, param_specs, prefill
from rdt2_jax.qwen2_5_vl.processor import ProcessorConfig
from rdt2_jax.qwen2_5_vl.text import logits
from rdt2_train.assemble import begin, image_grid, new_params, on_all_devices, open_stream
from rdt2_train.configs import RunConfig
from rdt2_train.examples import Examples, model_inputs, with_action_ids
from rdt2_train.flops import vq_flops
from rdt2_train.loop import Run
from rdt2_train.optimizer import make_optimizer
from rdt2_train.task import Outcome, Sum, Task


class VqConfig(RunConfig):
    """Stage 1.

    Attributes:
        adapters: train adapters of the decoder; None: all parameters.
        int8: adapters over weights in eight bits.
        tokenizer: folder of the action tokenizer, for shards without tokens and for the evaluation.
        head_chunk: supervised positions of a row whose logits are computed at a time.
    """

    adapters: LoraConfig | None = None
    int8: bool = False
    tokenizer: str | None = None
    head_chunk: PositiveInt = 16

    @model_validator(mode="after")
    def _integers_need_adapters(self) -> VqConfig:
        if self.int8 and self.adapters is None:
            raise ValueError("int8 weights cannot be trained: give adapters")
        return self


@struct.dataclass
class VqFrozen:
    """What the stage reads and does not change.

    Attributes:
        backbone: parameters that adapters adapt; None where all are trained.
        tokenizer: parameters of the action tokenizer; None where all samples carry their tokens.
    """

    backbone: Qwen25VLParams | None
    tokenizer: Any = None


def vq_task(
    config: Qwen25VLConfig,
    processor: ProcessorConfig,
    vocabulary_size: int,
    compute: Compute,
    *,
    adapters: LoraConfig | None = None,
    augmentation: AugmentConfig | None = None,
    tokenizer: LoadedTokenizer | None = None,
    head_chunk: int = 8,
) -> Task:
    """The stage as a task.

    Args:
        config, processor: of the backbone.
        vocabulary_size: action ids count down from it.
        compute: how the backbone is computed.
        adapters: train adapters; None: all parameters.
        augmentation: of the images; None: none.
        tokenizer: encodes chunks of samples without tokens. Its parameters are taken from `VqFrozen`.
        head_chunk: supervised positions of a row whose logits are computed at a time.
    """
    specs = param_specs(config)
    trainable = specs if adapters is None else adapter_specs(specs, int8_weights(specs), adapters)

    def loss(params: PyTree, frozen: VqFrozen, carried: PyTree, batch: Examples, key: jax.Array) -> Outcome:
        backbone: Any = params
        if adapters is not None:
            backbone = attach(frozen.backbone, params, adapters, key if adapters.dropout else None)
        if tokenizer is not None:
            tokens = encode(frozen.tokenizer, tokenizer.config, tokenizer.normalize(batch.action))
            batch = with_action_ids(batch, tokens, vocabulary_size)
        inputs = model_inputs(batch, processor, augmentation)
        hidden = prefill(backbone, config, inputs, compute).hidden
        return _cross_entropy(backbone, config, hidden, batch, compute, head_chunk)

    return Task("vq", trainable, loss)


def _cross_entropy(
    backbone: Qwen25VLParams, config: Qwen25VLConfig, hidden: jax.Array, batch: Examples, compute: Compute, chunk: int
) -> Outcome:
    """Of the ids at the supervised columns, each predicted from the column before it."""
    count = batch.targets.shape[1]
    pad = -count % chunk
    columns = jnp.pad(batch.targets, ((0, 0), (0, pad)))
    weights = jnp.pad(batch.target_weight, ((0, 0), (0, pad)))
    before = jnp.take_along_axis(hidden, jnp.maximum(columns - 1, 0)[:, :, None], axis=1)
    ids = jnp.take_along_axis(batch.input_ids, columns, axis=1)

    @jax.checkpoint
    def part(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, wanted, weight = rows
        scores = logits(backbone.text, config.text, states, compute=compute)
        chosen = jnp.take_along_axis(scores, wanted[:, :, None], axis=-1)[..., 0]
        surprise = jax.nn.logsumexp(scores, axis=-1) - chosen
        right = jnp.argmax(scores, axis=-1) == wanted
        return jnp.sum(surprise * weight), jnp.sum(right * weight)

    def in_parts(x: jax.Array) -> jax.Array:
        parted = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        return jnp.moveaxis(parted, 1, 0)

    surprises, rights = jax.lax.map(part, (in_parts(before), in_parts(ids), in_parts(weights)))
    weight = jnp.sum(batch.target_weight)
    return Outcome(Sum(jnp.sum(surprises), weight), {"token_accuracy": Sum(jnp.sum(rights), weight)})


def vq_run(config: VqConfig) -> Run:
    """The stage as a run: data opened, models read.

    Raises:
        ConfigError, CheckpointError, DataError, ShardingError: parts that are missing or do not fit each other.
    """
    layout = config.mesh.layout()
    compute = config.compute.compute(layout)
    preprocessor = Preprocessor.from_folder(config.model)
    model, pieces = preprocessor.config, preprocessor.tokenizer.num_pieces
    codec = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    if codec is not None:
        check_tokenizer(codec.config, preprocessor.tokenizer, model.text)
    task = vq_task(
        model,
        preprocessor.processor,
        pieces,
        compute,
        adapters=config.adapters,
        augmentation=config.data.augment,
        tokenizer=codec,
        head_chunk=config.head_chunk,
    )
    batches = open_stream(config, preprocessor, with_answers=True)
    adapters = config.adapters
    dtype = jnp.float32 if adapters is None else compute.dtype
    if config.int8:
        backbone = load_quantized(config.model, dtype=dtype, layout=layout).params
    else:
        backbone = load_params(config.model, dtype=dtype, shardings=lambda specs: layout.shardings(specs)[0]).params
    codec_params = None if codec is None else on_all_devices(codec.params, layout)
    trainable = backbone if adapters is None else new_params(task.specs, config, layout)
    return Run(
        task=task,
        optimizer=make_optimizer(config.steps, task.specs),
        layout=layout,
        frozen=VqFrozen(None if adapters is None else backbone, codec_params),
        initial=lambda: begin(task, config, layout, trainable),
        batches=batches,
        batch_size=config.batch_size,
        tokens=config.data.text_length,
        sample_flops=vq_flops(
            model,
            config.data.text_length,
            config.data.max_supervised,
            image_grid(preprocessor.processor),
            trained="full" if adapters is None else "lora",
            lora_rank=1 if adapters is None else adapters.rank,
            vision_trained=adapters is None,
            remat=config.compute.remat,
            head_recomputed=True,
        ),
    )
