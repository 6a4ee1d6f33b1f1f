"""Policies from folders: the same as from parts in memory, and one clear error for what does not fit."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_policy
from qwen_vocabulary import byte_ranks, tokenizer_json
from small_policy import observation, options

import rdt2_jax
from rdt2_jax.action_expert.checkpoint import save_expert
from rdt2_jax.action_expert.flow import Schedule
from rdt2_jax.action_tokenizer.checkpoint import save_tokenizer
from rdt2_jax.actions.normalizer import FieldNormalizer, FieldStatistics, LinearNormalizer
from rdt2_jax.errors import CheckpointError, ConfigError, DataError, Rdt2Error
from rdt2_jax.policy import FmPolicy, OneStepPolicy, VqPolicy, load_policy
from rdt2_jax.quantization import Int8Weight
from rdt2_jax.qwen2_5_vl import processor
from rdt2_jax.qwen2_5_vl.checkpoint import convert
from rdt2_jax.qwen2_5_vl.flax_module import Qwen25VL

CHOICES: dict[str, Any] = {"prompt_lengths": (256,), "compile_at_start": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, backbone = tmp_path_factory.mktemp("load"), small_policy.byte_backbone()
    Qwen25VL(backbone.config, small_policy.stacked_params(backbone.config)).save_pretrained(root / "vlm")
    (root / "vlm" / "tokenizer.json").write_text(json.dumps(tokenizer_json(byte_ranks())))
    (root / "vlm" / "preprocessor_config.json").write_text(
        json.dumps(processor.to_published(small_policy.SMALL_IMAGES))
    )
    convert(root / "vlm", root / "first", num_layers=2)
    save_expert(small_policy.expert(), root / "expert")
    (root / "tokenizer").mkdir()
    save_tokenizer(small_policy.codec(256), root / "tokenizer")
    small_policy.normalizer().save(root / "normalizer.npz")
    return {"root": root, **{name: root / name for name in ("vlm", "first", "expert", "tokenizer")}}


@pytest.fixture(scope="module")
def parts(folders: dict[str, Path]) -> dict[str, Any]:
    """What a flow policy is loaded from."""
    return {"vlm": folders["vlm"], "expert": folders["expert"], "normalizer": folders["root"] / "normalizer.npz"}


@pytest.fixture(scope="module")
def vq_parts(folders: dict[str, Path]) -> dict[str, Any]:
    return {"vlm": folders["vlm"], "tokenizer": folders["tokenizer"], "normalizer": folders["root"] / "normalizer.npz"}


def without_weights(folder: Path, target: Path) -> Path:
    """A copy whose weights would be an error if anyone read them."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    (target / "model.safetensors").write_bytes(b"none")
    return target


@pytest.mark.parametrize(("kind", "cls"), [("fm", FmPolicy), ("one-step", OneStepPolicy)])
def test_flow_policies_from_folders(parts: dict[str, Any], kind: str, cls: type[FmPolicy]) -> None:
    policy = load_policy(kind, **parts, **CHOICES)
    assert type(policy) is cls
    assert policy.backbone.params.text.norm is None, "a flow policy reads no norm"
    assert policy.backbone.params.text.head is None, "and no head"
    memory = small_policy.byte_backbone(), small_policy.expert(), small_policy.normalizer()
    expected = cls(*memory, options=options(**CHOICES)).infer(observation())
    np.testing.assert_array_equal(policy.infer(observation()).actions, expected.actions)


def _count_arrays(shape: tuple[int, ...]) -> int:
    gc.collect()
    return sum(array.shape == shape for array in jax.live_arrays())


def test_vq_from_folders(vq_parts: dict[str, Any]) -> None:
    tables = _count_arrays((320, 64))
    policy = load_policy("vq", **vq_parts, **CHOICES)
    assert type(policy) is VqPolicy
    assert policy.backbone.params.text.head is None
    assert _count_arrays((320, 64)) == tables + 1, "the embedding, and no head behind anyone's back"
    memory = small_policy.byte_backbone(), small_policy.codec(256), small_policy.normalizer()
    expected = VqPolicy(*memory, options=options(**CHOICES))
    np.testing.assert_array_equal(policy.tokens([observation()]).tokens, expected.tokens([observation()]).tokens)
    np.testing.assert_array_equal(policy.infer(observation()).actions, expected.infer(observation()).actions)
    assert len({*policy.tokens([observation()]).tokens[0].tolist()}) > 3


def test_eight_bits_and_dtypes(parts: dict[str, Any], vq_parts: dict[str, Any]) -> None:
    for kind, given in (("fm", parts), ("vq", vq_parts)):
        policy = load_policy(kind, **given, quantize=True, **CHOICES)
        assert isinstance(policy.backbone.params.text.layers[-1].mlp.up.weight, Int8Weight)
        assert policy.backbone.compute.dtype == jnp.float32
    exact, rough = (load_policy("fm", **parts, dtype=dtype, **CHOICES) for dtype in (None, jnp.bfloat16))
    assert isinstance(rough, FmPolicy)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((rough.backbone.params, rough._params))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert rough.backbone.compute.dtype == jnp.bfloat16
    scale = small_policy.normalizer().fields["action"].scale
    found, expected = (policy.infer(observation()).actions * scale for policy in (rough, exact))
    assert 1e-4 < np.abs(found - expected).max() < 0.2


