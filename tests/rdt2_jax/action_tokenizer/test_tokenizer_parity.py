"""The tokenizer against numbers from the public implementation (tests/golden/rvq_tiny and rvq_real)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.action_tokenizer.codec import encode_latents
from rdt2_jax.action_tokenizer.quantizer import Draw, quantize_and_update
from rdt2_jax.action_tokenizer.tokenizer import decode, encode, group_channels, reconstruction_loss
from rdt2_jax.action_tokenizer.training import loss, loss_and_codebooks
from rdt2_jax.actions.layout import GROUP_NAMES
from rdt2_jax.params import named_leaves

DECODED_ATOL = 1e-5
LATENT_ATOL = 1e-5
LOSS_RTOL = 1e-6
GRADIENT_TOLERANCE = {"pos": 5e-5, "grip": 5e-5, "rot": 5e-4}
EMA_TOLERANCE = 1e-5


def relative(a, b):
    """|difference| / (1 + |reference|), the measure of the goldens' README."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.max(np.abs(a - b) / (1 + np.abs(b)))


class TestTiny:
    def test_tokens_are_exact(self, tiny, tiny_io):
        np.testing.assert_array_equal(encode(tiny.params, tiny.config, tiny_io["x"]), tiny_io["token_ids"])

    def test_decoded_chunks(self, tiny, tiny_io):
        for ids, expected in (("token_ids", "decoded"), ("random_token_ids", "random_decoded")):
            decoded = decode(tiny.params, tiny.config, jnp.asarray(tiny_io[ids], jnp.int32))
            np.testing.assert_allclose(decoded, tiny_io[expected], rtol=0, atol=DECODED_ATOL)

    @pytest.mark.parametrize("group", GROUP_NAMES)
    def test_latents(self, tiny, tiny_io, group):
        latents = encode_latents(tiny.params.networks[group].encoder, group_channels(tiny_io["x"], group))
        np.testing.assert_allclose(np.swapaxes(latents, 1, 2), tiny_io[f"latent_{group}"], rtol=0, atol=LATENT_ATOL)

    @pytest.mark.parametrize("group", GROUP_NAMES)
    def test_reconstruction_losses(self, tiny_io, group):
        target = group_channels(tiny_io["x"], group)
        for name, source in (("decoded", "decoded"), ("noisy", "x_noisy"), ("self", "x")):
            value = reconstruction_loss(group, group_channels(jnp.asarray(tiny_io[source]), group), target)
            np.testing.assert_allclose(
                value, tiny_io[f"calculate_loss_{name}_{group}"], rtol=LOSS_RTOL, atol=1e-6 if group == "rot" else 1e-12
            )

    @pytest.mark.parametrize("group", GROUP_NAMES)
    def test_training_losses_with_fixed_codes(self, tiny, tiny_io, group):
        _, outputs = loss(tiny.params, tiny.config, tiny_io["x"])
        output = outputs[group]
        indices = np.asarray(output.indices).reshape(-1, tiny.config.num_levels(group))
        np.testing.assert_array_equal(indices, tiny_io[f"fwd_{group}_indices"])
        np.testing.assert_allclose(output.reconstruction, tiny_io[f"fwd_{group}_recon"], rtol=0, atol=DECODED_ATOL)
        losses = output.losses
        for ours, theirs in (
            (losses.total, "total"),
            (losses.reconstruction, "recon"),
            (losses.quantization, "vq"),
            (losses.commitment, "encoder"),
            (losses.commitment, "codebook"),
        ):
            np.testing.assert_allclose(ours, tiny_io[f"fwd_{group}_loss_{theirs}"], rtol=LOSS_RTOL, atol=1e-6)

    @pytest.mark.parametrize("group", GROUP_NAMES)
    def test_gradients(self, tiny, tiny_io, published_slots, group):
        def total(networks):
            return loss(tiny.params.replace(networks=networks), tiny.config, tiny_io["x"])[0]

        gradients = named_leaves(jax.jit(jax.grad(total))(tiny.params.networks))
        checked = 0
        for name in tiny_io:
            if not name.startswith(f"grad_{group}:"):
                continue
            op, index, leaf = published_slots[f"{group}_vqvae." + name.split(":")[1]]
            ours = op.invert(np.asarray(gradients[leaf.removeprefix("networks.")])[index])
            theirs = tiny_io[name]
            assert np.max(np.abs(ours - theirs)) <= GRADIENT_TOLERANCE[group] * np.max(np.abs(theirs)), name
            checked += 1
        assert checked >= 10

    def test_codes_get_no_gradient(self, tiny, tiny_io):
        def total(codes):
            books = {g: b.replace(codes=codes[g]) for g, b in tiny.params.codebooks.items()}
            return loss(tiny.params.replace(codebooks=books), tiny.config, tiny_io["x"])[0]

        gradients = jax.grad(total)({g: b.codes for g, b in tiny.params.codebooks.items()})
        # The decoder path is straight-through and the commitment stops at the code: nothing may reach it.
        for group in GROUP_NAMES:
            np.testing.assert_array_equal(gradients[group], 0.0)


