"""Model folders: published or converted weights beside the small files that belong to them.

A model folder has config.json, the files of tokenizer and processor, and either published safetensors or our Orbax
item "params" (the folder is then a checkpoint of `rdt2_jax.checkpoints`). `convert` and `export` go from one kind to
the other, one leaf at a time; `load_params` reads both.

A folder may hold the first decoder layers alone, without final norm and head: what the action expert reads. Its
config.json is the published one all the same; how many layers there are is counted from what is stored.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from rdt2_jax.checkpoints import (
    StoredLeaves,
    StreamedSave,
    host_target,
    restore_streamed,
    save_streamed,
    stored_metadata,
)
from rdt2_jax.errors import CheckpointError
from rdt2_jax.host_arrays import device_value
from rdt2_jax.params import PyTree, from_named_leaves, named_leaves, tree_bytes
from rdt2_jax.qwen2_5_vl.config import MODEL_TYPE, Qwen25VLConfig, read_config
from rdt2_jax.qwen2_5_vl.folder import (
    LAYERS,
    PARAMS_ITEM,
    PUBLISHED_FILES,
    Extent,
    find_model,
    is_converted,
    require_extent,
    require_two_folders,
    small_files,
    stored_extent,
)
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams
from rdt2_jax.weights.folders import published_folder
from rdt2_jax.weights.loader import (
    KEEP_SOURCE,
    ExportReport,
    LoadReport,
    Progress,
    export_streamed,
    leaf_places,
    load,
    published_leaves,
)
from rdt2_jax.weights.matching import floating_dtype
from rdt2_jax.weights.safetensors_files import SINGLE_FILE
from rdt2_jax.weights.table import Table

_DEFAULT_SHARD_BYTES = 5_000_000_000

Shardings = PyTree | Callable[[Qwen25VLParams], PyTree]
"""A tree like the parameters with sharding leaves, one sharding for all, or a function from specs to either."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on its devices.

    Attributes:
        config: its shape; `text.num_layers` is the number of layers that were loaded.
        params: parameters.
        folder: where they were.
        report: what loading did.
    """

    config: Qwen25VLConfig
    params: Qwen25VLParams
    folder: Path
    report: LoadReport


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion read (`loaded`) and wrote (`saved`), and the small `files` it put beside the weights."""

    folder: Path
    loaded: LoadReport
    saved: StreamedSave
    files: tuple[str, ...]


