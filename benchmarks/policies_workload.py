"""What the benchmarks of the policies ask: one observation, as a batch of one."""

from __future__ import annotations

import jax
import numpy as np

from rdt2_jax.action_expert.flow import sample
from rdt2_jax.actions.layout import STATE_DIM
from rdt2_jax.actions.types import IMAGE_SHAPE, Observation
from rdt2_jax.policy.backbone import Backbone
from rdt2_jax.policy.prompts import Prompts
from rdt2_jax.qwen2_5_vl.model import ModelInputs

PROMPT_LENGTH = 448
"""The bucket that the prompt falls into."""

JPEG_QUALITY = 95
"""Of the vq policy."""

jit_sample = jax.jit(sample, static_argnums=(1, 5), static_argnames="schedule")


def random_observation(seed: int = 0) -> Observation:
    """Random pixels and a state."""
    random = np.random.default_rng(seed)
    cameras = ("left_wrist", "right_wrist")
    return Observation(
        images={camera: random.integers(0, 256, IMAGE_SHAPE, dtype=np.uint8) for camera in cameras},
        capture_time_s=dict.fromkeys(cameras, 0.0),
        instruction="Pick up the apple.",
        id="benchmark",
        state=random.standard_normal(STATE_DIM).astype(np.float32),
    )


def inputs_of(backbone: Backbone, observation: Observation, jpeg_quality: int | None) -> ModelInputs:
    """A batch of one observation on the device."""
    prompts = Prompts(backbone.preprocessor, (PROMPT_LENGTH,), jpeg_quality)
    return jax.device_put(prompts.inputs([observation], prompts.lengths([observation]), 1), backbone.device)
