"""How a published tensor becomes a parameter, and back: reorderings of its elements, each with its inverse.

An op moves elements and never changes them, so a round trip is exact. Ops work on numpy arrays and return views where
numpy can; they also say which shape goes with which before any data is read. "Source" is the published side,
"target" ours.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

from rdt2_jax.errors import CheckpointError

Shape = tuple[int, ...]


class Op(Protocol):
    """A bijection between source and target arrays."""

    def target_shape(self, source: Shape) -> Shape:
        """Shape after `apply`. Raises CheckpointError if no array of shape `source` fits."""
        ...

    def source_shape(self, target: Shape) -> Shape:
        """Shape after `invert`. Raises CheckpointError if no array of shape `target` fits."""
        ...

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Source -> target."""
        ...

    def invert(self, array: np.ndarray) -> np.ndarray:
        """Target -> source."""
        ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """Leaves the tensor as it is."""

    def target_shape(self, source: Shape) -> Shape:
        return source

    def source_shape(self, target: Shape) -> Shape:
        return target

    def apply(self, array: np.ndarray) -> np.ndarray:
        return array

    def invert(self, array: np.ndarray) -> np.ndarray:
        return array


@dataclasses.dataclass(frozen=True)
class Permute:
    """Reorders dimensions: target dimension i is source dimension `order[i]`."""

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise CheckpointError("not a permutation of dimensions", found=self.order)

    @property
    def _inverse_order(self) -> tuple[int, ...]:
        return tuple(self.order.index(dimension) for dimension in range(len(self.order)))

    def target_shape(self, source: Shape) -> Shape:
        self._require_rank(source)
        return tuple(source[dimension] for dimension in self.order)

    def source_shape(self, target: Shape) -> Shape:
        self._require_rank(target)
        return tuple(target[dimension] for dimension in self._inverse_order)

    def apply(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self.order)

    def invert(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(self._inverse_order)

    def _require_rank(self, shape: Shape) -> None:
        if len(shape) != len(self.order):
            raise CheckpointError(
                "wrong number of dimensions", where=self, expected=f"{len(self.order)} dimensions", found=shape
            )


@dataclasses.dataclass(frozen=True)
class Split:
    """Splits the source's dimension `axis` into several of the given `sizes`, the first varying slowest."""

    axis: int
    sizes: tuple[int, ...]

    def target_shape(self, source: Shape) -> Shape:
        if not 0 <= self.axis < len(source) or source[self.axis] != math.prod(self.sizes):
            raise CheckpointError(
                "a dimension cannot be split",
                where=self,
                expected=f"{math.prod(self.sizes)} in dimension {self.axis}",
                found=source,
            )
        return (*source[: self.axis], *self.sizes, *source[self.axis + 1 :])

    def source_shape(self, target: Shape) -> Shape:
        end = self.axis + len(self.sizes)
        if self.axis < 0 or target[self.axis : end] != self.sizes:
            raise CheckpointError(
                "dimensions cannot be merged",
                where=self,
                expected=f"{self.sizes} in dimensions {self.axis}..{end - 1}",
                found=target,
            )
        return (*target[: self.axis], math.prod(self.sizes), *target[end:])

    def apply(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.target_shape(array.shape))

    def invert(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.source_shape(array.shape))


@dataclasses.dataclass(frozen=True)
class Inverse:
    """Another op, backwards."""

    op: Op

    def target_shape(self, source: Shape) -> Shape:
        return self.op.source_shape(source)

    def source_shape(self, target: Shape) -> Shape:
        return self.op.target_shape(target)

    def apply(self, array: np.ndarray) -> np.ndarray:
        return self.op.invert(array)

    def invert(self, array: np.ndarray) -> np.ndarray:
        return self.op.apply(array)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Ops one after another, in the order source -> target."""

    ops: tuple[Op, ...]

    def target_shape(self, source: Shape) -> Shape:
        for op in self.ops:
            source = op.target_shape(source)
        return source

    def source_shape(self, target: Shape) -> Shape:
        for op in reversed(self.ops):
            target = op.source_shape(target)
        return target

    def apply(self, array: np.ndarray) -> np.ndarray:
        for op in self.ops:
            array = op.apply(array)
        return array

    def invert(self, array: np.ndarray) -> np.ndarray:
        for op in reversed(self.ops):
            array = op.invert(array)
        return array


def chain(*ops: Op) -> Chain:
    """Ops one after another, in the order source -> target."""
    return Chain(ops)


def merge(axis: int, sizes: tuple[int, ...]) -> Inverse:
    """Merges the source's dimensions of `sizes`, starting at `axis`, into one."""
    return Inverse(Split(axis, sizes))


def reshape(source: Shape, target: Shape) -> Chain:
    """Reinterprets a C-ordered tensor of shape `source` as `target`."""
    if math.prod(source) != math.prod(target):
        raise CheckpointError("a reshape must keep the number of elements", expected=source, found=target)
    return chain(merge(0, source), Split(0, target))


identity = Identity()
"""The tensor as it is: norms, biases, embeddings."""

transpose = Permute((1, 0))
"""torch Linear (out, in) -> (in, out)."""

conv1d = Permute((2, 1, 0))
"""torch Conv1d (out, in, width) -> (width, in, out)."""

conv_transpose1d = Permute((2, 0, 1))
"""torch ConvTranspose1d (in, out, width) -> (width, in, out); taps keep torch's order."""


def convolution_as_linear(window: Shape) -> Chain:
    """torch convolution (out, *window) whose stride is its kernel -> (prod(window), out), a matrix over patches.

    Args:
        window: the kernel's dimensions behind `out`, channels first, for example (3, 2, 14, 14).
    """
    return chain(merge(1, window), transpose)


def heads_out(num_heads: int, head_dim: int) -> Chain:
    """torch Linear (heads * head_dim, embed) -> (embed, heads, head_dim): query, key and value projections."""
    return chain(Split(0, (num_heads, head_dim)), Permute((2, 0, 1)))


def heads_bias(num_heads: int, head_dim: int) -> Split:
    """Bias (heads * head_dim,) -> (heads, head_dim)."""
    return Split(0, (num_heads, head_dim))


def heads_in(num_heads: int, head_dim: int) -> Chain:
    """torch Linear (embed, heads * head_dim) -> (heads, head_dim, embed): the output projection of attention."""
    return chain(transpose, Split(0, (num_heads, head_dim)))


def fused_heads_out(parts: int, num_heads: int, head_dim: int) -> Chain:
    """torch Linear (parts * heads * head_dim, embed) -> (parts, embed, heads, head_dim): a fused q, k, v."""
    return chain(Split(0, (parts, num_heads, head_dim)), Permute((0, 3, 1, 2)))


def interleaved_heads_out(parts: int, num_heads: int, head_dim: int) -> Chain:
    """torch Linear (heads * head_dim * parts, embed) -> (parts, embed, heads, head_dim).

    The parts (keys and values) alternate element by element on the last axis of the layer's output.
    """
    return chain(Split(0, (num_heads, head_dim, parts)), Permute((2, 3, 0, 1)))
