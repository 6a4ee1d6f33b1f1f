"""Rules to NamedSharding on eight devices, and everything that is refused instead of being laid out by accident."""

from __future__ import annotations

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from rdt2_jax.errors import ShardingError
from rdt2_jax.params import ParamSpec, initialize, named_leaves, normal, ones, stack
from rdt2_jax.sharding import (
    DEFAULT_RULES,
    MESH_AXES,
    ShardingRules,
    abstract_sharded,
    batch_sharding,
    constrain,
    make_mesh,
    replicated,
    shardings,
)


@pytest.fixture(scope="module")
def mesh(eight_devices: list[Any]) -> Mesh:
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, eight_devices)


def transformer() -> dict[str, Any]:
    layer = {
        "q": ParamSpec((8, 4, 6), ("embed", "heads", "head_dim"), normal(0.1)),
        "up": ParamSpec((8, 16), ("embed", "mlp"), normal(0.1), jnp.bfloat16),
        "norm": ParamSpec((8,), (None,), ones),
    }
    return {
        "embedding": ParamSpec((10, 8), ("vocab", "embed"), normal(1.0)),
        "layers": stack(layer, 3),
        "conv": ParamSpec((3, 4, 8), ("kernel", "channels_in", "channels_out"), normal(0.1)),
    }


def specs_of(layout: Any) -> dict[str, P]:
    return {name: sharding.spec for name, sharding in named_leaves(layout).items()}


def refusal(specs: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> str:
    with pytest.raises(ShardingError) as caught:
        shardings(specs, rules, mesh)
    return str(caught.value)


def test_rules_become_partition_specs(mesh: Mesh) -> None:
    layout, report = shardings(transformer(), DEFAULT_RULES, mesh)
    assert specs_of(layout) == {
        "embedding": P("tensor", "fsdp"),
        "layers.q": P(None, "fsdp", "tensor", None),
        "layers.up": P(None, "fsdp", "tensor"),
        "layers.norm": P(None, None),
        "conv": P(None, "fsdp", "tensor"),
    }
    assert all(sharding.mesh is mesh for sharding in named_leaves(layout).values())
    assert report.fallbacks == ()


def test_report_counts_bytes_in_all_and_on_each_device(mesh: Mesh) -> None:
    report = shardings(transformer(), DEFAULT_RULES, mesh)[1]
    split = 10 * 8 * 4 + 3 * (8 * 4 * 6 * 4 + 8 * 16 * 2) + 3 * 4 * 8 * 4
    whole = 3 * 8 * 4
    assert report.total_bytes == split + whole
    assert report.bytes_per_device == split // 4 + whole
    layout, _ = shardings(transformer(), DEFAULT_RULES, mesh)
    placed = initialize(transformer(), jax.random.key(0), layout)
    assert sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed)) == report.bytes_per_device


def test_one_logical_axis_over_two_mesh_axes(mesh: Mesh) -> None:
    rules = DEFAULT_RULES.extended({"embed": ("fsdp", "tensor"), "mlp": None})
    layout, report = shardings({"w": ParamSpec((8, 3), ("embed", "mlp"))}, rules, mesh)
    assert layout["w"].spec == P(("fsdp", "tensor"), None)
    assert report.bytes_per_device == report.total_bytes // 4
    message = refusal({"w": ParamSpec((6, 3), ("embed", "mlp"))}, mesh, rules)
    assert "dimension 0 of size 6 does not divide by fsdp=2 x tensor=2" in message


def test_sharded_initialisation_equals_unsharded_exactly(mesh: Mesh) -> None:
    specs = transformer()
    layout, _ = shardings(specs, DEFAULT_RULES, mesh)
    key = jax.random.key(3)
    sharded = initialize(specs, key, layout)
    chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(initialize(specs, key)))
    for name, value in named_leaves(sharded).items():
        assert value.sharding == named_leaves(layout)[name], name
    assert sharded["layers"]["q"].addressable_shards[0].data.shape == (3, 4, 2, 6)


# what is refused


def test_a_mesh_axis_used_twice_is_named_with_the_parameter(mesh: Mesh) -> None:
    message = refusal({"attention": {"w": ParamSpec((8, 8), ("heads", "mlp"))}}, mesh)
    assert "attention.w (8, 8)" in message
    assert "dimensions 0 ('heads') and 1 ('mlp') both use the mesh axis 'tensor'" in message


def test_all_offending_parameters_are_reported_together(mesh: Mesh) -> None:
    message = refusal(
        {
            "fine": ParamSpec((8,), ("embed",)),
            "odd": ParamSpec((7, 5), ("embed", "mlp")),
            "twice": ParamSpec((4, 4), ("embed", "channels_in")),
            "layers": {"also_odd": ParamSpec((2, 9), ("layers", "heads"))},
        },
        mesh,
    )
    assert "(3 problems)" in message
    assert "odd (7, 5)" in message
    assert "dimension 0 of size 7 does not divide by fsdp=2" in message
    assert "dimension 1 of size 5 does not divide by tensor=2" in message
    assert "layers.also_odd (2, 9)" in message
    assert "twice (4, 4): dimensions 0 ('embed') and 1 ('channels_in')" in message
    assert "fine" not in message
    assert "mesh {'data': 2, 'fsdp': 2, 'tensor': 2}" in message


