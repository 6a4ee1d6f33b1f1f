"""The published code's tiny expert with its inputs, for all tests of the expert."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.action_expert.checkpoint import LoadedExpert, load_expert
from rdt2_jax.action_expert.model import Condition
from rdt2_jax.qwen2_5_vl.text import KeysValues

GOLDEN = Path(__file__).parents[2] / "golden" / "rdt_tiny"


@pytest.fixture(scope="session")
def golden_expert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as published, with safetensors."""
    folder = tmp_path_factory.mktemp("expert")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def golden_expert(golden_expert_folder: Path) -> LoadedExpert:
    return load_expert(golden_expert_folder)


@pytest.fixture(scope="session")
def golden_io(golden: Any) -> Any:
    """Inputs `in/…` and results `f32/…`, `bf16/…`, `f64/…` of the published code."""
    return golden("rdt_tiny", "io.npz")


@pytest.fixture(scope="session")
def condition(golden_io: Any) -> Condition:
    layers = tuple(KeysValues(jnp.asarray(golden_io[f"in/k{i}"]), jnp.asarray(golden_io[f"in/v{i}"])) for i in range(4))
    return Condition(layers, jnp.asarray(golden_io["in/mask"]))


@pytest.fixture(scope="session")
def state(golden_io: Any) -> jax.Array:
    return jnp.asarray(golden_io["in/state"][:, 0])


@pytest.fixture(scope="session")
def noise(golden_io: Any) -> np.ndarray:
    return golden_io["in/init"]
