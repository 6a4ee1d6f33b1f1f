"""Published weights into parameters and back, one leaf at a time.

`load` first verifies a whole file set from its headers and reports all problems together; only then it reads. It fills
one host buffer per leaf from the mapped files, puts it on its devices and lets go of it, so that beside the
parameters the process needs memory for one stacked leaf and one published tensor. `export` is the way back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from rdt2_jax.errors import CheckpointError
from rdt2_jax.host_arrays import device_value, host_value
from rdt2_jax.params import PyTree, from_named_leaves, named_leaves
from rdt2_jax.problems import Problems
from rdt2_jax.weights.safetensors_files import SafetensorsFiles
from rdt2_jax.weights.safetensors_writer import write_safetensors
from rdt2_jax.weights.sources import TensorInfo, TensorSource
from rdt2_jax.weights.table import Binding, Plan, Slot, Table, bind

KEEP_SOURCE = "source"
FOLLOW_SPECS = "specs"

Progress = Callable[[str, int, int], None]
"""Called as (leaf, bytes done, bytes in all) after every leaf."""

_PART_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a load did besides filling leaves.

    Attributes:
        num_tensors: published tensors that were used.
        nbytes: bytes of the parameters.
        largest_leaf_bytes, largest_tensor_bytes: host memory needed beside the parameters is at most their sum.
        ignored: unused tensor -> reason.
        constants: leaf without a published tensor -> reason.
        aliases: preferred name -> the other name under which the file has the tensor.
        duplicates: tensor -> another name under which the file has it too; both were compared and are equal.
        casts: leaf -> "stored dtype -> dtype".
    """

    num_tensors: int
    nbytes: int
    largest_leaf_bytes: int
    largest_tensor_bytes: int
    ignored: Mapping[str, str]
    constants: Mapping[str, str]
    aliases: Mapping[str, str]
    duplicates: Mapping[str, str]
    casts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Files that were written, how much is in them, and leaves that the published layout has no place for."""

    files: tuple[Path, ...]
    num_tensors: int
    nbytes: int
    left_out: Mapping[str, str]


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
    plan = bind(table, specs)
    if not isinstance(source, (str, os.PathLike)):
        return _load(plan, specs, source, shardings, dtype, progress)
    with SafetensorsFiles(source) as files:
        return _load(plan, specs, files, shardings, dtype, progress)


def export(
    table: Table,
    params: PyTree,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
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
        progress: called after every leaf.

    Raises:
        CheckpointError: the table does not fit the parameters, a dtype that the format lacks, or files exist.
    """
    plan = bind(table, params)
    leaves = named_leaves(params)
    exporter = _Exporter(plan, leaves, progress)
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


@dataclasses.dataclass(frozen=True)
class _Match:
    """A plan with the names that a source really has.

    `found` maps a slot's preferred name to the tensors of the source that carry it, at least one.
    """

    plan: Plan
    found: Mapping[str, tuple[TensorInfo, ...]]
    ignored: Mapping[str, str]
    dtypes: Mapping[str, np.dtype]

    def tensor(self, slot: Slot) -> TensorInfo:
        return self.found[slot.names[0]][0]


def _load(
    plan: Plan,
    specs: PyTree,
    source: TensorSource,
    shardings: PyTree | None,
    dtype: Any,
    progress: Progress | None,
) -> tuple[PyTree, LoadReport]:
    match = _match(plan, source, dtype)
    _require_equal_duplicates(match, source)
    places = _places(specs, shardings)
    total = sum(_leaf_bytes(match, binding) for binding in plan.bindings)
    done = 0
    leaves: dict[str, jax.Array] = {}
    for binding in plan.bindings:
        # the buffer has no name here: it dies inside device_value, before the next one is made
        leaves[binding.leaf] = device_value(_filled(match, binding, source), places[binding.leaf])
        done += _leaf_bytes(match, binding)
        if progress is not None:
            progress(binding.leaf, done, total)
    return from_named_leaves(specs, leaves), _report(match, total)


def _places(specs: PyTree, shardings: PyTree | None) -> dict[str, Sharding | None]:
    """Where every leaf goes."""
    names = named_leaves(specs)
    if shardings is None or isinstance(shardings, Sharding):
        return dict.fromkeys(names, shardings)
    return named_leaves(from_named_leaves(specs, named_leaves(shardings)))


