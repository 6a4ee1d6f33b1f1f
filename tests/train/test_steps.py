"""One step of every stage: the same on any mesh, in parts, and with anything computed again; frozen stays frozen."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rdt2_train.examples import flow_weights, with_action_ids
from rdt2_train.placement import place_batch, state_shardings
from rdt2_train.step import init_state, train_step
from train_setups import STAGES, batch, optimizer, setup

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import named_leaves
from rdt2_jax.sharding import Layout, make_mesh, replicated


def take_step(stage, layout=None, *, parts=1, remat="none", steps=1):
    """State and report after some steps on the same batch."""
    own = setup(stage, Compute(layout=layout, remat=remat))
    optimizing = optimizer(own.task)
    copied = jax.tree.map(jnp.array, (own.params, own.carried))
    state = init_state(*copied, optimizing, jax.random.key(5))
    frozen, examples = own.frozen, own.batch
    if layout is not None:
        state = jax.device_put(state, state_shardings(own.task, optimizing, layout))
        frozen = jax.device_put(frozen, replicated(layout.mesh))
        examples = place_batch(examples, layout)
    step = jax.jit(
        functools.partial(train_step, task=own.task, optimizer=optimizing, parts=parts, layout=layout),
        donate_argnums=0,
    )
    for _ in range(steps):
        state, report = step(state, frozen, examples)
    return jax.device_get((dataclasses.replace(state, key=None), report))


@functools.cache
def on_one_device(stage):
    return take_step(stage)


def close(found, expected, tolerance=1e-5):
    """Parameters, carried values and reports; moments of the optimizer in proportion."""
    (state, report), (wanted, wanted_report) = found, expected
    chex.assert_trees_all_close(state.params, wanted.params, atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(state.carried, wanted.carried, atol=tolerance, rtol=tolerance)
    chex.assert_trees_all_close(report, wanted_report, atol=tolerance, rtol=1e-4)


def layout_of(shape, devices):
    return Layout(make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), devices))


SHAPES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))
QUICK = {("vq_lora", (2, 2, 2)), ("fm", (2, 2, 2))}


@pytest.mark.parametrize(
    ("stage", "shape"),
    [
        pytest.param(stage, shape, marks=() if (stage, shape) in QUICK else pytest.mark.slow)
        for stage in STAGES
        for shape in SHAPES
    ],
)
def test_any_mesh(eight_devices, stage, shape):
    close(take_step(stage, layout_of(shape, eight_devices)), on_one_device(stage))


def only_some(*stages):
    """The stages to run with every change; the others run with the long tests."""
    return [pytest.param(stage, marks=() if stage in stages else pytest.mark.slow) for stage in STAGES]


@pytest.mark.parametrize("stage", only_some("vq_lora", "fm"))
def test_four_parts_are_the_whole_batch(stage):
    close(take_step(stage, parts=4), on_one_device(stage))


@pytest.mark.parametrize("stage", only_some("fm"))
def test_one_row_on_a_device(eight_devices, stage):
    """Two parts of four rows, over data and fsdp together: a layout that XLA got wrong where it was left to choose."""
    close(take_step(stage, layout_of((2, 2, 2), eight_devices), parts=2), on_one_device(stage))


@pytest.mark.parametrize("stage", only_some("vq_lora"))
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_computing_again_changes_nothing(stage, remat):
    close(take_step(stage, remat=remat), on_one_device(stage))


@pytest.mark.parametrize("stage", only_some("vq_lora", "fm"))
def test_everything_trainable_moves_and_nothing_else_has_a_moment(stage):
    own = setup(stage)
    state, report = on_one_device(stage)
    before, after = named_leaves(own.params), named_leaves(state.params)
    still = [name for name, leaf in before.items() if np.array_equal(leaf, after[name])]
    assert not still
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in after.values())
    assert report["finite"]
    assert 0 < report["grad_norm"] < np.inf


def test_trained_backbone_is_that_of_the_stage():
    """What each variant trains, by the names of its parameters."""
    trained = {stage: {name.split(".")[0] for name in named_leaves(setup(stage).task.specs)} for stage in STAGES}
    assert trained["fm"] == {"expert"}
    assert trained["fm_adapters"] == {"expert", "adapters"}
    assert trained["fm_full"] == {"expert", "backbone"}
    assert trained["vq"] == trained["vq_encode"] == {"vision", "text"}
    assert not any("norm" in name for name in named_leaves(setup("vq_lora").task.specs))


def gradient_of(stage):
    own = setup(stage)

    def loss(params):
        return own.task.loss(params, own.frozen, own.carried, own.batch, jax.random.key(5)).loss.mean

    return own, jax.jit(loss), jax.jit(jax.grad(loss))


@pytest.mark.slow
def test_gradients_reach_the_backbone_through_keys_and_values():
    """Against finite differences, weight by weight."""
    own, loss, gradient = gradient_of("fm_full")
    found = named_leaves(gradient(own.params))
    names = [
        "backbone.text.embedding",
        "backbone.text.layers.attention.key.weight",
        "backbone.text.layers.attention.value.bias",
        "backbone.text.layers.mlp.down.weight",
        "backbone.vision.patch_embedding.weight",
    ]
    leaves = named_leaves(own.params)
    known = [name for name in names if name in leaves]
    assert len(known) >= 4
    for name in known:
        place = np.unravel_index(int(jnp.argmax(jnp.abs(found[name]))), found[name].shape)
        moved = [float(loss(_replaced(own.params, name, leaves[name].at[place].add(step)))) for step in (-1e-2, 1e-2)]
        np.testing.assert_allclose((moved[1] - moved[0]) / 2e-2, found[name][place], rtol=0.05)


def _replaced(tree, name, value):
    leaves = {**named_leaves(tree), name: value}
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[key] for key in named_leaves(tree)])


@pytest.mark.slow
def test_full_training_with_the_backbone_frozen_is_expert_only_training():
    """The same loss, and the same gradient of the expert, whether or not the backbone is trained too."""
    full, loss_full, gradient_full = gradient_of("fm_full")
    alone, loss_alone, gradient_alone = gradient_of("fm")
    assert float(loss_full(full.params)) == float(loss_alone(alone.params))
    chex.assert_trees_all_equal(gradient_full(full.params).expert, gradient_alone(alone.params).expert)


@pytest.mark.slow
def test_consistency_has_a_target_that_follows():
    own = setup("one_step_consistency")
    state, _ = on_one_device("one_step_consistency")
    expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, own.carried, state.params)
    chex.assert_trees_all_close(state.carried, expected, atol=1e-6)


def test_questions_have_no_part_in_the_flow_but_in_the_words():
    examples = batch(16, questions=True)
    rows = np.asarray(examples.weight) == 0
    assert 0 < rows.sum() < 16
    assert (np.asarray(examples.target_weight)[rows].sum(axis=1) > 0).all()


def test_rows_that_fill_a_batch_count_for_nothing():
    own = setup("fm")
    weight = np.array([1, 1, 1, 0, 1, 1, 0, 1], np.float32)
    masked = dataclasses.replace(own.batch, weight=weight)
    kept = jax.tree.map(lambda x: np.asarray(x)[weight > 0], own.batch)

    def outcome(examples):
        return own.task.loss(own.params, own.frozen, None, examples, jax.random.key(0)).loss

    found, expected = outcome(masked), outcome(kept)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5)
    assert float(found.weight) == 6 * 20


def test_unmeasured_widths_are_not_learnt():
    """Neither by the flow, whatever they hold, nor as tokens that the step makes itself."""
    own = setup("fm")
    valid = np.array([[True, True]] * 6 + [[False, True]] * 2)
    batches = []
    for width in (0.0, 0.08):
        action = own.batch.action.copy()
        action[6:, :, 9] = width
        batches.append(dataclasses.replace(own.batch, gripper_valid=valid, action=action))
    weights = np.asarray(flow_weights(batches[0]))
    assert weights.sum() == 8 * 20 - 2
    assert not weights[6:, 0, 9].any()
    encoding = setup("vq_encode")
    marked = dataclasses.replace(encoding.batch, gripper_valid=valid)
    filled = with_action_ids(marked, np.zeros((8, 27), np.int32), 256)
    learnt = np.asarray(filled.target_weight).sum(axis=1)
    assert (learnt[:6] - learnt[6:].max() == 3).all()


def test_a_batch_that_cannot_be_divided():
    with pytest.raises(ConfigError, match="divisor of 8"):
        take_step("fm", parts=3)
