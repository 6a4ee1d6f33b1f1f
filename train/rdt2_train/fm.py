"""Stage 2, RDT2-FM: the action expert learns the flow from noise to actions, reading the backbone's keys and values.

The loss is that of `rdt2_jax.action_expert.flow`. The backbone has the layers that the expert reads and no head; it is
frozen, or adapted, or trained through its keys and values (a published variant of the original).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import model_validator
from rdt2_data.augment.config import AugmentConfig
from rdt2_data.dataset_config import load_dataset

from rdt2_jax.action_expert import flow
from rdt2_jax.action_expert.checkpoint import find_expert, load_expert
from rdt2_jax.action_expert.config import PRESETS, ActionExpertConfig, preset, read_config
from rdt2_jax.action_expert.flow import TimeDistribution
from rdt2_jax.action_expert.model import ActionExpertParams, Condition
from rdt2_jax.action_expert.parameters import param_specs as expert_specs
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.layers.compute import Compute
from rdt2_jax.lora import Adapters, LoraConfig, adapter_specs, attach
from rdt2_jax.qwen2_5_vl.checkpoint import load_params
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.int8 import int8_weights
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams, keys_and_values, param_specs
from rdt2_jax.qwen2_5_vl.processor import ProcessorConfig
from rdt2_jax.sharding import Layout
from rdt2_train.assemble import begin, image_grid, load_normalizer, new_params, open_stream
from rdt2_train.configs import RunConfig
from rdt2_train.examples import Examples, example_keys, flow_weights, model_inputs
from rdt2_train.flops import fm_flops
from rdt2_train.loop import Run
from rdt2_train.optimizer import make_optimizer
from rdt2_train.task import Outcome, Sum, Task

BackboneTraining = Literal["frozen", "adapters", "full"]

NOISE, TIME = 1, 2
"""Purposes of an example's random numbers, see `examples.example_keys`."""


class FmConfig(RunConfig):
    """Stage 2.

    Attributes:
        expert: folder of an action expert to go on with, or a preset ("rdt2", "tiny") to begin anew.
        backbone: what of the backbone is trained.
        adapters: where `backbone` says so.
        normalizer: file; None: that of the dataset.
        time_distribution: of the flow's times.
    """

    expert: str = "rdt2"
    backbone: BackboneTraining = "frozen"
    adapters: LoraConfig | None = None
    normalizer: str | None = None
    time_distribution: TimeDistribution = "logit_normal"

    @model_validator(mode="after")
    def _adapters_where_said(self) -> FmConfig:
        if (self.backbone == "adapters") != (self.adapters is not None):
            raise ValueError("adapters belong to backbone: adapters")
        return self


@struct.dataclass
class FmParams:
    """What is trained.

    Attributes:
        expert: always.
        adapters: of the backbone, or None.
        backbone: all of it, or None.
    """

    expert: ActionExpertParams
    adapters: Adapters | None = None
    backbone: Qwen25VLParams | None = None


@struct.dataclass
class FmFrozen:
    """What the stage reads and does not change.

    Attributes:
        backbone: its first layers without a head, in whatever precision; None where it is trained.
    """

    backbone: Qwen25VLParams | None


def fm_task(
    config: Qwen25VLConfig,
    expert: ActionExpertConfig,
    processor: ProcessorConfig,
    normalizer: LinearNormalizer,
    compute: Compute,
    *,
    backbone: BackboneTraining = "frozen",
    adapters: LoraConfig | None = None,
    augmentation: AugmentConfig | None = None,
    time_distribution: TimeDistribution = "logit_normal",
) -> Task:
    """The stage as a task.

    Args:
        config: of the backbone, with `expert.num_backbone_layers` layers.
        expert: of the action expert.
        processor: of the backbone.
        normalizer: of the actions.
        compute: how both are computed.
        backbone: what of it is trained.
        adapters: where `backbone` says so.
        augmentation: of the images; None: none.
        time_distribution: of the flow's times.
    """
    specs = param_specs(config, with_head=False)
    trainable = FmParams(
        expert_specs(expert),
        adapter_specs(specs, int8_weights(specs), adapters) if backbone == "adapters" and adapters else None,
        specs if backbone == "full" else None,
    )

    def loss(params: FmParams, frozen: FmFrozen, carried: Any, batch: Examples, key: jax.Array) -> Outcome:
        reader: Any = frozen.backbone if params.backbone is None else params.backbone
        if params.adapters is not None and adapters is not None:
            reader = attach(reader, params.adapters, adapters, key if adapters.dropout else None)
        read = read_condition(reader, config, expert, processor, batch, compute, augmentation)
        if backbone == "frozen":
            read = jax.lax.stop_gradient(read)
        actions = normalizer.normalize(batch.action)
        noise, times = draw_noise(batch, expert), draw_times(batch, time_distribution)
        weights = flow_weights(batch)
        mean = flow.loss_at(
            params.expert,
            expert,
            actions,
            noise,
            times,
            read,
            batch.state,
            compute,
            weights=weights,
        )
        weight = jnp.sum(weights)
        return Outcome(Sum(mean * weight, weight), {})

    return Task("fm", trainable, loss)


