"""Checksums of arrays, computed where they live and independent of how they are laid out.

Storage layers check sizes and structure, but a flipped bit in a compressed float passes them. The checksum is a sum,
modulo 2^32, of one well-mixed 32-bit word per element: a sum does not depend on the order of its terms, so an array
split over any mesh has the same checksum, and each device needs only its own shard. The mixing is the finalizer of
MurmurHash3 (Appleby, public domain) over the element's bits and its flat index; it is a bijection of the bits, so
that a change of a single element always changes the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.errors import DataError
from rdt2_jax.host_arrays import host_value

_INDEX_MULTIPLIER = np.uint32(0x9E3779B1)
_CHUNK = 1 << 16
"""Elements mixed at a time on the host: the temporaries stay in the processor's cache."""


def checksums(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Checksum of every array, in [0, 2^32).

    Args:
        arrays: name -> array of booleans, integers or floats of 8, 16, 32 or 64 bits.

    Raises:
        DataError: another dtype.
    """
    values: dict[str, Any] = {}
    for name, array in arrays.items():
        _word_dtype(array.dtype)
        values[name] = _checksum_on_devices(array) if _on_accelerator(array) else _checksum_on_host(array)
    # one transfer for all: until here devices only queued the work
    return {name: int(value) for name, value in jax.device_get(values).items()}


def _on_accelerator(array: jax.Array | np.ndarray) -> bool:
    if not isinstance(array, jax.Array):
        return False
    return not array.is_fully_addressable or next(iter(array.devices())).platform != "cpu"


def _word_dtype(dtype: Any) -> np.dtype:
    """The unsigned integers that the elements are read as; 64-bit elements are two words."""
    dtype = np.dtype(dtype)
    if dtype.kind not in "biuf" and not jnp.issubdtype(dtype, jnp.floating):
        raise DataError("no checksum for this dtype", expected="booleans, integers or floats", found=dtype)
    return np.dtype({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[dtype.itemsize])


@jax.jit
def _checksum_on_devices(array: jax.Array) -> jax.Array:
    bits = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    words = jax.lax.bitcast_convert_type(bits, _word_dtype(array.dtype)).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for dimension, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
    return jnp.sum(_mix(words, index), dtype=jnp.uint32)


def _checksum_on_host(array: jax.Array | np.ndarray) -> int:
    words = np.ascontiguousarray(host_value(array)).reshape(-1).view(_word_dtype(array.dtype))
    total = 0
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK].astype(np.uint32)
        index = np.arange(start, start + chunk.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(_mix(chunk, index), dtype=np.uint64))
    return total % (1 << 32)


def _mix(words: Any, index: Any) -> Any:
    """uint32 words and indices -> uint32; arithmetic wraps modulo 2^32."""
    h = words ^ (index * _INDEX_MULTIPLIER)
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
