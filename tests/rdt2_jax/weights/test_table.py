"""A weight table bound to a model is a bijection; everything that is not is reported at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdt2_jax.errors import CheckpointError
from rdt2_jax.params import ParamSpec
from rdt2_jax.weights.ops import heads_out, transpose
from rdt2_jax.weights.table import Constant, Ignored, Row, Table, bind


def spec(*shape: int, dtype=jnp.float32) -> ParamSpec:
    return ParamSpec(shape, (None,) * len(shape), dtype=dtype)


def bound(rows, specs, **others):
    """Leaf -> binding."""
    plan = bind(Table("Toy", tuple(rows), **others), specs)
    return {binding.leaf: binding for binding in plan.bindings}


def names(binding) -> dict[tuple[int, ...], tuple[str, ...]]:
    return {slot.index: slot.names for slot in binding.slots}


def problems(rows, specs, **others) -> list[str]:
    """The lines of the one error."""
    with pytest.raises(CheckpointError, match="does not fit the model") as error:
        bind(Table("Toy", tuple(rows), **others), specs)
    assert error.value.where == "Toy"
    lines = [line.strip() for line in str(error.value.found).strip().splitlines()]
    plural = "problem" if len(lines) == 1 else "problems"
    assert error.value.what == f"the weight table does not fit the model ({len(lines)} {plural})"
    return lines


class TestPlaceholders:
    def test_a_plain_row(self):
        binding = bound([Row("norm.weight", "norm.scale")], {"norm": {"scale": spec(4)}})["norm.scale"]
        assert names(binding) == {(): ("norm.weight",)}
        assert binding.shape == binding.source_shape == (4,)

    def test_a_placeholder_of_the_source_stacks_from_zero(self):
        binding = bound([Row("h.{i}.q", "q", heads_out(2, 3))], {"q": spec(3, 5, 2, 3)})["q"]
        assert names(binding) == {(i,): (f"h.{i}.q",) for i in range(3)}
        assert binding.source_shape == (6, 5)

    def test_two_placeholders_take_two_dimensions_in_order_of_appearance(self):
        binding = bound([Row("h.{i}.expert.{e}.w", "w", transpose)], {"w": spec(2, 3, 4, 5)})["w"]
        assert names(binding) == {(i, e): (f"h.{i}.expert.{e}.w",) for i in range(2) for e in range(3)}
        assert binding.source_shape == (5, 4)

    def test_a_placeholder_that_appears_twice_is_one(self):
        binding = bound([Row("h.{i}.w{i}", "w")], {"w": spec(2, 4)})["w"]
        assert names(binding) == {(0,): ("h.0.w0",), (1,): ("h.1.w1",)}

    def test_neighbours(self):
        binding = bound([Row("up_{i+1}.{i-1}", "w")], {"w": spec(2, 4)})["w"]
        assert names(binding) == {(0,): ("up_1.-1",), (1,): ("up_2.0",)}

    def test_values_repeat_a_row(self):
        specs = {"net": {"pos": {"w": spec(2, 4)}, "rot": {"w": spec(3, 4)}}}
        found = bound([Row("{group}_net.{i}.w", "net.{group}.w")], specs, values={"group": ("pos", "rot")})
        assert names(found["net.pos.w"]) == {(0,): ("pos_net.0.w",), (1,): ("pos_net.1.w",)}
        assert names(found["net.rot.w"]) == {(i,): (f"rot_net.{i}.w",) for i in range(3)}

    def test_values_of_a_row_add_to_those_of_the_table(self):
        specs = {"a": {"0": spec(2), "1": spec(2)}}
        found = bound(
            [Row("{group}_{stage+1}", "{group}.{stage}", values={"stage": (0, 1)})], specs, values={"group": ("a",)}
        )
        assert names(found["a.1"]) == {(): ("a_2",)}

    def test_a_placeholder_without_values(self):
        lines = problems([Row("{group}.w", "{group}.w")], {"w": spec(2)})
        assert lines == ["{group}.w <- {group}.w: placeholders without values, found ['group']", *lines[1:]]
        assert lines[1:] == ["leaf w: no row fills it"]

    def test_words_have_no_neighbours(self):
        found = problems([Row("{g+1}.w", "{g}.w")], {"a": {"w": spec(2)}}, values={"g": ("a",)})
        assert "only numbers have neighbours" in found[0]

    def test_bindings_come_in_the_order_of_the_model(self):
        rows = [Row("c", "c"), Row("a", "a"), Row("b", "b")]
        assert list(bound(rows, {"a": spec(1), "b": spec(1), "c": spec(1)})) == ["a", "b", "c"]

    def test_abstract_values_and_arrays_may_be_bound(self):
        for leaf in (jax.ShapeDtypeStruct((2, 4), jnp.bfloat16), np.zeros((2, 4), jnp.bfloat16)):
            binding = bound([Row("{i}.w", "w")], {"w": leaf})["w"]
            assert (binding.shape, binding.source_shape, binding.dtype) == ((2, 4), (4,), jnp.bfloat16)


class TestIndexMaps:
    GROUPS = ((0, 1), (3, 4), (6, 7))

    def test_grouped_layers(self):
        """Two of three blocks attend in windows, the third sees everything: two leaves share the source's count."""
        specs = {"windowed": spec(3, 2, 4), "full": spec(3, 4)}
        found = bound(
            [
                Row("blocks.{i}.w", "windowed", stacked={"i": self.GROUPS}),
                Row("blocks.{i}.w", "full", stacked={"i": (2, 5, 8)}),
            ],
            specs,
        )
        assert names(found["windowed"]) == {
            (g, b): (f"blocks.{self.GROUPS[g][b]}.w",) for g in range(3) for b in range(2)
        }
        assert names(found["full"]) == {(g,): (f"blocks.{3 * g + 2}.w",) for g in range(3)}
        assert found["windowed"].source_shape == found["full"].source_shape == (4,)

    def test_words(self):
        found = bound([Row("{part}.{i}.w", "w", stacked={"part": ("gate", "up")})], {"w": spec(2, 3, 4)})
        assert names(found["w"]) == {
            (p, i): (f"{part}.{i}.w",) for p, part in enumerate(("gate", "up")) for i in range(3)
        }

    def test_a_map_of_another_length(self):
        (line,) = problems([Row("h.{i}", "w", stacked={"i": (0, 1, 3)})], {"w": spec(4, 2)})
        assert line == "row h.{i} -> w: the index map of 'i' does not fit the leaf, expected (4,), found (3,)"

    def test_a_ragged_map(self):
        (line,) = problems([Row("h.{i}", "w", stacked={"i": ((0, 1), (2,))})], {"w": spec(2, 2, 2)})
        assert "must be rectangular" in line

    def test_a_map_for_a_placeholder_that_is_not_there(self):
        (line,) = problems([Row("h.{i}", "w", stacked={"j": (0, 1)})], {"w": spec(2, 2)})
        assert line == "row h.{i} -> w: an index map for a placeholder that the source lacks, found ['j']"

    def test_more_placeholders_than_dimensions(self):
        (line,) = problems([Row("{i}.{j}", "w")], {"w": spec(2)})
        assert "more placeholders than dimensions" in line

    def test_an_index_twice(self):
        lines = problems([Row("h.{i}", "w", stacked={"i": (0, 1, 1)})], {"w": spec(3, 2)})
        assert lines == ["tensor h.1: used for w and for w"]


