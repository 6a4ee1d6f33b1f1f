"""The published checkpoint layout: read, written, and refused with names; the same parameters on any mesh."""

from __future__ import annotations

import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rdt2_jax import checkpoints
from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer, load_tokenizer, save_tokenizer
from rdt2_jax.action_tokenizer.tokenizer import param_specs
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.errors import CheckpointError
from rdt2_jax.params import abstract
from rdt2_jax.sharding import DEFAULT_RULES, make_mesh, shardings

GOLDEN = Path(__file__).parents[2] / "golden"
CODES = "pos_vqvae.vq.quantizers.1.codebook.weight"


def change(folder, changes):
    """Rewrites model.safetensors with some tensors replaced (None: removed)."""
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")


def test_round_trip_is_exact(tiny, tmp_path):
    save_tokenizer(tiny, tmp_path)
    chex.assert_trees_all_equal(load_tokenizer(tmp_path).params, tiny.params)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / "rvq_tiny"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value)


def test_written_aliases_are_the_published_ones(tiny, tmp_path):
    """torch's safetensors loader finds a tensor of two names through the header."""
    save_tokenizer(tiny, tmp_path)
    with (
        safe_open(tmp_path / "model.safetensors", "np") as ours,
        safe_open(GOLDEN / "rvq_tiny" / "model.safetensors", "np") as theirs,
    ):
        assert ours.metadata() == {**theirs.metadata(), "format": "pt"}


def test_either_name_of_a_codebook(published_folder, small_params):
    codes = load_file(published_folder / "model.safetensors")[CODES]
    change(published_folder, {CODES: None, CODES.replace(".codebook", ""): codes})
    chex.assert_trees_all_equal(load_tokenizer(published_folder).params.networks, small_params.networks)


def test_two_names_that_disagree(published_folder):
    codes = load_file(published_folder / "model.safetensors")[CODES]
    change(published_folder, {CODES.replace(".codebook", ""): codes + 1})
    with pytest.raises(CheckpointError, match=r"quantizers\.1"):
        load_tokenizer(published_folder)


def test_every_wrong_tensor_is_named_at_once(published_folder):
    change(
        published_folder,
        {
            "rot_vqvae.encoder.conv_in.bias": None,
            "grip_vqvae.decoder.conv_out.weight": np.zeros((3, 8, 3), np.float32),
            "pos_vqvae.vq.quantizers.7.in_proj.bias": np.zeros(4, np.float32),
            "pos_vqvae.encoder.conv_in.bias": np.zeros(8, np.float16),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(published_folder)
    message = str(caught.value)
    assert str(published_folder / "model.safetensors") in message
    for name in (
        "rot_vqvae.encoder.conv_in.bias",
        "grip_vqvae.decoder.conv_out.weight",
        "pos_vqvae.vq.quantizers.7.in_proj.bias",
        "pos_vqvae.encoder.conv_in.bias",
    ):
        assert name in message


def test_config_of_another_size(published_folder):
    config = json.loads((published_folder / "config.json").read_text())
    config["n_codebooks"]["pos"] = 4
    (published_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"pos_vqvae\.vq\.quantizers\.3"):
        load_tokenizer(published_folder)


def test_truncated_and_missing_weights(published_folder):
    path = published_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_tokenizer(published_folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_tokenizer(published_folder)


def test_normalizer_beside_the_checkpoint(tmp_path, small_config, small_params, chunks):
    normalizer = LinearNormalizer.fit_actions(chunks)
    save_tokenizer(LoadedTokenizer(small_config, small_params, normalizer), tmp_path)
    loaded = load_tokenizer(tmp_path)
    np.testing.assert_array_equal(loaded.normalize(chunks), normalizer.normalize(chunks))
    np.testing.assert_allclose(loaded.unnormalize(loaded.normalize(chunks)), chunks, atol=1e-6)


def test_published_normalizer(published_folder, chunks):
    loaded = load_tokenizer(published_folder, normalizer=GOLDEN / "normalizer" / "normalizer_per_dim.pt")
    assert loaded.normalizer is not None
    assert not np.array_equal(loaded.normalize(chunks), chunks)
    with pytest.raises(CheckpointError, match=r"nowhere\.pt"):
        load_tokenizer(published_folder, normalizer=published_folder / "nowhere.pt")


def test_without_a_normalizer_units_are_normalised(published_folder, chunks):
    loaded = load_tokenizer(published_folder)
    assert loaded.normalizer is None
    assert loaded.normalize(chunks) is chunks


def test_saved_on_one_mesh_restored_on_others(eight_devices, tmp_path, small_config, small_params):
    """The tokenizer's own parameters, split by the default rules: (4, 2) to (2, 4) and to one device."""
    specs = param_specs(small_config)

    def placed(data, fsdp):
        mesh = make_mesh({"data": data, "fsdp": fsdp}, devices=eight_devices[: data * fsdp])
        tree, _ = shardings(specs, DEFAULT_RULES, mesh)
        return tree

    saved = jax.device_put(small_params, placed(4, 2))
    checkpoints.save(tmp_path / "checkpoint", {"params": saved}, {"step": 1})
    for data, fsdp in ((2, 4), (1, 1)):
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract(specs),
            placed(data, fsdp),
        )
        restored = checkpoints.restore(tmp_path / "checkpoint", "params", target)
        chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(small_params))
        kernel = restored.networks["pos"].encoder.stages[2].block_2.conv_1.kernel
        assert len(kernel.sharding.device_set) == data * fsdp
        assert kernel.addressable_shards[0].data.size * fsdp == kernel.size
