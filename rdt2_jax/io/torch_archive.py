"""Torch checkpoints (`.pt`, `.bin`) read without torch and without running anything they contain.

A checkpoint is a zip archive of stored (uncompressed) members: `<name>/data.pkl` describes the objects,
`<name>/data/<key>` holds each flat storage as raw little-endian numbers. Nothing is ever extracted to disk.
Every size is checked in Python integers before memory is taken or a view is made.

Container format: the zip writer of PyTorch (`caffe2/serialize/inline_container.h`, `torch/serialization.py`).
"""

from __future__ import annotations

import importlib
import math
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rdt2_jax.errors import CheckpointError, UnsafeFileError, missing_extra
from rdt2_jax.io.torch_pickle import MAX_PICKLE_BYTES, interpret_pickle
from rdt2_jax.io.torch_records import ParameterDictRef, StorageRef, TensorRef, describe

DEFAULT_MAX_BYTES = 64 * 2**30

MAX_EXPANSION = 16
"""How many times the bytes of all storages the tensors together may take. Shared weights give 2; a tensor
expanded with stride 0 could otherwise turn four bytes into the whole memory."""

MAX_DEPTH = 64
MAX_NODES = 200_000
"""Limits of the returned tree. A container that holds itself, or one that is shared so often that the tree
grows exponentially, meets them."""

_MAX_MEMBERS = 200_000
_READ_BYTES = 16 * 2**20
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    EOFError,
    OSError,
    struct.error,
)


def read_torch_archive(path: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES) -> Any:
    """Reads a checkpoint that `torch.save` wrote (zip format, torch 1.6 and later).

    Args:
        path: the `.pt` or `.bin` file.
        max_bytes: refuse a file whose storages, or whose tensors, together take more bytes than this.

    Returns:
        The saved object as a tree of dict, list, tuple, set, str, int, float, bool, None and numpy arrays.
        `OrderedDict` and `ParameterDict` become dict. Tensors are contiguous, writeable copies of their stored
        dtype (bfloat16 as `ml_dtypes.bfloat16`), whatever storage they shared; only a tensor that was saved as
        one and the same object under two names is one array under both.

    Raises:
        UnsafeFileError: the file asks for anything but tensors and plain data, or for too much memory.
        CheckpointError: the file is missing, damaged, or of a format that is not supported.
        MissingExtraError: the file holds bfloat16 tensors and `ml_dtypes` is not installed.
    """
    file = Path(path)
    _require_zip(file)
    with _reading(file), zipfile.ZipFile(file) as archive:
        members = _members(archive, file)
        pickle_name = _pickle_member(members, file)
        prefix = pickle_name.removesuffix("data.pkl")
        _require_little_endian(archive, members.get(prefix + "byteorder"), file)
        where = f"{file}: {pickle_name}"
        if members[pickle_name].file_size > MAX_PICKLE_BYTES:
            raise UnsafeFileError(
                "the pickle is too large",
                where=where,
                expected=f"at most {MAX_PICKLE_BYTES} bytes",
                found=members[pickle_name].file_size,
            )
        root, tensors = interpret_pickle(archive.read(members[pickle_name]), where)
        arrays = _read_tensors(archive, members, prefix, tensors, max_bytes, file)
    return _plain_tree(root, arrays, where)


# --- the zip container


def _require_zip(file: Path) -> None:
    with _reading(file), open(file, "rb") as stream:
        head = stream.read(64)
    if head.startswith(b"PK\x03\x04"):
        return
    if head.startswith(b"version https://git-lfs"):
        what, fix = "the file is a Git LFS pointer, not the checkpoint", "fetch the file itself (git lfs pull)"
    elif head.startswith(b"\x80"):
        what = "the file is a bare pickle, the format of torch before 1.6, which is not read here"
        fix = "load it with torch in a place where running its code does no harm, and save it again with torch.save"
    else:
        what, fix = "the file is no torch checkpoint", "check the download, or that the path is the right one"
    raise CheckpointError(
        what, where=file, expected="a zip archive written by torch.save", found=repr(head[:8]), fix=fix
    )


