"""How parameters and activations are laid out over a device mesh.

The only file that says PartitionSpec. Parameters name their dimensions logically (`ParamSpec.axes`); `ShardingRules`
map the names to mesh axes; `shardings` turns both into one NamedSharding per parameter, and refuses what would be
laid out by accident. Nothing here is global: rules and mesh are passed in.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rdt2_jax.errors import ShardingError
from rdt2_jax.params import LogicalAxes, ParamSpec, PyTree, from_named_leaves, is_spec, named_leaves
from rdt2_jax.problems import Problems

Rule = str | tuple[str, ...] | None
"""The mesh axis, or axes, over which a logical axis is split; None: never."""

MeshAxes = tuple[str, ...]

MESH_AXES: MeshAxes = ("data", "fsdp", "tensor")
"""Batch, fully sharded parameters (also batch), and tensor parallelism."""

DEFAULT_RULES_TABLE: Mapping[str, Rule] = {
    # activations
    "batch": ("data", "fsdp"),
    "sequence": None,
    "batch_within_embed": "data",  # rows, where the embedding itself is split over fsdp
    # transformers
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    # the convolutional tokenizer; codebooks move by statistics of the whole batch, so every device holds them
    "kernel": None,
    "channels_in": "fsdp",
    "channels_out": "tensor",
    "levels": None,
    "codes": None,
    "code_dim": None,
}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis name -> mesh axis, several mesh axes, or None. Immutable and hashable.

    Attributes:
        rules: one entry per logical axis name.
        mesh_axes: every mesh axis that a mesh may have. A rule or a mesh that names another is an error (a typo
            would otherwise replicate in silence); one that a mesh lacks, or has with size 1, drops out.

    Raises:
        ShardingError: a rule names a mesh axis that is not in `mesh_axes`, or one axis twice.
    """

    rules: Mapping[str, Rule]
    mesh_axes: MeshAxes = MESH_AXES

    def __post_init__(self) -> None:
        problems = Problems()
        normalized: dict[str, MeshAxes] = {}
        for name, rule in self.rules.items():
            axes = () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)
            unknown = [axis for axis in axes if axis not in self.mesh_axes]
            if unknown:
                problems.add(f"rule '{name}' -> {rule!r}: unknown mesh axis {', '.join(map(repr, unknown))}")
            if len(set(axes)) != len(axes):
                problems.add(f"rule '{name}' -> {rule!r}: a mesh axis is named twice")
            normalized[name] = axes
        problems.raise_if_any(ShardingError, "sharding rules that cannot be used", expected=", ".join(self.mesh_axes))
        object.__setattr__(self, "rules", MappingProxyType(normalized))
        object.__setattr__(self, "mesh_axes", tuple(self.mesh_axes))

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.rules.items())), self.mesh_axes))

    def mesh_axes_of(self, logical_axis: str) -> MeshAxes:
        """Mesh axes of one logical axis.

        Raises:
            ShardingError: no rule has this name; lists the known ones.
        """
        if logical_axis not in self.rules:
            close = difflib.get_close_matches(logical_axis, self.rules, n=1, cutoff=0.6)
            raise ShardingError(
                f"no rule for the logical axis '{logical_axis}'",
                expected=", ".join(self.rules),
                found=logical_axis,
                fix=f"did you mean '{close[0]}'?" if close else "add it with rules.extended({...})",
            )
        axes = self.rules[logical_axis]
        return axes if isinstance(axes, tuple) else ()

    def extended(self, rules: Mapping[str, Rule]) -> ShardingRules:
        """These rules with some added or replaced."""
        return ShardingRules({**self.rules, **rules}, self.mesh_axes)


DEFAULT_RULES = ShardingRules(DEFAULT_RULES_TABLE)
"""Rules of this project for meshes made of data x fsdp x tensor."""


