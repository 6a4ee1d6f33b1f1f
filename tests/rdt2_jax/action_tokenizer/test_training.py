"""The training step: on eight devices as on one, first batch, restarts, optimizer."""

from __future__ import annotations

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdt2_jax.action_tokenizer.tokenizer import encode
from rdt2_jax.action_tokenizer.training import draw_choices, init_state, loss, standardize, train_step
from rdt2_jax.actions.layout import GROUP_NAMES
from rdt2_jax.errors import DataError
from rdt2_jax.sharding import batch_sharding, make_mesh, replicated

STEPS = 5  # with restart_interval 2: first batch, plain, plain, restart, plain
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def run(config, params, batches, place_state, place_batch):
    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        choices = draw_choices(jax.random.fold_in(jax.random.key(0), state.step), config, len(batches[0]))
        return train_step(state, batch, choices, config, OPTIMIZER)

    state = place_state(init_state(jax.tree.map(jnp.copy, params), OPTIMIZER))
    losses = []
    for batch in batches:
        state, outputs = step(state, place_batch(batch))
        losses.append({group: float(output.losses.total) for group, output in outputs.items()})
    return jax.device_get(state), losses


def test_eight_devices_equal_one(eight_devices, small_config, small_params, chunks):
    batches = [np.roll(chunks, 7 * i, axis=0)[:32] for i in range(STEPS)]
    one = run(small_config, small_params, batches, lambda s: s, lambda b: b)
    mesh = make_mesh({"data": 8}, devices=eight_devices)
    eight = run(
        small_config,
        small_params,
        batches,
        lambda s: jax.device_put(s, replicated(mesh)),
        lambda b: jax.device_put(b, batch_sharding(mesh)),
    )
    chex.assert_trees_all_close(eight[0].params, one[0].params, rtol=0, atol=1e-6)
    chex.assert_trees_all_close(eight[1], one[1], rtol=1e-6)
    hits = [np.asarray(book.hits) for book in one[0].params.codebooks.values()]
    chex.assert_trees_all_equal([np.asarray(book.hits) for book in eight[0].params.codebooks.values()], hits)


def test_codebooks_are_the_same_on_every_device(eight_devices, small_config, small_params, chunks):
    mesh = make_mesh({"data": 8}, devices=eight_devices)
    state = jax.device_put(init_state(small_params, OPTIMIZER), replicated(mesh))
    choices = draw_choices(jax.random.key(0), small_config, 32)
    step = jax.jit(lambda s, b: train_step(s, b, choices, small_config, OPTIMIZER))
    state, _ = step(state, jax.device_put(chunks[:32], batch_sharding(mesh)))
    for book in state.params.codebooks.values():
        copies = [np.asarray(shard.data) for shard in book.codes.addressable_shards]
        assert len(copies) == 8
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0])


def test_loss_falls_and_codes_come_alive(small_config, small_params, chunks):
    state, losses = run(small_config, small_params, [chunks] * 40, lambda s: s, lambda b: b)
    assert int(state.step) == 40
    for group in GROUP_NAMES:
        assert losses[-1][group] < losses[0][group]
    tokens = np.asarray(encode(state.params, small_config, chunks))
    for group in GROUP_NAMES:
        assert len(np.unique(tokens[:, small_config.token_slice(group)])) > 3


def test_dead_codes_are_restarted_from_the_batch(small_config, small_params, chunks):
    state = init_state(small_params, OPTIMIZER)
    step = jax.jit(
        lambda s, b: train_step(s, b, draw_choices(jax.random.key(s.step), small_config, 64), small_config, OPTIMIZER)
    )
    for _ in range(small_config.restart_interval):
        state, _ = step(state, chunks)
    before = jax.device_get(state.params.codebooks["pos"])
    state, _ = step(state, chunks)
    after = jax.device_get(state.params.codebooks["pos"])
    dead = before.hits.sum(axis=1) == 0
    assert dead.any(), "the fixture should leave some codes unused"
    moved = np.linalg.norm(after.codes - before.codes, axis=-1)
    assert moved[dead].min() > 0
    assert int(after.cursor) == 1


def test_networks_and_codebooks_move_separately(small_config, small_params, chunks):
    """No optimizer state for codebooks, and no gradient into them: with a zero learning rate only they move."""
    frozen = optax.sgd(0.0)
    state = init_state(small_params, frozen)
    choices = draw_choices(jax.random.key(0), small_config, 64)
    state, _ = train_step(state, jnp.asarray(chunks), choices, small_config, frozen)
    chex.assert_trees_all_equal(state.params.networks, small_params.networks)
    for group in GROUP_NAMES:
        assert not np.array_equal(state.params.codebooks[group].codes, small_params.codebooks[group].codes)


def test_standardize_keeps_the_function_it_promises(small_config, small_params, chunks):
    """Standardised networks on x do what the drawn ones do on (x - mean) / std, away from the zero-padded ends."""
    from rdt2_jax.action_tokenizer.codec import _convolve

    mean, std = chunks.mean((0, 1)), chunks.std((0, 1)) + 1e-3
    moved = standardize(small_params, jnp.asarray(mean), jnp.asarray(std))
    channels = [0, 1, 2, 10, 11, 12]
    given, scaled = chunks[..., channels], ((chunks - mean) / std)[..., channels]
    ours = _convolve(moved.networks["pos"].encoder.conv_in, jnp.asarray(given))
    theirs = _convolve(small_params.networks["pos"].encoder.conv_in, jnp.asarray(scaled))
    np.testing.assert_allclose(ours[:, 1:-1], theirs[:, 1:-1], rtol=1e-4, atol=1e-4)


def test_losses_of_the_shape_errors(small_config, small_params, chunks):
    with pytest.raises(DataError, match=r"expected: \(batch, 24, 20\)"):
        loss(small_params, small_config, chunks[:, :23])
