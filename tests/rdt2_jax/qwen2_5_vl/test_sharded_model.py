"""The model over eight devices: the same numbers as on one, and what travels between them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qwen
from qwen_stages import model_inputs
from small_qwen import small_config

from rdt2_jax.checkpoints import restore, save
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import from_named_leaves, initialize, named_leaves
from rdt2_jax.qwen2_5_vl import model, text
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, preset
from rdt2_jax.qwen2_5_vl.generate import generate_jit
from rdt2_jax.sharding import Layout, abstract_sharded, batch_sharding, make_mesh, replicated

MESHES = {
    "tensor=2": {"tensor": 2},
    "fsdp=4": {"fsdp": 4},
    "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data=8": {"data": 8},
}


@pytest.fixture(scope="module")
def config() -> Qwen25VLConfig:
    return small_config()


@pytest.fixture(scope="module")
def params(config: Qwen25VLConfig) -> model.Qwen25VLParams:
    values = initialize(model.param_specs(config), jax.random.key(0))
    # of order one from stage to stage, but not so large that attention picks single keys and rounding decides which
    named = named_leaves(values)
    larger = {name: 5 * x if name.endswith("weight") and "patch" not in name else x for name, x in named.items()}
    return from_named_leaves(values, larger | {"text.embedding": 20 * values.text.embedding})


@pytest.fixture(scope="module")
def inputs(config: Qwen25VLConfig) -> model.ModelInputs:
    return model_inputs(config, tiny_qwen.make_prompts((1, 8, 6), words=(7, 4, 5, 6, 3, 2, 8, 1)))


def laid_out(inputs: model.ModelInputs, layout: Layout) -> model.ModelInputs:
    rows = batch_sharding(layout.mesh, layout.rules)
    return inputs.replace(
        input_ids=jax.device_put(inputs.input_ids, rows),
        valid=jax.device_put(inputs.valid, rows),
        patches=jax.device_put(inputs.patches, rows),
    )


forward = jax.jit(model.forward, static_argnums=(1, 3))


@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_sharded_forward_equals_unsharded(
    sizes: dict[str, int], config: Qwen25VLConfig, params: Any, inputs: Any, eight_devices: list[Any]
) -> None:
    layout = Layout(make_mesh(sizes, eight_devices))
    shardings, _ = layout.shardings(model.param_specs(config))
    expected = forward(params, config, inputs, Compute())
    sharded = jax.device_put(params, shardings)
    found = forward(sharded, config, laid_out(inputs, layout), Compute(layout=layout))
    assert float(jnp.abs(expected).max()) > 0.5
    np.testing.assert_allclose(found, expected, atol=5e-5 * float(jnp.abs(expected).max()))


def test_sharded_gradients_equal_unsharded(
    config: Qwen25VLConfig, params: Any, inputs: Any, eight_devices: list[Any]
) -> None:
    layout = Layout(make_mesh({"fsdp": 4, "tensor": 2}, eight_devices))
    shardings, _ = layout.shardings(model.param_specs(config))

    def loss(params: Any, inputs: model.ModelInputs, compute: Compute) -> jax.Array:
        logits = model.forward(params, config, inputs, compute)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs.input_ids[..., None], axis=-1)
        return -jnp.mean(picked)

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    expected = gradient(params, inputs, Compute(remat="full"))
    found = gradient(jax.device_put(params, shardings), laid_out(inputs, layout), Compute(remat="full", layout=layout))
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(found), strict=True):
        scale = float(jnp.abs(a).max())
        np.testing.assert_allclose(b, a, atol=2e-3 * scale + 1e-9, err_msg=jax.tree_util.keystr(path))


def test_sharded_generation_is_the_same_text(
    config: Qwen25VLConfig, params: Any, inputs: Any, eight_devices: list[Any]
) -> None:
    layout = Layout(make_mesh({"fsdp": 2, "tensor": 2}, eight_devices))
    shardings, _ = layout.shardings(model.param_specs(config))
    options = {"max_new_tokens": 4, "stop_ids": (511,), "pad_id": 0}
    expected = generate_jit(params, config, inputs, Compute(), **options)
    found = generate_jit(
        jax.device_put(params, shardings), config, laid_out(inputs, layout), Compute(layout=layout), **options
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_looking_tokens_up_never_gathers_the_table(sizes: dict[str, int], eight_devices: list[Any]) -> None:
    """Read from the compiled program, with a table of the published length: nothing of its size travels."""
    config = preset("tiny")
    layout = Layout(make_mesh(sizes, eight_devices))
    specs = model.param_specs(config)
    shardings, _ = layout.shardings(specs)
    ids = jax.ShapeDtypeStruct((8, 24), jnp.int32, sharding=batch_sharding(layout.mesh))
    params = abstract_sharded(specs, shardings).text

    def looked_up(params: text.TextParams, ids: jax.Array) -> jax.Array:
        return text.embed_tokens(params, ids, Compute(layout=layout))

    def gathered(params: text.TextParams, ids: jax.Array) -> jax.Array:
        whole = jax.lax.with_sharding_constraint(params.embedding, replicated(layout.mesh))
        return jnp.take(whole, ids, axis=0)

    table_part = config.text.vocab_size * config.text.hidden_size // (sizes["fsdp"] * sizes["tensor"])
    activations = 8 * 24 * config.text.hidden_size
    assert table_part > 50 * activations
    moved = collectives(jax.jit(looked_up).lower(params, ids).compile().as_text())
    assert moved, "the rows of the batch must travel to the columns of the table somehow"
    for kind, shape, size in moved:
        assert size <= activations, (kind, shape)
    would_move = collectives(jax.jit(gathered).lower(params, ids).compile().as_text())
    assert max(size for _, _, size in would_move) > table_part, "the test would not notice a table that is gathered"


@pytest.mark.parametrize("told", [True, False], ids=["with the layout", "without it"])
def test_learning_never_gathers_the_logits_of_the_whole_batch(told: bool, eight_devices: list[Any]) -> None:
    """Forward and backward of one layer and the head at the width of the 7B, read from the compiled program.

    Without the layout the compiler does gather them, which shows that the test would notice.
    """
    layout = Layout(make_mesh({"fsdp": 4, "tensor": 2}, eight_devices))
    config = preset("7b").with_layers(1).text
    specs = text.text_specs(config, jnp.bfloat16)
    compute = Compute(dtype=jnp.float32, layout=layout, remat="full")
    batch, length, supervised = 64, 96, 32

    def loss(params: text.TextParams, ids: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        embeddings = text.embed_tokens(params, ids, compute)
        hidden = text.prefill(params, config, embeddings, positions, valid, compute).hidden[:, -supervised:]
        logits = text.logits(params, config, hidden, compute=compute if told else None)
        targets = ids[:, -supervised:, None]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1))

    def rows(*shape: int, dtype: Any = jnp.int32, where: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where or batch_sharding(layout.mesh))

    inputs = rows(batch, length), rows(3, batch, length, where=replicated(layout.mesh)), rows(batch, length, dtype=bool)
    params = abstract_sharded(specs, layout.shardings(specs)[0])
    moved = collectives(jax.jit(jax.grad(loss)).lower(params, *inputs).compile().as_text())
    assert moved
    of_the_whole_batch = [shape for _, shape, _ in moved if shape == (batch, supervised, config.vocab_size // 2)]
    assert bool(of_the_whole_batch) is not told


def collectives(program: str) -> list[tuple[str, tuple[int, ...], int]]:
    """(kind, shape, numbers) of every array that a compiled program's collectives give."""
    found = []
    pattern = r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    for result, kind in re.findall(pattern, program):
        for dims in re.findall(r"\w+\[([\d,]*)\]", result):
            shape = tuple(int(n) for n in dims.split(",") if n)
            found.append((kind, shape, int(np.prod(shape))))
    return found


def test_saved_on_one_mesh_restored_on_another(
    config: Qwen25VLConfig, params: Any, inputs: Any, eight_devices: list[Any], tmp_path: Path
) -> None:
    specs = model.param_specs(config)
    first = Layout(make_mesh({"fsdp": 4, "tensor": 2}, eight_devices))
    second = Layout(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, eight_devices))
    save(tmp_path / "checkpoint", {"params": jax.device_put(params, first.shardings(specs)[0])}, {})
    shardings, _ = second.shardings(specs)
    restored = restore(tmp_path / "checkpoint", "params", abstract_sharded(specs, shardings))
    chex.assert_trees_all_equal(restored, params)
    assert jax.tree.map(lambda x: x.sharding, restored) == shardings
    expected = forward(params, config, inputs, Compute())
    found = forward(restored, config, laid_out(inputs, second), Compute(layout=second))
    np.testing.assert_allclose(found, expected, atol=5e-5 * float(jnp.abs(expected).max()))
