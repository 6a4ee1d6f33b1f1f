"""The leaves of a model, made one at a time from published tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.errors import CheckpointError
from rdt2_jax.host_arrays import aligned_empty
from rdt2_jax.params import PyTree
from rdt2_jax.problems import Problems
from rdt2_jax.weights.matching import Match, match
from rdt2_jax.weights.reports import LoadReport
from rdt2_jax.weights.safetensors_files import SafetensorsFiles
from rdt2_jax.weights.sources import TensorSource
from rdt2_jax.weights.table import Binding, Plan, Table, bind

EachTensor = Callable[[str, int], None]

_PART_BYTES = 1 << 22


class PublishedLeaves:
    """What published weights make of a model, known before any of it is read.

    Attributes:
        abstract: dotted leaf name -> shape and dtype, in the order of the model's tree.
        report: as `load` gives it.

    Args:
        plan: the published layout, bound to the model.
        source: where the tensors are.
        dtype: as in `load`.

    Raises:
        CheckpointError: as `load`; of values that do not fit their dtype `read` tells.
    """

    def __init__(self, plan: Plan, source: TensorSource, dtype: Any = None) -> None:
        self._source = source
        self._match = match(plan, source, dtype)
        _require_equal_duplicates(self._match, source)
        self._bindings = {binding.leaf: binding for binding in self._match.plan.bindings}
        self.abstract: Mapping[str, jax.ShapeDtypeStruct] = {
            name: jax.ShapeDtypeStruct(binding.shape, self._match.dtypes[name])
            for name, binding in self._bindings.items()
        }
        self.report = _report(self._match)

    def read(self, name: str, each_tensor: EachTensor | None = None) -> np.ndarray:
        """One leaf, in a new host buffer that starts where jax can share it.

        Beside the buffer, memory for one published tensor is needed.

        Args:
            name: dotted leaf name.
            each_tensor: called as (published name, its bytes in the leaf) after every tensor that was read.

        Raises:
            CheckpointError: a value does not fit the leaf's dtype.
        """
        return _filled(self._match, self._bindings[name], self._source, each_tensor)

    def nbytes(self, name: str) -> int:
        """Bytes of one leaf."""
        return _leaf_bytes(self._match, self._bindings[name])


@contextmanager
def published_leaves(
    table: Table, specs: PyTree, source: str | os.PathLike[str] | TensorSource, dtype: Any = None
) -> Iterator[PublishedLeaves]:
    """Opens published weights for a model; see `PublishedLeaves`.

    Args:
        table, specs, dtype: as in `load`.
        source: a path for `SafetensorsFiles`, or any other source of tensors.

    Raises:
        CheckpointError: as `load`.
    """
    plan = bind(table, specs)  # a table that does not fit the model is found before any file is opened
    if not isinstance(source, (str, os.PathLike)):
        yield PublishedLeaves(plan, source, dtype)
        return
    with SafetensorsFiles(source) as files:
        yield PublishedLeaves(plan, files, dtype)


def _filled(
    matched: Match, binding: Binding, source: TensorSource, each_tensor: EachTensor | None = None
) -> np.ndarray:
    """A new host buffer with one leaf's values."""
    dtype = matched.dtypes[binding.leaf]
    if binding.constant is not None:
        return np.full(binding.shape, binding.constant.value, dtype)
    buffer = aligned_empty(binding.shape, dtype)
    for slot in binding.slots:
        info = matched.tensor(slot)
        tensor = source.read(info.name)
        if not _fits(tensor, dtype):
            raise CheckpointError("values do not fit the dtype", where=info.name, expected=dtype, found=info.dtype)
        buffer[slot.index] = binding.op.apply(tensor)
        del tensor
        source.release(info.name)
        if each_tensor is not None:
            each_tensor(info.name, buffer[slot.index].nbytes)
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


def _require_equal_duplicates(matched: Match, source: TensorSource) -> None:
    """Alternatives that are both present must hold the same bits."""
    problems = Problems()
    for first, *others in matched.found.values():
        for other in others:
            if first.dtype != other.dtype or not _bits_equal(source.read(first.name), source.read(other.name)):
                problems.add(f"{first.name} and {other.name} are one tensor, but differ")
            source.release(first.name)
            source.release(other.name)
    problems.raise_if_any(CheckpointError, "tensors under two names contradict each other")


def _bits_equal(a: np.ndarray, b: np.ndarray) -> bool:
    flat_a, flat_b = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(_parts(flat_a), _parts(flat_b), strict=True))


def _parts(flat: np.ndarray) -> Iterator[np.ndarray]:
    """A flat array in parts, so that a pass over it needs little memory."""
    step = max(1, _PART_BYTES // flat.dtype.itemsize)
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def _leaf_bytes(matched: Match, binding: Binding) -> int:
    return int(np.prod(binding.shape, dtype=np.int64)) * matched.dtypes[binding.leaf].itemsize


def _report(matched: Match) -> LoadReport:
    bindings = matched.plan.bindings
    slots = [slot for binding in bindings for slot in binding.slots]
    renamed = {slot.names[0]: matched.tensor(slot).name for slot in slots}
    stored = {b.leaf: {str(matched.tensor(slot).dtype) for slot in b.slots} for b in bindings}
    canonical = matched.plan.table.canonical_name
    return LoadReport(
        num_tensors=len(slots),
        nbytes=sum(_leaf_bytes(matched, binding) for binding in bindings),
        largest_leaf_bytes=max((_leaf_bytes(matched, binding) for binding in bindings), default=0),
        largest_tensor_bytes=max((matched.tensor(slot).nbytes for slot in slots), default=0),
        ignored=matched.ignored,
        constants={b.leaf: b.constant.reason for b in bindings if b.constant is not None},
        aliases={name: found for name, found in renamed.items() if canonical(found) != name},
        duplicates={first.name: other.name for first, *others in matched.found.values() for other in others},
        casts={
            leaf: f"{', '.join(sorted(dtypes))} -> {matched.dtypes[leaf]}"
            for leaf, dtypes in stored.items()
            if dtypes - {str(matched.dtypes[leaf])}
        },
    )
