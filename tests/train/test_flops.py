"""Operations of a training sample: against what XLA counts in gradients, and against the counts of inference.

The networks here have unrolled layers, since XLA counts the body of a loop once. It counts norms, softmax, activations
and the like too, which the model leaves out; the networks are wide enough for that to be about a percent. Counting
before XLA's optimisations gives the same as after them to a few tenths of a percent (one test compiles), in seconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rdt2_train.flops import StepFlops, fm_flops, one_step_flops, tokenizer_flops, vq_flops

from rdt2_jax import lora
from rdt2_jax.action_expert import cost as expert_cost
from rdt2_jax.action_expert import distill, flow
from rdt2_jax.action_expert import model as expert_model
from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.model import Condition
from rdt2_jax.action_tokenizer import tokenizer as action_tokenizer
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig, Levels
from rdt2_jax.action_tokenizer.training import draw_choices, loss_and_codebooks
from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.stack import unstack
from rdt2_jax.params import abstract
from rdt2_jax.qwen2_5_vl import cost, model
from rdt2_jax.qwen2_5_vl import text as text_model
from rdt2_jax.qwen2_5_vl.config import preset
from rdt2_jax.qwen2_5_vl.int8 import int8_weights
from rdt2_jax.qwen2_5_vl.model import ModelInputs
from rdt2_jax.qwen2_5_vl.text import KeysValues

GRID = (1, 16, 16)
LENGTH, SUPERVISED = 64, 12  # of up to 64 queries, the XLA kernel multiplies all pairs at once

# What the model leaves out, as a share of what it counts: 0.6 to 1.2% here.
REST = 0.015

LORA = lora.LoraConfig(rank=8)

# What is compiled here is never run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def backbone_config(layers=2):
    tiny = preset("tiny")
    text = {"hidden_size": 256, "intermediate_size": 512, "num_layers": layers, "vocab_size": 1024}
    text |= {"num_heads": 4, "num_kv_heads": 2, "mrope_sections": (8, 12, 12)}
    vision = {"hidden_size": 256, "intermediate_size": 512, "out_hidden_size": 256, "depth": 2}
    vision |= {"full_attention_blocks": (1,)}
    return tiny.model_copy(
        update={"text": tiny.text.model_copy(update=text), "vision": tiny.vision.model_copy(update=vision)}
    )


def small_expert():
    """One block, which reads the backbone's second layer."""
    values = {"hidden_size": 256, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "mlp_multiple_of": 32}
    return ActionExpertConfig(**values, condition_layers=(1,))


def of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def inputs_of(config, grid=None):
    """One prompt, without an image or with one."""
    patches = None if grid is None else of(1, 1, grid[1] * grid[2], config.vision.patch_dim)
    ids = of(1, LENGTH, dtype=jnp.int32)
    valid, positions = of(1, LENGTH, dtype=bool), of(3, 1, LENGTH, dtype=jnp.int32)
    return ModelInputs(ids, valid, positions, of(1, dtype=jnp.int32), patches, grid)


def params_of(config, **parts):
    return jax.eval_shape(model.unstacked, abstract(model.param_specs(config, **parts)))


def adapters_of(config):
    """Unrolled: a name of its own for every layer's weight."""
    specs = model.param_specs(config)
    stacked = abstract(lora.adapter_specs(specs, int8_weights(specs), LORA))
    return {
        name.replace("text.layers.", f"text.layers.{i}."): adapter
        for name, whole in stacked.items()
        for i, adapter in enumerate(jax.eval_shape(unstack, whole))
    }


def counted(loss, *arguments, compiled=False):
    """Operations of the gradient with respect to the first argument; compiled, or before XLA's optimisations."""
    return flops_of(jax.grad(loss), *arguments, compiled=compiled)


def flops_of(function, *arguments, compiled=False):
    lowered = jax.jit(function).lower(*arguments)
    analysis = (lowered.compile(QUICK) if compiled else lowered).cost_analysis()
    return dict(analysis or {})["flops"]


def masked_pairs(config, layers, passes):
    """Operations on pairs that the causal mask hides, which this kernel multiplies all the same."""
    pairs = LENGTH * LENGTH - LENGTH * (LENGTH + 1) // 2
    return passes * 4.0 * pairs * config.text.num_heads * config.text.head_dim * layers


