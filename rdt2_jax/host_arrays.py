"""Arrays on their way between host memory and devices, without copies that outlive the transfer."""

from __future__ import annotations

import gc
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from rdt2_jax.errors import DataError, ShardingError

_ALIGNMENT = 64
"""What jax's CPU client asks of memory that it shares."""


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised C-ordered host array that jax can share on CPU: numpy aligns large arrays to 16 bytes only."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    block = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + nbytes].view(dtype).reshape(shape)


def host_value(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole value on the host, as numpy; it may share the array's memory, so do not write into it.

    Unlike `np.asarray`, which makes jax keep its copy for as long as the array lives, this leaves nothing behind.

    Raises:
        ShardingError: part of the array lives on devices of another process.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if not array.is_fully_addressable:
        raise ShardingError(
            "the array is spread over several processes",
            expected="an array on devices of this process",
            found=array.sharding,
        )
    shards = array.addressable_shards
    on_cpu = shards[0].device.platform == "cpu"
    if on_cpu and len(shards) == 1:
        return np.asarray(array)
    value = np.empty(array.shape, array.dtype)
    for shard in shards:
        if shard.replica_id == 0:
            # jax keeps a host copy of what is converted; on CPU it is a view, elsewhere it must die with a temporary
            value[shard.index] = np.asarray(shard.data if on_cpu else jnp.copy(shard.data))
    return value


def device_value(buffer: np.ndarray, sharding: Sharding | None = None) -> jax.Array:
    """Hands a host buffer over to devices; the values are in place when this returns.

    On CPU the result may be the buffer itself, or pieces of it (jax shares suitably aligned memory, even when told
    not to): whoever calls this must never write into the buffer again. Where the values were copied, jax no longer
    holds the buffer, and it is freed as soon as the caller lets go of it.

    Args:
        buffer: host array.
        sharding: where to put it; None means the default device.

    Raises:
        DataError: a 64-bit dtype while jax runs with 32-bit types, which would cut it silently.
    """
    if jax.dtypes.canonicalize_dtype(buffer.dtype) != buffer.dtype:
        raise DataError(
            "jax would cut a 64-bit array to 32 bits",
            found=f"{buffer.dtype} {buffer.shape}",
            fix="convert it explicitly, or enable jax_enable_x64",
        )
    value = jax.device_put(buffer, sharding)
    value.block_until_ready()
    del buffer
    # jax queues host buffers for release until its next call; its hook on the collector empties the queue now
    gc.collect(0)
    return value
