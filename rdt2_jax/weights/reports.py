"""What loading and exporting did, and how they tell how far they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called as (leaf, bytes done, bytes in all) after every leaf."""


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
