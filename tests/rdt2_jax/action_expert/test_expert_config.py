"""The shape of an expert: as published, written back, and refused with names."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from rdt2_jax.action_expert.config import ActionExpertConfig, preset, published_config, read_config
from rdt2_jax.action_expert.model import param_specs
from rdt2_jax.errors import CheckpointError, ConfigError
from rdt2_jax.params import abstract, count_parameters
from rdt2_jax.qwen2_5_vl.config import preset as backbone_preset

GOLDEN = Path(__file__).parents[2] / "golden" / "rdt_tiny"


def test_published_file_and_back(tmp_path: Path) -> None:
    config = read_config(GOLDEN)
    assert config == preset("tiny")
    (tmp_path / "config.json").write_text(published_config(config))
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((GOLDEN / "config.json").read_text())
    assert read_config(tmp_path) == config


def test_other_layers_of_the_backbone_survive(tmp_path: Path) -> None:
    config = preset("tiny").model_copy(update={"condition_layers": (1, 3)})
    (tmp_path / "config.json").write_text(published_config(config))
    assert read_config(tmp_path) == config
    assert config.num_backbone_layers == 4


def test_published_size() -> None:
    """488M as the public code counts, less the three tensors of every block that nothing reads."""
    config = preset("rdt2")
    assert (config.head_dim, config.mlp_size, config.num_tokens, config.num_backbone_layers) == (128, 2816, 28, 14)
    unused = 14 * (1024 + 1024 * 1024 + 128)
    total = count_parameters(param_specs(config)) + unused
    assert total == pytest.approx(488e6, rel=0.01)
    assert {leaf.dtype for leaf in jax_leaves(config)} == {jnp.dtype(jnp.bfloat16)}


def jax_leaves(config: ActionExpertConfig):
    import jax

    return jax.tree.leaves(abstract(param_specs(config, jnp.bfloat16)))


def test_presets_fit_their_backbones() -> None:
    preset("rdt2").check_backbone(backbone_preset("7b").text)
    preset("tiny").check_backbone(backbone_preset("tiny").text)
    with pytest.raises(
        ConfigError, match=r"num_kv_heads: the expert has 4, the backbone 2[\s\S]*head_dim: .* 128, .* 16"
    ):
        preset("rdt2").check_backbone(backbone_preset("tiny").text)
    with pytest.raises(ConfigError, match="reads 4 layers, the backbone has 2"):
        preset("tiny").check_backbone(backbone_preset("tiny").text.model_copy(update={"num_layers": 2}))
    with pytest.raises(ConfigError, match="no such preset"):
        preset("huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 66}, "multiple of num_heads"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"condition_layers": (0, 1, 2, 3, 4)}, "5 condition_layers for 4 blocks"),
        ({"num_steps": 0}, "num_steps"),
        ({"norm_eps": 0}, "norm_eps"),
    ],
)
def test_impossible_shapes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActionExpertConfig(**(preset("tiny").model_dump() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_adaptor": "mlp2x_silu"}, "act_adaptor"),
        ({"img_token_dim": 2176}, "img_token_dim"),
        ({"pred_horizon": 16}, "act_pos_emb_config"),
        ({"horizon": 16}, "unknown key 'horizon'"),
        ({"rdt": {"depth": 4}}, "missing key 'rdt.hidden_size'"),
    ],
)
def test_files_that_are_not_this_expert(change: dict, message: str, tmp_path: Path) -> None:
    published = json.loads((GOLDEN / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ConfigError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_configuration_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "vision_config": {}}')
    with pytest.raises(
        CheckpointError, match=r"not the configuration of an action expert[\s\S]*model_type, vision_config"
    ):
        read_config(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no configuration of an action expert"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not the configuration of an action expert"):
        read_config(tmp_path)
