"""The port beside transformers: every stage, every position, float32, on a small model with random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qwen
from qwen_stages import TOLERANCES, broken, differences, model_inputs, port_stages

from rdt2_jax.errors import ConfigError
from rdt2_jax.layers.attention import AttentionBackend
from rdt2_jax.layers.compute import Compute
from rdt2_jax.qwen2_5_vl import model, text
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, read_config
from rdt2_jax.qwen2_5_vl.grid import token_positions
from rdt2_jax.weights.loader import load
from rdt2_jax.weights.qwen2_5_vl import qwen2_5_vl_table

pytestmark = pytest.mark.torch_peer

COMPOSITE = (1, 28, 54)
GRIDS = {
    "composite": COMPOSITE,
    "whole windows": (1, 16, 16),
    "smaller than a window": (1, 4, 6),
    "tall": (1, 26, 10),
    "one token": (1, 2, 2),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """One model in both libraries."""

    peer: Any
    folder: Path
    config: Qwen25VLConfig
    params: model.Qwen25VLParams


def load_params(folder: Path, config: Qwen25VLConfig) -> model.Qwen25VLParams:
    return load(qwen2_5_vl_table(config), model.param_specs(config), folder)[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    peer = tiny_qwen.make_peer()
    folder = tiny_qwen.save_peer(peer, tmp_path_factory.mktemp("tiny") / "older")
    config = read_config(folder)
    return Pair(peer, folder, config, load_params(folder, config))


@pytest.fixture(scope="module", params=GRIDS)
def stages(request: pytest.FixtureRequest, pair: Pair) -> dict[str, float]:
    """Differences by stage; rows have different lengths, so one of them is padded."""
    prompts = tiny_qwen.make_prompts(GRIDS[request.param])
    theirs = tiny_qwen.peer_stages(pair.peer, prompts)
    return differences(port_stages(pair.params, pair.config, prompts), theirs, prompts.mask)


@pytest.mark.parametrize("stage", TOLERANCES)
def test_stage(stage: str, stages: dict[str, float]) -> None:
    assert stages[stage] <= TOLERANCES[stage]


def test_stages_are_large_enough_to_be_told_apart(pair: Pair) -> None:
    """What is compared is of order one: a tolerance of 3e-5 means something."""
    theirs = tiny_qwen.peer_stages(pair.peer, tiny_qwen.make_prompts(COMPOSITE))
    for stage in ("patch_embed", "vision_blocks", "merger", "layers", "keys", "values", "logits"):
        assert 0.3 < theirs[stage].std() < 5, stage


def test_patches_of_low_variance_show_the_epsilon_of_the_vision_norms(pair: Pair) -> None:
    prompts = low_variance_prompts()
    theirs = tiny_qwen.peer_stages(pair.peer, prompts)
    assert not broken(differences(port_stages(pair.params, pair.config, prompts), theirs, prompts.mask))
    assert np.abs(theirs["patch_embed"]).max() < 1e-2, "the variance is not near the epsilon"


def low_variance_prompts() -> tiny_qwen.Prompts:
    prompts = tiny_qwen.make_prompts((1, 12, 10))
    return dataclasses.replace(prompts, patches=prompts.patches * np.float32(1e-3))


@pytest.mark.parametrize(
    "compute",
    [Compute(attention=AttentionBackend.CHUNKED, query_chunk=100), Compute(remat="full")],
    ids=["query chunks", "remat"],
)
def test_other_ways_to_compute_it(pair: Pair, compute: Compute) -> None:
    prompts = tiny_qwen.make_prompts(COMPOSITE)
    theirs = tiny_qwen.peer_stages(pair.peer, prompts)
    assert not broken(differences(port_stages(pair.params, pair.config, prompts, compute), theirs, prompts.mask))


def test_a_tree_per_layer_is_the_same_model(pair: Pair) -> None:
    prompts = tiny_qwen.make_prompts((1, 18, 10))
    theirs = tiny_qwen.peer_stages(pair.peer, prompts)
    ours = port_stages(model.unstacked(pair.params), pair.config, prompts)
    assert not broken(differences(ours, theirs, prompts.mask))


def test_newer_names_give_the_same_parameters(pair: Pair, tmp_path: Path) -> None:
    folder = tiny_qwen.save_peer(pair.peer, tmp_path / "newer", newer_names=True)
    config = read_config(folder)
    assert config == pair.config
    chex.assert_trees_all_equal(load_params(folder, config), pair.params)


def test_flat_configuration_of_older_versions(pair: Pair, tmp_path: Path) -> None:
    published = json.loads((pair.folder / "config.json").read_text())
    nested = published.pop("text_config")
    rope = nested.pop("rope_parameters")
    nested.pop("model_type")
    vision = published["vision_config"]
    vision["in_chans"] = vision.pop("in_channels")
    del vision["rope_parameters"]
    flat = {
        **nested,
        **published,
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "rope_theta": rope["rope_theta"],
    }
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert read_config(tmp_path) == pair.config


def test_tied_embeddings(tmp_path: Path) -> None:
    peer = tiny_qwen.make_peer(1, tie_word_embeddings=True)
    folder = tiny_qwen.save_peer(peer, tmp_path / "tied")
    config = read_config(folder)
    assert config.text.tie_embeddings
    params = load_params(folder, config)
    assert params.text.head is None
    prompts = tiny_qwen.make_prompts((1, 6, 4))
    theirs = tiny_qwen.peer_stages(peer, prompts)
    assert not broken(differences(port_stages(params, config, prompts), theirs, prompts.mask))


def test_two_images_in_a_row(pair: Pair) -> None:
    """Beside the peer: positions go on behind the first image, and each image's tokens go to their own place."""
    import torch

    grid, tokens = (1, 6, 10), 15
    random = np.random.default_rng(5)
    image = [tiny_qwen.VISION_START_ID, *[tiny_qwen.IMAGE_ID] * tokens, tiny_qwen.VISION_END_ID]
    ids = np.array([[*random.integers(0, 490, 3), *image, *random.integers(0, 490, 2), *image, 7, 8]] * 2)
    patches = random.standard_normal((2, 2, 60, 1176)).astype(np.float32)
    positions, following = token_positions(pair.config, ids, np.ones_like(ids), [[grid, grid]] * 2)
    inputs = model.ModelInputs(
        jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, bool), positions, following, jnp.asarray(patches), grid
    )
    ours = jax.jit(model.forward, static_argnums=(1, 3))(pair.params, pair.config, inputs, Compute())
    with torch.no_grad():
        theirs = pair.peer(
            input_ids=torch.tensor(ids),
            pixel_values=torch.tensor(patches.reshape(-1, 1176)),
            image_grid_thw=torch.tensor([grid] * 4),
            mm_token_type_ids=torch.tensor((ids == tiny_qwen.IMAGE_ID).astype(np.int64)),
        ).logits
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=TOLERANCES["logits"])


