"""A policy from model folders. What can be checked is checked before weights are read, and only what runs is read."""

from __future__ import annotations

import dataclasses
import difflib
import os
from typing import Any

import jax.numpy as jnp

from rdt2_jax.action_expert.checkpoint import find_expert, load_expert
from rdt2_jax.action_expert.config import read_config as read_expert_config
from rdt2_jax.action_expert.flow import Schedule
from rdt2_jax.action_expert.model import unstacked as unstacked_expert
from rdt2_jax.action_tokenizer.checkpoint import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from rdt2_jax.action_tokenizer.checkpoint import NORMALIZER_FILE, load_tokenizer
from rdt2_jax.action_tokenizer.checkpoint import WEIGHTS_FILE as TOKENIZER_WEIGHTS_FILE
from rdt2_jax.action_tokenizer.config import read_published_config
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.checkpoints import stored_metadata
from rdt2_jax.config import parse_config
from rdt2_jax.errors import ConfigError
from rdt2_jax.hub import model_folder
from rdt2_jax.layers.compute import Compute, default_compute
from rdt2_jax.policy.backbone import Backbone
from rdt2_jax.policy.base import check_normalizer
from rdt2_jax.policy.fm import FmPolicy, check_expert
from rdt2_jax.policy.one_step import OneStepPolicy
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.policy.vq import VqPolicy, check_same_normalizer, check_tokenizer
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl import model
from rdt2_jax.qwen2_5_vl.checkpoint import load_params
from rdt2_jax.qwen2_5_vl.folder import (
    PARAMS_ITEM,
    Extent,
    find_model,
    find_preprocessor,
    is_converted,
    require_extent,
    stored_extent,
)
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.int8 import load_quantized

KINDS = ("vq", "fm", "one-step")

Folder = str | os.PathLike[str]


def load_policy(
    kind: str,
    *,
    vlm: Folder,
    normalizer: Folder | LinearNormalizer,
    expert: Folder | None = None,
    tokenizer: Folder | None = None,
    quantize: bool = False,
    dtype: Any = None,
    compute: Compute | None = None,
    schedule: Schedule | None = None,
    **options: Any,
) -> VqPolicy | FmPolicy:
    """Reads a policy, ready to run on the default device.

    Args:
        kind: "vq", "fm" or "one-step".
        vlm: the backbone: a folder or a hub name, see `qwen2_5_vl.checkpoint.load_params`. Flow policies read its first
            layers alone, without final norm and head.
        normalizer: file (.pt as published, .npz or .json) that expert or tokenizer were trained with. A tokenizer's
            folder may have a copy, which has to be the same.
        expert: "fm" and "one-step": folder or hub name of the action expert.
        tokenizer: "vq": folder of the action tokenizer.
        quantize: the backbone's decoder in eight bits.
        dtype: of weights and activations; None: bfloat16, on a CPU float32. The action tokenizer stays in float32.
        compute: how to compute; None: `default_compute()` in `dtype`.
        schedule: "fm": how the flow is integrated; None: the expert's own number of Euler steps.
        options: fields of `PolicyOptions`.

    Raises:
        ConfigError: an unknown kind or option, an argument of the wrong type, a part that this kind lacks or does not
            take, parts that do not fit each other, or no usable configuration.
        CheckpointError: files that are missing, damaged or contradictory.
        DataError: no usable normalizer.
    """
    _check_kind(kind, expert, tokenizer, schedule)
    _check_types(vlm, normalizer, expert, tokenizer, compute, schedule)
    dtype = None if dtype is None else _floating(dtype)
    choices = parse_config(PolicyOptions, options, where=f"options of load_policy({kind!r})")
    choices.check(kind)
    if compute is None:
        compute = default_compute() if dtype is None else default_compute(dtype=dtype)
    weights = _Weights(vlm, quantize, compute.dtype if dtype is None else dtype, compute)
    if not isinstance(normalizer, LinearNormalizer):
        normalizer = LinearNormalizer.load(normalizer)
    check_normalizer(normalizer)
    preprocessor = Preprocessor.from_folder(find_preprocessor(vlm))
    if kind == "vq":
        needs = TOKENIZER_CONFIG_FILE, TOKENIZER_WEIGHTS_FILE
        codec = model_folder(_given(tokenizer), needs=needs, wants=(NORMALIZER_FILE,))
        config = read_published_config(codec / TOKENIZER_CONFIG_FILE)
        check_tokenizer(config, preprocessor.tokenizer, preprocessor.config.text)
        if (codec / NORMALIZER_FILE).is_file():
            check_same_normalizer(LinearNormalizer.load(codec / NORMALIZER_FILE), normalizer)
        backbone = weights.backbone(preprocessor, None)
        return VqPolicy(backbone, load_tokenizer(codec), normalizer, options=choices)
    folder = find_expert(_given(expert))
    config = read_expert_config(folder)
    check_expert(config, preprocessor.config.text)
    backbone = weights.backbone(preprocessor, config.num_backbone_layers)
    loaded = load_expert(folder, config, dtype=weights.dtype)
    loaded = dataclasses.replace(loaded, params=unstacked_expert(loaded.params, delete=True))
    if kind == "fm":
        return FmPolicy(backbone, loaded, normalizer, options=choices, schedule=schedule)
    return OneStepPolicy(backbone, loaded, normalizer, options=choices)


