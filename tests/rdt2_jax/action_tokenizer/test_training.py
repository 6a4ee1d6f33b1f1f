"""The training step: on eight devices as on one, first batch, restarts, optimizer."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rdt2_data.synthetic import smooth_chunks

from rdt2_jax.action_tokenizer.tokenizer import encode
from rdt2_jax.action_tokenizer.training import (
    draw_choices,
    init_state,
    loss,
    loss_and_codebooks,
    standardize,
    train_step,
)
from rdt2_jax.actions.layout import GROUP_NAMES
from rdt2_jax.errors import DataError
from rdt2_jax.params import count_parameters
from rdt2_jax.sharding import batch_sharding, make_mesh, replicated

# Linear in the gradients, so that equal parameters mean equal gradients. AdamW's first steps divide a gradient by its
# own size: where that is zero up to rounding, the last bit of a sum over devices would decide the sign of the update.
OPTIMIZER = optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.02, momentum=0.9)))
BATCH = 32


@pytest.fixture(scope="module")
def step(small_config):
    """One compiled training step; on sharded arguments it compiles once more."""

    @jax.jit
    def step(state, batch):
        choices = draw_choices(jax.random.fold_in(jax.random.key(0), state.step), small_config, BATCH)
        return train_step(state, batch, choices, small_config, OPTIMIZER)

    return step


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-6), (jnp.float32, 1e-5)])
def test_eight_devices_equal_one(eight_devices, step, small_params, dtype, tolerance):
    """Every kind of step from the same state: first batch, plain, restart (the interval is 2), plain.

    In double precision equality is far below the tolerance; in single precision a convolution over four chunks sums
    in another order than one over thirty-two, and fourteen layers later that shows in the sixth digit. The networks are
    standardised as in training, and no two chunks are alike: equal vectors (arms and grippers at rest) become equal
    codes, and rounding would choose between them.
    """
    chunks = smooth_chunks(4 * BATCH, seed=6)
    chunks += np.random.default_rng(0).normal(scale=0.01, size=chunks.shape)
    small_params = standardize(small_params, jnp.asarray(chunks.mean((0, 1))), jnp.asarray(chunks.std((0, 1))))
    mesh = make_mesh({"data": 8}, devices=eight_devices)
    with jax.enable_x64(dtype == jnp.float64):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, small_params)
        state = init_state(params, OPTIMIZER)
        for index in range(4):
            batch = jnp.asarray(chunks[index * BATCH :][:BATCH], dtype)
            eight, outputs_of_eight = step(
                jax.device_put(state, replicated(mesh)), jax.device_put(batch, batch_sharding(mesh))
            )
            state, outputs = step(state, batch)
            assert state.params.networks["pos"].encoder.conv_in.kernel.dtype == dtype
            compare_steps(eight, outputs_of_eight, state, outputs, tolerance)


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def compare_steps(eight, outputs_of_eight, one, outputs, tolerance):
    ours, theirs = jax.device_get(eight.params), jax.device_get(one.params)
    chex.assert_trees_all_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for group in GROUP_NAMES:
        np.testing.assert_array_equal(outputs_of_eight[group].indices, outputs[group].indices)
        np.testing.assert_array_equal(eight.params.codebooks[group].hits, one.params.codebooks[group].hits)
        ours, theirs = (jax.device_get(o[group].losses) for o in (outputs_of_eight, outputs))
        chex.assert_trees_all_close(ours, theirs, rtol=1e-6, atol=1e-7)
        copies = [np.asarray(shard.data) for shard in eight.params.codebooks[group].codes.addressable_shards]
        assert len(copies) == 8
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0])


def test_loss_falls_and_codes_come_alive(step, small_config, small_params, chunks):
    state, losses = init_state(small_params, OPTIMIZER), []
    for _ in range(40):
        state, outputs = step(state, chunks[:BATCH])
        losses.append({group: float(output.losses.total) for group, output in outputs.items()})
    assert int(state.step) == 40
    tokens = np.asarray(encode(state.params, small_config, chunks))
    for group in GROUP_NAMES:
        assert losses[-1][group] < losses[0][group]
        assert len(np.unique(tokens[:, small_config.token_slice(group)])) > 3


def test_dead_codes_are_restarted_from_the_batch(step, small_config, small_params, chunks):
    state = init_state(small_params, OPTIMIZER)
    for _ in range(small_config.restart_interval):
        state, _ = step(state, chunks[:BATCH])
    before = jax.device_get(state.params.codebooks["pos"])
    state, _ = step(state, chunks[:BATCH])
    after = jax.device_get(state.params.codebooks["pos"])
    dead = before.hits.sum(axis=1) == 0
    assert 0 < dead.sum() < dead.size, "the fixture should leave some codes unused"
    # More codes may be dead than the batch has vectors: the rest wait for the next restart.
    restarted = (np.linalg.norm(after.codes - before.codes, axis=-1) > 0) & dead
    for level in range(dead.shape[0]):
        assert restarted[level].sum() == min(dead[level].sum(), BATCH * small_config.num_latents)
    assert int(after.cursor) == 1


def test_the_optimizer_knows_the_networks_alone(small_params):
    moments = [leaf for leaf in jax.tree.leaves(OPTIMIZER.init(small_params.networks)) if np.ndim(leaf)]
    assert {leaf.size for leaf in moments} == {count_parameters(small_params.networks)}


def test_continuous_steps_leave_the_codebooks_alone(small_config, small_params, chunks):
    choices = draw_choices(jax.random.key(0), small_config, BATCH)
    arguments = small_params.networks, small_params.codebooks, small_config, jnp.asarray(chunks[:BATCH]), choices
    _, (outputs, codebooks) = loss_and_codebooks(*arguments, continuous=True)
    chex.assert_trees_all_equal(codebooks, small_params.codebooks)
    assert not codebooks["pos"].initialized
    for group in GROUP_NAMES:
        assert float(outputs[group].losses.commitment) == 0.0
        assert not np.asarray(outputs[group].indices).any()


def test_standardize_keeps_the_function_it_promises(small_config, small_params, chunks):
    """Standardised networks on x do what the drawn ones do on (x - mean) / spread, away from the zero-padded ends."""
    from rdt2_jax.action_tokenizer.codec import _convolve

    mean, std = chunks.mean((0, 1)), chunks.std((0, 1))
    moved = standardize(small_params, jnp.asarray(mean), jnp.asarray(std))
    channels = [0, 1, 2, 10, 11, 12]
    spread = np.sqrt(np.mean(std[channels] ** 2))
    given, scaled = chunks[..., channels], ((chunks - mean) / spread)[..., channels]
    ours = _convolve(moved.networks["pos"].encoder.conv_in, jnp.asarray(given))
    theirs = _convolve(small_params.networks["pos"].encoder.conv_in, jnp.asarray(scaled))
    np.testing.assert_allclose(ours[:, 1:-1], theirs[:, 1:-1], rtol=1e-4, atol=1e-4)


def test_losses_of_the_shape_errors(small_config, small_params, chunks):
    with pytest.raises(DataError, match=r"expected: \(batch, 24, 20\)"):
        loss(small_params, small_config, chunks[:, :23])
