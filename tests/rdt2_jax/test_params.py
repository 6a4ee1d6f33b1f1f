"""One declaration per parameter: initial values, abstract shapes, names and stacks that follow from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.errors import ConfigError
from rdt2_jax.params import (
    ParamSpec,
    abstract,
    count_parameters,
    fan_in_uniform,
    from_named_leaves,
    initialize,
    is_spec,
    named_leaves,
    normal,
    ones,
    stack,
    zeros,
)


@flax.struct.dataclass
class Layer:
    kernel: Any
    scale: Any


@flax.struct.dataclass
class Model:
    embedding: Any
    layers: Layer
    heads: tuple[Any, ...]


def layer() -> Layer:
    return Layer(
        kernel=ParamSpec((4, 6), ("embed", "mlp"), normal(0.02), fallbacks=((None, "mlp"),)),
        scale=ParamSpec((4,), ("embed",), ones, jnp.bfloat16),
    )


def model() -> Model:
    return Model(
        embedding=ParamSpec((5, 4), ("vocab", "embed"), normal(1.0)),
        layers=stack(layer(), 3),
        heads=(ParamSpec((4,), ("embed",), normal(1.0)), ParamSpec((4,), ("embed",), zeros)),
    )


@pytest.fixture(scope="module")
def values() -> Model:
    return initialize(model(), jax.random.key(7))


def test_values_have_the_declared_shapes_dtypes_and_classes(values: Model) -> None:
    assert isinstance(values, Model)
    assert isinstance(values.layers, Layer)
    chex.assert_trees_all_equal_shapes_and_dtypes(values, abstract(model()))
    chex.assert_shape(values.layers.kernel, (3, 4, 6))
    assert values.layers.scale.dtype == jnp.bfloat16
    np.testing.assert_array_equal(values.layers.scale, np.ones((3, 4)))
    np.testing.assert_array_equal(values.heads[1], np.zeros(4))


def test_same_key_same_values_and_another_key_other_values(values: Model) -> None:
    chex.assert_trees_all_equal(initialize(model(), jax.random.key(7)), values)
    other = initialize(model(), jax.random.key(8))
    assert not np.array_equal(other.embedding, values.embedding)


def test_values_depend_on_the_name_of_a_leaf_and_on_no_other_leaf(values: Model) -> None:
    around = {"a_new_leaf": ParamSpec((2,), (None,), ones), "embedding": model().embedding}
    np.testing.assert_array_equal(initialize(around, jax.random.key(7))["embedding"], values.embedding)
    renamed = initialize({"embedding_2": model().embedding}, jax.random.key(7))
    assert not np.array_equal(renamed["embedding_2"], values.embedding)


def test_stacked_layers_are_initialised_independently_and_each_like_a_single_one() -> None:
    spec = ParamSpec((8, 64), ("embed", "mlp"), fan_in_uniform(16))
    stacked = initialize({"w": stack(spec, 3)}, jax.random.key(0))["w"]
    chex.assert_shape(stacked, (3, 8, 64))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not np.any(np.asarray(stacked[first]) == np.asarray(stacked[second]))
    # the initializer sees the shape of one layer, so that a fan computed from it is not that of the stack
    shapes = []
    abstract_init = ParamSpec(
        (8, 64), ("embed", "mlp"), lambda key, shape, dtype: shapes.append(shape) or jnp.ones(shape)
    )
    initialize({"w": stack(abstract_init, 3)}, jax.random.key(0))
    assert shapes == [(8, 64)]


def test_stack_extends_axes_and_every_fallback() -> None:
    stacked = stack(layer(), 3)
    assert stacked.kernel.shape == (3, 4, 6)
    assert stacked.kernel.axes == ("layers", "embed", "mlp")
    assert stacked.kernel.fallbacks == (("layers", None, "mlp"),)
    assert stacked.scale.dtype == jnp.bfloat16
    assert stack(layer(), 2, axis_name=None).scale.axes == (None, "embed")


def test_stacks_of_stacks_differ_in_every_layer() -> None:
    spec = stack(stack(ParamSpec((16,), (None,), normal(1.0)), 2, None), 3)
    values = np.asarray(initialize({"w": spec}, jax.random.key(1))["w"]).reshape(6, 16)
    assert len({row.tobytes() for row in values}) == 6


def test_fan_in_uniform_fills_its_bounds() -> None:
    values = np.asarray(fan_in_uniform(25)(jax.random.key(0), (2000,), jnp.float32))
    assert np.abs(values).max() <= 0.2
    assert values.max() > 0.19
    assert values.min() < -0.19
    assert fan_in_uniform(25) is fan_in_uniform(25)


def test_named_leaves_are_dotted_names_in_the_order_of_the_tree() -> None:
    names = list(named_leaves(model()))
    assert names == ["embedding", "layers.kernel", "layers.scale", "heads.0", "heads.1"]
    assert all(is_spec(leaf) for leaf in named_leaves(model()).values())
    assert list(named_leaves(abstract(model()))) == names


def test_two_leaves_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"same name(.|\n)*a\.b"):
        named_leaves({"a.b": 1, "a": {"b": 2}})


def test_from_named_leaves_restores_the_structure(values: Model) -> None:
    leaves = named_leaves(values)
    shuffled = dict(reversed(leaves.items()))
    chex.assert_trees_all_equal(from_named_leaves(model(), shuffled), values)


def test_from_named_leaves_lists_missing_and_unknown_names(values: Model) -> None:
    leaves = named_leaves(values)
    del leaves["heads.1"]
    leaves["head"] = leaves.pop("heads.0")
    with pytest.raises(ConfigError, match=r"missing: \['heads.0', 'heads.1'\], not in the tree: \['head'\]"):
        from_named_leaves(model(), leaves)


def test_sizes() -> None:
    spec = ParamSpec((3, 5), (None, None), dtype=jnp.bfloat16)
    assert (spec.size, spec.nbytes) == (15, 30)
    assert (ParamSpec((), ()).size, ParamSpec((), ()).nbytes) == (1, 4)
    expected = 5 * 4 + 3 * (4 * 6 + 4) + 4 + 4
    assert count_parameters(model()) == count_parameters(abstract(model())) == expected


def test_abstract_of_a_model_that_fits_no_memory() -> None:
    huge = abstract({"w": ParamSpec((1 << 20, 1 << 20, 64), (None, None, None))})
    assert huge["w"].shape == (1 << 20, 1 << 20, 64)
    assert count_parameters(huge) == 1 << 46


@pytest.mark.parametrize("axes", [(), ("embed",), ("embed", "mlp", None)])
def test_wrong_number_of_axes_is_refused(axes: tuple[str | None, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 6\) needs 2 axes"):
        ParamSpec((4, 6), axes)


def test_wrong_number_of_fallback_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 6\) needs 2 axes, got \(None,\)"):
        ParamSpec((4, 6), ("embed", "mlp"), fallbacks=((None, "mlp"), (None,)))


def test_a_declaration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParamSpec((4,), ("embed",)).shape = (5,)  # type: ignore[misc]


def test_equal_declarations_are_equal_and_share_their_compilations() -> None:
    def declare() -> ParamSpec:
        return stack(ParamSpec((4, 4), ("embed", None), normal(0.5)), 3)

    assert declare() == declare()