def test_unknown_logical_name_names_the_parameter_and_suggests(mesh: Mesh) -> None:
    message = refusal({"block": {"w": ParamSpec((8,), ("embedd",))}}, mesh)
    assert "no rule for the logical axis 'embedd'" in message
    assert "block.w" in message
    assert "did you mean 'embed'?" in message
    assert all(name in message for name in DEFAULT_RULES.rules)
    assert "rules.extended" in refusal({"w": ParamSpec((8,), ("qqqqqq",))}, mesh)


def test_unknown_name_in_a_fallback_is_refused_when_it_is_tried(mesh: Mesh) -> None:
    spec = ParamSpec((7,), ("embed",), fallbacks=(("no_such_axis",),))
    assert "no rule for the logical axis 'no_such_axis'" in refusal({"w": spec}, mesh)


def test_rules_that_name_unknown_or_repeated_mesh_axes_are_refused_together() -> None:
    with pytest.raises(ShardingError) as caught:
        ShardingRules({"embed": "fsdpp", "mlp": ("tensor", "tensor"), "heads": ("data", "model")})
    message = str(caught.value)
    assert "(3 problems)" in message
    assert "'embed' -> 'fsdpp': unknown mesh axis 'fsdpp'" in message
    assert "rule 'mlp'" in message
    assert "named twice" in message
    assert "unknown mesh axis 'model'" in message


def test_a_mesh_axis_that_no_rule_can_use_is_refused(eight_devices: list[Any]) -> None:
    other = make_mesh({"data": 2, "model": 4}, eight_devices)
    assert "expected: data, fsdp, tensor\n  found: model" in refusal({"w": ParamSpec((8,), ("embed",))}, other)
    with pytest.raises(ShardingError, match="found: model"):
        batch_sharding(other)
    with pytest.raises(ShardingError, match="found: model"):
        constrain(jnp.ones(8), "embed", rules=DEFAULT_RULES, mesh=other)
    rules = ShardingRules({"embed": "model"}, (*MESH_AXES, "model"))
    assert shardings({"w": ParamSpec((8,), ("embed",))}, rules, other)[0]["w"].spec == P("model")


# fallbacks


def test_fallbacks_are_tried_in_order(mesh: Mesh) -> None:
    choices = (("heads", None), (None, "mlp"), (None, None))

    def chosen(shape: tuple[int, int]) -> tuple[P, tuple[Any, ...]]:
        layout, report = shardings({"w": ParamSpec(shape, ("embed", "mlp"), fallbacks=choices)}, DEFAULT_RULES, mesh)
        return layout["w"].spec, report.fallbacks

    assert chosen((8, 6)) == (P("fsdp", "tensor"), ())
    spec, (use,) = chosen((8, 5))
    assert spec == P("tensor", None)
    assert (use.name, use.shape, use.nbytes, use.axes, use.replicated) == ("w", (8, 5), 160, ("heads", None), False)
    assert use.reason == "dimension 1 of size 5 does not divide by tensor=2"
    spec, (use,) = chosen((7, 6))
    assert spec == P(None, "tensor")
    assert "size 7 does not divide by fsdp=2" in use.reason
    assert "size 7 does not divide by tensor=2" in use.reason
    spec, (use,) = chosen((7, 5))
    assert spec == P(None, None)
    assert use.replicated


def test_replication_is_reported_with_its_bytes_and_reason(mesh: Mesh) -> None:
    specs = {
        "kv": ParamSpec((3, 5), ("kv_heads", None), dtype=jnp.bfloat16, fallbacks=((None, None),)),
        "w": ParamSpec((7, 4), ("embed", "mlp"), fallbacks=((None, "mlp"),)),
    }
    report = shardings(specs, DEFAULT_RULES, mesh)[1]
    assert [use.name for use in report.fallbacks] == ["kv", "w"]
    assert [(use.name, use.shape, use.nbytes) for use in report.replicated] == [("kv", (3, 5), 30)]
    assert report.bytes_per_device == 30 + 7 * 4 * 4 // 2
    text = str(report)
    assert re.search(r"replicated: kv \(3, 5\), 30 bytes: dimension 0 of size 3 does not divide by tensor=2", text)
    assert "split by (None, 'mlp'): w (7, 4)" in text


def test_no_fallback_that_divides_lists_what_was_tried(mesh: Mesh) -> None:
    message = refusal({"w": ParamSpec((7, 5), ("embed", None), fallbacks=((None, "mlp"),))}, mesh)
    assert "dimension 0 of size 7 does not divide by fsdp=2" in message
    assert "dimension 1 of size 5 does not divide by tensor=2" in message


def test_a_fallback_that_collides_is_refused(mesh: Mesh) -> None:
    message = refusal({"w": ParamSpec((7, 4), ("embed", None), fallbacks=(("heads", "mlp"),))}, mesh)
    assert "both use the mesh axis 'tensor'" in message


# mesh shapes


