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


@pytest.fixture(scope="module")
def one_and_eight(eight_devices, step, small_params):
    """`run(dtype)`: after each of four steps, (state, outputs) on one device and on eight, both from the same state.

    The four are every kind of step: first batch, plain, restart (the interval is 2), plain. The networks are
    standardised as in training, and no two chunks are alike: equal vectors (arms and grippers at rest) become equal
    codes, and rounding would choose between them.
    """
    chunks = smooth_chunks(4 * BATCH, seed=6)
    chunks += np.random.default_rng(0).normal(scale=0.01, size=chunks.shape)
    params = standardize(small_params, jnp.asarray(chunks.mean((0, 1))), jnp.asarray(chunks.std((0, 1))))
    mesh = make_mesh({"data": 8}, devices=eight_devices)

    def run(dtype):
        state = init_state(jax.tree.map(lambda p: p.astype(dtype) if is_float(p) else p, params), OPTIMIZER)
        for batch in chunks.reshape(4, BATCH, *chunks.shape[1:]).astype(dtype):
            placed = jax.device_put(state, replicated(mesh)), jax.device_put(batch, batch_sharding(mesh))
            one, eight = step(state, jnp.asarray(batch)), step(*placed)
            yield one, eight
            state = one[0]

    return run


def test_eight_devices_equal_one(one_and_eight):
    """In double precision, so that what is compared is the algorithm and not the order of its sums."""
    with jax.enable_x64(True):
        for one, eight in one_and_eight(np.float64):
            assert one[0].params.networks["pos"].encoder.conv_in.kernel.dtype == np.float64
            chex.assert_trees_all_close(jax.device_get(eight), jax.device_get(one), rtol=0, atol=1e-6)
            for group in GROUP_NAMES:
                np.testing.assert_array_equal(eight[1][group].indices, one[1][group].indices)
                np.testing.assert_array_equal(
                    eight[0].params.codebooks[group].hits, one[0].params.codebooks[group].hits
                )


def test_eight_devices_in_single_precision(one_and_eight):
    """A convolution over four chunks sums in another order than one over thirty-two; rarely, a code falls otherwise."""
    for one, eight in one_and_eight(np.float32):
        for group in GROUP_NAMES:
            ours, theirs = eight[1][group], one[1][group]
            assert np.mean(np.asarray(ours.indices) == np.asarray(theirs.indices)) >= 0.98
            np.testing.assert_allclose(ours.losses.total, theirs.losses.total, rtol=1e-3)
            copies = [np.asarray(shard.data) for shard in eight[0].params.codebooks[group].codes.addressable_shards]
            assert len(copies) == 8
            for copy in copies[1:]:
                np.testing.assert_array_equal(copy, copies[0])


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


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