def test_padding_on_the_left_changes_nothing(pair: Pair) -> None:
    """A row alone, and the same row beside a longer one."""
    together = tiny_qwen.make_prompts((1, 12, 10), words=(9, 2))
    pad = int((together.mask[1] == 0).sum())
    assert pad == 7
    alone = dataclasses.replace(
        together,
        input_ids=together.input_ids[1:, pad:],
        mask=together.mask[1:, pad:],
        patches=together.patches[1:],
    )
    padded = port_stages(pair.params, pair.config, together)
    bare = port_stages(pair.params, pair.config, alone)
    assert np.abs(padded["logits"][1:, pad:] - bare["logits"]).max() <= TOLERANCES["logits"]
    for stage in ("keys", "values"):
        assert np.abs(padded[stage][:, 1:, :, pad:] - bare[stage]).max() <= TOLERANCES[stage]


def test_rows_of_padding_alone_are_finite(pair: Pair) -> None:
    """A row without any token, as at the end of a data set, does not spoil values or gradients."""
    inputs = model_inputs(pair.config, tiny_qwen.make_prompts((1, 4, 4)))
    inputs = inputs.replace(valid=inputs.valid.at[0].set(False))

    def loss(params: model.Qwen25VLParams) -> jax.Array:
        return jnp.square(model.forward(params, pair.config, inputs, Compute())).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(pair.params)
    assert np.isfinite(value)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("layout", ["stacked", "a tree per layer"])
def test_cached_decoding_equals_the_whole_sequence(pair: Pair, layout: str) -> None:
    """Prefill of all but the last tokens, then one at a time: logits as if all had been there at once."""
    params = pair.params if layout == "stacked" else model.unstacked(pair.params)
    prompts = tiny_qwen.make_prompts((1, 6, 8), words=(9, 6))
    inputs = model_inputs(pair.config, prompts)
    length, steps = inputs.input_ids.shape[1], 4
    compute = Compute()
    whole = jax.jit(lambda p: model.forward(p, pair.config, inputs, compute))(params)
    prefix = inputs.replace(
        input_ids=inputs.input_ids[:, :-steps],
        valid=inputs.valid[:, :-steps],
        positions=inputs.positions[:, :, :-steps],
    )
    prompt = jax.jit(lambda p: model.prefill(p, pair.config, prefix, compute))(params)
    cache = text.new_cache(prompt.keys_values, length)

    @jax.jit
    def step(params: Any, cache: Any, index: jax.Array) -> tuple[jax.Array, Any]:
        ids = jax.lax.dynamic_slice_in_dim(inputs.input_ids, index, 1, axis=1)
        positions = jax.lax.dynamic_slice_in_dim(inputs.positions, index, 1, axis=2)
        valid = inputs.valid & (jnp.arange(length) <= index)
        embedded = text.embed_tokens(params.text, ids, compute)
        hidden, cache = text.decode_step(
            params.text, pair.config.text, embedded, positions, valid, cache, index, compute
        )
        return text.logits(params.text, pair.config.text, hidden)[:, 0], cache

    for index in range(length - steps, length):
        logits, cache = step(params, cache, jnp.int32(index))
        np.testing.assert_allclose(logits, whole[:, index], atol=TOLERANCES["logits"], rtol=0)


