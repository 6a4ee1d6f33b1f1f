"""Three optimizer steps of the VQ stage beside transformers and torch: same batch, weights and schedule."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qwen
from rdt2_train.examples import Examples, supervised_columns
from rdt2_train.optimizer import OptimizerConfig, ScheduleConfig, StepsConfig, decay_mask, learning_rate, make_optimizer
from rdt2_train.step import init_state, train_step
from rdt2_train.vq import VqFrozen, vq_task

from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import named_leaves
from rdt2_jax.qwen2_5_vl import model
from rdt2_jax.qwen2_5_vl.config import read_config
from rdt2_jax.qwen2_5_vl.grid import token_positions
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED, patchify
from rdt2_jax.weights.loader import load
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table

pytestmark = pytest.mark.torch_peer

STEPS = StepsConfig(
    steps=10,
    optimizer=OptimizerConfig(
        schedule=ScheduleConfig(peak=1e-4, warmup_steps=2, shape="cosine", anneal_steps=2), clip=0.5
    ),
)
SIZE = (84, 168)
ANSWER = 6


def load_params(folder, config):
    return load(qwen2_5_vl_table(config), model.param_specs(config), folder)[0]


def make_batch(config):
    """Two rows, the second shorter, whose last ids are learnt."""
    processor = PUBLISHED.model_copy(update={"min_pixels": 28 * 28, "max_pixels": SIZE[0] * SIZE[1]})
    grid = (1, SIZE[0] // 14, SIZE[1] // 14)
    prompts = tiny_qwen.make_prompts(grid, words=(14, 11))
    ids, mask = prompts.input_ids.astype(np.int32), prompts.mask.astype(bool)
    positions, following = token_positions(config, ids, mask, [[grid]] * 2)
    supervised = np.zeros_like(mask)
    supervised[0, -ANSWER:] = supervised[1, -ANSWER + 1 :] = True
    targets, weight = supervised_columns(supervised, 8)
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    examples = Examples(
        image=images,
        key=np.zeros((2, 2), np.uint32),
        input_ids=ids,
        mask=mask,
        positions=np.moveaxis(positions, 0, 1),
        following=following,
        targets=targets,
        target_weight=weight,
        action=np.zeros((2, 24, 20), np.float32),
        gripper_valid=np.ones((2, 2), bool),
        state=np.zeros((2, 20), np.float32),
        weight=np.ones(2, np.float32),
        has_tokens=np.ones(2, bool),
    )
    return examples, supervised, grid, processor


def peer_steps(peer, examples, supervised, grid, processor, decayed):
    """What torch makes of the same batch; returns the losses."""
    import torch

    patches, _ = patchify(examples.image, processor)
    labels = np.where(supervised, examples.input_ids, -100)
    inputs = {
        "input_ids": torch.tensor(examples.input_ids.astype(np.int64)),
        "attention_mask": torch.tensor(examples.mask.astype(np.int64)),
        "pixel_values": torch.tensor(np.asarray(patches).reshape(-1, patches.shape[-1])),
        "image_grid_thw": torch.tensor([grid] * 2),
        "mm_token_type_ids": torch.tensor((examples.input_ids == tiny_qwen.IMAGE_ID).astype(np.int64)),
        "labels": torch.tensor(labels.astype(np.int64)),
    }
    chosen = STEPS.optimizer
    named = dict(peer.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decayed(n, p)], "weight_decay": chosen.weight_decay},
        {"params": [p for n, p in named.items() if not decayed(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(chosen.b1, chosen.b2), eps=chosen.eps)
    rate = learning_rate(chosen.schedule, STEPS.steps)
    losses = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        optimizer.zero_grad()
        loss = peer(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), chosen.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_three_steps(tmp_path):
    peer = tiny_qwen.make_peer()
    folder = tiny_qwen.save_peer(peer, tmp_path / "before")
    config = read_config(folder)
    params = load_params(folder, config)
    examples, supervised, grid, processor = make_batch(config)

    task = vq_task(config, processor, 100, Compute())
    optimizer = make_optimizer(STEPS, task.specs)
    state = init_state(params, None, optimizer, jax.random.key(0))
    step = jax.jit(lambda state: train_step(state, VqFrozen(None), examples, task, optimizer))
    losses = []
    for _ in range(3):
        state, report = step(state)
        losses.append(float(report["loss"]))

    def decayed(name, parameter):
        return parameter.ndim >= 2 and "norm" not in name.split(".")[-2]

    theirs = peer_steps(peer, examples, supervised, grid, processor, decayed)
    np.testing.assert_allclose(losses, theirs, rtol=1e-5)
    expected = load_params(tiny_qwen.save_peer(peer, tmp_path / "after"), config)
    assert any(
        float(jnp.abs(a - b).max()) > 1e-4 for a, b in zip(*map(jax.tree.leaves, (expected, params)), strict=True)
    )
    chex.assert_trees_all_close(state.params, expected, atol=1e-5, rtol=0)


def test_decay_spares_norms_and_biases():
    from rdt2_jax.qwen2_5_vl.config import preset

    mask = named_leaves(decay_mask(model.param_specs(preset("tiny"))))
    for name, decays in mask.items():
        assert decays == (not name.endswith("bias") and "norm" not in name), name
    assert any(mask.values())
    assert not all(mask.values())
