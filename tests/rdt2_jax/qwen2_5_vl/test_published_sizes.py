"""The published sizes: parameters counted and named without memory, and layers at full width beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qwen
from qwen_stages import differences, model_inputs, port_stages

from rdt2_jax.errors import ShardingError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import abstract, count_parameters, named_leaves
from rdt2_jax.qwen2_5_vl import model
from rdt2_jax.qwen2_5_vl.config import from_published, preset
from rdt2_jax.sharding import DEFAULT_RULES, make_mesh, shardings
from rdt2_jax.weights.loader import load
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table
from rdt2_jax.weights.sources import ArraySource
from rdt2_jax.weights.table import bind

GOLDEN = Path(__file__).parents[2] / "golden" / "qwen2_5_vl"
PUBLISHED = {"7b": 8_292_166_656, "3b": 3_754_622_976}
"""Numbers of parameters of the published checkpoints (the 3B's without the head that is its embedding)."""

TENSORS = {"7b": 729, "3b": 824}
"""Tensors in the published checkpoints."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_has_the_published_shape_and_its_axes(name: str) -> None:
    specs = model.param_specs(preset(name), jnp.bfloat16)
    found = {k: [list(s.shape), str(jnp.dtype(s.dtype)), list(s.axes)] for k, s in named_leaves(specs).items()}
    assert found == json.loads((GOLDEN / f"{name}_parameters.json").read_text())
    assert count_parameters(specs) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weight_table_names_every_published_tensor_once(name: str) -> None:
    config = preset(name)
    plan = bind(qwen2_5_vl_table(config), model.param_specs(config))
    names = [slot.names[0] for binding in plan.bindings for slot in binding.slots]
    assert len(names) == len(set(names)) == TENSORS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_of_the_whole_model(name: str) -> None:
    """The composite image and a prompt through the full-size model, without a byte of it."""
    config = preset(name)
    params = abstract(model.param_specs(config, jnp.bfloat16))
    length = 420
    inputs = model.ModelInputs(
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((1, length), jnp.bool_),
        jax.ShapeDtypeStruct((3, 1, length), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, 1, 1512, 1176), jnp.float32),
        (1, 28, 54),
    )
    compute = Compute(dtype=jnp.bfloat16)
    logits = jax.eval_shape(lambda p, i: model.forward(p, config, i, compute), params, inputs)
    assert logits.shape == (1, length, config.text.vocab_size)
    assert logits.dtype == jnp.float32
    kv = jax.eval_shape(lambda p, i: model.keys_and_values(p, config, i, compute), params, inputs)
    assert kv.key.shape == (config.text.num_layers, 1, config.text.num_kv_heads, length, 128)
    assert kv.key.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "tensor", "fallbacks"),
    [
        ("7b", 1, 0),
        ("7b", 2, 0),
        ("7b", 4, 0),
        ("3b", 2, 0),
        ("3b", 4, 4),
        ("3b", 8, 14),
    ],
)
def test_meshes_that_divide(name: str, tensor: int, fallbacks: int, eight_devices: list[Any]) -> None:
    """Key and value heads of the 3B, and over 8 the vision MLP, stay whole on the tensor axis, and that is reported."""
    mesh = make_mesh({"fsdp": 8 // tensor, "tensor": tensor}, eight_devices)
    _, report = shardings(model.param_specs(preset(name), jnp.bfloat16), DEFAULT_RULES, mesh)
    assert len(report.fallbacks) == fallbacks
    names = {fallback.name for fallback in report.fallbacks}
    assert all(".attention.key" in n or ".attention.value" in n or ".mlp." in n for n in names)
    kept_whole = sum(fallback.nbytes for fallback in report.fallbacks)
    assert report.bytes_per_device <= kept_whole + 1.01 * (report.total_bytes - kept_whole) / 8


def test_heads_of_the_7b_do_not_divide_by_8(eight_devices: list[Any]) -> None:
    with pytest.raises(ShardingError, match=r"attention\.query\.weight .*size 28 does not divide by tensor=8"):
        shardings(model.param_specs(preset("7b")), DEFAULT_RULES, make_mesh({"tensor": 8}, eight_devices))


@pytest.mark.torch_peer
def test_layers_at_full_width() -> None:
    """One decoder layer and one group of two vision blocks of the 7B, random weights, beside transformers.

    Sums are up to 18,944 terms long here, so the bound is relative to each stage's size.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    small = tiny_qwen.peer_config().to_dict()
    full = preset("7b")
    peer_config = Qwen2_5_VLConfig(
        text_config=small["text_config"]
        | {
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "num_hidden_layers": 1,
            "layer_types": ["full_attention"],
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
        },
        vision_config=small["vision_config"]
        | {
            "depth": 2,
            "fullatt_block_indexes": [1],
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
        },
        **{k: small[k] for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    peer = Qwen2_5_VLForConditionalGeneration(peer_config).eval()
    config = from_published(peer_config.to_dict())
    wide = {"num_layers": 28, "vocab_size": 152064}
    assert config.text.model_copy(update=wide) == full.text
    deep = {"depth": 32, "full_attention_blocks": (7, 15, 23, 31)}
    assert config.vision.model_copy(update=deep) == full.vision
    arrays = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    params, _ = load(qwen2_5_vl_table(config), model.param_specs(config), ArraySource(arrays))
    prompts = tiny_qwen.make_prompts((1, 12, 18), words=(5,))
    theirs = tiny_qwen.peer_stages(peer, prompts)
    found = differences(port_stages(params, config, prompts), theirs, prompts.mask)
    for stage, difference in found.items():
        assert difference <= 3e-5 * max(1.0, float(np.abs(theirs[stage]).max())), stage


def test_wrong_patches_are_refused() -> None:
    config = preset("tiny").model_copy(update={"image_token_id": 500, "video_token_id": 501})
    prompts = tiny_qwen.make_prompts((1, 4, 4))
    inputs = model_inputs(config, prompts)
    from rdt2_jax.errors import DataError

    params = abstract(model.param_specs(config))
    with pytest.raises(DataError, match=r"patches do not fit their grid"):
        jax.eval_shape(
            lambda p: model.forward(p, config, inputs.replace(patches=inputs.patches[:, :, :-1]), Compute()), params
        )