def test_first_layers_alone_give_the_keys_and_values_of_the_whole(pair: Pair) -> None:
    """What the action expert reads needs neither the later layers, nor the final norm, nor the head."""
    inputs = model_inputs(pair.config, tiny_qwen.make_prompts((1, 12, 10)))
    run = jax.jit(model.keys_and_values, static_argnums=(1, 3), static_argnames=("num_layers", "kv_layers"))
    whole = run(pair.params, pair.config, inputs, Compute())
    assert isinstance(whole, text.KeysValues)
    assert whole.key.shape == (4, 2, 2, inputs.input_ids.shape[1], 16)
    shorter = pair.config.with_layers(2)
    table = qwen2_5_vl_table(shorter, published_layers=4, with_head=False)
    params, report = load(table, model.param_specs(shorter, with_head=False), pair.folder)
    assert params.text.norm is None
    assert params.text.head is None
    assert any(name.startswith("model.layers.3.") for name in report.ignored)
    half = run(params, shorter, inputs, Compute(), num_layers=2)
    chex.assert_trees_all_close(half, jax.tree.map(lambda x: x[:2], whole), atol=1e-6)
    unstacked = model.unstacked(pair.params)
    unrolled = run(unstacked, pair.config, inputs, Compute(), num_layers=2)
    assert isinstance(unrolled, tuple)
    chex.assert_trees_all_close(unrolled[1], jax.tree.map(lambda x: x[1], whole), atol=1e-5)
    chosen = run(pair.params, pair.config, inputs, Compute(), kv_layers=(3, 1))
    chex.assert_trees_all_close(chosen, jax.tree.map(lambda x: x[np.array([3, 1])], whole), atol=1e-5)
    chosen = run(unstacked, pair.config, inputs, Compute(), kv_layers=(3, 1))
    assert isinstance(chosen, tuple)
    chex.assert_trees_all_close(chosen[0], jax.tree.map(lambda x: x[3], whole), atol=1e-5)
    with pytest.raises(ConfigError, match="0 to 3"):
        run(pair.params, pair.config, inputs, Compute(), kv_layers=(4,))
    with pytest.raises(ConfigError, match=r"num_layers=2"):
        run(pair.params, pair.config, inputs, Compute(), num_layers=2)
    with pytest.raises(ConfigError, match="no head"):
        text.logits(params.text, shorter.text, jnp.zeros((1, 64)))


def test_the_last_layer_of_a_tuple_computes_only_its_keys_and_values(pair: Pair) -> None:
    """Counted by the compiler: two layers' keys and values cost little more than one whole layer."""
    inputs = model_inputs(pair.config, tiny_qwen.make_prompts((1, 4, 4)))
    params = model.unstacked(pair.params)
    run = jax.jit(model.keys_and_values, static_argnums=(1, 3), static_argnames="num_layers")

    def flops(count: int) -> float:
        return run.lower(params, pair.config, inputs, Compute(), num_layers=count).compile().cost_analysis()["flops"]

    first, second, third = (flops(count) for count in (1, 2, 3))
    assert second - first == pytest.approx(third - second, rel=0.05)
    layer_flops = third - second
    whole = jax.jit(model.prefill, static_argnums=(1, 3), static_argnames="num_layers")
    all_of_it = whole.lower(params, pair.config, inputs, Compute(), num_layers=1).compile().cost_analysis()["flops"]
    assert all_of_it - first > 0.6 * layer_flops


def test_bfloat16_is_as_exact_as_the_peers(pair: Pair) -> None:
    """Parity in bf16 proves nothing; its error against float64 must not exceed the peer's own by much."""
    import copy

    import torch

    prompts = tiny_qwen.make_prompts((1, 18, 10))
    keep = prompts.mask.astype(bool)
    exact = tiny_qwen.peer_stages(copy.deepcopy(pair.peer).to(torch.float64), prompts)
    peer = tiny_qwen.peer_stages(copy.deepcopy(pair.peer).to(torch.bfloat16), prompts)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair.params)
    ours = port_stages(params, pair.config, prompts, Compute(dtype=jnp.bfloat16))

    def error(found: np.ndarray, stage: str) -> float:
        difference = found - exact[stage]
        return float(np.sqrt(np.mean(np.square(difference[keep] if stage == "logits" else difference))))

    for stage in ("vision_blocks", "merger", "logits"):
        assert error(ours[stage], stage) <= 1.25 * error(peer[stage], stage), stage