def test_mesh_axes_of_size_one_or_absent_drop_out(eight_devices: list[Any]) -> None:
    specs = {"w": ParamSpec((8, 5), ("embed", "mlp")), "same": ParamSpec((4, 3), ("heads", "mlp"))}
    ones_mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 1}, eight_devices)
    absent = make_mesh({"data": 2, "fsdp": 4}, eight_devices)
    for mesh in (ones_mesh, absent):
        layout, report = shardings(specs, DEFAULT_RULES, mesh)
        assert layout["w"].spec == P("fsdp", None)
        assert layout["same"].spec == P(None, None)
        assert report.fallbacks == ()
    single = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, eight_devices)
    layout, report = shardings(transformer(), DEFAULT_RULES, single)
    assert all(sharding.is_fully_replicated for sharding in named_leaves(layout).values())
    assert report.bytes_per_device == report.total_bytes


def test_make_mesh_keeps_order_and_uses_automatic_axes(eight_devices: list[Any]) -> None:
    mesh = make_mesh({"tensor": 2, "data": 3}, eight_devices)
    assert mesh.axis_names == ("tensor", "data")
    assert dict(mesh.shape) == {"tensor": 2, "data": 3}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(eight_devices[:6])


def test_too_few_devices_says_how_many_and_what_to_set(eight_devices: list[Any]) -> None:
    with pytest.raises(ShardingError) as caught:
        make_mesh({"data": 4, "fsdp": 4}, eight_devices)
    message = str(caught.value)
    assert "expected: 16 for {'data': 4, 'fsdp': 4}" in message
    assert "found: 8 cpu devices" in message
    assert "xla_force_host_platform_device_count=16" in message
    with pytest.raises(ShardingError, match="found: 0 no devices"):
        make_mesh({"data": 1}, [])


@pytest.mark.parametrize("sizes", [{}, {"data": 0}, {"data": 2, "fsdp": -1}])
def test_impossible_mesh_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ShardingError, match="axes of size 1 or more"):
        make_mesh(sizes)


# activations


def test_constrain_lays_an_activation_out_inside_jit(mesh: Mesh) -> None:
    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        return constrain(x * 2, "batch", None, "mlp", rules=DEFAULT_RULES, mesh=mesh)

    x = np.arange(8 * 3 * 4, dtype=np.float32).reshape(8, 3, 4)
    y = double(x)
    np.testing.assert_array_equal(y, x * 2)
    assert y.sharding.shard_shape(y.shape) == (2, 3, 2)


def test_constrain_refuses_inside_jit_while_tracing(mesh: Mesh) -> None:
    def traced(shape: tuple[int, ...], *axes: str | None) -> None:
        jax.eval_shape(
            lambda x: constrain(x, *axes, rules=DEFAULT_RULES, mesh=mesh), jax.ShapeDtypeStruct(shape, jnp.float32)
        )

    traced((8, 4), "batch", "mlp")
    with pytest.raises(ShardingError, match="one logical axis per dimension"):
        traced((8, 4), "batch")
    with pytest.raises(ShardingError, match="dimension 0 of size 6 does not divide by data=2 x fsdp=2"):
        traced((6, 4), "batch", "mlp")
    with pytest.raises(
        ShardingError, match=r"dimensions 0 \('batch'\) and 1 \('embed'\) both use the mesh axis 'fsdp'"
    ):
        traced((8, 4), "batch", "embed")
    with pytest.raises(ShardingError, match="no rule for the logical axis 'btach'"):
        traced((8, 4), "btach", None)


def test_batch_and_replicated_shardings_fit_any_rank(mesh: Mesh) -> None:
    for shape in ((8,), (8, 3, 5)):
        assert batch_sharding(mesh).shard_shape(shape) == (2, *shape[1:])
        assert replicated(mesh).shard_shape(shape) == shape
    rules = DEFAULT_RULES.extended({"batch": "data"})
    assert batch_sharding(mesh, rules).shard_shape((8, 3)) == (4, 3)


# rules and targets


def test_rules_are_values(mesh: Mesh) -> None:
    table = {"embed": "fsdp", "mlp": ["tensor"]}
    rules = ShardingRules(table)  # type: ignore[arg-type]
    same = ShardingRules({"mlp": "tensor", "embed": ("fsdp",)})
    assert rules == same
    assert hash(rules) == hash(same)
    table["embed"] = "tensor"
    assert rules.mesh_axes_of("embed") == ("fsdp",)
    with pytest.raises(TypeError):
        rules.rules["embed"] = "tensor"  # type: ignore[index]
    other = rules.extended({"embed": None, "new": "data"})
    assert other.mesh_axes_of("embed") == ()
    assert other.mesh_axes_of("new") == ("data",)
    assert rules.mesh_axes_of("embed") == ("fsdp",)
    assert other != rules


def test_abstract_sharded_carries_shape_dtype_and_place(mesh: Mesh) -> None:
    specs = transformer()
    layout, _ = shardings(specs, DEFAULT_RULES, mesh)
    target = abstract_sharded(specs, layout)
    for name, spec in named_leaves(specs).items():
        leaf = named_leaves(target)[name]
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (spec.shape, spec.dtype, named_leaves(layout)[name])