class TestCodebookUpdates:
    def test_three_steps_of_moving_averages(self, tiny, golden):
        record = golden("rvq_tiny", "train_ema.npz")
        codebooks = tiny.params.codebooks
        update = loss_and_codebooks
        for step in range(3):
            x = record[f"step{step}/x"]
            choices = {g: any_draw(tiny.config, g, len(x)) for g in GROUP_NAMES}
            _, (outputs, codebooks) = update(tiny.params.networks, codebooks, tiny.config, x, choices)
            for group in GROUP_NAMES:
                self.compare_outputs(outputs[group], record, f"step{step}/{group}", tiny.config.num_levels(group))
                compare_codebook(codebooks[group], record, f"step{step}/{group}", tiny.config.num_levels(group))

    @staticmethod
    def compare_outputs(output, record, prefix, levels):
        np.testing.assert_array_equal(np.asarray(output.indices).reshape(-1, levels), record[f"{prefix}/indices"])
        np.testing.assert_allclose(output.reconstruction, record[f"{prefix}/recon"], rtol=0, atol=DECODED_ATOL)
        for ours, theirs in (("total", "total"), ("reconstruction", "recon"), ("commitment", "encoder")):
            expected = record[f"{prefix}/loss_{theirs}"]
            np.testing.assert_allclose(getattr(output.losses, ours), expected, rtol=LOSS_RTOL, atol=1e-6)

    @pytest.mark.parametrize("variant", ["enough", "short"])
    @pytest.mark.parametrize("group", GROUP_NAMES)
    def test_restart_with_the_recorded_permutations(self, tiny, golden, variant, group):
        record = golden("rvq_tiny", "train_restart.npz")
        levels = tiny.config.num_levels(group)
        before = recorded_codebook(tiny.params.codebooks[group], record, f"{variant}/before/{group}", levels)
        network = tiny.params.networks[group]
        latents = encode_latents(network.encoder, group_channels(record[f"{variant}/x"], group))
        choices = recorded_draw(record, f"{variant}/{group}", before, levels)
        quantized, after = jax.jit(quantize_and_update, static_argnames="config")(
            network.projections, before, latents, choices, tiny.config
        )
        indices = np.asarray(quantized.indices).reshape(-1, levels)
        np.testing.assert_array_equal(indices, record[f"{variant}/{group}/indices"])
        compare_codebook(after, record, f"{variant}/after/{group}", levels)

    def test_first_batch_starts_codes_and_averages_from_data(self, golden, first_init_grip):
        """The recorded run shows the defect (averages of the random start overwrite the data): ours must not."""
        config, network, codebook, record = first_init_grip
        latents = encode_latents(network.encoder, group_channels(record["x"], "grip"))
        order = jnp.asarray(record["randperm0"], jnp.int32)[None]
        choices = Draw(order, jnp.arange(config.num_codes, dtype=jnp.int32)[None])
        quantized, after = quantize_and_update(network.projections, codebook, latents, choices, config)
        vectors = np.asarray(latents.reshape(-1, config.latent_size) @ network.projections.in_kernel[0])
        vectors = vectors + np.asarray(network.projections.in_bias[0])
        started = vectors[record["randperm0"][: config.num_codes]]
        index = np.asarray(quantized.indices).reshape(-1)
        # The published run chose the same codes: quantization comes before the averages go wrong.
        np.testing.assert_array_equal(index, record["step0/indices"][:, 0])
        hits = np.bincount(index, minlength=config.num_codes).astype(np.float64)
        sums = np.zeros_like(started, np.float64)
        np.add.at(sums, index, vectors)
        count = 0.99 + 0.01 * hits
        smoothed = (count + 1e-5) / (count.sum() + config.num_codes * 1e-5) * count.sum()
        expected = (0.99 * started + 0.01 * sums) / smoothed[:, None]
        np.testing.assert_allclose(after.codes[0], expected, rtol=1e-4, atol=1e-6)
        # Codes stay as long as the vectors they stand for; in the published run they grow a hundredfold.
        longest = np.linalg.norm(vectors, axis=-1).max()
        assert np.linalg.norm(after.codes[0], axis=-1).max() <= 1.01 * longest
        assert np.linalg.norm(record["after_step0/grip/0/weight"], axis=-1).max() > 20 * longest
        assert bool(after.initialized)


