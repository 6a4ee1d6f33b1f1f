"""Expert folders in the published layout: `config.json` beside `model.safetensors` or `pytorch_model.bin`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rdt2_jax.action_expert.config import CONFIG_FILE, ActionExpertConfig, published_config, read_config
from rdt2_jax.action_expert.model import ActionExpertParams, param_specs
from rdt2_jax.errors import CheckpointError
from rdt2_jax.hub import model_folder
from rdt2_jax.io.torch_archive import read_torch_archive
from rdt2_jax.params import PyTree
from rdt2_jax.weights.action_expert import action_expert_table, unused_tensors
from rdt2_jax.weights.folders import published_folder
from rdt2_jax.weights.loader import KEEP_SOURCE, ExportReport, LoadReport, Progress, export, load
from rdt2_jax.weights.safetensors_files import SINGLE_FILE
from rdt2_jax.weights.sources import ArraySource, TensorSource

TORCH_FILE = "pytorch_model.bin"

_WEIGHTS = (SINGLE_FILE, TORCH_FILE)


@dataclass(frozen=True)
class LoadedExpert:
    """An expert on its devices.

    Attributes:
        config: its shape.
        params: its parameters.
        folder: where they were; None: made from scratch.
        report: what loading did.
    """

    config: ActionExpertConfig
    params: ActionExpertParams
    folder: Path | None = None
    report: LoadReport | None = None


def load_expert(
    folder: str | os.PathLike[str],
    config: ActionExpertConfig | None = None,
    *,
    dtype: Any = None,
    shardings: PyTree | None = None,
    progress: Progress | None = None,
) -> LoadedExpert:
    """Reads a published expert, or one that `save_expert` wrote.

    Args:
        folder: a folder or a hub name, see `hub.model_folder`.
        config: its shape; None: the folder's config.json.
        dtype: floating dtype of the parameters; None keeps the stored one.
        shardings: where parameters go; None: the default device.
        progress: called after every leaf.

    Raises:
        CheckpointError: no such folder, no weights, or weights that do not fit the configuration or
            are damaged; lists everything.
        ConfigError: no usable config.json.
        UnsafeFileError: a torch file that would run code.
    """
    path = find_expert(folder)
    config = read_config(path) if config is None else config
    params, report = load(
        action_expert_table(config),
        param_specs(config),
        _tensors(find_weights(path)),
        shardings=shardings,
        dtype=KEEP_SOURCE if dtype is None else dtype,
        progress=progress,
    )
    return LoadedExpert(config, params, path, report)


def save_expert(
    expert: LoadedExpert,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> ExportReport:
    """Writes an expert in the published layout; the folder appears only when it is complete.

    Tensors that the published code has but never uses are written too, with the values of a fresh model, so that it
    finds nothing missing.

    Args:
        expert: with stacked parameters.
        folder: the new folder; missing parents are created.
        overwrite: allow a folder with an expert, and nothing else but `files`, to be replaced.
        files: name -> content of small files to put beside the weights.

    Raises:
        CheckpointError: `folder` exists, or layers are not stacked.
    """
    if isinstance(expert.params.layers, tuple):
        raise CheckpointError(
            "layers must be stacked to be saved", found="a tree per layer", fix="save before unstacking"
        )
    files = {**files, CONFIG_FILE: published_config(expert.config).encode()}
    with published_folder(folder, files, read_config=read_config, overwrite=overwrite) as (temporary, target):
        table, unused = action_expert_table(expert.config), unused_tensors(expert.config)
        report = export(table, expert.params, temporary / SINGLE_FILE, unused=unused)
    return replace(report, files=tuple(target / file.name for file in report.files))


def find_expert(name: str | os.PathLike[str]) -> Path:
    """The folder of an expert, by path or hub name, with its configuration and its weights.

    Of a repository that has both kinds of weights, only safetensors are fetched.

    Raises:
        CheckpointError: as `hub.model_folder`; no weights.
    """
    folder = model_folder(name, needs=(CONFIG_FILE,), wants=(SINGLE_FILE,))
    if not any((folder / weights).is_file() for weights in _WEIGHTS):
        folder = model_folder(name, needs=(CONFIG_FILE,), wants=(TORCH_FILE,))
    find_weights(folder)
    return folder


def find_weights(folder: Path) -> Path:
    """The weights of an expert's folder: safetensors, or where there are none the torch file.

    Raises:
        CheckpointError: neither is there.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        "no weights in the folder",
        where=folder,
        expected=" or ".join(_WEIGHTS),
        found=", ".join(sorted(file.name for file in folder.iterdir())[:20]),
    )


def _tensors(file: Path) -> TensorSource | Path:
    """What `weights.load` reads."""
    if file.name == SINGLE_FILE:
        return file
    tensors = read_torch_archive(file)
    if not isinstance(tensors, Mapping):
        raise CheckpointError("not a set of tensors", where=file, expected="a state dict", found=type(tensors).__name__)
    return ArraySource(tensors, where=str(file))
