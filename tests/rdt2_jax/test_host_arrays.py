"""Arrays between host and devices: whole values, and no memory that outlives its use."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rdt2_jax.errors import DataError
from rdt2_jax.host_arrays import device_value, host_value
from rdt2_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def mesh(eight_devices: list[Any]) -> Mesh:
    return make_mesh({"fsdp": 4, "tensor": 2}, eight_devices)


SPECS = [P(), P("fsdp"), P(None, "tensor"), P("tensor", "fsdp"), P(("fsdp", "tensor"))]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_values_survive_the_way_to_devices_and_back(mesh: Mesh, spec: P, dtype: Any) -> None:
    values = np.arange(64).reshape(8, 8).astype(dtype)
    array = device_value(values.copy(), NamedSharding(mesh, spec))
    assert array.sharding == NamedSharding(mesh, spec)
    back = host_value(array)
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, values)


def test_without_a_sharding_values_go_to_the_default_device() -> None:
    array = device_value(np.arange(3, dtype=np.float32))
    assert array.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(host_value(array), [0, 1, 2])


def test_a_host_value_leaves_no_copy_behind(mesh: Mesh) -> None:
    """`np.asarray` of a sharded array would: jax keeps it, and the next one is the same object."""
    array = device_value(np.ones((8, 8), np.float32), NamedSharding(mesh, P("fsdp")))
    copy = weakref.ref(host_value(array))
    assert copy() is None
    kept = weakref.ref(np.asarray(array))
    assert kept() is not None


def test_a_buffer_that_was_copied_is_freed_when_the_caller_lets_go(mesh: Mesh) -> None:
    buffer = np.ones((8, 1024), np.float32)
    freed = weakref.ref(buffer)
    array = device_value(buffer, NamedSharding(mesh, P(None, "tensor")))  # no piece of it is contiguous
    assert freed() is not None
    del buffer
    assert freed() is None
    np.testing.assert_array_equal(host_value(array), np.ones((8, 1024)))


def test_numpy_arrays_are_host_values_already() -> None:
    values = np.arange(3)
    assert host_value(values) is values


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64])
def test_64_bit_values_are_not_cut_in_silence(dtype: Any) -> None:
    with pytest.raises(DataError, match="cut a 64-bit array"):
        device_value(np.zeros(3, dtype))
