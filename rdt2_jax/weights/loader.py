"""Published weights into parameters, one leaf at a time.

`load` first verifies a whole file set from its headers and reports all problems together; only then it reads. It fills
one host buffer per leaf from the mapped files, puts it on its devices and lets go of it, so that beside the
parameters the process needs memory for one stacked leaf and one published tensor. `export` is the way back.
"""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.sharding import Sharding

from rdt2_jax.host_arrays import device_value
from rdt2_jax.params import PyTree, from_named_leaves, named_leaves
from rdt2_jax.weights.exporter import export, export_streamed
from rdt2_jax.weights.leaves import PublishedLeaves, published_leaves
from rdt2_jax.weights.matching import FOLLOW_SPECS, KEEP_SOURCE
from rdt2_jax.weights.reports import ExportReport, LoadReport, Progress
from rdt2_jax.weights.sources import TensorSource
from rdt2_jax.weights.table import Table

__all__ = [
    "FOLLOW_SPECS",
    "KEEP_SOURCE",
    "ExportReport",
    "LoadReport",
    "Progress",
    "PublishedLeaves",
    "export",
    "export_streamed",
    "leaf_places",
    "load",
    "published_leaves",
]


def load(
    table: Table,
    specs: PyTree,
    source: str | os.PathLike[str] | TensorSource,
    *,
    shardings: PyTree | None = None,
    dtype: Any = None,
    progress: Progress | None = None,
) -> tuple[PyTree, LoadReport]:
    """Fills a model from published weights.

    Args:
        table: the published layout.
        specs: tree of ParamSpec.
        source: a path for `SafetensorsFiles`, or any other source of tensors.
        shardings: tree like `specs` with sharding leaves, or one for all; None: everything on the default device.
        dtype: None demands that the file has each leaf's own dtype. "source" keeps the file's dtypes, "specs"
            converts to the leaves' dtypes, a floating dtype converts all floating leaves to it. Floats never become
            integers, nor the reverse.
        progress: called after every leaf.

    Returns:
        A tree like `specs` with jax arrays, and the report.

    Raises:
        CheckpointError: table and model, or model and file, do not fit; lists everything that is missing, unexpected,
            or of another shape or dtype. Or a duplicate differs, or a value does not fit its dtype.
    """
    with published_leaves(table, specs, source, dtype) as leaves:
        places = leaf_places(specs, shardings)
        done = 0
        values: dict[str, jax.Array] = {}
        for name in leaves.abstract:
            # the buffer has no name here: it dies inside device_value, before the next one is made
            values[name] = device_value(leaves.read(name), places[name])
            done += leaves.nbytes(name)
            if progress is not None:
                progress(name, done, leaves.report.nbytes)
    return from_named_leaves(specs, values), leaves.report


def leaf_places(specs: PyTree, shardings: PyTree | None) -> dict[str, Sharding | None]:
    """Where every leaf goes, by dotted name.

    Args:
        specs: tree of ParamSpec.
        shardings: tree like it with sharding leaves, or one for all; None: the default device.

    Raises:
        ConfigError: `shardings` is a tree with other leaves.
    """
    names = named_leaves(specs)
    if shardings is None or isinstance(shardings, Sharding):
        return dict.fromkeys(names, shardings)
    return named_leaves(from_named_leaves(specs, named_leaves(shardings)))
