"""Every stage on models small enough for a test: shards on disk, stream, batch, task, parameters."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import small_policy
from rdt2_data.dataset_config import load_dataset
from rdt2_data.pipeline.stream import StreamConfig, TrainingStream
from rdt2_data.pipeline.text import TextEncoder
from rdt2_train.examples import Examples, make_examples
from rdt2_train.fm import FmFrozen, FmParams, fm_task
from rdt2_train.one_step import OneStepFrozen, one_step_task
from rdt2_train.optimizer import OptimizerConfig, ScheduleConfig, StepsConfig, make_optimizer
from rdt2_train.task import Task
from rdt2_train.vq import VqFrozen, vq_task
from small_shards import question, sample, write_dataset, write_shards

from rdt2_jax.action_expert import distill
from rdt2_jax.layers.compute import Compute
from rdt2_jax.lora import LoraConfig
from rdt2_jax.params import initialize
from rdt2_jax.qwen2_5_vl import model
from rdt2_jax.qwen2_5_vl.int8 import quantize_decoder

IMAGE_TOKENS = 18
LENGTH = 112
MAX_SUPERVISED = 40
NO_DROPOUT = LoraConfig(rank=2, alpha=4.0, dropout=0.0)
# The published learning rate: Adam divides by the size of a gradient, also where that is nothing but rounding.
STEPS = StepsConfig(steps=100, optimizer=OptimizerConfig(schedule=ScheduleConfig(peak=1e-4)))

STAGES = (
    "vq",
    "vq_lora",
    "vq_int8",
    "vq_encode",
    "fm",
    "fm_adapters",
    "fm_full",
    "one_step_regression",
    "one_step_consistency",
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a step needs; `params`, `frozen` and `carried` are on one device."""

    task: Task
    params: Any
    frozen: Any
    carried: Any
    batch: Examples


@functools.cache
def dataset(*, tokens: bool = True, questions: bool = False) -> Path:
    """A dataset file: 24 samples, tokens below 64, perhaps a quarter of questions."""
    folder = Path(tempfile.mkdtemp(prefix="rdt2-train-"))

    def make(number: int) -> dict[str, bytes]:
        token = np.random.default_rng(number).integers(0, 64, 27).astype(np.int16)
        return sample(number, tokens=tokens, **({"action_token": token} if tokens else {}))

    file = write_dataset(folder / "actions", shards=2, samples=12, make=make)
    if not questions:
        return file
    write_shards(folder / "questions", shards=1, samples=6, make=question)
    mixture = folder / "mixture.yaml"
    mixture.write_text(
        "name: mixture\ntype: mixture\ntrain: {a: {config_path: actions/dataset.yaml, weight: 1}}\n"
        "questions: {shards_dir: questions, share: 0.25}\n"
    )
    return mixture


def batch(size: int, *, step: int = 0, answers: bool = True, **kind: bool) -> Examples:
    """A batch of the stream."""
    parts = small_policy.byte_backbone()
    encoder = TextEncoder(parts.preprocessor.tokenizer, IMAGE_TOKENS, LENGTH, with_answers=answers)
    stream = TrainingStream(load_dataset(dataset(**kind)), StreamConfig(batch_size=size), encoder=encoder)
    return make_examples(stream.batch(step), parts.config, small_policy.SMALL_IMAGES, MAX_SUPERVISED)


def setup(stage: str, compute: Compute = Compute(), size: int = 8) -> Setup:  # noqa: B008  frozen
    """A stage with random parameters; adapters are not zero, so that everything has a gradient."""
    kind, _, variant = stage.partition("_")
    if kind == "vq":
        return _vq(variant, compute, size)
    if kind == "fm":
        return _fm(variant, compute, size)
    return _one_step(variant.removeprefix("step_"), compute, size)


def optimizer(task: Task) -> Any:
    return make_optimizer(STEPS, task.specs)


def _vq(variant: str, compute: Compute, size: int) -> Setup:
    parts = small_policy.byte_backbone()
    params = small_policy.stacked_params(parts.config)
    pieces = parts.preprocessor.tokenizer.num_pieces
    codec = small_policy.codec(64) if variant == "encode" else None
    adapters = NO_DROPOUT if variant in ("lora", "int8") else None
    task = vq_task(
        parts.config, small_policy.SMALL_IMAGES, pieces, compute, adapters=adapters, tokenizer=codec, head_chunk=16
    )
    if variant == "int8":
        params, _ = quantize_decoder(params)
    examples = batch(size, tokens=variant != "encode", questions=variant != "encode")
    if adapters is not None:
        return Setup(task, _random(task.specs), VqFrozen(params), None, examples)
    return Setup(task, params, VqFrozen(None, None if codec is None else codec.params), None, examples)


def _reader() -> Any:
    """Backbone of the expert: four layers, no head."""
    parts = small_policy.byte_backbone()
    expert = small_policy.expert()
    params = model.with_first_layers(small_policy.stacked_params(parts.config), expert.config.num_backbone_layers)
    text = parts.config.text.model_copy(update={"num_layers": expert.config.num_backbone_layers})
    return parts.config.model_copy(update={"text": text}), params


def _fm(variant: str, compute: Compute, size: int) -> Setup:
    config, reader = _reader()
    expert = small_policy.expert()
    training: Any = variant or "frozen"
    task = fm_task(
        config,
        expert.config,
        small_policy.SMALL_IMAGES,
        small_policy.normalizer(),
        compute,
        backbone=training,
        adapters=NO_DROPOUT if training == "adapters" else None,
    )
    adapters = _random(task.specs.adapters) if training == "adapters" else None
    params = FmParams(expert.params, adapters, reader if training == "full" else None)
    frozen = FmFrozen(None if training == "full" else reader)
    return Setup(task, params, frozen, None, batch(size, answers=False))


def _one_step(objective: str, compute: Compute, size: int) -> Setup:
    config, reader = _reader()
    expert = small_policy.expert()
    chosen = distill.DistillConfig(objective=objective, num_steps=3, target_decay=0.5)  # type: ignore[arg-type]
    task = one_step_task(config, expert.config, small_policy.SMALL_IMAGES, small_policy.normalizer(), compute, chosen)
    state = distill.init(expert.params, chosen)
    student = jax.tree.map(lambda x: x * 1.2, state.student)
    return Setup(task, student, OneStepFrozen(reader, expert.params), state.target, batch(size, answers=False))


def _random(specs: Any) -> Any:
    made = initialize(specs, jax.random.key(3))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape, jnp.float32), made)
