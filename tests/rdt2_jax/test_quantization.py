"""Weights in eight bits: what rounding promises, what it costs, and the same model in every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from small_qwen import small_config, small_inputs, small_params

from rdt2_jax import quantization
from rdt2_jax.checkpoints import restore, save
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.layers.linear import Linear, linear
from rdt2_jax.params import ParamSpec, abstract, initialize, named_leaves, tree_bytes
from rdt2_jax.quantization import Int8Weight, dequantize, quantize, quantize_leaves, quantized_specs
from rdt2_jax.qwen2_5_vl import text as text_model
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, preset
from rdt2_jax.qwen2_5_vl.generate import generate_jit
from rdt2_jax.qwen2_5_vl.int8 import dequantized_decoder, int8_weights, quantize_decoder, quantized_decoder_specs
from rdt2_jax.qwen2_5_vl.model import (
    ModelInputs,
    Qwen25VLParams,
    forward,
    keys_and_values,
    param_specs,
    prefill,
    unstacked,
    with_first_layers,
)
from rdt2_jax.sharding import Layout, make_mesh

CONFIG = small_config().with_layers(2)
LAYERS = CONFIG.text.num_layers
SPECS = param_specs(CONFIG, vision=False)


@pytest.fixture(scope="module")
def params() -> Qwen25VLParams:
    """The decoder alone: it is all that is quantised."""
    return small_params(CONFIG, vision=False)


@pytest.fixture(scope="module")
def inputs() -> ModelInputs:
    return small_inputs(CONFIG, images=False)


def same(first: Any, second: Any) -> None:
    """Fails unless both trees have the same names and the same bits."""
    first, second = named_leaves(first), named_leaves(second)
    assert list(first) == list(second)
    for name, leaf in first.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(second[name]), err_msg=name, strict=True)


# --- one weight ---


@hypothesis.given(
    arrays.arrays(np.float32, (2, 3, 6), elements=st.floats(-3, 3, width=32, allow_subnormal=False)),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    st.sampled_from([1, 2]),
)
def test_rounding_is_to_the_nearest_of_255_levels_of_each_channel(weight, dtype, num_inputs):
    weight = np.where(np.abs(weight) < 1e-3, 0, weight).astype(dtype)
    inputs = tuple(range(weight.ndim - num_inputs, weight.ndim))
    quantized = quantize(jnp.asarray(weight), num_inputs)
    values, scale = np.asarray(quantized.values), np.asarray(quantized.scale)
    exact = weight.astype(np.float64)
    largest = np.abs(exact).max(axis=inputs)
    assert values.dtype == np.int8
    assert scale.dtype == np.float32
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(values.astype(int)).max(axis=inputs), np.where(largest > 0, 127, 0))
    step = (largest / 127).reshape(*largest.shape, *(1,) * num_inputs)
    assert (np.abs(np.asarray(dequantize(quantized)) - exact) <= step * (0.5 + 1e-4)).all()


def test_what_is_on_the_levels_stays():
    once = quantize(jax.random.normal(jax.random.key(0), (3, 5, 40)), 1)
    twice = quantize(dequantize(once), 1)
    np.testing.assert_array_equal(twice.values, once.values)
    np.testing.assert_allclose(twice.scale, once.scale, rtol=1e-6)


def test_channels_of_zeros_stay_zeros():
    weight = jnp.zeros((3, 4)).at[1].set(2.0)
    quantized = quantize(weight, 1)
    np.testing.assert_array_equal(dequantize(quantized), weight)
    np.testing.assert_array_equal(quantized.scale == 0, [True, False, True])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_that_are_not_finite_are_refused(wrong, dtype):
    weight = jnp.ones((4, 2, 3), dtype).at[2, 1, 0].set(wrong)
    with pytest.raises(DataError, match=r"not finite(.|\n)*mlp\.up(.|\n)*in 1 of 8 output channels"):
        quantize_leaves({"mlp": {"up": weight}}, {"mlp.up": 1})


@pytest.mark.parametrize(
    ("weight", "num_inputs"),
    [(jnp.ones((2, 3), jnp.int8), 1), (jnp.ones((2, 3)), 2), (jnp.ones((2, 3)), 0), (jnp.ones((0, 3)), 1)],
)
def test_what_is_no_weight_is_refused(weight, num_inputs):
    with pytest.raises(DataError, match="not the weight of a linear layer"):
        quantize(weight, num_inputs)


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_a_linear_layer_multiplies_with_what_the_weight_stands_for(num_inputs):
    random = np.random.default_rng(1)
    weight, bias = random.standard_normal((6, 4, 8), np.float32), random.standard_normal((6, 4)[: 3 - num_inputs])
    x = jnp.asarray(random.standard_normal({1: (5, 8), 2: (5, 4, 8)}[num_inputs], np.float32))
    bias = jnp.asarray(bias, jnp.float32)
    quantized = quantize(jnp.asarray(weight), num_inputs)
    expected = linear(Linear(dequantize(quantized), bias), x, num_inputs)
    np.testing.assert_allclose(linear(Linear(quantized, bias), x, num_inputs), expected, rtol=1e-5, atol=1e-5)


def test_scales_are_not_rounded_to_the_dtype_of_activations():
    quantized = quantize(jax.random.normal(jax.random.key(2), (64, 32)), 1)
    one_hot = jnp.eye(32, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(linear(Linear(quantized), one_hot), dequantize(quantized, jnp.bfloat16).T)


def test_rounding_16_bits_makes_no_float32_copy():
    """A stacked weight of the 7B would need 7.6 GB more for one."""
    weight = jax.ShapeDtypeStruct((4, 256, 1024), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((4, 256), jnp.float32)
    values = jax.ShapeDtypeStruct(weight.shape, jnp.int8)
    for lowered in (
        quantization._scale.lower(weight, 1),
        quantization._values.lower(weight, scale),
        quantization._squares.lower(weight),
        quantization._squared_errors.lower(weight, values, scale),
    ):
        assert lowered.compile().memory_analysis().temp_size_in_bytes < weight.size // 8


# --- the decoder ---


def test_every_linear_layer_of_the_decoder_is_named_with_its_inputs(params):
    names = int8_weights(params)
    assert set(names) == {
        f"text.layers.{name}" for name in named_leaves(params.text.layers) if name.endswith(".weight")
    }
    quantized, _ = quantize_decoder(params)
    attention, width, hidden = quantized.text.layers.attention, CONFIG.text.hidden_size, CONFIG.text.intermediate_size
    for part in (attention.query, attention.key, attention.value):
        assert part.weight.scale.shape == part.bias.shape
    assert attention.out.weight.scale.shape == quantized.text.layers.mlp.down.weight.scale.shape == (LAYERS, width)
    assert quantized.text.layers.mlp.gate.weight.scale.shape == (LAYERS, hidden)
    assert quantized.text.embedding is params.text.embedding


def test_both_layouts_hold_the_same_numbers(params):
    same(quantize_decoder(unstacked(params), head=True)[0], unstacked(quantize_decoder(params, head=True)[0]))


def test_the_declaration_is_that_of_the_arrays(params):
    specs = quantized_decoder_specs(SPECS, head=True)
    quantized, _ = quantize_decoder(params, head=True)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)  # noqa: E731
    assert shapes(abstract(specs)) == shapes(quantized)
    plain = named_leaves(SPECS)
    for name, num_inputs in int8_weights(params, head=True).items():
        found, weight = named_leaves(specs), plain[name]
        assert found[f"{name}.values"].axes == weight.axes
        assert found[f"{name}.scale"].axes == weight.axes[:-num_inputs]
        assert found[f"{name}.scale"].fallbacks == tuple(axes[:-num_inputs] for axes in weight.fallbacks)


def compiled_prefill(num_layers: int, *, images: bool) -> Any:
    """What XLA says about the memory of prefill in bfloat16 at the width of the 7B with the decoder in eight bits.

    One row of 512 tokens, with one image of 392 x 784 among them if `images`; layers stacked; nothing is allocated.
    """
    config = preset("7b").with_layers(num_layers)
    grid, tokens = (1, 28, 56), jax.ShapeDtypeStruct((1, 512), jnp.int32)
    patches = jax.ShapeDtypeStruct((1, 1, grid[1] * grid[2], config.vision.patch_dim), jnp.float32)
    inputs = ModelInputs(
        input_ids=tokens,
        valid=jax.ShapeDtypeStruct((1, 512), bool),
        positions=jax.ShapeDtypeStruct((3, 1, 512), jnp.int32),
        following=jax.ShapeDtypeStruct((1,), jnp.int32),
        patches=patches if images else None,
        grid=grid if images else None,
    )
    params = abstract(quantized_decoder_specs(param_specs(config, jnp.bfloat16, vision=images)))
    run = jax.jit(lambda params, inputs: prefill(params, config, inputs, Compute(dtype=jnp.bfloat16)))
    return run.lower(params, inputs).compile().memory_analysis()


def test_bytes_are_counted_before_and_after_there_are_arrays(params):
    specs = quantized_decoder_specs(SPECS, head=True)
    quantized, _ = quantize_decoder(params, head=True)
    found = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(quantized))
    assert tree_bytes(specs) == tree_bytes(abstract(specs)) == tree_bytes(quantized) == found


def test_the_7b_fits_a_device_of_16_gb():
    whole = param_specs(preset("7b"), jnp.bfloat16)
    quantized, with_head = quantized_decoder_specs(whole), quantized_decoder_specs(whole, head=True)
    assert tree_bytes(whole) > 16e9
    assert tree_bytes(quantized) < 10.1e9
    assert tree_bytes(with_head) < 9.6e9


def test_prefill_of_the_7b_fits_beside_its_weights():
    """Weights, keys, values and hidden states, and everything in between, as it is compiled for the CPU: there products
    of 16 bits are computed in float32, from copies of the weights that other devices do not need.

    Layers are scanned: what one more of them takes is told from a decoder of two and one of four, and added for all.
    """
    layers = preset("7b").text.num_layers
    two, four = (compiled_prefill(count, images=False) for count in (2, 4))
    temporary = (four.temp_size_in_bytes - two.temp_size_in_bytes) / 2
    output = (four.output_size_in_bytes - two.output_size_in_bytes) / 2
    assert 2 * 512 * 4 * 128 * 2 <= output < 2e6, "keys and values of one layer"
    assert 0 <= temporary < 2e6, "a scanned layer must use the memory of the one before it"
    seeing = compiled_prefill(2, images=True)
    beside = seeing.temp_size_in_bytes + seeing.output_size_in_bytes + (layers - 2) * (temporary + output)
    weights = tree_bytes(quantized_decoder_specs(param_specs(preset("7b"), jnp.bfloat16)))
    assert weights + beside < 14e9


def test_quantised_declarations_have_no_initial_values():
    with pytest.raises(ConfigError, match=r"no initial values(.|\n)*quantise the weights"):
        initialize(quantized_specs({"a": ParamSpec((2, 3), (None, None))}, {"a": 1}), jax.random.key(0))


def test_the_report_says_what_was_lost_and_gained(params):
    quantized, report = quantize_decoder(params, head=True)
    assert {leaf.name for leaf in report.leaves} == set(int8_weights(params, head=True))
    before, after = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, quantized))
    assert (report.bytes_before, report.bytes_after) == (before, after)
    originals, rounded = named_leaves(params), named_leaves(dequantized_decoder(quantized))
    for leaf in report.leaves:
        exact, found = np.asarray(originals[leaf.name], np.float64), np.asarray(rounded[leaf.name])
        expected = np.sqrt(np.square(found - exact).mean() / np.square(exact).mean())
        assert leaf.relative_error == pytest.approx(expected, rel=1e-3)
        assert 0.003 < leaf.relative_error < 0.015
        assert leaf.bytes_before == originals[leaf.name].nbytes
        assert f"{leaf.name} {leaf.shape}: relative rms error {leaf.relative_error:.2%}" in str(report)


def test_originals_are_freed_one_by_one_on_request(params):
    copy = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf), copy=True), params)
    quantized, _ = quantize_decoder(copy, delete=True)
    weights = int8_weights(params)
    assert {name for name, leaf in named_leaves(copy).items() if leaf.is_deleted()} == set(weights)
    same(quantized, quantize_decoder(params)[0])


def test_nothing_is_freed_when_names_are_wrong():
    tree = {"a": jnp.ones((2, 3)), "b": Int8Weight(jnp.ones((2, 3), jnp.int8), jnp.ones(2))}
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*there is no c(.|\n)*b is in eight bits already"):
        quantize_leaves(tree, {"a": 1, "c": 1, "b": 1}, delete=True)
    assert not tree["a"].is_deleted()


@pytest.mark.parametrize("layout", [lambda params: params, unstacked])
def test_a_quantised_decoder_is_refused_a_second_time(params, layout):
    quantized, _ = quantize_decoder(layout(params))
    with pytest.raises(ConfigError, match="in eight bits already"):
        quantize_decoder(quantized)


def test_a_head_that_is_not_there_is_refused(params):
    with pytest.raises(ConfigError, match=r"no head to quantise(.|\n)*keys and values alone"):
        int8_weights(with_first_layers(params, 2), head=True)
    with pytest.raises(ConfigError, match=r"no head to quantise(.|\n)*the embedding"):
        quantized_decoder_specs(param_specs(small_config(tie_embeddings=True)), head=True)


# --- the model ---


def stages(params: Qwen25VLParams, config: Qwen25VLConfig, inputs: ModelInputs, dtype: Any) -> dict[str, np.ndarray]:
    """Hidden states, keys, values and logits of the tokens that are not padding."""
    compute = Compute(dtype=dtype)

    @jax.jit
    def run(params: Qwen25VLParams, inputs: ModelInputs) -> dict[str, jax.Array]:
        found = prefill(params, config, inputs, compute)
        logits = text_model.logits(params.text, config.text, found.hidden)
        return {"hidden": found.hidden, "keys": found.keys_values.key, "values": found.keys_values.value, "x": logits}

    found = {name: np.asarray(value, np.float64) for name, value in run(params, inputs).items()}
    tokens = np.asarray(inputs.valid)
    for name in ("keys", "values"):
        found[name] = np.moveaxis(found[name], (1, 3), (0, 1))
    return {name: value[tokens] for name, value in found.items()}


def relative_errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    return {
        name: float(np.sqrt(np.square(found[name] - value).mean() / np.square(value).mean()))
        for name, value in expected.items()
    }


def test_the_error_of_a_model_is_of_the_order_of_bfloat16s(params, inputs):
    exact = stages(params, CONFIG, inputs, jnp.float32)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    bfloat16 = relative_errors(stages(halved, CONFIG, inputs, jnp.bfloat16), exact)
    int8 = relative_errors(stages(quantize_decoder(params, head=True)[0], CONFIG, inputs, jnp.float32), exact)
    both = relative_errors(stages(quantize_decoder(halved, head=True)[0], CONFIG, inputs, jnp.bfloat16), exact)
    for stage in exact:
        assert 0.001 < int8[stage] < 0.03, (stage, int8)
        assert both[stage] < 3 * bfloat16[stage], (stage, both, bfloat16)


def test_a_quantised_model_is_that_of_its_dequantised_weights(params, inputs):
    quantized, _ = quantize_decoder(params, head=True)
    run = jax.jit(forward, static_argnums=(1, 3))
    expected = run(dequantized_decoder(quantized), CONFIG, inputs, Compute())
    for tree in (quantized, unstacked(quantized)):
        found = run(tree, CONFIG, inputs, Compute())
        np.testing.assert_allclose(found, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_a_quantised_model_generates_what_its_dequantised_weights_do(params, inputs):
    quantized, _ = quantize_decoder(unstacked(params), head=True)
    allowed = jnp.asarray([5, 11, 77, 300, 401])
    choices = {"max_new_tokens": 6, "stop_ids": (509,), "pad_id": 510, "allowed_ids": allowed}
    expected = generate_jit(dequantized_decoder(quantized), CONFIG, inputs, Compute(), **choices)
    found = generate_jit(quantized, CONFIG, inputs, Compute(), **choices)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert len(set(found.tokens.ravel().tolist())) > 1


def test_over_a_mesh_it_is_the_same_model(eight_devices, params, inputs, tmp_path):
    layout = Layout(make_mesh({"fsdp": 4, "tensor": 2}, eight_devices))
    specs = SPECS
    sharded = jax.device_put(params, layout.shardings(specs)[0])
    quantized, report = quantize_decoder(sharded, head=True)
    alone, alone_report = quantize_decoder(params, head=True)
    same(quantized, alone)
    for one, other in zip(report.leaves, alone_report.leaves, strict=True):
        assert dataclasses.replace(one, relative_error=0.0) == dataclasses.replace(other, relative_error=0.0)
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-4)
    wanted, layout_report = layout.shardings(quantized_decoder_specs(specs, head=True))
    assert not layout_report.fallbacks
    places = named_leaves(wanted)
    for name, leaf in named_leaves(quantized).items():
        assert leaf.sharding.is_equivalent_to(places[name], leaf.ndim), name

    batch = small_inputs(CONFIG, rows=4, images=False)
    run = jax.jit(forward, static_argnums=(1, 3))
    expected = run(alone, CONFIG, batch, Compute())
    found = run(quantized, CONFIG, batch, Compute(layout=layout))
    valid = np.asarray(batch.valid)
    np.testing.assert_allclose(np.asarray(found)[valid], np.asarray(expected)[valid], atol=1e-3)

    save(tmp_path / "int8", {"params": quantized}, {})
    same(restore(tmp_path / "int8", "params", abstract(quantized_decoder_specs(specs, head=True))), alone)


def test_a_policy_reads_the_same_keys_and_values(params, inputs):
    """From a quantised decoder of the first layers alone, in the layout of inference."""
    run = jax.jit(keys_and_values, static_argnums=(1, 3))
    (found,) = run(unstacked(quantize_decoder(with_first_layers(params, 1))[0]), CONFIG, inputs, Compute())
    expected = stages(quantize_decoder(params, head=True)[0], CONFIG, inputs, jnp.float32)
    valid = np.asarray(inputs.valid)
    for one, other in ((found.key, expected["keys"]), (found.value, expected["values"])):
        np.testing.assert_allclose(np.swapaxes(one, 1, 2)[valid], other[:, 0], atol=1e-4)
