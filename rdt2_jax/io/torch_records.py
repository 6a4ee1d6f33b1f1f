"""The records a torch checkpoint is made of, as inert data: names, storages, tensors and dicts.

None of them can be called, and none of them knows torch. `rdt2_jax.io.torch_pickle` makes them and
`rdt2_jax.io.torch_archive` turns them into numpy arrays.

Meaning of the records: `torch/serialization.py`, `torch/_utils.py` and `torch/nn/modules/container.py` of PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STORAGE_DTYPES = {
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}

ORDERED_DICT = "collections.OrderedDict"
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
SETS = ("__builtin__.set", "builtins.set")
ALLOWED_GLOBALS = frozenset({*STORAGE_DTYPES, *SETS, ORDERED_DICT, PARAMETER_DICT, REBUILD_TENSOR, REBUILD_PARAMETER})


@dataclass(frozen=True)
class Global:
    """The name of a class or function. It is never looked up."""

    name: str


@dataclass(frozen=True)
class StorageRef:
    """One flat block of numbers: `numel` elements of `dtype` in the archive member `data/<key>`."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A strided view of a storage; offset and strides count elements. Its bounds are not yet checked."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class OrderedDictRef(dict):
    """Told apart from a plain dict because torch attaches `_metadata` to the one and never to the other."""

    __slots__ = ()


class ParameterDictRef:
    """An `nn.ParameterDict` record: empty when named, filled by the state that follows."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None


def describe(value: Any) -> str:
    """A value for a message: never long, and never a walk through nested containers of unknown size."""
    if isinstance(value, tuple) and len(value) <= 8:
        return "(" + ", ".join("tuple" if isinstance(item, tuple) else describe(item) for item in value) + ")"
    if value is None or isinstance(value, (str, int, float)):
        text = str(value)
    elif isinstance(value, Global):
        text = value.name
    elif isinstance(value, StorageRef):
        text = f"storage {value.key}"
    else:
        return type(value).__name__.strip("_")
    text = text if len(text) <= 120 else text[:120] + "..."
    return text if text.isprintable() else ascii(text)
