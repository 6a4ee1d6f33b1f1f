"""Which tensors of a source fill which leaves, decided from headers alone, with all problems reported together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.errors import CheckpointError
from rdt2_jax.problems import Problems
from rdt2_jax.weights.sources import TensorInfo, TensorSource
from rdt2_jax.weights.table import Binding, Plan, Slot

KEEP_SOURCE = "source"
FOLLOW_SPECS = "specs"


@dataclasses.dataclass(frozen=True)
class Match:
    """A plan with the names that a source really has.

    Attributes:
        plan: what was matched.
        found: a slot's preferred name -> the tensors of the source that carry it, at least one.
        ignored: unused tensor -> reason.
        dtypes: leaf -> the dtype that it will have.
    """

    plan: Plan
    found: Mapping[str, tuple[TensorInfo, ...]]
    ignored: Mapping[str, str]
    dtypes: Mapping[str, np.dtype]

    def tensor(self, slot: Slot) -> TensorInfo:
        """The tensor that fills a slot."""
        return self.found[slot.names[0]][0]


def match(plan: Plan, source: TensorSource, dtype: Any) -> Match:
    """Compares a plan with what a source has, from its headers alone.

    Args:
        plan: a table bound to a model.
        source: tensors; none is read.
        dtype: which dtypes leaves get, as in `load`.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of another shape or dtype; lists all of them.
    """
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
    return Match(plan, found, ignored, dtypes)


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
        wanted = floating_dtype(policy)
        wanted = wanted if jnp.issubdtype(declared, jnp.floating) else declared
    for dtype in stored:
        if ((keep or policy is None) and dtype != wanted) or not _same_kind(dtype, wanted):
            name = next(info.name for info in tensors if info.dtype == dtype)
            advice = "; choose with dtype='specs', dtype='source' or a dtype" if policy is None else ""
            problems.add(f"dtype: {name} is {dtype}, {binding.leaf} would be {wanted}{advice}")
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        problems.add(f"dtype: {binding.leaf} would be {wanted}, which jax cuts to 32 bits")
    return wanted


def floating_dtype(policy: Any) -> np.dtype:
    """A dtype that a caller chose for floating leaves.

    Raises:
        CheckpointError: not a floating dtype.
    """
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
