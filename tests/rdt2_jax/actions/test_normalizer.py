"""The normalizer maps actions exactly as the published files say, and survives a trip through every format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdt2_jax.actions.layout import GROUP_CHANNELS
from rdt2_jax.actions.normalizer import (
    STATISTIC_NAMES,
    FieldNormalizer,
    FieldStatistics,
    LinearNormalizer,
)
from rdt2_jax.errors import CheckpointError, DataError, Rdt2Error, UnsafeFileError

GOLDEN = Path(__file__).parents[2] / "golden" / "normalizer"
CASES = ("per_dim", "per_step")
RTOL, ATOL = 1e-6, 2e-6  # measured 1.3e-6: two float32 roundings of an order that libraries choose


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "io.npz") as arrays:
        return dict(arrays)


def published(case: str) -> LinearNormalizer:
    return LinearNormalizer.load(GOLDEN / f"normalizer_{case}.pt")


def field(scale: object = 2.0, offset: object = 0.5, shape: tuple[int, ...] = (3,)) -> FieldNormalizer:
    def full(value: object) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, np.float32), shape)

    return FieldNormalizer(full(scale), full(offset), FieldStatistics(full(-1), full(1), full(0), full(0.5)))


def assert_same(a: LinearNormalizer, b: LinearNormalizer) -> None:
    assert list(a.fields) == list(b.fields)
    for name in a.fields:
        x, y = a.fields[name], b.fields[name]
        np.testing.assert_array_equal(x.scale, y.scale, strict=True)
        np.testing.assert_array_equal(x.offset, y.offset, strict=True)
        for key in STATISTIC_NAMES:
            np.testing.assert_array_equal(getattr(x.input_stats, key), getattr(y.input_stats, key), strict=True)


def true_actions(count: int, seed: int = 0) -> np.ndarray:
    """Frames (count, 24, 20) whose rot6d are rotations."""
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(count, 24, 20)).astype(np.float32)
    for start in (3, 13):
        q, _ = np.linalg.qr(rng.normal(size=(count, 24, 3, 3)))
        actions[..., start : start + 6] = np.concatenate([q[..., 0], q[..., 1]], axis=-1)
    actions[..., [9, 19]] = rng.uniform(0, 0.088, size=(count, 24, 2))
    return actions


# --- parity


@pytest.mark.parametrize("case", CASES)
def test_published_parameters_are_bit_exact(case: str, golden: dict[str, np.ndarray]) -> None:
    action = published(case).field("action")
    np.testing.assert_array_equal(action.scale, golden[f"{case}/scale"], strict=True)
    np.testing.assert_array_equal(action.offset, golden[f"{case}/offset"], strict=True)
    for key in STATISTIC_NAMES:
        np.testing.assert_array_equal(
            getattr(action.input_stats, key), golden[f"{case}/input_stats/{key}"], strict=True
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("library", ["numpy", "jax", "jit"])
def test_published_normalizer_gives_the_reference_values(
    case: str, library: str, golden: dict[str, np.ndarray]
) -> None:
    normalizer = published(case)
    x = golden[f"{case}/x"] if library == "numpy" else jnp.asarray(golden[f"{case}/x"])
    normalize, unnormalize = normalizer.normalize, normalizer.unnormalize
    if library == "jit":
        normalize, unnormalize = jax.jit(normalize), jax.jit(unnormalize)
    for key, value in (
        ("normalized", normalize(x)),
        ("unnormalized", unnormalize(x)),
        ("unnormalize_of_normalize", unnormalize(normalize(x))),
    ):
        assert isinstance(value, np.ndarray if library == "numpy" else jax.Array)
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, golden[f"{case}/{key}"], rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("case", CASES)
def test_other_types_are_cast_to_float32_first(case: str, golden: dict[str, np.ndarray]) -> None:
    x = golden[f"{case}/x"]
    value = published(case).normalize(x.astype(np.float64) + 1e-12)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, golden[f"{case}/normalized_from_f64_input"], rtol=RTOL, atol=ATOL)
    assert published(case).normalize(np.zeros((24, 20), np.int64)).dtype == np.float32


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("xp", [np, jnp])
def test_passthrough_keeps_the_masked_values(case: str, xp: object, golden: dict[str, np.ndarray]) -> None:
    normalizer, x = published(case), golden[f"{case}/x"]
    mask = np.arange(20) < 10
    value = normalizer.normalize(xp.asarray(x), passthrough=mask)  # type: ignore[attr-defined]
    np.testing.assert_allclose(value, golden[f"{case}/dict_normalized_masked_first10"], rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(np.asarray(value)[..., :10], x[..., :10])
    back = normalizer.unnormalize(value, passthrough=mask)
    np.testing.assert_allclose(back, x, rtol=1e-5, atol=ATOL)


def test_range_normalizer_gives_the_reference_values(golden: dict[str, np.ndarray]) -> None:
    low, high, mean, std = (golden[f"range/in_{key}"] for key in STATISTIC_NAMES)
    normalizer = LinearNormalizer.from_range(low, high, mean=mean, std=std, field="action")
    np.testing.assert_array_equal(normalizer.field("action").scale, golden["range/scale"], strict=True)
    np.testing.assert_array_equal(normalizer.field("action").offset, golden["range/offset"], strict=True)
    np.testing.assert_allclose(
        normalizer.normalize(golden["range/data"]), golden["range/normalized"], rtol=RTOL, atol=ATOL
    )


# --- properties


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.floats(0.125, 100, width=32), st.floats(-10, 10, width=32), st.floats(-10, 10, width=32)),
        min_size=1,
        max_size=8,
    )
)
def test_unnormalize_inverts_normalize(rows: list[tuple[float, float, float]]) -> None:
    scale, offset, x = np.array(rows, np.float32).T
    normalizer = LinearNormalizer({"a": field(scale, offset, (len(rows),))})
    back = normalizer.unnormalize(normalizer.normalize(x, "a"), "a")
    # each of the three roundings is at most 2^-24 of the largest intermediate, |x scale| + |offset|
    bound = 4 * 2.0**-24 * (np.abs(x * scale) + np.abs(offset)) / scale + 1e-30
    assert np.all(np.abs(back - x) <= bound)


def test_a_field_of_one_number_fits_any_width() -> None:
    normalizer = published("per_step")
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(normalizer.normalize(x, "robot0_eef_pos"), x)


def test_fit_actions_scales_positions_and_widths_only() -> None:
    actions = true_actions(50)
    normalizer = LinearNormalizer.fit_actions(actions)
    entry = normalizer.field("action")
    normalized = normalizer.normalize(actions)
    moving = [*GROUP_CHANNELS["pos"], *GROUP_CHANNELS["grip"]]
    np.testing.assert_allclose(normalized[..., moving].min(axis=(0, 1)), -1, atol=1e-6)
    np.testing.assert_allclose(normalized[..., moving].max(axis=(0, 1)), 1, atol=1e-6)
    rotation = list(GROUP_CHANNELS["rot"])
    np.testing.assert_array_equal(normalized[..., rotation], actions[..., rotation])
    np.testing.assert_array_equal(entry.input_stats.min, actions.min(axis=(0, 1)))
    np.testing.assert_array_equal(entry.input_stats.max, actions.max(axis=(0, 1)))
    np.testing.assert_allclose(entry.input_stats.mean, actions.mean(axis=(0, 1), dtype=np.float64), atol=1e-7)
    np.testing.assert_allclose(entry.input_stats.std, actions.std(axis=(0, 1), dtype=np.float64), rtol=1e-6)


def test_fit_actions_only_shifts_a_gripper_that_never_moves() -> None:
    actions = true_actions(3)
    actions[..., 9] = 0.05
    normalizer = LinearNormalizer.fit_actions(actions)
    assert normalizer.field("action").scale[9] == 1
    np.testing.assert_array_equal(normalizer.normalize(actions)[..., 9], 0)


def test_out_of_range_counts_and_clips_nothing() -> None:
    normalizer = LinearNormalizer({"a": field(scale=2.0, offset=0.0)})
    x = np.array([[0.5, 0.6, -0.5], [0.0, -2.0, np.nan], [-0.5, 0.0, 0.0], [0.5 + 1e-8, 0.5, 0.5]])
    report = normalizer.out_of_range(x, "a")
    np.testing.assert_array_equal(report.fraction, [0, 0.5, 0.25])
    np.testing.assert_allclose(report.minimum, [-1, -4, np.nan])
    np.testing.assert_allclose(report.maximum, [1, 1.2, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(normalizer.out_of_range(x, "a", tolerance=0.2001).fraction, [0, 0.25, 0.25])
    assert normalizer.out_of_range(x, "a", low=0.0).fraction[0] == 0.25
    with pytest.raises(DataError, match="no values to check"):
        normalizer.out_of_range(np.zeros((0, 3)), "a")


def test_the_normalizer_cannot_be_changed() -> None:
    source = np.ones(3, np.float32)
    normalizer = LinearNormalizer({"a": FieldNormalizer(source, source, FieldStatistics(*[source] * 4))})
    source[:] = 5
    np.testing.assert_array_equal(normalizer.field("a").scale, 1)
    with pytest.raises(ValueError, match="read-only"):
        normalizer.field("a").scale[0] = 2
    with pytest.raises(TypeError):
        normalizer.fields["b"] = normalizer.field("a")  # type: ignore[index]


def test_jax_is_not_imported() -> None:
    code = "import sys, rdt2_jax.actions.normalizer; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- files


@pytest.mark.parametrize("suffix", [".npz", ".json"])
@pytest.mark.parametrize("case", CASES)
def test_files_keep_every_bit(tmp_path: Path, suffix: str, case: str) -> None:
    normalizer = published(case)
    normalizer.save(tmp_path / f"n{suffix}")
    assert [entry.name for entry in tmp_path.iterdir()] == [f"n{suffix}"]
    assert_same(LinearNormalizer.load(tmp_path / f"n{suffix}"), normalizer)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_files_keep_awkward_floats(tmp_path: Path, suffix: str) -> None:
    tiny, big = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    normalizer = LinearNormalizer({"a b": field([tiny, big, 1 / 3], [-0.0, 0.1, -big])})
    normalizer.save(str(tmp_path / f"n{suffix}"))
    loaded = LinearNormalizer.load(str(tmp_path / f"n{suffix}"))
    assert_same(loaded, normalizer)
    assert np.signbit(loaded.field("a b").offset[0])


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "n.json"
    normalizer = LinearNormalizer({"a": field()})
    normalizer.save(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        normalizer.save(path)
    assert path.read_bytes() == before


def _edit_json(path: Path, keys: list[str], value: object) -> None:
    document = json.loads(path.read_text())
    entry = document
    for key in keys[:-1]:
        entry = entry[key]
    if value is None:
        del entry[keys[-1]]
    else:
        entry[keys[-1]] = value
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["version"], 99, "expected format"),
        (["fields"], [1, 2], r"no normalizer(.|\n)*mapping of names"),
        (["fields"], {}, "at least one field"),
        (["fields", "a", "scale"], None, r"field a(.|\n)*scale, offset, input_stats"),
        (["fields", "a", "extra"], [1.0], r"field a(.|\n)*extra"),
        (["fields", "a", "input_stats", "std"], None, r"field a, input_stats(.|\n)*min, max, mean, std"),
        (["fields", "a", "scale"], [2.0, 0.0, 2.0], r"scale of zero(.|\n)*\[\[1\]\]"),
        (["fields", "a", "scale"], [2.0, 2.0], r"one shape(.|\n)*field a, offset"),
        (["fields", "a", "offset"], [2.0, float("nan"), 2.0], r"finite(.|\n)*field a, offset"),
        (["fields", "a", "offset"], [2.0, 1e39, 2.0], r"finite(.|\n)*field a, offset"),
        (["fields", "a", "offset"], ["1", "2", "3"], "lists of numbers"),
        (["fields", "a", "offset"], [[1], [2, 3]], "cannot be read"),
        (["fields", "a", "input_stats", "mean"], [True, True, True], "lists of numbers"),
    ],
)
def test_broken_json_says_where(tmp_path: Path, keys: list[str], value: object, message: str) -> None:
    path = tmp_path / "n.json"
    LinearNormalizer({"a": field()}).save(path)
    _edit_json(path, keys, value)
    with pytest.raises(DataError, match=message) as error:
        LinearNormalizer.load(path)
    assert "n.json" in str(error.value)


def test_npz_files_cannot_unpickle_and_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "n.npz"
    np.savez(path, **{"a/scale": np.array([{}], dtype=object)})
    with pytest.raises(DataError, match=r"cannot be read(.|\n)*allow_pickle"):
        LinearNormalizer.load(path)
    np.savez(path, **{"a/scale": np.ones(3, np.float32), "a/surprise": np.ones(3)})
    with pytest.raises(DataError, match=r"field a(.|\n)*surprise"):
        LinearNormalizer.load(path)
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match="not a zip file"):
        LinearNormalizer.load(path)


def test_an_npz_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "n.npz"
    np.savez_compressed(path, **{"a/scale": np.zeros(2**24, np.float64)})
    assert path.stat().st_size < 2**20
    with pytest.raises(DataError, match="too many for a normalizer"):
        LinearNormalizer.load(path)


def test_wrong_file_types_are_named(tmp_path: Path) -> None:
    normalizer = LinearNormalizer({"a": field()})
    with pytest.raises(DataError, match=r"known suffix(.|\n)*\.npz or \.json(.|\n)*\.pt"):
        normalizer.save(tmp_path / "n.pt")
    with pytest.raises(DataError, match=r"known suffix(.|\n)*\.pt, \.npz or \.json(.|\n)*none"):
        LinearNormalizer.load(tmp_path / "normalizer")
    with pytest.raises(Rdt2Error, match="does not exist"):
        normalizer.save(tmp_path / "missing" / "n.json")


@pytest.mark.parametrize("name", ["n.pt", "n.npz", "n.json"])
def test_a_missing_file_is_called_a_normalizer(name: str, tmp_path: Path) -> None:
    error = CheckpointError if name.endswith(".pt") else DataError
    with pytest.raises(error, match=rf"the normalizer file does not exist\n(.|\n)*{name}"):
        LinearNormalizer.load(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(error, match="the normalizer file cannot be read"):
        LinearNormalizer.load(tmp_path / name)


def test_a_damaged_torch_file_is_called_a_normalizer(tmp_path: Path) -> None:
    (tmp_path / "n.pt").write_bytes((GOLDEN / "normalizer_per_dim.pt").read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"the normalizer file cannot be read(.|\n)*n\.pt"):
        LinearNormalizer.load(tmp_path / "n.pt")


@pytest.mark.parametrize("suffix", [".PT", ".NPZ", ".Json"])
def test_suffixes_in_capitals_mean_the_same(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"n{suffix}"
    if suffix == ".PT":
        path.write_bytes((GOLDEN / "normalizer_per_dim.pt").read_bytes())
    else:
        published("per_dim").save(path)
    assert_same(LinearNormalizer.load(path), published("per_dim"))


def test_a_torch_file_that_is_no_normalizer_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.ones(3)}, tmp_path / "n.pt")
    with pytest.raises(DataError, match=r"no normalizer(.|\n)*n.pt, field weight"):
        LinearNormalizer.load(tmp_path / "n.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "n.pt")
    with pytest.raises(UnsafeFileError, match=r"torch.nn.modules.linear.Linear"):
        LinearNormalizer.load(tmp_path / "n.pt")


# --- bad values


def test_unknown_field_lists_the_names() -> None:
    with pytest.raises(DataError, match=r"expected: action, robot0_eef_pos(.|\n)*found: acton"):
        published("per_step").normalize(np.zeros((24, 20)), "acton")


@pytest.mark.parametrize("shape", [(20,), (24, 19), (23, 20), (20, 24), ()])
@pytest.mark.parametrize("xp", [np, jnp])
def test_wrong_shapes_are_named(shape: tuple[int, ...], xp: object) -> None:
    with pytest.raises(DataError, match=r"field action(.|\n)*\(\.\.\., 24, 20\)"):
        published("per_step").unnormalize(xp.zeros(shape))  # type: ignore[attr-defined]


@pytest.mark.parametrize("mask", [np.ones(20), np.ones(19, bool), np.ones((2, 4, 24, 20), bool)])
def test_wrong_masks_are_named(mask: np.ndarray) -> None:
    with pytest.raises(DataError, match="boolean mask that fits"):
        published("per_dim").normalize(np.zeros((4, 24, 20)), passthrough=mask)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda f: FieldNormalizer(f.scale.astype(np.float64), f.offset, f.input_stats), "float32"),
        (lambda f: FieldNormalizer(f.scale.tolist(), f.offset, f.input_stats), "numpy arrays"),
        (lambda f: FieldNormalizer(f.scale, f.offset[:2], f.input_stats), r"field a, offset(.|\n)*shape \(3,\)"),
        (lambda f: FieldNormalizer(f.scale * np.inf, f.offset, f.input_stats), r"finite(.|\n)*field a, scale"),
        (lambda f: FieldNormalizer(f.scale * 0, f.offset, f.input_stats), "scale of zero"),
    ],
)
def test_unusable_fields_are_refused(broken: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LinearNormalizer({"a": broken(field())})  # type: ignore[operator]


def test_unusable_names_are_refused() -> None:
    with pytest.raises(DataError, match="name without '/'"):
        LinearNormalizer({"a/b": field()})
    with pytest.raises(DataError, match="at least one field"):
        LinearNormalizer({})


@pytest.mark.parametrize(("low", "high"), [([1.0], [0.0]), ([0.0], [np.inf]), ([np.nan], [1.0]), ([0.0, 0.0], [1.0])])
def test_unusable_ranges_are_refused(low: list[float], high: list[float]) -> None:
    with pytest.raises(DataError, match="finite minimum up to a finite maximum"):
        LinearNormalizer.from_range(low, high, mean=[0.0], std=[1.0])


def test_unusable_chunks_are_refused() -> None:
    with pytest.raises(DataError, match="no frame"):
        LinearNormalizer.fit_actions(np.zeros((0, 24, 20), np.float32))
    with pytest.raises(DataError, match="wrong shape"):
        LinearNormalizer.fit_actions(np.zeros((24, 19), np.float32))
    actions = true_actions(2)
    actions[1, 5, 0] = np.nan
    with pytest.raises(DataError, match=r"finite(.|\n)*\[1, 5, 0\]"):
        LinearNormalizer.fit_actions(actions)