@contextmanager
def _reading(where: object) -> Iterator[None]:
    """Turns what the zip reader and the file system raise into a CheckpointError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError("the checkpoint does not exist", where=where) from error
    except _ZIP_ERRORS as error:
        raise CheckpointError(
            "the checkpoint cannot be read",
            where=where,
            found=f"{type(error).__name__}: {error}",
            fix="the file is probably truncated or damaged: fetch or save it again",
        ) from error


def _members(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    """The members by name, after refusing every trick a zip directory can play."""
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise UnsafeFileError(
            "the archive has too many members", where=file, expected=f"at most {_MAX_MEMBERS}", found=len(infos)
        )
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        where = f"{file}: {info.filename[:120]!r}"
        if info.filename in members:
            raise UnsafeFileError("the archive has two members of one name", where=where)
        if _is_odd_name(info):
            raise UnsafeFileError("a member has a name that torch.save does not write", where=where)
        if info.flag_bits & 0x41:
            raise UnsafeFileError("a member is encrypted", where=where)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnsafeFileError(
                "a member is compressed",
                where=where,
                expected="stored members, as torch.save writes them",
                found=f"{info.compress_size} bytes that claim to become {info.file_size}",
                fix="save the checkpoint again with torch.save",
            )
        members[info.filename] = info
    total, available = sum(info.file_size for info in infos), file.stat().st_size
    if total > available:
        raise UnsafeFileError(
            "the members claim more bytes than the file has, so they overlap or are cut off",
            where=file,
            expected=f"at most {available}",
            found=total,
        )
    return members


def _is_odd_name(info: zipfile.ZipInfo) -> bool:
    name = info.filename
    parts = name.split("/")
    return (
        info.orig_filename != name
        or "\\" in name
        or ":" in name
        or not name.isprintable()
        or any(part in ("", ".", "..") for part in parts)
    )


def _pickle_member(members: dict[str, zipfile.ZipInfo], file: Path) -> str:
    found = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise CheckpointError(
            "the archive is no torch checkpoint",
            where=file,
            expected="exactly one member <name>/data.pkl",
            found=", ".join(found) or "none",
        )
    return found[0]


def _require_little_endian(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None, file: Path) -> None:
    """Archives older than the `byteorder` member are little-endian, as are the machines that wrote them."""
    if info is None:
        return
    order = archive.read(info) if info.file_size <= 16 else b"?"
    if order != b"little":
        raise CheckpointError(
            "the checkpoint has a byte order that is not read here",
            where=f"{file}: {info.filename}",
            expected="little",
            found=repr(order),
            fix="save it again on a little-endian machine",
        )


# --- storages and tensors


def _read_tensors(
    archive: zipfile.ZipFile,
    members: dict[str, zipfile.ZipInfo],
    prefix: str,
    tensors: list[TensorRef],
    max_bytes: int,
    file: Path,
) -> dict[TensorRef, np.ndarray]:
    """Checks every storage and view first, then reads each storage once and copies its tensors out of it."""
    storages: dict[str, StorageRef] = {}
    by_storage: dict[str, list[TensorRef]] = {}
    for tensor in tensors:
        storage = tensor.storage
        where = f"{file}: {prefix}data/{storage.key}"
        if storages.setdefault(storage.key, storage) != storage:
            raise CheckpointError("one storage is declared in two ways", where=where)
        by_storage.setdefault(storage.key, []).append(tensor)
        _require_inside(tensor, where)
    infos = {key: _storage_member(members, prefix, storage, file) for key, storage in storages.items()}
    _require_moderate(tensors, list(storages.values()), max_bytes, file)

    arrays: dict[TensorRef, np.ndarray] = {}
    for key, storage in storages.items():
        flat = _read_storage(archive, infos[key], storage, file)
        for tensor in by_storage[key]:
            arrays[tensor] = _copy_view(flat, tensor, only_user=len(by_storage[key]) == 1)
    return arrays


def _require_inside(tensor: TensorRef, where: str) -> None:
    """The view must lie inside its storage: offset + sum of (size - 1) * stride < numel."""
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if min(numbers) < 0:
        raise CheckpointError("a tensor has a negative offset, size or stride", where=where, found=str(numbers))
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True) if size
    )
    is_empty = 0 in tensor.shape
    if (tensor.offset if is_empty else last + 1) > tensor.storage.numel:
        raise CheckpointError(
            "a tensor reaches beyond its storage",
            where=where,
            expected=f"at most {tensor.storage.numel} elements",
            found=f"offset {tensor.offset}, sizes {tensor.shape}, strides {tensor.strides}",
        )


def _storage_member(
    members: dict[str, zipfile.ZipInfo], prefix: str, storage: StorageRef, file: Path
) -> zipfile.ZipInfo:
    name = f"{prefix}data/{storage.key}"
    info = members.get(name)
    size = storage.numel * _itemsize(storage.dtype)
    if info is None or info.file_size != size:
        raise CheckpointError(
            "the numbers of a tensor are missing" if info is None else "a storage has the wrong size",
            where=f"{file}: {name}",
            expected=f"{size} bytes ({storage.numel} elements of {storage.dtype})",
            found="no such member" if info is None else f"{info.file_size} bytes",
        )
    return info


def _require_moderate(tensors: list[TensorRef], storages: list[StorageRef], max_bytes: int, file: Path) -> None:
    stored = sum(storage.numel * _itemsize(storage.dtype) for storage in storages)
    # A size of 0 counts as 1: numpy refuses empty arrays whose other sizes overflow, and so does this sum.
    wanted = sum(
        math.prod(max(size, 1) for size in tensor.shape) * _itemsize(tensor.storage.dtype) for tensor in tensors
    )
    limit = min(max_bytes, MAX_EXPANSION * stored + 2**20)
    if stored > max_bytes or wanted > limit:
        raise UnsafeFileError(
            "the tensors would take too much memory",
            where=file,
            expected=f"at most {limit} bytes",
            found=f"{wanted} bytes from storages of {stored}",
            fix="raise max_bytes if you trust the file and it really is this large",
        )


def _read_storage(archive: zipfile.ZipFile, info: zipfile.ZipInfo, storage: StorageRef, file: Path) -> np.ndarray:
    where = f"{file}: {info.filename}"
    buffer = np.empty(info.file_size, np.uint8)
    filled = 0
    with _reading(where), archive.open(info) as stream:
        while piece := stream.read(_READ_BYTES):  # zipfile compares the CRC when the end is met
            buffer[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
    if filled != info.file_size:
        raise CheckpointError("a storage is cut off", where=where, expected=info.file_size, found=filled)
    if storage.dtype == "bool" and buffer.size and buffer.max() > 1:
        raise CheckpointError("a storage of booleans holds other values", where=where, expected="0 and 1")
    return buffer.view(_numpy_dtype(storage.dtype))


def _copy_view(flat: np.ndarray, tensor: TensorRef, *, only_user: bool) -> np.ndarray:
    """The tensor as an array of its own. Its bounds are known to be good (`_require_inside`)."""
    if 0 in tensor.shape:
        return np.empty(tensor.shape, flat.dtype)
    # The stride of an axis of size 1 is never walked and may be any number, one that overflows included.
    strides = tuple(
        stride * flat.dtype.itemsize if size > 1 else 0
        for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)
    if only_user and view.size == flat.size and view.flags.c_contiguous:
        return flat.reshape(tensor.shape)  # the whole storage: a second copy would double the memory needed
    return np.array(view, order="C", copy=True)


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _numpy_dtype(dtype: str) -> np.dtype:
    if dtype != "bfloat16":
        return np.dtype(dtype).newbyteorder("<")
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ModuleNotFoundError as error:
        raise missing_extra("ml_dtypes", "model", "reading bfloat16 tensors") from error


# --- the returned tree


def _plain_tree(root: Any, tensors: dict[TensorRef, Any], where: str) -> Any:
    """The root object of `interpret_pickle` as plain Python, with a value in place of each tensor record."""
    nodes = 0

    def convert(value: Any, depth: int, path: str) -> Any:
        nonlocal nodes
        nodes += 1
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise UnsafeFileError(
                "the objects are nested too deeply or repeat without end",
                where=f"{where}, key {path or '(root)'}",
                expected=f"at most {MAX_DEPTH} levels and {MAX_NODES} values",
            )
        if isinstance(value, ParameterDictRef):
            value = _merge_parameter_dict(value, f"{where}, key {path or '(root)'}")
        if isinstance(value, dict):
            return {key: convert(item, depth + 1, f"{path}/{describe(key)}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(convert(item, depth + 1, f"{path}[{i}]") for i, item in enumerate(value))
        if isinstance(value, TensorRef):
            return tensors[value]
        if isinstance(value, set):
            nodes += len(value)
            return set(value)
        if value is None or isinstance(value, (str, int, float)):
            return value
        raise UnsafeFileError(
            "the checkpoint holds an object that is neither a tensor nor plain data",
            where=f"{where}, key {path or '(root)'}",
            found=describe(value),
        )

    return convert(root, 0, "")


def _merge_parameter_dict(source: ParameterDictRef, where: str) -> dict[Any, Any]:
    """Parameters and nested dicts of an `nn.ParameterDict`, in the order of its `_keys`."""
    state = source.state or {}
    keys, parameters, modules = (state.get(name) for name in ("_keys", "_parameters", "_modules"))
    if not (isinstance(keys, dict) and isinstance(parameters, dict) and isinstance(modules, dict)):
        raise CheckpointError(
            "a ParameterDict lacks its contents",
            where=where,
            expected="dicts _keys, _parameters and _modules",
            found=", ".join(describe(name) for name in state) or "nothing",
        )
    if parameters.keys() & modules.keys() or keys.keys() != parameters.keys() | modules.keys():
        raise CheckpointError(
            "the keys of a ParameterDict do not match its contents",
            where=where,
            expected=", ".join(describe(key) for key in keys),
            found=", ".join(describe(key) for key in (*parameters, *modules)),
        )
    return {key: parameters[key] if key in parameters else modules[key] for key in keys}