class TestBijection:
    def test_everything_wrong_is_reported_together(self):
        specs = {
            "filled": spec(2),
            "twice": spec(2),
            "missing": spec(2),
            "gap": spec(3, 2),
            "flat": spec(5),
            "other": spec(2),
        }
        rows = [
            Row("filled", "filled"),
            Row("twice.a", "twice"),
            Row("twice.b", "twice"),
            Row("gap.{i}", "gap", stacked={"i": (0, 2)}),
            Row("flat", "flat", transpose),
            Row("filled", "other"),
            Row("unknown", "unknown.leaf"),
        ]
        lines = problems(rows, specs, ignored=(Ignored("fill*", "not needed"),))
        assert sorted(lines) == sorted(
            [
                "leaf missing: no row fills it",
                "row twice.b -> twice: another row fills this leaf",
                "row gap.{i} -> gap: the index map of 'i' does not fit the leaf, expected (3,), found (2,)",
                "row flat -> flat: wrong number of dimensions, expected 2 dimensions, found (5,)",
                "tensor filled: used for filled and for other",
                "row unknown -> unknown.leaf: the model has no such leaf",
                "tensor filled: used for other, and ignored: not needed",
            ]
        )

    def test_one_tensor_in_two_stacks(self):
        rows = [Row("h.{i}", "a"), Row("h.{i}", "b", stacked={"i": (1, 2)})]
        assert problems(rows, {"a": spec(2, 3), "b": spec(2, 3)}) == ["tensor h.1: used for a and for b"]

    def test_a_leaf_with_row_and_constant(self):
        lines = problems([Row("w", "w")], {"w": spec(2)}, constants=(Constant("w", 0, "unknown"),))
        assert lines == ["constant -> w: another row fills this leaf"]

    def test_hundreds_of_problems_are_counted(self):
        with pytest.raises(CheckpointError, match=r"\(60 problems\)[\s\S]*and 10 more"):
            bind(Table("Toy", ()), {f"w{i}": spec(1) for i in range(60)})


