"""Weight tables: which published tensor fills which leaf.

One `Row` per tensor family. In names, `{i}` stands for an index and `{i+1}` or `{i-1}` for its neighbour. What a
placeholder stands for follows from where it appears:

- in the source and the leaf, with `values`: the row is repeated for every value, `{group}` for "pos", "rot", "grip";
- in the source alone: the leaf is stacked over it. Placeholders take the leaf's leading dimensions in the order in
  which they appear, counting from 0; an index map `stacked={"i": ((0, 1), (3, 4))}` says otherwise, and takes as
  many dimensions as it is deep (blocks in groups), with numbers or words in it.

`bind` lays a table over the declaration of a model and demands a bijection: every leaf and every slice of a stacked
leaf filled once, no published tensor used twice. It reads no file.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rdt2_jax.errors import CheckpointError, Rdt2Error
from rdt2_jax.params import PyTree, named_leaves
from rdt2_jax.problems import Problems
from rdt2_jax.weights.ops import Op, Shape, identity

_PLACEHOLDER = re.compile(r"\{(\w+)([+-]\d+)?\}")

Values = Mapping[str, Sequence[Any]]
IndexMap = Sequence[Any]
"""Nested sequences of indices or words, one level per leading dimension that they fill."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One family of published tensors and the leaf it fills.

    Attributes:
        source: published name. A tuple lists alternatives of which a file has one; if it has several, they must be
            bit-equal. The first is the one that is written.
        leaf: dotted name of the leaf.
        op: from one published tensor to the leaf, or to one slice of a stacked leaf.
        stacked: index maps of placeholders, where counting from 0 along one dimension is not right.
        values: what the other placeholders stand for; added to the table's.
    """

    source: str | tuple[str, ...]
    leaf: str
    op: Op = identity
    stacked: Mapping[str, IndexMap] = dataclasses.field(default_factory=dict)
    values: Values = dataclasses.field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """All alternatives."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Published tensors that are not used, and why.

    Attributes:
        pattern: name with `*` and `?` as in file names, and placeholders.
        reason: why it is right to leave them out.
        values: what the placeholders stand for.
    """

    pattern: str
    reason: str
    values: Values = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Constant:
    """A leaf that no published tensor fills, the value it gets in all its elements, and why."""

    leaf: str
    value: bool | int | float
    reason: str
    values: Values = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """Everything that is known about one published layout.

    Attributes:
        name: of the published model, for messages.
        rows: tensor families.
        ignored: tensors that a file may have and that are not used.
        constants: leaves without a published tensor.
        values: what placeholders with a meaning of their own stand for, in all rows.
        prefixes: (prefix in the file, prefix in the rows): other spellings of the same layout. The first that fits a
            name is replaced.
    """

    name: str
    rows: tuple[Row, ...]
    ignored: tuple[Ignored, ...] = ()
    constants: tuple[Constant, ...] = ()
    values: Values = dataclasses.field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = ()

    def canonical_name(self, name: str) -> str:
        """A name found in a file, as the rows spell it."""
        for found, ours in self.prefixes:
            if name.startswith(found):
                return ours + name.removeprefix(found)
        return name


@dataclasses.dataclass(frozen=True)
class Slot:
    """One published tensor: where it goes in its leaf, and its names, the first preferred."""

    index: tuple[int, ...]
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Binding:
    """One leaf with all the published tensors that fill it; without slots it is filled with `constant`."""

    leaf: str
    shape: Shape
    dtype: Any
    op: Op
    source_shape: Shape
    slots: tuple[Slot, ...]
    constant: Constant | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table bound to a model: a bijection between published tensors and slices of leaves.

    Attributes:
        table: what was bound.
        bindings: one per leaf, in the order of the model's tree.
        ignored: (pattern without placeholders, reason).
    """

    table: Table
    bindings: tuple[Binding, ...]
    ignored: tuple[tuple[str, str], ...]

    def ignored_reason(self, name: str) -> str | None:
        """Why a (canonical) name is not used; None if no rule ignores it."""
        for pattern, reason in self.ignored:
            if fnmatch.fnmatchcase(name, pattern):
                return reason
        return None


def bind(table: Table, specs: PyTree) -> Plan:
    """Lays a table over a model.

    Args:
        table: the published layout.
        specs: tree of ParamSpec, of abstract values or of arrays: anything with shape and dtype.

    Returns:
        A plan whose bindings are in the order of the tree's leaves.

    Raises:
        CheckpointError: the table is not a bijection with the leaves; lists all problems.
    """
    binder = _Binder(table, named_leaves(specs))
    for row in table.rows:
        binder.add_row(row)
    for constant in table.constants:
        binder.add_constant(constant)
    return binder.finish()