def vq_loss(params, config, inputs, compute):
    hidden = model.prefill(params, config, inputs, compute).hidden[:, -SUPERVISED:]
    return jnp.mean(jnp.square(text_model.logits(params.text, config.text, hidden)))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_vq_trained_whole(remat):
    config, grid = backbone_config(), GRID if remat == "dots" else None
    params, compute = params_of(config), Compute(remat=remat)
    xla = counted(
        lambda p, i: vq_loss(p, config, i, compute), params, inputs_of(config, grid), compiled=remat == "dots"
    )
    ours = vq_flops(config, LENGTH, SUPERVISED, grid, remat=remat)
    expected = ours.hardware + masked_pairs(config, config.text.num_layers, 3 if remat == "none" else 4)
    assert 1.0 < xla / expected < 1 + REST


def test_vq_with_adapters():
    config = backbone_config()

    def loss(adapters, params, inputs):
        return vq_loss(lora.attach(params, adapters, LORA), config, inputs, Compute(remat="full"))

    xla = counted(loss, adapters_of(config), params_of(config), inputs_of(config))
    ours = vq_flops(config, LENGTH, SUPERVISED, None, trained="lora", lora_rank=LORA.rank, remat="full")
    expected = ours.hardware + masked_pairs(config, config.text.num_layers, 4)
    assert 1.0 < xla / expected < 1 + REST


@pytest.mark.parametrize(
    ("trained", "remat"), [("frozen", "none"), ("frozen", "full"), ("lora", "full"), ("full", "dots")]
)
def test_flow_matching(trained, remat):
    config = backbone_config()
    expert = small_expert()
    specs = abstract(expert_model.param_specs(expert))
    network = jax.eval_shape(expert_model.unstacked, specs)
    backbone, adapters = params_of(config, with_head=False), adapters_of(config)
    # of the last layer, keys and values alone are read
    adapters = {k: v for k, v in adapters.items() if ".1." not in k or ".key." in k or ".value." in k}
    trainable = {"frozen": network, "lora": (network, adapters), "full": (network, backbone)}[trained]

    def loss(trainable, backbone, inputs, actions, t, state):
        network = trainable
        if trained == "lora":
            network, backbone = trainable[0], lora.attach(backbone, trainable[1], LORA)
        elif trained == "full":
            network, backbone = trainable
        compute = Compute(remat=remat)
        keys_values = model.keys_and_values(backbone, config, inputs, compute, kv_layers=expert.condition_layers)
        condition = Condition(keys_values, inputs.valid)
        return flow.loss_at(network, expert, actions, -actions, t, condition, state, compute)

    xla = counted(loss, trainable, backbone, inputs_of(config), of(1, 24, 20), of(1), of(1, 20))
    ours = fm_flops(config, expert, LENGTH, None, backbone_trained=trained, lora_rank=LORA.rank, remat=remat)
    expected = ours.hardware + masked_pairs(config, 1, 1 if trained == "frozen" else 4)
    assert 1.0 < xla / expected < 1 + REST


@pytest.mark.parametrize("objective", ["regression", "consistency"])
def test_distillation(objective):
    config, expert = backbone_config(), small_expert()
    length = 512  # long enough for what attention costs to show
    # one step: a loop of several is counted once
    settings = distill.DistillConfig(objective=objective, num_steps=1)
    network = jax.eval_shape(expert_model.unstacked, abstract(expert_model.param_specs(expert)))
    part: Any = of(1, expert.num_kv_heads, length, expert.head_dim)
    condition = Condition((KeysValues(part, part),), of(1, length, dtype=bool))

    def loss(student, target, teacher, condition, state):
        key = jax.random.key(0)
        return distill.loss(student, target, teacher, expert, settings, condition, state, key, Compute())[0]

    target = network if objective == "consistency" else None
    xla = counted(loss, network, target, network, condition, of(1, expert.state_dim))
    ours = one_step_flops(config, expert, settings, length, None)
    backbone = cost.prefill_flops(config, length, 2, keys_values_only=True)
    assert 1.0 < xla / (ours.hardware - backbone) < 1 + REST


@pytest.mark.parametrize("continuous", [True, False])
def test_tokenizer(continuous):
    levels = Levels(pos=1, rot=1, grip=1)  # several are scanned
    config = ActionTokenizerConfig(hidden_size=64, latent_size=64, embedding_dim=16, num_codes=256, levels=levels)
    specs, batch = abstract(action_tokenizer.param_specs(config)), 2

    def loss(networks, codebooks, actions):
        choices = draw_choices(jax.random.key(0), config, batch)
        return loss_and_codebooks(networks, codebooks, config, actions, choices, continuous=continuous)

    def gradient(*arguments):
        return jax.grad(loss, has_aux=True)(*arguments)

    xla = flops_of(gradient, specs.networks, specs.codebooks, of(batch, 24, 20))
    ours = batch * tokenizer_flops(config, continuous=continuous).hardware
    assert 1.0 < xla / ours < 1 + REST