def _match(plan: Plan, source: TensorSource, dtype: Any) -> _Match:
    """Compares a plan with what a source has, from its headers alone."""
    problems = Problems()
    available: dict[str, TensorInfo] = {}
    for name, info in source.tensors.items():
        canonical = plan.table.canonical_name(name)
        if canonical in available:
            problems.add(f"tensors {available[canonical].name} and {name}: two spellings of one name")
        available[canonical] = info
    found: dict[str, tuple[TensorInfo, ...]] = {}
    dtypes: dict[str, np.dtype] = {}
    for binding in plan.bindings:
        for slot in binding.slots:
            present = tuple(available.pop(name) for name in slot.names if name in available)
            if not present:
                where = f"{binding.leaf}{list(slot.index) or ''}"
                problems.add(f"missing: {' or '.join(slot.names)}, {binding.source_shape} for {where}")
            for info in present:
                if info.shape != binding.source_shape:
                    problems.add(
                        f"shape: {info.name} is {info.shape}, {binding.source_shape} is needed for {binding.leaf}"
                    )
            found[slot.names[0]] = present
        present = [info for slot in binding.slots for info in found[slot.names[0]]]
        dtypes[binding.leaf] = _leaf_dtype(binding, present, dtype, problems)
    ignored: dict[str, str] = {}
    for name, info in available.items():
        reason = plan.ignored_reason(name)
        if reason is None:
            problems.add(f"unexpected: {info.name}, {info.dtype} {info.shape}")
        else:
            ignored[info.name] = reason
    problems.raise_if_any(
        CheckpointError,
        f"the weights are not those of a {plan.table.name} of this configuration",
        where=next((info.where for info in source.tensors.values()), "a source without tensors"),
    )
    return _Match(plan, found, ignored, dtypes)


def _leaf_dtype(binding: Binding, tensors: list[TensorInfo], policy: Any, problems: Problems) -> np.dtype:
    """The dtype a leaf will have, by the caller's policy; what does not fit is a problem."""
    declared = jnp.dtype(binding.dtype)
    stored = list(dict.fromkeys(info.dtype for info in tensors))
    if not stored:
        return declared
    keep = isinstance(policy, str) and policy == KEEP_SOURCE
    if policy is None or (isinstance(policy, str) and policy == FOLLOW_SPECS):
        wanted = declared
    elif keep:
        # a file of integers for a floating leaf is another model, whatever the caller keeps
        wanted = stored[0] if _same_kind(stored[0], declared) else declared
    else:
        wanted = _floating_dtype(policy)
        wanted = wanted if jnp.issubdtype(declared, jnp.floating) else declared
    for dtype in stored:
        if ((keep or policy is None) and dtype != wanted) or not _same_kind(dtype, wanted):
            name = next(info.name for info in tensors if info.dtype == dtype)
            advice = "; choose with dtype='specs', dtype='source' or a dtype" if policy is None else ""
            problems.add(f"dtype: {name} is {dtype}, {binding.leaf} would be {wanted}{advice}")
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        problems.add(f"dtype: {binding.leaf} would be {wanted}, which jax cuts to 32 bits")
    return wanted


