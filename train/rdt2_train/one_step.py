"""Stage 3, RDT2-UltraFast: a student learns to make the teacher's whole rollout in one step.

Both objectives are those of `rdt2_jax.action_expert.distill`. The student begins as the teacher; teacher and backbone
are frozen. Consistency distillation has a target network that follows the student.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from rdt2_data.augment.config import AugmentConfig
from rdt2_data.dataset_config import load_dataset

from rdt2_jax.action_expert import distill
from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.distill import DistillConfig
from rdt2_jax.action_expert.model import ActionExpertParams
from rdt2_jax.action_expert.parameters import param_specs as expert_specs
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.layers.compute import Compute
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams
from rdt2_jax.qwen2_5_vl.processor import ProcessorConfig
from rdt2_train.assemble import begin, image_grid, load_normalizer, open_stream
from rdt2_train.configs import RunConfig
from rdt2_train.examples import Examples, example_keys, flow_weights
from rdt2_train.flops import one_step_flops
from rdt2_train.fm import (
    begin_expert,
    draw_noise,
    find_expert_config,
    first_layers_of,
    load_reader,
    read_condition,
)
from rdt2_train.loop import Run
from rdt2_train.optimizer import make_optimizer
from rdt2_train.step import TrainState
from rdt2_train.task import Outcome, Sum, Task

STEP = 3
"""Purpose of an example's random numbers: which step of the rollout consistency looks at."""


class OneStepConfig(RunConfig):
    """Stage 3.

    Attributes:
        teacher: folder of the trained action expert.
        distill: the objective.
        on_data: see `one_step.one_step_task`.
        normalizer: file; None: that of the dataset.
    """

    teacher: str
    distill: DistillConfig = DistillConfig()
    on_data: bool = True
    normalizer: str | None = None


@struct.dataclass
class OneStepFrozen:
    """What the stage reads and does not change.

    Attributes:
        backbone: its first layers without a head.
        teacher: the trained action expert.
    """

    backbone: Qwen25VLParams
    teacher: ActionExpertParams


def one_step_task(
    config: Qwen25VLConfig,
    expert: ActionExpertConfig,
    processor: ProcessorConfig,
    normalizer: LinearNormalizer,
    compute: Compute,
    chosen: DistillConfig,
    *,
    on_data: bool = True,
    augmentation: AugmentConfig | None = None,
) -> Task:
    """The stage as a task; `TrainState.params` is the student, `TrainState.carried` its target network or None.

    Args:
        config, expert, processor, normalizer, compute, augmentation: as of `fm.fm_task`.
        chosen: the objective.
        on_data: consistency looks at points between noise and the batch's actions, at the price of one teacher step;
            otherwise at points of the teacher's own rollout.
    """
    specs = expert_specs(expert)
    consistent = chosen.objective == "consistency"

    def loss(student: Any, frozen: OneStepFrozen, target: Any, batch: Examples, key: jax.Array) -> Outcome:
        read = jax.lax.stop_gradient(
            read_condition(frozen.backbone, config, expert, processor, batch, compute, augmentation)
        )
        noise, weights = draw_noise(batch, expert), flow_weights(batch)
        if consistent:
            mean, report = distill.consistency_loss_at(
                student,
                target,
                frozen.teacher,
                expert,
                chosen,
                noise,
                _draw_steps(batch, chosen.num_steps),
                read,
                batch.state,
                compute,
                actions=normalizer.normalize(batch.action) if on_data else None,
                weights=weights,
            )
        else:
            mean, report = distill.regression_loss_at(
                student, frozen.teacher, expert, chosen, noise, read, batch.state, compute, weights=weights
            )
        weight = jnp.sum(weights)
        squares = jnp.square(report["difference_rms"])
        return Outcome(Sum(mean * weight, weight), {"mean_square_difference": Sum(squares * weight, weight)})

    def follow(student: Any, target: Any) -> Any:
        return distill.after_step(distill.DistillState(student, target), chosen).target

    return Task("one_step", specs, loss, specs if consistent else None, follow if consistent else None)


def _draw_steps(batch: Examples, count: int) -> jax.Array:
    """Which step of the rollout, int32 (B,), each from its example's own key."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(example_keys(batch, STEP))


def one_step_run(config: OneStepConfig) -> Run:
    """The stage as a run: data opened, models read.

    Raises:
        ConfigError, CheckpointError, DataError, ShardingError: parts that are missing or do not fit each other.
    """
    layout = config.mesh.layout()
    compute = config.compute.compute(layout)
    preprocessor = Preprocessor.from_folder(config.model)
    expert = find_expert_config(config.teacher)
    expert.check_backbone(preprocessor.config.text)
    model = first_layers_of(preprocessor.config, expert)
    normalizer = load_normalizer(config.normalizer, load_dataset(config.data.dataset))
    task = one_step_task(
        model,
        expert,
        preprocessor.processor,
        normalizer,
        compute,
        config.distill,
        on_data=config.on_data,
        augmentation=config.data.augment,
    )
    batches = open_stream(config, preprocessor, with_answers=False)
    teacher = begin_expert(config.teacher, expert, config, layout, compute.dtype)
    frozen = OneStepFrozen(load_reader(config.model, expert, layout, compute.dtype), teacher)

    def initial() -> TrainState:
        state = distill.init(begin_expert(config.teacher, expert, config, layout), config.distill)
        return begin(task, config, layout, state.student, state.target)

    return Run(
        task=task,
        optimizer=make_optimizer(config.steps, task.specs),
        layout=layout,
        frozen=frozen,
        initial=initial,
        batches=batches,
        batch_size=config.batch_size,
        tokens=config.data.text_length,
        sample_flops=one_step_flops(
            model,
            expert,
            config.distill,
            config.data.text_length,
            image_grid(preprocessor.processor),
            with_actions=config.on_data,
            remat=config.compute.remat,
        ),
    )
