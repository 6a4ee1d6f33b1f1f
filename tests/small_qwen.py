"""A Qwen2.5-VL small enough to be made on the spot, without torch: its configuration, parameters and a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tiny_qwen import IDS, IMAGE_ID, VISION_END_ID, VISION_START_ID, VOCABULARY

from rdt2_jax.params import from_named_leaves, named_leaves
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, preset
from rdt2_jax.qwen2_5_vl.grid import token_positions
from rdt2_jax.qwen2_5_vl.model import ModelInputs, Qwen25VLParams, param_specs

GRID = (1, 4, 6)
LENGTH = 16


def small_config(*, tie_embeddings: bool = False) -> Qwen25VLConfig:
    """The preset "tiny" with few words."""
    tiny = preset("tiny")
    text = tiny.text.model_copy(update={"vocab_size": VOCABULARY, "tie_embeddings": tie_embeddings})
    ids = {
        "image_token_id": IDS["image"],
        "video_token_id": IDS["video"],
        "vision_start_token_id": IDS["start"],
        "vision_end_token_id": IDS["end"],
    }
    return tiny.model_copy(update={"text": text, **ids})


def small_params(config: Qwen25VLConfig, *, vision: bool = True) -> Qwen25VLParams:
    """Random parameters, stacked; weights larger than fresh ones and biases that are not zero, so that all matter."""
    specs, random = param_specs(config, vision=vision), np.random.default_rng(7)
    values: dict[str, jax.Array] = {}
    for name, spec in named_leaves(specs).items():
        drawn = random.standard_normal(spec.shape, np.float32)
        scaled = 0.3 * drawn if name.endswith("bias") else 1 + 0.2 * drawn if "norm" in name else 0.1 * drawn
        values[name] = jnp.asarray(scaled, jnp.float32)
    return from_named_leaves(specs, values)


def small_inputs(config: Qwen25VLConfig, rows: int = 2, *, images: bool = True) -> ModelInputs:
    """Some words per row, and an image; every second row is shorter."""
    random = np.random.default_rng(3)
    tokens = GRID[1] * GRID[2] // config.vision.merge_unit
    ids = random.integers(0, 490, (rows, LENGTH)).astype(np.int32)
    if images:
        ids[:, 4 : 6 + tokens] = [VISION_START_ID, *[IMAGE_ID] * tokens, VISION_END_ID]
    valid = np.ones((rows, LENGTH), bool)
    valid[1::2, :3] = False
    positions, following = token_positions(config, ids, valid, [[GRID] if images else []] * rows)
    if not images:
        return ModelInputs(ids, valid, positions, following)
    patches = random.standard_normal((rows, 1, GRID[1] * GRID[2], config.vision.patch_dim)).astype(np.float32)
    return ModelInputs(ids, valid, positions, following, patches, GRID)