@dataclasses.dataclass(frozen=True)
class _Weights:
    """How a backbone is read."""

    folder: Folder
    quantize: bool
    dtype: Any
    compute: Compute

    def backbone(self, preprocessor: Preprocessor, num_layers: int | None) -> Backbone:
        """The first layers alone, or all of the model; what the folder lacks is said before it is read.

        Raises:
            CheckpointError: as `checkpoint.load_params`.
        """
        path, config = find_model(self.folder), preprocessor.config
        if is_converted(path):
            has = stored_extent(path, stored_metadata(path, PARAMS_ITEM), config)
            count = config.text.num_layers if num_layers is None else num_layers
            require_extent(path, has, Extent(count, num_layers is None, True))
        load = load_quantized if self.quantize else load_params
        loaded = load(path, num_layers=num_layers, dtype=self.dtype)
        return Backbone(loaded.config, model.unstacked(loaded.params, delete=True), preprocessor, self.compute)


def _check_kind(kind: str, expert: Folder | None, tokenizer: Folder | None, schedule: Schedule | None) -> None:
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind).lower().replace("_", "-"), KINDS, n=1, cutoff=0.3)
        raise ConfigError(
            "no such policy",
            where="kind",
            expected=", ".join(KINDS),
            found=kind,
            fix=f"did you mean {close[0]!r}?" if close else None,
        )
    needed, other = ("tokenizer", "expert") if kind == "vq" else ("expert", "tokenizer")
    given = {"expert": expert, "tokenizer": tokenizer}
    problems = Problems()
    if given[needed] is None:
        what = "the action tokenizer" if kind == "vq" else "the action expert"
        problems.add(f"{needed}= is missing: the folder of {what}")
    if given[other] is not None:
        problems.add(f"{other}= is not for this policy")
    if schedule is not None and kind != "fm":
        problems.add("schedule= is for 'fm' alone")
    problems.raise_if_any(ConfigError, f"the parts are not those of a policy of kind {kind!r}", where="load_policy")


def _check_types(vlm: Any, normalizer: Any, expert: Any, tokenizer: Any, compute: Any, schedule: Any) -> None:
    folder: tuple[str, tuple[type, ...]] = ("a folder or hub name", (str, os.PathLike))
    problems = Problems()
    for name, value, (needed, types) in (
        ("vlm", vlm, folder),
        ("normalizer", normalizer, ("a file or a LinearNormalizer", (*folder[1], LinearNormalizer))),
        ("expert", "" if expert is None else expert, folder),
        ("tokenizer", "" if tokenizer is None else tokenizer, folder),
        ("compute", compute, ("a Compute", (Compute, type(None)))),
        ("schedule", schedule, ("a Schedule", (Schedule, type(None)))),
    ):
        if not isinstance(value, types):
            problems.add(f"{name}=: {needed} is needed, found {type(value).__name__}")
    problems.raise_if_any(ConfigError, "arguments of the wrong type", where="load_policy")


def _floating(dtype: Any) -> Any:
    """A floating dtype, also by its name."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ConfigError("not a floating dtype", where="dtype", expected="bfloat16 or float32", found=repr(dtype))
    return found


def _given(folder: Folder | None) -> Folder:
    """A part that `_check_kind` has seen already."""
    if folder is None:
        raise ConfigError("a part is missing", where="load_policy")
    return folder