def load_params(
    folder: str | os.PathLike[str],
    config: Qwen25VLConfig | None = None,
    *,
    num_layers: int | None = None,
    vision: bool = True,
    dtype: Any = None,
    shardings: Shardings = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads a model folder of either kind, one leaf at a time, each straight onto its devices.

    Beside the parameters themselves, one leaf is held: of converted ones in compressed form, while it is read.

    Args:
        folder: a folder or a hub name, see `model_folder`.
        config: the shape of the whole model; None: the folder's config.json.
        num_layers: only the first decoder layers, without final norm and head; None: all that the folder has.
        vision: with the vision tower.
        dtype: floating dtype of the parameters; None keeps the stored ones.
        shardings: where parameters go; None: everything on the default device. As their specs depend on the folder, a
            function that is called with them is often simplest.
        progress: called after every leaf.

    Raises:
        CheckpointError: no such model, no weights, weights that do not fit the configuration, are damaged, or lack
            the layers or the vision tower that are asked for.
        ConfigError: no usable config.json, or an impossible `num_layers`.
    """
    dtype = None if dtype is None else floating_dtype(dtype)
    path = find_model(folder)
    config = read_config(path) if config is None else config
    if is_converted(path):
        return _load_converted(path, config, num_layers, vision, dtype, shardings, progress)
    extent = Extent(config.text.num_layers if num_layers is None else num_layers, num_layers is None, vision)
    specs = extent.specs(config)
    params, report = load(
        extent.table(config),
        specs,
        path,
        shardings=_resolved(shardings, specs),
        dtype=KEEP_SOURCE if dtype is None else dtype,
        progress=progress,
    )
    return LoadedModel(config.with_layers(extent.num_layers), params, path, report)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    vision: bool = True,
    dtype: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Published weights -> a model folder with Orbax weights, which appears only when it is complete.

    Beside what is being written, one leaf and one published tensor are held.

    Args:
        source: a folder with published weights, or a hub name.
        target: the new folder; missing parents are created.
        num_layers: keep only the first decoder layers, and then neither final norm nor head.
        vision: keep the vision tower.
        dtype: floating dtype to convert to; None keeps the published ones.
        overwrite: allow a converted folder to be replaced if there is nothing else in it.
        progress: called as (tensor, bytes done, bytes in all) for every published tensor that was read.

    Raises:
        CheckpointError: no published weights, files missing, cut off or of another shape, `target` exists, or is
            inside the source or around it.
        ConfigError: no usable config.json, or an impossible `num_layers`.
        Rdt2Error: `target` cannot be created.
    """
    path, target = find_model(source), Path(target)
    require_two_folders(path, target)
    if is_converted(path):
        raise CheckpointError(
            "the weights are converted already", where=path, expected="published safetensors", found="Orbax items"
        )
    config = read_config(path)
    extent = Extent(config.text.num_layers if num_layers is None else num_layers, num_layers is None, vision)
    table, specs = extent.table(config), extent.specs(config)
    with published_leaves(table, specs, path, KEEP_SOURCE if dtype is None else dtype) as leaves:
        done, total = 0, leaves.report.nbytes

        def each_tensor(name: str, nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(name, done, total)

        files = small_files(path, {str(leaf.dtype) for leaf in leaves.abstract.values()})
        saved = save_streamed(
            target,
            PARAMS_ITEM,
            leaves.abstract,
            lambda name: leaves.read(name, each_tensor),
            {"model": MODEL_TYPE, **dataclasses.asdict(extent)},
            files=files,
            overwrite=overwrite,
        )
        return ConversionReport(target, leaves.report, saved, tuple(files))


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_shard_bytes: int = _DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """A converted folder -> one with safetensors under their published names, as transformers loads it.

    One leaf is held at a time, and while it is read up to as much again in compressed form. The new folder appears
    only when it is complete.

    Args:
        source: a folder with Orbax weights of a whole model.
        target: the new folder; missing parents are created.
        max_shard_bytes: largest amount of data in one file; more makes shards and an index.
        overwrite: allow the folder of a published model to be replaced if there is nothing else in it.
        progress: called after every leaf.

    Raises:
        CheckpointError: no Orbax weights, only part of a model, damaged, or `target` exists, or is inside the source
            or around it.
        Rdt2Error: `target` cannot be created.
    """
    path = find_model(source)
    require_two_folders(path, Path(target))
    if not is_converted(path):
        raise CheckpointError(
            "the weights are published ones already", where=path, expected="Orbax items", found="safetensors"
        )
    config, leaves = read_config(path), StoredLeaves(path, PARAMS_ITEM)
    stored = leaves.abstract
    whole = Extent(config.text.num_layers, True, True)
    require_extent(path, stored_extent(path, stored, config), whole)
    return write_published(
        target,
        whole.table(config),
        stored,
        leaves.read,
        small_files(path, {str(leaf.dtype) for leaf in stored.values()}),
        max_shard_bytes=max_shard_bytes if tree_bytes(dict(stored)) > max_shard_bytes else None,
        overwrite=overwrite,
        progress=progress,
    )


def write_published(
    folder: str | os.PathLike[str],
    table: Table,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str], np.ndarray],
    files: Mapping[str, bytes],
    *,
    max_shard_bytes: int | None,
    overwrite: bool,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a folder as published, one leaf at a time; it appears only when it is complete.

    Args:
        folder: the new folder; missing parents are created.
        table: names and layout of the published tensors.
        leaves: dotted leaf name -> shape and dtype.
        read: gives the values of a leaf by name.
        files: name -> content of the small files to put beside the weights.
        max_shard_bytes: largest amount of data in one file; None: a single file.
        overwrite: allow the folder of a published model to be replaced if there is nothing else in it.
        progress: called after every leaf.

    Raises:
        CheckpointError: `folder` exists, see `weights.folders.require_replaceable`.
        Rdt2Error: `folder` cannot be created.
    """
    with published_folder(folder, files, read_config=read_config, known=PUBLISHED_FILES, overwrite=overwrite) as (
        temporary,
        target,
    ):
        report = export_streamed(
            table,
            leaves,
            read,
            temporary if max_shard_bytes is not None else temporary / SINGLE_FILE,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    return dataclasses.replace(report, files=tuple(target / file.name for file in report.files))


def _load_converted(
    folder: Path,
    config: Qwen25VLConfig,
    num_layers: int | None,
    vision: bool,
    dtype: Any,
    shardings: Shardings,
    progress: Progress | None,
) -> LoadedModel:
    stored = stored_metadata(folder, PARAMS_ITEM)
    has = stored_extent(folder, stored, config)
    wants = Extent(has.num_layers, has.with_head, vision) if num_layers is None else Extent(num_layers, False, vision)
    require_extent(folder, has, wants)
    specs = wants.specs(config)
    places = leaf_places(specs, _resolved(shardings, specs))
    targets = {
        name: _target(name, spec.shape, stored.get(name), has.num_layers, places[name])
        for name, spec in named_leaves(specs).items()
    }
    total = sum(spec.size * (dtype or targets[name].dtype).itemsize for name, spec in named_leaves(specs).items())
    done = 0
    leaves: dict[str, jax.Array] = {}
    for name, leaf in restore_streamed(folder, PARAMS_ITEM, targets):
        if isinstance(leaf, np.ndarray):
            # a copy: a view would keep all layers in memory where jax shares the host's
            leaf = device_value(leaf[: wants.num_layers].copy(), places[name])
        leaves[name] = leaf if dtype is None else _cast(leaf, dtype, name)
        done += leaves[name].nbytes
        if progress is not None:
            progress(name, done, total)
    report = _restore_report(stored, leaves, total)
    return LoadedModel(config.with_layers(wants.num_layers), from_named_leaves(specs, leaves), folder, report)


def _target(
    name: str, shape: tuple[int, ...], stored: jax.ShapeDtypeStruct | None, stored_layers: int, place: Sharding | None
) -> jax.ShapeDtypeStruct | np.ndarray:
    """What to restore: the leaf in its place, or on the host a stack of which only the first layers are wanted.

    A leaf that is not stored has a target too: the restore reports it, with all else that does not fit.
    """
    dtype = jnp.dtype(jnp.float32) if stored is None else stored.dtype
    if name.startswith(LAYERS) and shape[0] < stored_layers:
        return host_target(jax.ShapeDtypeStruct((stored_layers, *shape[1:]), dtype))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _cast(leaf: jax.Array, dtype: np.dtype, name: str) -> jax.Array:
    """A leaf in another floating dtype; a value that it cannot hold is an error, as in `weights.load`."""
    if leaf.dtype == dtype:
        return leaf
    cast, overflows = _cast_and_count(leaf, dtype)
    if overflows:
        raise CheckpointError("values do not fit the dtype", where=name, expected=dtype, found=leaf.dtype)
    return jax.device_put(cast, leaf.sharding)  # the compiler usually leaves it there, but need not


@functools.partial(jax.jit, static_argnames="dtype")
def _cast_and_count(leaf: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """A cast, and how many finite values became infinite; one compilation for all leaves of a shape."""
    cast = leaf.astype(dtype)
    return cast, jnp.sum(jnp.isinf(cast) & ~jnp.isinf(leaf))


def _restore_report(
    stored: Mapping[str, jax.ShapeDtypeStruct], leaves: Mapping[str, jax.Array], nbytes: int
) -> LoadReport:
    largest = max(tree_bytes(stored[name]) for name in leaves)
    return LoadReport(
        num_tensors=len(leaves),
        nbytes=nbytes,
        largest_leaf_bytes=largest,
        largest_tensor_bytes=largest,
        ignored={name: "not asked for" for name in stored if name not in leaves},
        constants={},
        aliases={},
        duplicates={},
        casts={
            name: f"{stored[name].dtype} -> {leaf.dtype}"
            for name, leaf in leaves.items()
            if leaf.dtype != stored[name].dtype
        },
    )


def _resolved(shardings: Shardings, specs: Qwen25VLParams) -> PyTree:
    return shardings(specs) if callable(shardings) else shardings
