"""Parameters back into published weights, one leaf at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from rdt2_jax.host_arrays import host_value
from rdt2_jax.params import PyTree, named_leaves
from rdt2_jax.weights.reports import ExportReport, Progress
from rdt2_jax.weights.safetensors_writer import write_safetensors
from rdt2_jax.weights.sources import TensorInfo
from rdt2_jax.weights.table import Plan, Table, bind


def export(
    table: Table,
    params: PyTree,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    unused: Mapping[str, np.ndarray] = MappingProxyType({}),
    progress: Progress | None = None,
) -> ExportReport:
    """Writes parameters under their published names, in the dtypes they have.

    A row's first name is written. Its alternatives stand in the header's metadata as {alternative: first name}, as
    torch's safetensors writer records tensors that share memory.

    Args:
        table: the published layout.
        params: tree of arrays.
        path: a file; with `max_shard_bytes`, an existing folder without weights.
        metadata: more text for the header, `{"format": "pt"}` by default.
        max_shard_bytes: largest amount of data in one file.
        overwrite: allow an existing file to be replaced.
        unused: tensors that no leaf fills, by published name: written as they are, behind the others.
        progress: called after every leaf.

    Raises:
        CheckpointError: the table does not fit the parameters, a dtype that the format lacks, or files exist.
    """
    leaves = named_leaves(params)
    return export_streamed(
        table,
        leaves,
        lambda name: host_value(leaves[name]),
        path,
        metadata=metadata,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        unused=unused,
        progress=progress,
    )


def export_streamed(
    table: Table,
    leaves: Mapping[str, Any],
    read: Callable[[str], np.ndarray],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    unused: Mapping[str, np.ndarray] = MappingProxyType({}),
    progress: Progress | None = None,
) -> ExportReport:
    """As `export`, for leaves that are read when their turn comes: at most one is held.

    Args:
        table: the published layout.
        leaves: dotted leaf name -> anything with its shape and dtype.
        read: gives a leaf as a host array; called once for each that has a published name.
        path, metadata, max_shard_bytes, overwrite, unused, progress: as in `export`.

    Raises:
        CheckpointError: as `export`, and what `read` raises.
    """
    plan = bind(table, dict(leaves))
    exporter = _Exporter(plan, leaves, read, unused, progress)
    aliases = {alias: slot.names[0] for binding in plan.bindings for slot in binding.slots for alias in slot.names[1:]}
    files = write_safetensors(
        path,
        exporter.tensors,
        exporter.read,
        metadata={**({"format": "pt"} if metadata is None else metadata), **aliases},
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
    left_out = {b.leaf: b.constant.reason for b in plan.bindings if b.constant is not None}
    nbytes = sum(info.nbytes for info in exporter.tensors)
    return ExportReport(files, len(exporter.tensors), nbytes, left_out)


class _Exporter:
    """Gives the writer its tensors, holding one leaf on the host at a time."""

    def __init__(
        self,
        plan: Plan,
        leaves: Mapping[str, Any],
        read: Callable[[str], np.ndarray],
        unused: Mapping[str, np.ndarray],
        progress: Progress | None,
    ) -> None:
        self._read_leaf, self._unused, self._progress = read, unused, progress
        self._slots = {slot.names[0]: (binding, slot) for binding in plan.bindings for slot in binding.slots}
        self.tensors = [
            TensorInfo(name, np.dtype(leaves[binding.leaf].dtype), binding.source_shape)
            for name, (binding, _) in self._slots.items()
        ]
        self.tensors += [TensorInfo(name, array.dtype, array.shape) for name, array in unused.items()]
        self._total = sum(info.nbytes for info in self.tensors)
        self._done = 0
        self._held: tuple[str, np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        if name in self._unused:
            self._done += self._unused[name].nbytes
            return self._unused[name]
        binding, slot = self._slots[name]
        if self._held is None or self._held[0] != binding.leaf:
            self._held = None
            self._held = (binding.leaf, self._read_leaf(binding.leaf))
        tensor = binding.op.invert(self._held[1][slot.index])
        self._done += tensor.nbytes
        if slot is binding.slots[-1] and self._progress is not None:
            self._progress(binding.leaf, self._done, self._total)
        return tensor
