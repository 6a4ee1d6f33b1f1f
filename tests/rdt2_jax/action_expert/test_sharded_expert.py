"""The expert over eight devices: velocity, loss and gradients as on one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.action_expert import flow, model
from rdt2_jax.action_expert.checkpoint import LoadedExpert
from rdt2_jax.action_expert.config import preset
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import named_leaves
from rdt2_jax.qwen2_5_vl.text import KeysValues
from rdt2_jax.sharding import Layout, batch_sharding, make_mesh

MESHES = {
    "tensor=2": {"tensor": 2},
    "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data=8": {"data": 8},
}


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape, np.float32))  # noqa: E731
    layers = tuple(KeysValues(normal(8, 2, 12, 16), normal(8, 2, 12, 16)) for _ in range(4))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    valid = jnp.arange(12) >= jnp.arange(8)[:, None] // 2
    return {
        "actions": normal(8, 24, 20),
        "noise": normal(8, 24, 20),
        "t": jnp.linspace(0.05, 0.95, 8),
        "condition": model.Condition(stacked, valid),
        "state": normal(8, 20),
    }


@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_sharded_equals_unsharded(
    sizes: dict[str, int], golden_expert: LoadedExpert, batch: dict[str, Any], eight_devices: list[Any]
) -> None:
    config, params = golden_expert.config, golden_expert.params
    layout = Layout(make_mesh(sizes, eight_devices))
    rows = batch_sharding(layout.mesh, layout.rules)
    shardings, _ = layout.shardings(model.param_specs(config))

    def loss(compute: Compute) -> Any:
        function = jax.value_and_grad(lambda p, b: flow.loss_at(p, config, **b, compute=compute))
        return jax.jit(function)

    def run(compute: Compute) -> Any:
        return jax.jit(lambda p, b: flow.sample(p, config, b["noise"], b["condition"], b["state"], compute))

    placed = {name: jax.device_put(value, rows) if name != "condition" else value for name, value in batch.items()}
    sharded, laid_out = jax.device_put(params, shardings), Compute(layout=layout)
    np.testing.assert_allclose(run(laid_out)(sharded, placed), run(Compute())(params, batch), atol=2e-5)
    expected, gradients = loss(Compute())(params, batch)
    found, sharded_gradients = loss(laid_out)(sharded, placed)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for name, gradient in named_leaves(gradients).items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(
            named_leaves(sharded_gradients)[name], gradient, atol=2e-5 * scale + 1e-9, err_msg=name
        )


def test_one_row_on_each_device(golden_expert: LoadedExpert, batch: dict[str, Any], eight_devices: list[Any]) -> None:
    """Over data and fsdp together, beside tensor: where modulations were left to XLA, the velocity was another."""
    config, params = golden_expert.config, golden_expert.params
    layout = Layout(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, eight_devices))
    half = jax.tree.map(lambda x: x[:4], {name: value for name, value in batch.items() if name != "condition"})
    condition = batch["condition"]
    read = model.Condition(jax.tree.map(lambda x: x[:, :4], condition.keys_values), condition.valid[:4])
    rows, (shardings, _) = batch_sharding(layout.mesh, layout.rules), layout.shardings(model.param_specs(config))

    def run(compute: Compute) -> Any:
        def loss(p: Any, b: Any) -> Any:
            found = model.velocity(p, config, b["noise"], b["t"], read, b["state"], compute)
            return jnp.mean(jnp.square(found - b["actions"])), found

        return jax.jit(jax.grad(loss, has_aux=True))

    placed = {name: jax.device_put(value, rows) for name, value in half.items()}
    gradients, velocity = run(Compute())(params, half)
    found_gradients, found = run(Compute(layout=layout))(jax.device_put(params, shardings), placed)
    np.testing.assert_allclose(found, velocity, atol=2e-5)
    for name, gradient in named_leaves(gradients).items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(
            named_leaves(found_gradients)[name], gradient, atol=2e-5 * scale + 1e-9, err_msg=name
        )


def test_published_size_over_meshes(eight_devices: list[Any]) -> None:
    """Nothing of the published expert is replicated but small things, up to as many devices as it has key heads."""
    specs = model.param_specs(preset("rdt2"))
    for sizes in ({"tensor": 2}, {"tensor": 4}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        _, report = Layout(make_mesh(sizes, eight_devices)).shardings(specs)
        assert not [fallback for fallback in report.fallbacks if fallback.nbytes > 2**20], sizes
    _, report = Layout(make_mesh({"tensor": 8}, eight_devices)).shardings(specs)
    assert {fallback.name for fallback in report.fallbacks} == {"layers.self_attention.key_value.weight"}