def _floating_dtype(policy: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(policy)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise CheckpointError(
            "only floating leaves can be converted as one",
            where="dtype",
            expected=f"None, '{KEEP_SOURCE}', '{FOLLOW_SPECS}' or a floating dtype",
            found=policy,
        )
    return dtype


def _same_kind(a: np.dtype, b: np.dtype) -> bool:
    return any(jnp.issubdtype(a, kind) and jnp.issubdtype(b, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _require_equal_duplicates(match: _Match, source: TensorSource) -> None:
    """Alternatives that are both present must hold the same bits."""
    problems = Problems()
    for first, *others in match.found.values():
        for other in others:
            if first.dtype != other.dtype or not _bits_equal(source.read(first.name), source.read(other.name)):
                problems.add(f"{first.name} and {other.name} are one tensor, but differ")
            source.release(first.name)
            source.release(other.name)
    problems.raise_if_any(CheckpointError, "tensors under two names contradict each other")


def _bits_equal(a: np.ndarray, b: np.ndarray) -> bool:
    flat_a, flat_b = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(_parts(flat_a), _parts(flat_b), strict=True))


def _filled(match: _Match, binding: Binding, source: TensorSource) -> np.ndarray:
    """A new host buffer with one leaf's values."""
    dtype = match.dtypes[binding.leaf]
    if binding.constant is not None:
        return np.full(binding.shape, binding.constant.value, dtype)
    buffer = np.empty(binding.shape, dtype)
    for slot in binding.slots:
        info = match.tensor(slot)
        tensor = source.read(info.name)
        if not _fits(tensor, dtype):
            raise CheckpointError("values do not fit the dtype", where=info.name, expected=dtype, found=info.dtype)
        buffer[slot.index] = binding.op.apply(tensor)
        del tensor
        source.release(info.name)
    return buffer


def _fits(tensor: np.ndarray, dtype: np.dtype) -> bool:
    """False if a narrower integer or float cannot hold the values; infinities stay infinities."""
    kind = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    if dtype == np.bool_ or (kind(dtype).max >= kind(tensor.dtype).max and kind(dtype).min <= kind(tensor.dtype).min):
        return True
    largest, smallest = kind(dtype).max, kind(dtype).min
    for part in _parts(tensor.reshape(-1)):
        finite = part if kind is jnp.iinfo else part[np.isfinite(part)]
        if finite.size and not (smallest <= finite.min() and finite.max() <= largest):
            return False
    return True


def _parts(flat: np.ndarray) -> Iterator[np.ndarray]:
    """A flat array in parts, so that a pass over it needs little memory."""
    step = max(1, _PART_BYTES // flat.dtype.itemsize)
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def _leaf_bytes(match: _Match, binding: Binding) -> int:
    return int(np.prod(binding.shape, dtype=np.int64)) * match.dtypes[binding.leaf].itemsize


def _report(match: _Match, total: int) -> LoadReport:
    bindings = match.plan.bindings
    slots = [slot for binding in bindings for slot in binding.slots]
    renamed = {slot.names[0]: match.tensor(slot).name for slot in slots}
    stored = {b.leaf: {str(match.tensor(slot).dtype) for slot in b.slots} for b in bindings}
    canonical = match.plan.table.canonical_name
    return LoadReport(
        num_tensors=len(slots),
        nbytes=total,
        largest_leaf_bytes=max((_leaf_bytes(match, binding) for binding in bindings), default=0),
        largest_tensor_bytes=max((match.tensor(slot).nbytes for slot in slots), default=0),
        ignored=match.ignored,
        constants={b.leaf: b.constant.reason for b in bindings if b.constant is not None},
        aliases={name: found for name, found in renamed.items() if canonical(found) != name},
        duplicates={first.name: other.name for first, *others in match.found.values() for other in others},
        casts={
            leaf: f"{', '.join(sorted(dtypes))} -> {match.dtypes[leaf]}"
            for leaf, dtypes in stored.items()
            if dtypes - {str(match.dtypes[leaf])}
        },
    )


class _Exporter:
    """Gives the writer its tensors, holding one leaf on the host at a time."""

    def __init__(self, plan: Plan, leaves: Mapping[str, Any], progress: Progress | None) -> None:
        self._leaves, self._progress = leaves, progress
        self._slots = {slot.names[0]: (binding, slot) for binding in plan.bindings for slot in binding.slots}
        self.tensors = [
            TensorInfo(name, np.dtype(leaves[binding.leaf].dtype), binding.source_shape)
            for name, (binding, _) in self._slots.items()
        ]
        self._total = sum(info.nbytes for info in self.tensors)
        self._done = 0
        self._held: tuple[str, np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        binding, slot = self._slots[name]
        if self._held is None or self._held[0] != binding.leaf:
            self._held = None
            self._held = (binding.leaf, host_value(self._leaves[binding.leaf]))
        tensor = binding.op.invert(self._held[1][slot.index])
        self._done += tensor.nbytes
        if slot is binding.slots[-1] and self._progress is not None:
            self._progress(binding.leaf, self._done, self._total)
        return tensor