@dataclasses.dataclass(frozen=True)
class Fallback:
    """One parameter that could not have its first choice of axes.

    Attributes:
        name: dotted name of the parameter.
        shape, nbytes: of the whole parameter.
        axes: the logical axes that were used instead.
        replicated: True if nothing is left to split, so that every device holds all of it.
        reason: what did not divide.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    axes: LogicalAxes
    replicated: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class ShardingReport:
    """What a layout costs.

    Attributes:
        total_bytes: of all parameters together.
        bytes_per_device: of the shards that one device holds.
        fallbacks: parameters that did not get their first choice.
    """

    total_bytes: int
    bytes_per_device: int
    fallbacks: tuple[Fallback, ...]

    @property
    def replicated(self) -> tuple[Fallback, ...]:
        """Parameters that were meant to be split and are held whole by every device."""
        return tuple(fallback for fallback in self.fallbacks if fallback.replicated)

    def __str__(self) -> str:
        lines = [f"{self.total_bytes:,} bytes of parameters, {self.bytes_per_device:,} on each device"]
        for use in self.fallbacks:
            kind = "replicated" if use.replicated else f"split by {use.axes}"
            lines.append(f"  {kind}: {use.name} {use.shape}, {use.nbytes:,} bytes: {use.reason}")
        return "\n".join(lines)


def make_mesh(axis_sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the given axis sizes, in that order, with automatic axis types.

    Args:
        axis_sizes: mesh axis name -> size, for example `{"data": 2, "fsdp": 2, "tensor": 2}`.
        devices: devices to choose from; all of this process group by default.

    Raises:
        ShardingError: a size below 1, or more devices asked for than there are.
    """
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(axis_sizes.values())
    if not axis_sizes or any(size < 1 for size in axis_sizes.values()):
        raise ShardingError("a mesh needs axes of size 1 or more", found=dict(axis_sizes))
    if needed > len(devices):
        platform = devices[0].platform if devices else "no"
        raise ShardingError(
            "not enough devices for the mesh",
            expected=f"{needed} for {dict(axis_sizes)}",
            found=f"{len(devices)} {platform} devices",
            fix=f"on CPU set XLA_FLAGS=--xla_force_host_platform_device_count={needed} before jax starts",
        )
    return jax.make_mesh(
        tuple(axis_sizes.values()),
        tuple(axis_sizes),
        axis_types=(AxisType.Auto,) * len(axis_sizes),
        devices=devices[:needed],
    )


def shardings(specs: PyTree, rules: ShardingRules, mesh: Mesh) -> tuple[PyTree, ShardingReport]:
    """One NamedSharding per parameter.

    A parameter whose dimensions do not divide tries its `fallbacks` in order; the one that is used is reported.

    Args:
        specs: tree of ParamSpec.
        rules: logical axis -> mesh axes.
        mesh: where to lay the parameters out.

    Returns:
        A tree like `specs` with NamedSharding leaves, and the report.

    Raises:
        ShardingError: names every parameter that uses a mesh axis twice or that does not divide and has no fallback
            that does; or a mesh axis or logical axis is unknown.
    """
    _require_known_mesh(rules, mesh)
    problems = Problems()
    chosen: dict[str, NamedSharding] = {}
    fallbacks: list[Fallback] = []
    total_bytes = bytes_per_device = 0
    for name, spec in named_leaves(specs).items():
        layout = _choose_layout(name, spec, rules, mesh, problems, fallbacks)
        chosen[name] = NamedSharding(mesh, _partition_spec(layout))
        total_bytes += spec.nbytes
        bytes_per_device += spec.nbytes // _num_shards(layout, mesh)
    problems.raise_if_any(
        ShardingError,
        "parameters that cannot be laid out",
        where=f"mesh {dict(mesh.shape)}",
        fix="give the ParamSpec other axes or fallbacks (None in every place allows replication), or change the mesh",
    )
    report = ShardingReport(total_bytes, bytes_per_device, tuple(fallbacks))
    return from_named_leaves(specs, chosen), report


def abstract_sharded(specs: PyTree, layout: PyTree) -> PyTree:
    """`jax.ShapeDtypeStruct` leaves that carry shardings: the target of a restore.

    Args:
        specs: tree of ParamSpec, of abstract values or of arrays.
        layout: tree of the same structure with sharding leaves.
    """
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding),
        specs,
        layout,
        is_leaf=is_spec,
    )


def constrain(x: jax.Array, *axes: str | None, rules: ShardingRules, mesh: Mesh) -> jax.Array:
    """Asks the compiler to lay an activation out by logical axes; for use inside jit.

    Args:
        x: activation.
        axes: one logical axis name (or None) per dimension of `x`.
        rules, mesh: as in `shardings`.

    Raises:
        ShardingError: wrong number of axes, a mesh axis used twice, or a dimension that does not divide.
    """
    _require_known_mesh(rules, mesh)
    if len(axes) != x.ndim:
        raise ShardingError("one logical axis per dimension is needed", expected=f"{x.ndim} for {x.shape}", found=axes)
    layout = _resolve(axes, rules, mesh)
    problem = _collision(axes, layout) or _indivisible(x.shape, layout, mesh)
    if problem:
        raise ShardingError("an activation cannot be laid out", where=f"mesh {dict(mesh.shape)}", found=problem)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _partition_spec(layout)))