LARGE = preset("7b")
IMAGES = (1, 28, 54)


def test_forward_passes_are_those_of_the_inference_counts():
    text, expert = LARGE, ActionExpertConfig()
    seen = cost.prefill_flops(text, 420, 14, grid=IMAGES, num_images=2, keys_values_only=True)
    moved = expert_cost.prepare_flops(expert, 1) + expert_cost.velocity_flops(expert, 420)
    for trained in ("frozen", "full"):
        found = fm_flops(text, expert, 420, IMAGES, num_images=2, backbone_trained=trained, remat="full")
        assert found.forward == pytest.approx(seen + moved, rel=1e-12)
    whole = cost.text_flops(text.text, 420, logit_positions=27) + cost.vision_flops(text.vision, IMAGES)
    assert vq_flops(text, 420, 27, IMAGES).forward == pytest.approx(whole, rel=1e-12)


def test_what_is_frozen_costs_its_forward_pass_alone():
    frozen = vq_flops(LARGE, 420, 27, IMAGES, trained="frozen", remat="full")
    assert frozen == StepFlops(forward=frozen.forward)
    expert = ActionExpertConfig()
    stage = fm_flops(LARGE, expert, 420, IMAGES)
    seen = cost.prefill_flops(LARGE, 420, 14, grid=IMAGES, keys_values_only=True)
    moved = stage.forward - seen
    assert 0.9 * moved < stage.weight_gradients < moved
    assert stage.model < seen + 3.1 * moved


def test_whole_and_adapted_cost_about_three_and_two_passes():
    whole, adapted = (vq_flops(LARGE, 420, 27, None, trained=t) for t in ("full", "lora"))
    assert whole.model / whole.forward == pytest.approx(3, rel=0.001)
    assert 2 < adapted.model / whole.forward < 2.05
    assert adapted.weight_gradients < 0.02 * adapted.forward
    sighted = vq_flops(LARGE, 420, 27, IMAGES, vision_trained=False)
    assert sighted.model == pytest.approx(whole.model + cost.vision_flops(LARGE.vision, IMAGES), rel=1e-12)


def test_rematerialisation_changes_hfu_alone():
    none, dots, full = (vq_flops(LARGE, 420, 27, IMAGES, remat=remat) for remat in ("none", "dots", "full"))
    assert none.model == dots.model == full.model
    assert none.hardware == none.model
    assert 0 < dots.recomputed < 0.1 * full.recomputed < full.recomputed < full.forward


def test_logits_that_are_computed_again():
    once, again = (vq_flops(LARGE, 420, 27, IMAGES, remat="dots", head_recomputed=twice) for twice in (False, True))
    assert again.recomputed - once.recomputed == pytest.approx(2 * 27 * 152064 * 3584, rel=1e-6)
    assert again.model == once.model


def test_a_longer_rollout_is_paid_by_the_teacher_alone():
    config, expert = LARGE, ActionExpertConfig()
    one, five = (
        one_step_flops(config, expert, distill.DistillConfig(num_steps=n), 420, IMAGES, remat="full") for n in (1, 5)
    )
    longer = expert_cost.sample_flops(expert, 420, 5) - expert_cost.sample_flops(expert, 420, 1)
    assert five == dataclasses.replace(one, forward=pytest.approx(one.forward + longer, rel=1e-12))
    settings = distill.DistillConfig(objective="consistency", method="heun")
    near, far = (one_step_flops(config, expert, settings, 420, IMAGES, with_actions=w) for w in (True, False))
    more = expert_cost.sample_flops(expert, 420, 10) - expert_cost.sample_flops(expert, 420, 2)
    assert far.forward - near.forward == pytest.approx(more, rel=1e-9)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"trained": "half"}, "(?s)no such choice.*trained.*frozen or lora or full.*half"),
        ({"remat": "some"}, "(?s)no such choice.*remat.*some"),
        ({"lora_rank": 0}, "(?s)must be positive.*lora_rank"),
        ({"num_images": 0}, "(?s)must be positive.*num_images"),
        ({"length": 0}, "(?s)must be positive.*length"),
        ({"supervised": -1}, "(?s)supervised.*0 or more.*-1"),
    ],
)
def test_choices_that_are_not_there(choices, message):
    arguments = {"length": 420, "supervised": 27, "grid": IMAGES, **choices}
    with pytest.raises(ConfigError, match=message):
        vq_flops(LARGE, **arguments)


def test_an_expert_of_another_backbone():
    with pytest.raises(ConfigError, match="does not belong to this backbone"):
        fm_flops(preset("3b"), ActionExpertConfig(), 420, IMAGES)
