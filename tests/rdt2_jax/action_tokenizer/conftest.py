"""Tokenizers of the goldens, loaded through the project's own loader."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer, load_tokenizer
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig, Levels
from rdt2_jax.action_tokenizer.tokenizer import ActionTokenizerParams, param_specs
from rdt2_jax.params import from_named_leaves, initialize, named_leaves
from rdt2_jax.weights.action_tokenizer import ACTION_TOKENIZER
from rdt2_jax.weights.table import bind

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def tiny() -> LoadedTokenizer:
    return load_tokenizer(GOLDEN / "rvq_tiny")


@pytest.fixture(scope="session")
def tiny_io(golden):
    return golden("rvq_tiny", "io.npz")


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> LoadedTokenizer:
    """The published size with weights from the goldens' recipe, written in the published format and read back."""
    info = json.loads((GOLDEN / "rvq_real" / "info.json").read_text())
    folder = tmp_path_factory.mktemp("rvq_real")
    (folder / "config.json").write_text(json.dumps(info["config"]))
    save_file(recipe_weights(info["state_dict_shapes"], seed=20252), folder / "model.safetensors")
    return load_tokenizer(folder)


def recipe_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Weights by the recipe of the goldens' README: normal numbers keyed by crc32 of the published name."""

    def values(name: str, shape: list[int]) -> np.ndarray:
        z = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())])).standard_normal(
            shape, dtype=np.float32
        )
        if len(shape) >= 2:
            return z / np.float32(np.sqrt(np.prod(shape[1:])))
        return 1 + np.float32(0.1) * z if name.endswith(".weight") else np.float32(0.1) * z

    weights = {}
    for name, shape in shapes.items():
        if name.endswith(("entry_hits", "ema_cluster_size")):
            weights[name] = np.zeros(shape, np.int32 if name.endswith("entry_hits") else np.float32)
        elif name.endswith((".codebook.weight", ".ema_w")):
            stem = name.removesuffix(".codebook.weight").removesuffix(".ema_w")
            weights[name] = values(f"{stem}.weight", shape)
        elif ".vq.quantizers." in name and name.count(".") == 4 and name.endswith(".weight"):
            continue  # the codebook's other name: files keep one of the two
        else:
            weights[name] = values(name, shape)
    return weights


@pytest.fixture(scope="session")
def small_config() -> ActionTokenizerConfig:
    return ActionTokenizerConfig(
        hidden_size=8,
        latent_size=16,
        embedding_dim=4,
        num_codes=128,
        levels=Levels(pos=3, rot=2, grip=1),
        restart_interval=2,
    )


@pytest.fixture(scope="session")
def small_params(small_config) -> ActionTokenizerParams:
    return jax.jit(lambda key: initialize(param_specs(small_config), key))(jax.random.key(3))


@pytest.fixture(scope="session")
def chunks() -> np.ndarray:
    from rdt2_data.synthetic import smooth_chunks

    return smooth_chunks(64, seed=5)


@pytest.fixture
def published_folder(tmp_path, small_config, small_params) -> Path:
    """A checkpoint folder as published, written by our exporter."""
    from rdt2_jax.action_tokenizer.checkpoint import save_tokenizer

    save_tokenizer(LoadedTokenizer(small_config, small_params), tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def published_slots(tiny) -> dict[str, tuple[Any, tuple[int, ...], str]]:
    """Published name -> (op, index in the stacked leaf, leaf), from the project's weight table."""
    plan = bind(ACTION_TOKENIZER, param_specs(tiny.config))
    return {
        name: (binding.op, slot.index, binding.leaf)
        for binding in plan.bindings
        for slot in binding.slots
        for name in slot.names
    }


@pytest.fixture(scope="session")
def first_init_grip(golden, tiny, published_slots):
    """The recorded first training step of a fresh width VQ-VAE: (config, network, codebook, record)."""
    record = golden("rvq_tiny", "train_first_init_grip.npz")
    leaves = {name: np.array(leaf) for name, leaf in named_leaves(tiny.params).items()}
    filled = 0
    for name in record:
        if name.startswith("init_state:"):
            op, index, leaf = published_slots["grip_vqvae." + name.removeprefix("init_state:")]
            leaves[leaf][index] = op.apply(record[name])
            filled += 1
    assert filled > 50
    network = from_named_leaves(tiny.params, {n: jnp.asarray(v) for n, v in leaves.items()}).networks["grip"]
    codebook = tiny.params.codebooks["grip"].replace(
        codes=jnp.asarray(record["before/grip/0/weight"])[None],
        ema_sum=jnp.asarray(record["before/grip/0/ema_w"])[None],
        ema_count=jnp.asarray(record["before/grip/0/ema_cluster_size"])[None],
        hits=jnp.asarray(record["before/grip/0/entry_hits"])[None],
        cursor=jnp.int32(0),
        initialized=jnp.asarray(False),
    )
    return tiny.config, network, codebook, record