def batch_sharding(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> NamedSharding:
    """Splits the leading axis of arrays of any rank as the rules say for "batch"."""
    _require_known_mesh(rules, mesh)
    return NamedSharding(mesh, _partition_spec(_resolve(("batch",), rules, mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array, of any rank."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which everything is laid out over it; hashable, a static argument of jit.

    Attributes:
        mesh: where.
        rules: logical axis -> mesh axes.
    """

    mesh: Mesh
    rules: ShardingRules = DEFAULT_RULES

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """As `constrain`: lays an activation out by logical axes."""
        return constrain(x, *axes, rules=self.rules, mesh=self.mesh)

    def shardings(self, specs: PyTree) -> tuple[PyTree, ShardingReport]:
        """As `shardings`: one NamedSharding per parameter."""
        return shardings(specs, self.rules, self.mesh)


def _choose_layout(
    name: str,
    spec: ParamSpec,
    rules: ShardingRules,
    mesh: Mesh,
    problems: Problems,
    fallbacks: list[Fallback],
) -> tuple[MeshAxes, ...]:
    """The first of a parameter's choices that divides; problems and fallbacks are appended to."""
    reasons: list[str] = []
    whole_everywhere: tuple[MeshAxes, ...] = ((),) * len(spec.shape)  # stands in while more problems are collected
    for axes in (spec.axes, *spec.fallbacks):
        layout = _resolve(axes, rules, mesh, where=name)
        collision = _collision(axes, layout)
        if collision:
            problems.add(f"{name} {spec.shape}: {collision}")
            return whole_everywhere
        indivisible = _indivisible(spec.shape, layout, mesh)
        if not indivisible:
            if reasons:
                whole = not any(layout)
                fallbacks.append(Fallback(name, spec.shape, spec.nbytes, axes, whole, "; ".join(reasons)))
            return layout
        if indivisible not in reasons:
            reasons.append(indivisible)
    problems.add(f"{name} {spec.shape}, axes {spec.axes}: {'; '.join(reasons)}")
    return whole_everywhere


def _resolve(axes: LogicalAxes, rules: ShardingRules, mesh: Mesh, where: str | None = None) -> tuple[MeshAxes, ...]:
    """Mesh axes of every dimension; those that the mesh lacks, or has with size 1, are left out."""
    layout = []
    for axis in axes:
        try:
            mesh_axes = () if axis is None else rules.mesh_axes_of(axis)
        except ShardingError as error:
            raise ShardingError(
                error.what, where=where, expected=error.expected, found=error.found, fix=error.fix
            ) from None
        layout.append(tuple(name for name in mesh_axes if mesh.shape.get(name, 1) > 1))
    return tuple(layout)


def _collision(axes: LogicalAxes, layout: tuple[MeshAxes, ...]) -> str | None:
    """Two dimensions that ask for the same mesh axis, as a sentence."""
    users: dict[str, int] = {}
    for dimension, mesh_axes in enumerate(layout):
        for name in mesh_axes:
            if name in users:
                first = users[name]
                return (
                    f"dimensions {first} ('{axes[first]}') and {dimension} ('{axes[dimension]}') "
                    f"both use the mesh axis '{name}'"
                )
            users[name] = dimension
    return None


def _indivisible(shape: tuple[int, ...], layout: tuple[MeshAxes, ...], mesh: Mesh) -> str | None:
    """The dimensions that do not divide by their mesh axes, as a sentence."""
    found = []
    for dimension, (size, mesh_axes) in enumerate(zip(shape, layout, strict=True)):
        parts = math.prod(mesh.shape[name] for name in mesh_axes)
        if size % parts:
            sizes = " x ".join(f"{name}={mesh.shape[name]}" for name in mesh_axes)
            found.append(f"dimension {dimension} of size {size} does not divide by {sizes}")
    return ", ".join(found) or None


def _partition_spec(layout: tuple[MeshAxes, ...]) -> PartitionSpec:
    return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in layout))


def _num_shards(layout: tuple[MeshAxes, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for axes in layout for name in axes)


def _require_known_mesh(rules: ShardingRules, mesh: Mesh) -> None:
    unknown = [name for name in mesh.axis_names if name not in rules.mesh_axes]
    if unknown:
        raise ShardingError(
            "the rules do not know a mesh axis, so nothing would be split over it",
            where=f"mesh {dict(mesh.shape)}",
            expected=", ".join(rules.mesh_axes),
            found=", ".join(unknown),
        )