class _Binder:
    """Collects bindings and problems while a table is laid over the leaves of a model."""

    def __init__(self, table: Table, leaves: Mapping[str, Any]) -> None:
        self.table, self.leaves = table, leaves
        self.problems = Problems()
        self.bindings: dict[str, Binding | None] = {}
        self.users: dict[str, str] = {}

    def add_row(self, row: Row) -> None:
        for leaf_name, *sources in self._expanded((row.leaf, *row.sources), row.values):
            if self._claim_leaf(leaf_name, f"row {sources[0]}"):
                try:
                    binding = _bind_row(row, leaf_name, tuple(sources), self.leaves[leaf_name])
                except Rdt2Error as error:
                    self.problems.add(f"row {sources[0]} -> {leaf_name}: {_one_line(error)}")
                else:
                    self.bindings[leaf_name] = binding
                    self._claim_tensors(binding)

    def add_constant(self, constant: Constant) -> None:
        for (leaf_name,) in self._expanded((constant.leaf,), constant.values):
            if self._claim_leaf(leaf_name, "constant"):
                leaf = self.leaves[leaf_name]
                self.bindings[leaf_name] = Binding(leaf_name, tuple(leaf.shape), leaf.dtype, identity, (), (), constant)

    def finish(self) -> Plan:
        ignored = tuple(
            (pattern, rule.reason)
            for rule in self.table.ignored
            for (pattern,) in self._expanded((rule.pattern,), rule.values)
        )
        bindings = tuple(found for found in map(self.bindings.get, self.leaves) if found is not None)
        plan = Plan(self.table, bindings, ignored)
        for name in self.leaves:
            if name not in self.bindings:
                self.problems.add(f"leaf {name}: no row fills it")
        for name, leaf_name in self.users.items():
            reason = plan.ignored_reason(name)
            if reason is not None:
                self.problems.add(f"tensor {name}: used for {leaf_name}, and ignored: {reason}")
        self.problems.raise_if_any(CheckpointError, "the weight table does not fit the model", where=self.table.name)
        return plan

    def _expanded(self, patterns: tuple[str, ...], values: Values) -> list[tuple[str, ...]]:
        try:
            return list(_expand(patterns, {**self.table.values, **values}))
        except Rdt2Error as error:
            self.problems.add(f"{' <- '.join(patterns)}: {_one_line(error)}")
            return []

    def _claim_leaf(self, leaf_name: str, claimant: str) -> bool:
        if leaf_name not in self.leaves:
            self.problems.add(f"{claimant} -> {leaf_name}: the model has no such leaf")
        elif leaf_name in self.bindings:
            self.problems.add(f"{claimant} -> {leaf_name}: another row fills this leaf")
        else:
            self.bindings[leaf_name] = None
            return True
        return False

    def _claim_tensors(self, binding: Binding) -> None:
        for slot in binding.slots:
            for name in slot.names:
                if name in self.users:
                    self.problems.add(f"tensor {name}: used for {self.users[name]} and for {binding.leaf}")
                self.users[name] = binding.leaf


def _bind_row(row: Row, leaf_name: str, sources: tuple[str, ...], leaf: Any) -> Binding:
    """The binding of one (expanded) row: which tensors fill which slices of its leaf."""
    shape = tuple(leaf.shape)
    placeholders = list(dict.fromkeys(name for name, _ in _PLACEHOLDER.findall(sources[0])))
    for source in sources[1:]:
        if {name for name, _ in _PLACEHOLDER.findall(source)} != set(placeholders):
            raise CheckpointError("alternatives of a row must have the same placeholders", found=sources)
    unknown = set(row.stacked) - set(placeholders)
    if unknown:
        raise CheckpointError("an index map for a placeholder that the source lacks", found=sorted(unknown))
    axes: list[np.ndarray] = []
    depth = 0
    for name in placeholders:
        if depth >= len(shape):
            raise CheckpointError("more placeholders than dimensions", expected=f"at most {shape}", found=placeholders)
        index_map = _index_array(row.stacked[name]) if name in row.stacked else _index_array(range(shape[depth]))
        if index_map.shape != shape[depth : depth + index_map.ndim]:
            raise CheckpointError(
                f"the index map of '{name}' does not fit the leaf",
                expected=shape[depth : depth + index_map.ndim],
                found=index_map.shape,
            )
        depth += index_map.ndim
        axes.append(index_map)
    source_shape = row.op.source_shape(shape[depth:])
    slots = []
    for index in np.ndindex(*shape[:depth]):
        values: dict[str, Any] = {}
        start = 0
        for name, index_map in zip(placeholders, axes, strict=True):
            values[name] = index_map[index[start : start + index_map.ndim]]
            start += index_map.ndim
        slots.append(Slot(index, tuple(dict.fromkeys(_fill(source, values) for source in sources))))
    return Binding(leaf_name, shape, leaf.dtype, row.op, source_shape, tuple(slots))


def _index_array(index_map: IndexMap) -> np.ndarray:
    """Nested sequences as an array of objects, so that words and numbers stay what they are."""
    try:
        shape = np.array(index_map).shape
    except ValueError as error:
        raise CheckpointError("an index map must be rectangular", found=index_map) from error
    return np.array(index_map, dtype=object).reshape(shape)


def _expand(patterns: tuple[str, ...], values: Values) -> Iterator[tuple[str, ...]]:
    """All patterns, with every combination of values for the placeholders of the first put in."""
    names = list(dict.fromkeys(name for name, _ in _PLACEHOLDER.findall(patterns[0])))
    missing = [name for name in names if name not in values]
    if missing:
        raise CheckpointError("placeholders without values", found=missing)
    for combination in itertools.product(*(values[name] for name in names)):
        chosen = dict(zip(names, combination, strict=True))
        yield tuple(_fill(pattern, chosen) for pattern in patterns)


def _fill(pattern: str, values: Mapping[str, Any]) -> str:
    """Puts values into a pattern; placeholders without one stay."""

    def value(match: re.Match[str]) -> str:
        name, offset = match.groups()
        if name not in values:
            return match.group(0)
        if offset is None:
            return str(values[name])
        if not isinstance(values[name], int):
            raise CheckpointError("only numbers have neighbours", expected="an integer", found=values[name])
        return str(values[name] + int(offset))

    return _PLACEHOLDER.sub(value, pattern)


def _one_line(error: Rdt2Error) -> str:
    parts = [error.what]
    if error.expected is not None:
        parts.append(f"expected {error.expected}")
    if error.found is not None:
        parts.append(f"found {error.found}")
    return ", ".join(parts)