class TestRealSize:
    def test_tokens_and_chunks(self, real, golden):
        record = golden("rvq_real", "io.npz")
        np.testing.assert_array_equal(encode(real.params, real.config, record["x"]), record["token_ids"])
        decoded = decode(real.params, real.config, jnp.asarray(record["token_ids"], jnp.int32))
        np.testing.assert_allclose(decoded, record["decoded"], rtol=0, atol=DECODED_ATOL)
        for group in GROUP_NAMES:
            target = group_channels(record["x"], group)
            value = reconstruction_loss(group, group_channels(decoded, group), target)
            np.testing.assert_allclose(value, record[f"calculate_loss_{group}"], rtol=2e-6)


def any_draw(config, group, batch):
    """Choices that must not matter, because nothing is restarted."""
    levels, vectors = config.num_levels(group), batch * config.num_latents
    return Draw(
        jnp.tile(jnp.arange(vectors, dtype=jnp.int32)[::-1], (levels, 1)),
        jnp.tile(jnp.arange(config.num_codes, dtype=jnp.int32)[::-1], (levels, 1)),
    )


def recorded_draw(record, prefix, before, levels):
    """The recorded permutations as a Draw: randperm0 orders vectors, randperm1 (if any) the dead codes."""
    vector_order, code_order = [], []
    for level in range(levels):
        dead = np.flatnonzero(np.asarray(before.hits[level]).sum(axis=0) == 0)
        alive = np.flatnonzero(np.asarray(before.hits[level]).sum(axis=0) != 0)
        if f"{prefix}/{level}/randperm1" in record:
            dead = dead[record[f"{prefix}/{level}/randperm1"]]
        vector_order.append(record[f"{prefix}/{level}/randperm0"])
        code_order.append(np.concatenate([dead, alive]))
    return Draw(jnp.asarray(np.stack(vector_order), jnp.int32), jnp.asarray(np.stack(code_order), jnp.int32))


def recorded_codebook(like, record, prefix, levels):
    def stacked(name):
        return jnp.stack([jnp.asarray(record[f"{prefix}/{level}/{name}"]) for level in range(levels)])

    return like.replace(
        codes=stacked("weight"),
        ema_sum=stacked("ema_w"),
        ema_count=stacked("ema_cluster_size"),
        hits=stacked("entry_hits"),
        cursor=jnp.int32(record[f"{prefix}/0/restart_cnt"]),
    )


def compare_codebook(codebook, record, prefix, levels):
    for level in range(levels):
        for ours, theirs in (("codes", "weight"), ("ema_sum", "ema_w"), ("ema_count", "ema_cluster_size")):
            expected = record[f"{prefix}/{level}/{theirs}"]
            assert relative(getattr(codebook, ours)[level], expected) <= EMA_TOLERANCE, (prefix, level, ours)
        np.testing.assert_array_equal(codebook.hits[level], record[f"{prefix}/{level}/entry_hits"])
        assert int(codebook.cursor) == int(record[f"{prefix}/{level}/restart_cnt"])
