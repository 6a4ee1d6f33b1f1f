"""Checksums: the same wherever an array lives, and different for every change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rdt2_jax.checkpoints.checksums import _CHUNK, _checksum_on_devices, checksums
from rdt2_jax.errors import DataError
from rdt2_jax.sharding import make_mesh

RANDOM = np.random.default_rng(0)


def checksum(array: Any) -> int:
    return checksums({"x": array})["x"]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.int8, np.uint32, np.bool_])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2)])
def test_devices_and_host_agree(dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.asarray(RANDOM.normal(size=shape) * 100).astype(np.int8).astype(dtype)
    assert int(_checksum_on_devices(jnp.asarray(values))) == checksum(values) == checksum(jnp.asarray(values))


def test_arrays_longer_than_a_chunk_are_whole() -> None:
    values = RANDOM.normal(size=2 * _CHUNK + 7).astype(np.float32)
    assert int(_checksum_on_devices(jnp.asarray(values))) == checksum(values)
    values[-1] += 1
    assert int(_checksum_on_devices(jnp.asarray(values))) == checksum(values)


def test_the_layout_does_not_matter(eight_devices: list[Any]) -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, eight_devices)
    values = RANDOM.normal(size=(8, 6)).astype(np.float32)
    for spec in (P("fsdp", "tensor"), P("tensor"), P(None, "tensor"), P()):
        array = jax.device_put(values, NamedSharding(mesh, spec))
        assert checksum(array) == checksum(values)
        assert int(_checksum_on_devices(array)) == checksum(values)
    assert checksum(np.asfortranarray(values)) == checksum(values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, jnp.bfloat16])
def test_every_flipped_bit_is_noticed(dtype: Any) -> None:
    values = RANDOM.normal(size=6).astype(dtype)
    original = checksum(values)
    for bit in range(8 * values.nbytes):
        flipped = values.copy()
        flipped.view(np.uint8)[bit // 8] ^= 1 << bit % 8
        assert checksum(flipped) != original


def test_order_counts() -> None:
    assert checksum(np.array([1.0, 2.0])) != checksum(np.array([2.0, 1.0]))
    assert checksum(np.zeros(3, np.float32)) != checksum(np.zeros(4, np.float32))


def test_dtypes_without_a_checksum_are_refused() -> None:
    with pytest.raises(DataError, match="no checksum for this dtype"):
        checksum(np.zeros(2, np.complex64))
