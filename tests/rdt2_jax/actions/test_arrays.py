"""The array namespace: numpy in, numpy out; jax in, jax out; jax itself never imported."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import rdt2_jax.actions
from rdt2_jax.actions import arrays
from rdt2_jax.errors import DataError


def test_importing_the_actions_leaves_jax_out() -> None:
    code = (
        "import sys, pkgutil, importlib, rdt2_jax.actions as a\n"
        "for m in pkgutil.iter_modules(a.__path__): importlib.import_module('rdt2_jax.actions.' + m.name)\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'torch', 'mujoco'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_public_names_are_there() -> None:
    assert len(set(rdt2_jax.actions.__all__)) == len(rdt2_jax.actions.__all__)
    for name in rdt2_jax.actions.__all__:
        assert getattr(rdt2_jax.actions, name) is not None
    assert rdt2_jax.actions.chunk_to_tcp.__module__ == "rdt2_jax.actions.chunks"


def test_namespace_follows_the_arguments() -> None:
    assert arrays.namespace(np.ones(2), [1.0]) is np
    assert arrays.namespace(np.ones(2), jnp.ones(2)) is jnp
    assert arrays.namespace(np.float32(1.0)) is np


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_types_are_kept(dtype: type) -> None:
    _, array = arrays.as_arrays(np.ones(3, dtype))
    assert isinstance(array, np.ndarray)
    assert array.dtype == dtype


def test_other_numbers_become_floating_point() -> None:
    xp, integers, flags, low = arrays.as_arrays([1, 2], np.array([True]), np.ones(2, ml_dtypes.bfloat16))
    assert xp is np
    assert {integers.dtype, flags.dtype, low.dtype} == {np.dtype(np.float64)}
    xp, integers, kept = arrays.as_arrays(jnp.arange(2), jnp.ones(2, jnp.bfloat16))
    assert xp is jnp
    assert integers.dtype == jnp.float32
    assert kept.dtype == jnp.bfloat16


@pytest.mark.parametrize("values", [np.ones(2, complex), ["a", "b"], np.array([None]), np.zeros(1, [("x", "f4")])])
def test_what_is_not_a_real_number_is_refused(values: object) -> None:
    with pytest.raises(DataError, match="without arithmetic on real numbers"):
        arrays.as_arrays(values)


def test_ragged_lists_are_refused() -> None:
    with pytest.raises(DataError, match="do not form an array"):
        arrays.as_arrays([[1.0, 2.0], [3.0]])
    with pytest.raises(DataError, match="thing is not an array"):
        arrays.host_array([[1.0, 2.0], [3.0]], "thing")


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap], ids=["jit", "grad", "vmap"])
def test_tracers_are_told_from_values(transform) -> None:
    seen = []

    def look(x):
        seen.append(arrays.is_concrete(x))
        with pytest.raises(DataError, match="cannot be checked inside a jax transformation"):
            arrays.host_array(x, "x")
        return x * 2.0

    transform(look)(jnp.ones(()) if transform is jax.grad else jnp.ones(2))
    assert seen == [False]
    assert arrays.is_concrete(jnp.ones(2))
    assert arrays.is_concrete(np.ones(2))
    np.testing.assert_array_equal(arrays.host_array(jnp.ones(2), "x"), np.ones(2))


@pytest.mark.parametrize("shape", [(), (6,), (6, 5), (5, 6, 1)])
def test_wrong_trailing_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"rot6d has the wrong shape") as error:
        arrays.require_trailing_shape(np.zeros(shape), (5, 6), "rot6d")
    assert "(..., 5, 6)" in str(error.value)
    assert str(shape) in str(error.value)


def test_right_trailing_shapes_pass() -> None:
    arrays.require_trailing_shape(np.zeros((2, 5, 6)), (5, 6), "rot6d")
    arrays.require_trailing_shape(jnp.zeros((5, 6)), (5, 6), "rot6d")


def test_common_shape_broadcasts_or_names_the_arrays() -> None:
    assert arrays.common_shape("a and b", (3, 1), (2,)) == (3, 2)
    with pytest.raises(DataError, match="leading axes of a and b do not fit"):
        arrays.common_shape("a and b", (3,), (2,))


def test_read_only_copy_is_both() -> None:
    source = np.zeros(3)
    copy = arrays.read_only_copy(source)
    source[0] = 1.0
    assert copy[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        copy[0] = 2.0


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_small_products_agree_with_the_libraries(xp) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(5, 1, 4, 3)), random.normal(size=(6, 3, 2))
    np.testing.assert_allclose(arrays.matmul(xp, xp.asarray(a), xp.asarray(b)), a @ b, atol=1e-6)
    u, v = random.normal(size=(2, 7, 3))
    np.testing.assert_allclose(arrays.cross(xp, xp.asarray(u), xp.asarray(v)), np.cross(u, v), atol=1e-6)


def test_matmul_does_not_use_the_reduced_precision_of_accelerators() -> None:
    text = jax.jit(lambda a, b: arrays.matmul(jnp, a, b)).lower(jnp.ones((4, 4)), jnp.ones((4, 4))).as_text()
    assert "dot_general" not in text


def test_norms_of_zero_have_a_zero_gradient() -> None:
    gradient = jax.grad(lambda v: arrays.vector_norm(jnp, v))(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, np.zeros(3))
    assert np.isfinite(jax.jacobian(lambda v: arrays.unit_vector(jnp, v))(jnp.zeros(3))).all()
    np.testing.assert_array_equal(arrays.unit_vector(np, np.zeros(3)), np.zeros(3))


def test_nan_is_not_hidden() -> None:
    assert np.isnan(arrays.vector_norm(np, np.array([0.0, np.nan])))
    assert np.isnan(arrays.unit_vector(np, np.array([0.0, np.nan]))).all()