def test_the_schedule_and_the_first_layers_alone(
    parts: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    save_expert(small_policy.expert((1, 0)), tmp_path / "two")
    converted = {**parts, "vlm": folders["first"], "expert": tmp_path / "two"}
    policy = load_policy("fm", **converted, schedule=Schedule(num_steps=2, method="heun"), **CHOICES)
    assert policy.backbone.config.text.num_layers == 2
    whole = load_policy("fm", **{**converted, "vlm": folders["vlm"]}, schedule=Schedule(2, "heun"), **CHOICES)
    np.testing.assert_array_equal(policy.infer(observation()).actions, whole.infer(observation()).actions)


def test_a_folder_that_lacks_what_is_needed(parts: dict[str, Any], vq_parts: dict[str, Any], folders: Any) -> None:
    first = {"vlm": folders["first"]}
    with pytest.raises(CheckpointError, match=r"less of the model(.|\n)*4 layers, no norm, no head"):
        load_policy("fm", **{**parts, **first}, **CHOICES)
    with pytest.raises(CheckpointError, match=r"less of the model(.|\n)*4 layers, norm and head"):
        load_policy("vq", **{**vq_parts, **first}, **CHOICES)


@pytest.mark.parametrize(
    ("kind", "hint"),
    [("one_step", "did you mean 'one-step'"), ("VQ", "did you mean 'vq'"), ("fmm", "did you mean 'fm'"), (3, "vq, fm")],
)
def test_unknown_kinds(parts: dict[str, Any], kind: Any, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"no such policy(.|\n)*{hint}"):
        load_policy(kind, **parts)


def test_missing_and_needless_parts(parts: dict[str, Any], vq_parts: dict[str, Any], folders: Any) -> None:
    for kind, given, messages in (
        ("fm", vq_parts, ("expert= is missing", "tokenizer= is not for this policy")),
        ("one-step", {**parts, "schedule": Schedule(2)}, ("schedule= is for 'fm' alone",)),
        ("vq", parts, ("tokenizer= is missing", "expert= is not for this policy")),
        ("vq", {**vq_parts, "expert": folders["expert"]}, ("expert= is not for this policy",)),
    ):
        with pytest.raises(ConfigError) as caught:
            load_policy(kind, **given)
        assert all(message in str(caught.value) for message in messages)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"prompt_length": (448,)}, "did you mean 'prompt_lengths'"),
        ({"prompt_lengths": (512, 448)}, "must be ascending"),
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"jpeg_quality": 101}, "jpeg_quality"),
        ({"constrained": False}, "nothing to constrain"),
    ],
)
def test_wrong_options(parts: dict[str, Any], choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy("fm", **parts, **{**CHOICES, **choice})


def test_sizes_that_differ_are_found_before_weights_are_read(
    parts: dict[str, Any], vq_parts: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    vlm = without_weights(folders["vlm"], tmp_path / "vlm")
    for name, value, message in (
        ("num_heads", 2, "head_dim: the expert has 32, the backbone 16"),
        ("num_kv_heads", 4, "num_kv_heads: the expert has 4, the backbone 2"),
        ("depth", 9, "the expert reads 9 layers, the backbone has 4"),
    ):
        expert = without_weights(folders["expert"], tmp_path / name)
        published = json.loads((expert / "config.json").read_text())
        published["rdt"][name] = value
        (expert / "config.json").write_text(json.dumps(published))
        with pytest.raises(ConfigError, match=message):
            load_policy("fm", **{**parts, "vlm": vlm, "expert": expert}, **CHOICES)
    expert = without_weights(folders["expert"], tmp_path / "short")
    published = json.loads((expert / "config.json").read_text())
    published.pop("act_pos_emb_config")
    (expert / "config.json").write_text(json.dumps({**published, "pred_horizon": 16, "state_dim": 14}))
    with pytest.raises(ConfigError, match=r"chunk_length: the expert has 16(.|\n)*state_dim: the expert has 14"):
        load_policy("fm", **{**parts, "vlm": vlm, "expert": expert}, **CHOICES)
    codec = without_weights(folders["tokenizer"], tmp_path / "codec")
    published = json.loads((codec / "config.json").read_text())
    text = json.dumps(published).replace("256", "1024")
    (codec / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="1024 codes, but the vocabulary has 256 pieces"):
        load_policy("vq", **{**vq_parts, "vlm": vlm, "tokenizer": codec}, **CHOICES)
    with pytest.raises(Rdt2Error, match=r"model\.safetensors"):
        load_policy("fm", **{**parts, "vlm": vlm}, **CHOICES)


def test_weights_that_do_not_fit_their_own_configuration(parts: dict[str, Any], folders: Any, tmp_path: Path) -> None:
    expert = tmp_path / "expert"
    shutil.copytree(folders["expert"], expert)
    published = json.loads((expert / "config.json").read_text())
    published["rdt"]["multiple_of"] = 512
    (expert / "config.json").write_text(json.dumps(published))
    with pytest.raises(CheckpointError, match="ffn"):
        load_policy("fm", **{**parts, "expert": expert}, **CHOICES)


def test_an_expert_without_weights_is_found_before_the_backbone_is_read(
    parts: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    vlm, expert = without_weights(folders["vlm"], tmp_path / "vlm"), tmp_path / "expert"
    shutil.copytree(folders["expert"], expert, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(CheckpointError, match="no weights in the folder"):
        load_policy("fm", **{**parts, "vlm": vlm, "expert": expert}, **CHOICES)


def test_a_tokenizer_folder_with_a_normalizer_of_its_own(
    vq_parts: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """It has to be the one that is given; said before any weights are read."""
    codec = tmp_path / "codec"
    shutil.copytree(folders["tokenizer"], codec)
    small_policy.normalizer().save(codec / "normalizer.npz")
    load_policy("vq", **{**vq_parts, "tokenizer": codec}, **CHOICES)
    field = small_policy.normalizer().fields["action"]
    other = FieldNormalizer(field.scale, field.offset + np.float32(0.5), field.input_stats)
    LinearNormalizer({"action": other}).save(codec / "normalizer.npz")
    vlm = without_weights(folders["vlm"], tmp_path / "vlm")
    with pytest.raises(ConfigError, match=r"another normalizer(.|\n)*offset differs in 20 of 20 channels"):
        load_policy("vq", **{**vq_parts, "tokenizer": codec, "vlm": vlm}, **CHOICES)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"dtype": "foo"}, ConfigError, "not a floating dtype(.|\n)*where: dtype(.|\n)*'foo'"),
        ({"dtype": jnp.int8}, ConfigError, "not a floating dtype"),
        ({"compute": "float32"}, ConfigError, "compute=: a Compute is needed, found str"),
        ({"schedule": 5}, ConfigError, "schedule=: a Schedule is needed, found int"),
        ({"vlm": None}, ConfigError, "vlm=: a folder or hub name is needed, found NoneType"),
        ({"expert": 3}, ConfigError, "expert=: a folder or hub name is needed, found int"),
        ({"normalizer": None}, ConfigError, "normalizer=: (.|\n)*found NoneType"),
        ({"normalizer": {}}, ConfigError, "normalizer=: (.|\n)*found dict"),
    ],
)
def test_arguments_of_another_type(
    parts: dict[str, Any], given: dict[str, Any], error: type[Rdt2Error], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_policy("fm", **{**parts, **given}, **CHOICES)


def test_a_dtype_by_its_name(parts: dict[str, Any]) -> None:
    policy = load_policy("fm", **parts, dtype="bfloat16", **CHOICES)
    assert policy.backbone.compute.dtype == policy.backbone.params.text.layers[0].mlp_norm.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("action", (14,), "not one of action chunks"),
        ("action", (24, 14), "not one of action chunks"),
        ("pose", (20,), "no such field"),
    ],
)
def test_wrong_normalizers(parts: dict[str, Any], field: str, shape: tuple[int, ...], message: str) -> None:
    ones = np.ones(shape, np.float32)
    wrong = LinearNormalizer({field: FieldNormalizer(ones, ones, FieldStatistics(ones, ones, ones, ones))})
    with pytest.raises(DataError, match=message):
        load_policy("fm", **{**parts, "normalizer": wrong}, **CHOICES)


def test_a_normalizer_of_every_step(parts: dict[str, Any]) -> None:
    steps = np.broadcast_to(np.arange(1, 25, dtype=np.float32)[:, None], (24, 20)).copy()
    zeros = np.zeros_like(steps)
    each = LinearNormalizer({"action": FieldNormalizer(1 / steps, zeros, FieldStatistics(zeros, zeros, zeros, zeros))})
    same = LinearNormalizer({"action": FieldNormalizer(zeros + 1, zeros, FieldStatistics(zeros, zeros, zeros, zeros))})
    memory = small_policy.byte_backbone(), small_policy.expert()
    found, plain = (FmPolicy(*memory, n, options=options(**CHOICES)).infer(observation()).actions for n in (each, same))
    np.testing.assert_allclose(found, plain * steps, rtol=1e-5)


def test_the_package_names_what_few_lines_need() -> None:
    assert rdt2_jax.load_policy is load_policy
    assert rdt2_jax.Observation is type(observation())
    code = (
        "import sys, rdt2_jax.policy, rdt2_jax.policy.clock; print('jax' in sys.modules, rdt2_jax.Observation.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "False Observation\n"