def read_condition(
    backbone: Qwen25VLParams,
    config: Qwen25VLConfig,
    expert: ActionExpertConfig,
    processor: ProcessorConfig,
    batch: Examples,
    compute: Compute,
    augmentation: AugmentConfig | None,
) -> Condition:
    """What the expert reads of a batch's images and instructions."""
    inputs = model_inputs(batch, processor, augmentation)
    found = keys_and_values(
        backbone,
        config,
        inputs,
        compute,
        num_layers=expert.num_backbone_layers,
        kv_layers=expert.condition_layers,
    )
    return Condition(found, inputs.valid)


def draw_noise(batch: Examples, expert: ActionExpertConfig) -> jax.Array:
    """Standard normal float32 (B, frames, action_dim), each chunk from its example's own key."""
    shape = (expert.chunk_length, expert.action_dim)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(example_keys(batch, NOISE))


def draw_times(batch: Examples, distribution: TimeDistribution) -> jax.Array:
    """Times of the flow, float32 (B,), each from its example's own key."""
    return jax.vmap(lambda key: flow.draw_times(key, 1, distribution)[0])(example_keys(batch, TIME))


def fm_run(config: FmConfig) -> Run:
    """The stage as a run: data opened, models read.

    Raises:
        ConfigError, CheckpointError, DataError, ShardingError: parts that are missing or do not fit each other.
    """
    layout = config.mesh.layout()
    compute = config.compute.compute(layout)
    preprocessor = Preprocessor.from_folder(config.model)
    expert = find_expert_config(config.expert)
    expert.check_backbone(preprocessor.config.text)
    model = first_layers_of(preprocessor.config, expert)
    normalizer = load_normalizer(config.normalizer, load_dataset(config.data.dataset))
    task = fm_task(
        model,
        expert,
        preprocessor.processor,
        normalizer,
        compute,
        backbone=config.backbone,
        adapters=config.adapters,
        augmentation=config.data.augment,
        time_distribution=config.time_distribution,
    )
    batches = open_stream(config, preprocessor, with_answers=False)
    full = config.backbone == "full"
    reader = load_reader(config.model, expert, layout, jnp.float32 if full else compute.dtype)
    specs = task.specs
    params = FmParams(
        expert=begin_expert(config.expert, expert, config, layout),
        adapters=None if specs.adapters is None else new_params(specs.adapters, config, layout),
        backbone=reader if full else None,
    )
    return Run(
        task=task,
        optimizer=make_optimizer(config.steps, task.specs),
        layout=layout,
        frozen=FmFrozen(None if full else reader),
        initial=lambda: begin(task, config, layout, params),
        batches=batches,
        batch_size=config.batch_size,
        tokens=config.data.text_length,
        sample_flops=fm_flops(
            model,
            expert,
            config.data.text_length,
            image_grid(preprocessor.processor),
            backbone_trained={"frozen": "frozen", "adapters": "lora", "full": "full"}[config.backbone],  # type: ignore[arg-type]
            lora_rank=1 if config.adapters is None else config.adapters.rank,
            vision_trained=full,
            remat=config.compute.remat,
        ),
    )


def first_layers_of(config: Qwen25VLConfig, expert: ActionExpertConfig) -> Qwen25VLConfig:
    """The backbone with as many layers as the expert reads."""
    text = config.text.model_copy(update={"num_layers": expert.num_backbone_layers})
    return config.model_copy(update={"text": text})


def find_expert_config(expert: str) -> ActionExpertConfig:
    """Of a preset or a folder."""
    return preset(expert) if expert in PRESETS else read_config(find_expert(expert))


def begin_expert(
    name: str, expert: ActionExpertConfig, config: RunConfig, layout: Layout, dtype: Any = jnp.float32
) -> ActionExpertParams:
    """A folder's parameters, or new ones for a preset."""
    specs = expert_specs(expert)
    if name in PRESETS:
        return new_params(specs, config, layout)
    return load_expert(name, expert, dtype=dtype, shardings=layout.shardings(specs)[0]).params


def load_reader(folder: str, expert: ActionExpertConfig, layout: Layout, dtype: Any) -> Qwen25VLParams:
    """The backbone's first layers, on the mesh."""
    return load_params(
        folder,
        num_layers=expert.num_backbone_layers,
        dtype=dtype,
        shardings=lambda specs: layout.shardings(specs)[0],
    ).params