class TestAliases:
    def test_all_names_belong_to_the_slot_the_first_preferred(self):
        found = bound([Row(("q.{i}.weight", "q.{i}.w"), "q")], {"q": spec(2, 3)})
        assert names(found["q"]) == {(i,): (f"q.{i}.weight", f"q.{i}.w") for i in range(2)}

    def test_alternatives_with_other_placeholders(self):
        (line,) = problems([Row(("q.{i}", "q.{j}"), "q")], {"q": spec(2, 3)})
        assert "must have the same placeholders" in line

    def test_an_alias_that_another_row_uses(self):
        rows = [Row(("a", "shared"), "a"), Row("shared", "b")]
        assert problems(rows, {"a": spec(1), "b": spec(1)}) == ["tensor shared: used for a and for b"]


class TestIgnoredPrefixesConstants:
    def test_reasons(self):
        table = Table(
            "Toy",
            (Row("w", "w"),),
            ignored=(Ignored("*.rotary.inv_freq", "computed"), Ignored("{group}.head.*", "unused", {"group": ("a",)})),
        )
        plan = bind(table, {"w": spec(1)})
        assert plan.ignored_reason("h.3.rotary.inv_freq") == "computed"
        assert plan.ignored_reason("a.head.weight") == "unused"
        assert plan.ignored_reason("b.head.weight") is None
        assert plan.ignored_reason("A.head.weight") is None, "names are case-sensitive"

    def test_a_pattern_must_not_hide_a_tensor_that_is_used(self):
        lines = problems([Row("h.{i}.w", "w")], {"w": spec(2, 1)}, ignored=(Ignored("h.1.*", "not needed"),))
        assert lines == ["tensor h.1.w: used for w, and ignored: not needed"]

    def test_the_first_prefix_that_fits_is_replaced_once(self):
        table = Table("Toy", (), prefixes=(("model.language_model.", "model."), ("model.", "text.")))
        assert table.canonical_name("model.language_model.norm") == "model.norm"
        assert table.canonical_name("model.norm") == "text.norm"
        assert table.canonical_name("visual.model.norm") == "visual.model.norm"

    def test_constants_fill_leaves(self):
        specs = {"c": {"pos": spec(2, dtype=jnp.int32), "rot": spec(dtype=jnp.int32)}, "w": spec(1)}
        constants = (Constant("c.{group}", 7, "not published"),)
        found = bound([Row("w", "w")], specs, constants=constants, values={"group": ("pos", "rot")})
        for name, shape in (("c.pos", (2,)), ("c.rot", ())):
            assert found[name].slots == ()
            assert found[name].shape == shape
            assert found[name].constant == constants[0]
        assert found["w"].constant is None

    def test_a_constant_for_an_unknown_leaf(self):
        lines = problems([], {}, constants=(Constant("cursor", 0, "unknown"),))
        assert lines == ["constant -> cursor: the model has no such leaf"]
