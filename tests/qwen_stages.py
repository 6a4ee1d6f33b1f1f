"""The port by stages, and how far each may be from transformers.

Tolerances are absolute, in float32, over every position that is not padding. Used by the parity tests, and by the
mutation tests, which ask that each known mistake breaks at least one of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny_qwen import Prompts

from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.norms import rms_norm
from rdt2_jax.qwen2_5_vl import grid as grids
from rdt2_jax.qwen2_5_vl import model, text, vision
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig

TOLERANCES = {
    "window_index": 0.0,
    "cu_seqlens": 0.0,
    "vision_positions": 0.0,
    "positions": 0.0,
    "position_delta": 0.0,
    "patch_embed": 5e-5,
    "vision_blocks": 5e-5,
    "merger": 3e-5,
    "embeddings": 3e-5,
    "layers": 3e-5,
    "norm": 3e-5,
    "keys": 3e-5,
    "values": 3e-5,
    "logits": 1e-4,
}
"""Stage -> largest absolute difference."""


def model_inputs(config: Qwen25VLConfig, prompts: Prompts) -> model.ModelInputs:
    """The prompts as the port takes them."""
    positions, following = grids.token_positions(
        config, prompts.input_ids, prompts.mask, [[prompts.grid]] * len(prompts.mask)
    )
    return model.ModelInputs(
        jnp.asarray(prompts.input_ids, jnp.int32),
        jnp.asarray(prompts.mask, bool),
        jnp.asarray(positions),
        jnp.asarray(following),
        jnp.asarray(prompts.patches)[:, None],
        prompts.grid,
    )


def port_stages(
    params: model.Qwen25VLParams, config: Qwen25VLConfig, prompts: Prompts, compute: Compute | None = None
) -> dict[str, np.ndarray]:
    """Everything in `TOLERANCES` as the port computes it; traced anew on every call, so that patches of it count."""
    compute = Compute() if compute is None else compute
    inputs = model_inputs(config, prompts)
    table = grids.windows.__wrapped__(config.vision, prompts.grid)

    def run(params: model.Qwen25VLParams, inputs: model.ModelInputs) -> dict[str, Any]:
        assert params.vision is not None
        tokens, trace = vision.encode_images_traced(
            params.vision, config.vision, inputs.patches[:, 0], prompts.grid, compute
        )
        embeddings = model.embed(params, config, inputs, compute)
        prompt = text.prefill(
            params.text, config.text, embeddings, inputs.positions, inputs.valid, compute, with_layer_outputs=True
        )
        kv = prompt.keys_values
        if isinstance(kv, tuple) and not isinstance(kv, text.KeysValues):
            kv = jax.tree.map(lambda *x: jnp.stack(x), *kv)
        return {
            "patch_embed": trace.patches,
            "vision_blocks": trace.blocks,
            "merger": tokens,
            "embeddings": embeddings,
            "layers": prompt.layer_outputs,
            "norm": rms_norm(params.text.norm, prompt.hidden, config.text.norm_eps),
            "keys": kv.key,
            "values": kv.value,
            "logits": text.logits(params.text, config.text, prompt.hidden),
        }

    return {
        "window_index": table.token_order,
        "cu_seqlens": table.boundaries,
        "vision_positions": grids.patch_positions(config.vision, prompts.grid),
        "positions": np.asarray(inputs.positions),
        "position_delta": np.asarray(inputs.following) - prompts.mask.sum(axis=1),
        **{name: np.asarray(x, np.float64) for name, x in jax.jit(run)(params, inputs).items()},
    }


def differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, float]:
    """Stage -> largest absolute difference where there is no padding; infinite where shapes differ."""
    found = {}
    for stage, expected in theirs.items():
        actual = ours[stage]
        if actual.shape != expected.shape:
            found[stage] = float("inf")
            continue
        difference = np.abs(actual - expected)
        if stage in ("embeddings", "norm", "logits"):
            difference = difference * mask[:, :, None]
        elif stage == "layers":
            difference = difference * mask[None, :, :, None]
        elif stage in ("keys", "values"):
            difference = difference * mask[None, :, None, :, None]
        found[stage] = float(difference.max())
    return found


def broken(found: dict[str, float]) -> dict[str, float]:
    """The stages that are further off than they may be; not a number counts."""
    return {stage: value for stage, value in found.items() if not value <= TOLERANCES[stage]}
