"""Table, loader, sharding and checkpoints together, on a transformer with stacked layers and blocks in groups."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_transformer import (
    EMBED,
    FULL_BLOCKS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    WINDOWED_BLOCKS,
    Transformer,
    published_tensors,
    transformer_specs,
    transformer_table,
)

from rdt2_jax.checkpoints import restore, save
from rdt2_jax.errors import CheckpointError
from rdt2_jax.sharding import DEFAULT_RULES, abstract_sharded, make_mesh, shardings
from rdt2_jax.weights.loader import export, load
from rdt2_jax.weights.sources import ArraySource
from rdt2_jax.weights.table import Ignored


def load_arrays(arrays: dict[str, np.ndarray], **options: Any) -> Transformer:
    return load(transformer_table(), transformer_specs(), ArraySource(arrays), **options)[0]


def test_loaded_projections_compute_what_the_published_ones_do() -> None:
    arrays = published_tensors()
    params = load_arrays(arrays)
    x = np.random.default_rng(1).standard_normal((3, EMBED), np.float32)
    for i in range(LAYERS):
        prefix = f"model.layers.{i}"
        query = x @ arrays[f"{prefix}.self_attn.q_proj.weight"].T + arrays[f"{prefix}.self_attn.q_proj.bias"]
        ours = jnp.einsum("be,ehd->bhd", x, params.layers.attention.q[i]) + params.layers.attention.q_bias[i]
        np.testing.assert_allclose(ours, query.reshape(3, HEADS, HEAD_DIM), atol=1e-5)
        key = x @ arrays[f"{prefix}.self_attn.k_proj.weight"].T
        ours = jnp.einsum("be,ehd->bhd", x, params.layers.attention.k[i])
        np.testing.assert_allclose(ours, key.reshape(3, KV_HEADS, HEAD_DIM), atol=1e-5)
        out = query @ arrays[f"{prefix}.self_attn.o_proj.weight"].T
        ours = jnp.einsum("bhd,hde->be", query.reshape(3, HEADS, HEAD_DIM), params.layers.attention.o[i])
        np.testing.assert_allclose(ours, out, atol=1e-5)
        np.testing.assert_array_equal(params.layers.gate_up[i, 0], arrays[f"{prefix}.mlp.gate_proj.weight"].T)
        np.testing.assert_array_equal(params.layers.gate_up[i, 1], arrays[f"{prefix}.mlp.up_proj.weight"].T)


def test_blocks_in_groups_find_their_place() -> None:
    arrays = published_tensors()
    vision = load_arrays(arrays).vision
    for group, blocks in enumerate(WINDOWED_BLOCKS):
        for place, block in enumerate(blocks):
            np.testing.assert_array_equal(
                vision.windowed.norm[group, place], arrays[f"visual.blocks.{block}.norm.weight"]
            )
    for group, block in enumerate(FULL_BLOCKS):
        fused = arrays[f"visual.blocks.{block}.attn.qkv.weight"].reshape(3, HEADS, HEAD_DIM, EMBED)
        np.testing.assert_array_equal(vision.full.qkv[group], fused.transpose(0, 3, 1, 2))


def test_both_spellings_of_the_layout_load_and_the_older_one_is_written(tmp_path) -> None:
    arrays = published_tensors()
    renamed = {
        name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.")
        else name: array
        for name, array in arrays.items()
    }
    params = load_arrays(renamed)
    chex.assert_trees_all_equal(params, load_arrays(arrays))
    export(transformer_table(), params, tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    chex.assert_trees_all_equal(written, arrays)


def test_a_shorter_model_takes_the_first_layers_and_says_what_it_leaves() -> None:
    arrays = published_tensors()
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.2\.norm\.weight"):
        load(transformer_table(), transformer_specs(layers=2), ArraySource(arrays))
    rest = Ignored("model.layers.{i}.*", "the policy reads two layers", values={"i": range(2, LAYERS)})
    params, report = load(transformer_table((rest,)), transformer_specs(layers=2), ArraySource(arrays))
    whole = load_arrays(arrays)
    chex.assert_trees_all_equal(params.layers, jax.tree.map(lambda leaf: leaf[:2], whole.layers))
    assert len(report.ignored) == 9 * 2
    assert set(report.ignored.values()) == {"the policy reads two layers"}


def test_from_published_files_through_two_meshes_and_back(tmp_path, eight_devices: list[Any]) -> None:
    """bf16 weights: loaded on one mesh, saved, restored on another, exported: not a bit changes."""
    arrays = published_tensors(dtype=jnp.bfloat16)
    specs = transformer_specs(jnp.bfloat16)
    first, _ = shardings(specs, DEFAULT_RULES, make_mesh({"fsdp": 4, "tensor": 2}, eight_devices))
    second, _ = shardings(specs, DEFAULT_RULES, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, eight_devices))
    params, _ = load(transformer_table(), specs, ArraySource(arrays), shardings=first)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == first
    save(tmp_path / "checkpoint", {"params": params}, {"step": 1})
    restored = restore(tmp_path / "checkpoint", "params", abstract_sharded(specs, second))
    assert isinstance(restored, Transformer)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == second
    export(transformer_table(), restored, tmp_path / "model.safetensors")
    chex.assert_trees_all_equal(load_file(tmp_path / "model.safetensors"), arrays)
