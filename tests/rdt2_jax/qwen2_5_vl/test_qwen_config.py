"""Presets and published configurations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rdt2_jax.errors import ConfigError
from rdt2_jax.qwen2_5_vl.config import PRESETS, from_published, preset, read_config, to_published


@pytest.mark.parametrize("name", PRESETS)
def test_published_form_reads_back(name: str) -> None:
    assert from_published(to_published(preset(name))) == preset(name)


def test_published_7b() -> None:
    config = preset("7b")
    assert (config.text.head_dim, config.vision.head_dim) == (128, 80)
    assert config.vision.full_attention_blocks == (7, 15, 23, 31)
    assert (config.vision.patch_dim, config.vision.window_patches) == (1176, 64)
    assert (config.vision.num_groups, config.vision.group_size) == (4, 8)
    assert not config.text.tie_embeddings
    assert preset("3b").text.tie_embeddings
    assert hash(config) == hash(preset("7b"))


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="7b, 3b, tiny"):
        preset("72b")


def changed(path: str, value: Any) -> dict[str, Any]:
    """The published 7B with one field set, or removed where the value is None."""
    published = json.loads(json.dumps(to_published(preset("7b"))))
    *parents, last = path.split(".")
    node = published
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return published


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "qwen2_vl", "not the configuration of a Qwen2.5-VL"),
        ("text_config.hidden_size", None, r"text_config\.hidden_size"),
        ("text_config.rope_parameters", None, r"mrope_section"),
        ("vision_config.fullatt_block_indexes", [7, 15, 23, 30], "end groups of equal length"),
        ("vision_config.fullatt_block_indexes", [], "end groups of equal length"),
        ("vision_config.hidden_act", "gelu", "does not do that"),
        ("text_config.use_sliding_window", True, "does not do that"),
        ("text_config.num_attention_heads", 27, "not a multiple of num_heads"),
        ("text_config.num_key_value_heads", 3, "not a multiple of num_kv_heads"),
        ("text_config.rope_parameters.mrope_section", [16, 24, 23], "half of head_dim"),
        ("vision_config.out_hidden_size", 2048, "must be text.hidden_size"),
        ("vision_config.window_size", 100, "not a multiple of patch_size"),
        ("text_config.rms_norm_eps", 0.0, "norm_eps"),
        ("text_config.rope_parameters.rope_type", "yarn", r"rope_type"),
        ("text_config.rope_parameters.type", "yarn", r"rope_parameters\.type"),
        ("vision_config.rope_parameters.rope_type", "default", r"rope_type"),
        ("text_config.head_dim", 64, r"text_config\.head_dim"),
        ("vision_config.head_dim", 64, r"vision_config\.head_dim"),
    ],
)
def test_configurations_that_are_refused(path: str, value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs its config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize("count", [0, 29])
def test_layers_that_there_are_not(count: int) -> None:
    with pytest.raises(ConfigError, match="1 to 28"):
        preset("7b").with_layers(count)


def test_an_epsilon_that_the_published_form_cannot_say() -> None:
    config = preset("tiny")
    other = config.model_copy(update={"vision": config.vision.model_copy(update={"norm_eps": 1e-5})})
    with pytest.raises(ConfigError, match="no place for this epsilon"):
        to_published(other)
