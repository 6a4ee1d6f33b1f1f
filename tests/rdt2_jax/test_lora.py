"""Adapters: nothing at first, W + scale B A afterwards, over integers too, and no gradient for what they adapt."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_qwen import small_config, small_inputs, small_params

from rdt2_jax import lora
from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.linear import Linear, linear
from rdt2_jax.params import initialize, named_leaves
from rdt2_jax.quantization import quantize
from rdt2_jax.qwen2_5_vl.int8 import int8_weights, quantize_decoder
from rdt2_jax.qwen2_5_vl.model import forward, param_specs, unstacked

CONFIG = lora.LoraConfig(rank=3, alpha=6.0, dropout=0.0)


def adapters_of(shapes, seed=0):
    """Random adapters, B not zero."""
    specs = lora.adapter_specs(shapes, int8_weights(shapes), CONFIG)
    made = initialize(specs, jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), made)


@pytest.fixture(scope="module")
def model():
    config = small_config()
    return config, small_params(config), small_inputs(config)


def test_specs_follow_the_weights():
    specs = lora.adapter_specs(param_specs(small_config()), int8_weights(param_specs(small_config())), CONFIG)
    weights = named_leaves(param_specs(small_config()))
    assert len(specs) == 7
    for name, adapter in specs.items():
        shape, axes = weights[name].shape, weights[name].axes
        inputs = 2 if "attention.out" in name else 1
        assert adapter.down.shape == (shape[0], 3, *shape[-inputs:])
        assert adapter.down.axes == ("layers", "rank", *axes[-inputs:])
        assert adapter.up.shape == (*shape[:-inputs], 3)
        assert adapter.up.axes == (*axes[:-inputs], "rank")


def test_new_adapters_change_nothing(model):
    config, params, inputs = model
    specs = lora.adapter_specs(param_specs(config), int8_weights(params), CONFIG)
    adapters = initialize(specs, jax.random.key(0))
    adapted = lora.attach(params, adapters, CONFIG)
    chex.assert_trees_all_equal(forward(adapted, config, inputs, Compute()), forward(params, config, inputs, Compute()))


@pytest.mark.parametrize("stacked", [True, False])
def test_attached_equals_merged(model, stacked):
    config, params, inputs = model
    if not stacked:
        params = unstacked(params)
        shapes = jax.eval_shape(lambda: params)
        adapters = {}
        whole = adapters_of(param_specs(config))
        for name in int8_weights(shapes):
            prefix, _, rest = name.partition("text.layers.")
            layer, _, weight = rest.partition(".")
            adapter = whole[f"{prefix}text.layers.{weight}"]
            adapters[name] = jax.tree.map(lambda x, i=int(layer): x[i], adapter)
    else:
        adapters = adapters_of(param_specs(config))
    merged = lora.merge(params, adapters, CONFIG)
    attached = forward(lora.attach(params, adapters, CONFIG), config, inputs, Compute())
    expected = forward(merged, config, inputs, Compute())
    assert float(jnp.abs(expected - forward(params, config, inputs, Compute())).max()) > 1e-2
    np.testing.assert_allclose(attached, expected, atol=2e-5)


def test_over_integers(model):
    config, params, inputs = model
    quantized, _ = quantize_decoder(params)
    adapters = adapters_of(param_specs(config))
    attached = forward(lora.attach(quantized, adapters, CONFIG), config, inputs, Compute())
    expected = forward(lora.merge(quantized, adapters, CONFIG), config, inputs, Compute())
    np.testing.assert_allclose(attached, expected, atol=2e-5)


def test_against_the_formula():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(4, 2, 5)).astype(np.float32)
    down, up = generator.normal(size=(3, 5)).astype(np.float32), generator.normal(size=(4, 2, 3)).astype(np.float32)
    x = generator.normal(size=(7, 5)).astype(np.float32)
    for base, tolerance in ((jnp.asarray(weight), 1e-5), (quantize(jnp.asarray(weight), 1), 0.1)):
        adapted = lora.AdaptedWeight(base, lora.Adapter(down, up), scale=0.5)
        expected = np.einsum("abi,ni->nab", weight + 0.5 * np.einsum("abr,ri->abi", up, down), x)
        np.testing.assert_allclose(linear(Linear(adapted), jnp.asarray(x)), expected, atol=tolerance)


def test_gradient_reaches_adapters_alone(model):
    """The gradient of B at the start is that of scale * A x, and the base has none because nothing asks for it."""
    config, params, inputs = model
    adapters = adapters_of(param_specs(config))

    def loss(adapters, remat):
        logits = forward(lora.attach(params, adapters, CONFIG), config, inputs, Compute(remat=remat))
        return jnp.square(logits).mean()

    gradients = jax.grad(loss)(adapters, "none")
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))
    chex.assert_trees_all_close(jax.grad(loss)(adapters, "full"), gradients, rtol=1e-4, atol=1e-6)
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    moved = [loss(jax.tree.map(lambda x, d, s=s: x + s * d, adapters, direction), "none") for s in (-1e-3, 1e-3)]
    found = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))
    np.testing.assert_allclose((moved[1] - moved[0]) / 2e-3, found, rtol=2e-2)


def test_no_product_of_the_size_of_a_weight():
    """A training step computes thin matrices only: no array of the weight's shape but the weight."""
    weight = jnp.ones((64, 48))
    adapter = lora.Adapter(jnp.ones((3, 48)), jnp.zeros((64, 3)))

    def loss(adapter, x):
        return linear(Linear(lora.AdaptedWeight(weight, adapter)), x).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter, jnp.ones((5, 48)))
    shapes = [tuple(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars if eqn.primitive.name == "dot_general"]
    assert (64, 48) not in shapes
    assert (48, 64) not in shapes


def test_dropout(model):
    config, params, inputs = model
    adapters = adapters_of(param_specs(config))
    dropping = lora.LoraConfig(rank=3, alpha=6.0, dropout=0.5)

    def run(key):
        attached = lora.attach(params, adapters, dropping, None if key is None else jax.random.key(key))
        return forward(attached, config, inputs, Compute())

    plain = forward(lora.attach(params, adapters, CONFIG), config, inputs, Compute())
    chex.assert_trees_all_equal(run(None), plain)
    chex.assert_trees_all_equal(run(1), run(1))
    assert float(jnp.abs(run(1) - run(2)).max()) > 1e-3


def test_dropout_keeps_the_mean():
    weight = lora.AdaptedWeight(
        jnp.zeros((2, 4)),
        lora.Adapter(jnp.ones((1, 4)), jnp.ones((2, 1))),
        jax.random.key_data(jax.random.key(0)),
        dropout=0.1,
    )
    x = jnp.full((20_000, 4), 3.0)
    seen = lora.dropped_out(x, weight)
    assert abs(float((seen == 0).mean()) - 0.1) < 0.01
    np.testing.assert_allclose(seen.mean(), 3.0, atol=0.03)


def test_layers_and_weights_drop_different_inputs(model):
    config, params, _ = model
    attached = lora.attach(params, adapters_of(param_specs(config)), lora.LoraConfig(rank=3), jax.random.key(0))
    keys = [
        tuple(row)
        for leaf in jax.tree.leaves(attached, is_leaf=lambda x: isinstance(x, lora.AdaptedWeight))
        if isinstance(leaf, lora.AdaptedWeight)
        for row in np.asarray(leaf.key).tolist()
    ]
    assert len(set(keys)) == len(keys) == 7 * config.text.num_layers


def test_unknown_weights_are_named(model):
    config, params, _ = model
    with pytest.raises(ConfigError, match=r"text\.layers\.nothing"):
        lora.adapter_specs(param_specs(config), {"text.layers.nothing": 1}, CONFIG)
    adapters = adapters_of(param_specs(config))
    for function in (lora.attach, lora.merge):
        with pytest.raises(ConfigError, match="no such weights"):
            function(params, {"text.nothing": next(iter(adapters.values()))}, CONFIG)
