"""Statistics in one pass: exact where they promise it, bounded where they do not, the same in every run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from look_shards import good_samples, write_shards
from rdt2_data.commands_look import stats
from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import Turn, action_members, question_members
from rdt2_data.scan import in_order
from rdt2_data.shards.source import open_source
from rdt2_data.statistics.collect import ChannelStatistics, collect_statistics
from rdt2_data.statistics.histogram import LARGEST, Histograms
from rdt2_data.statistics.moments import Moments
from rdt2_data.statistics.normalizers import fit_normalizer
from rdt2_data.statistics.quantiles import QuantileSketch
from rdt2_data.synthetic import smooth_chunks

from rdt2_jax.actions.layout import GROUP_CHANNELS
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.cli import main
from rdt2_jax.errors import DataError

ROTATION = list(GROUP_CHANNELS["rot"])
OTHERS = [c for c in range(20) if c not in ROTATION]


# -------------------------------------------------------------------------------------------------- moments


@given(
    offset=st.floats(-1e6, 1e6),
    spread=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 500), max_size=6),
)
def test_moments_in_parts_are_the_moments_of_the_whole(offset, spread, seed, cuts):
    values = offset + spread * np.random.default_rng(seed).normal(size=(500, 2))
    merged = Moments.none(2)
    for part in np.split(values, sorted(cuts)):
        merged = merged.merged(Moments.of(part))
    assert merged.count == 500
    np.testing.assert_array_equal(merged.minimum, values.min(axis=0))
    np.testing.assert_array_equal(merged.maximum, values.max(axis=0))
    scale = abs(offset) + spread
    np.testing.assert_allclose(merged.mean, values.mean(axis=0), rtol=0, atol=1e-14 * scale)
    np.testing.assert_allclose(merged.std, values.std(axis=0), rtol=1e-9, atol=1e-14 * scale)


@given(value=st.floats(-1e9, 1e9, width=32), parts=st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_a_channel_that_never_moves_has_no_deviation(value, parts):
    merged = Moments.none(1)
    for count in parts:
        merged = merged.merged(Moments.of(np.full((count, 1), value, np.float32)))
    np.testing.assert_allclose(merged.mean, [value], rtol=1e-15)
    assert merged.std[0] <= 1e-15 * abs(value)


def test_a_large_offset_does_not_swallow_a_small_spread():
    values = 1e8 + np.tile([[-1.0], [1.0]], (5000, 1))
    merged = Moments.none(1)
    for part in np.split(values, 100):
        merged = merged.merged(Moments.of(part))
    np.testing.assert_allclose(merged.std, [1.0], rtol=1e-9)


def test_moments_of_nothing_are_refused():
    with pytest.raises(DataError, match="no values"):
        _ = Moments.none(3).std


# ------------------------------------------------------------------------------------------------ quantiles


def awkward_values(count: int, seed: int = 0) -> np.ndarray:
    """(count, 5): normal, sorted, heavy tails, mostly two values as a gripper has, and two narrow heaps."""
    r = np.random.default_rng(seed)
    ends = np.where(r.random(count) < 0.6, 0.088, np.where(r.random(count) < 0.5, 0.0, 0.088 * r.random(count)))
    heaps = np.where(r.random(count) < 0.5, 0.0, 1.0) + 1e-3 * r.normal(size=count)
    columns = (r.normal(size=count), np.sort(r.normal(size=count)), r.standard_cauchy(count), ends, heaps)
    return np.stack(columns, axis=1).astype(np.float32)


def rank_errors(values: np.ndarray, shares: np.ndarray, found: np.ndarray) -> np.ndarray:
    """How far the ranks of `found` lie from `shares`, per channel; a value that occurs often has a range of ranks."""
    worst = []
    for column, answers in zip(np.sort(values, axis=0).T, found.T, strict=True):
        low = np.searchsorted(column, answers, "left") / len(column)
        high = np.searchsorted(column, answers, "right") / len(column)
        worst.append(np.maximum(np.maximum(low - shares, shares - high), 0).max())
    return np.array(worst)


SHARES = np.linspace(0.001, 0.999, 499)


@pytest.mark.parametrize("block", [768, 50_000])
def test_quantiles_keep_within_half_a_percent_of_rank(block):
    values = awkward_values(300_000)
    sketch = QuantileSketch(5)
    for start in range(0, len(values), block):
        sketch.update(values[start : start + block])
    errors = rank_errors(values, SHARES, sketch.quantiles(SHARES.tolist()))
    assert sketch.rank_error <= 0.005
    assert errors.max() <= sketch.rank_error
    assert all(
        set(found) <= set(column) for found, column in zip(sketch.quantiles([0.1, 0.5]).T, values.T, strict=True)
    )


def test_the_order_of_merging_matters_no_more_than_stated():
    values = awkward_values(200_000, seed=1)
    parts = []
    for part in np.array_split(values, 7):
        parts.append(QuantileSketch(5, capacity=2048))
        parts[-1].update(part)
    one, other = QuantileSketch(5, capacity=2048), QuantileSketch(5, capacity=2048)
    for part in parts:
        one.merge(part)
    for part in reversed(parts):
        other.merge(part)
    assert one.count == other.count == len(values)
    for sketch in (one, other):
        assert sketch.rank_error <= 0.005
        errors = rank_errors(values, SHARES, sketch.quantiles(SHARES.tolist()))
        assert errors.max() <= sketch.rank_error
    with pytest.raises(DataError, match="do not fit"):
        one.merge(QuantileSketch(5))


def test_a_sketch_is_exact_until_it_is_full_and_the_same_in_every_run():
    values = awkward_values(4000)
    sketch = QuantileSketch(5)
    sketch.update(values)
    assert sketch.rank_error == 0
    np.testing.assert_array_equal(sketch.quantiles([0.0, 1.0]), [values.min(axis=0), values.max(axis=0)])
    at = np.full(5, 0.0, np.float32)
    np.testing.assert_allclose(sketch.share_below(at, inclusive=True), (values <= 0).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sketch.share_below(at, inclusive=False), (values < 0).mean(axis=0), rtol=1e-12)

    runs = []
    for _ in range(2):
        runs.append(QuantileSketch(5, capacity=64))
        runs[-1].update(values)
    np.testing.assert_array_equal(runs[0].quantiles(SHARES.tolist()), runs[1].quantiles(SHARES.tolist()))
    with pytest.raises(DataError, match="do not exist"):
        sketch.quantiles([1.5])


# ------------------------------------------------------------------------------------------------ histograms


@given(seed=st.integers(0, 2**32 - 1), exponents=st.lists(st.integers(-12, 6), min_size=1, max_size=5))
def test_histograms_count_exactly_in_whatever_order_values_come(seed, exponents):
    r = np.random.default_rng(seed)
    parts = [(10.0**e * r.normal(size=(40, 1))).astype(np.float32) for e in exponents]
    one, other = Histograms(1), Histograms(1)
    for part in parts:
        one.update(part)
    for part in reversed(parts):
        other.update(part)
    bins, again = one.channel(0), other.channel(0)
    np.testing.assert_array_equal(bins.edges, again.edges)
    np.testing.assert_array_equal(bins.counts, again.counts)
    expected, _ = np.histogram(np.concatenate(parts).astype(np.float64), np.append(bins.edges[:-1], np.inf))
    np.testing.assert_array_equal(bins.counts, expected)
    assert len(bins.counts) <= 256
    assert bins.counts[0] > 0
    assert bins.counts[-1] > 0


def test_values_no_action_has_are_counted_and_leave_the_histogram_as_it_is():
    usual = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    wild = np.array([[1e13], [-1e13], [3e38], [LARGEST]], np.float32)
    plain, both, late = Histograms(1), Histograms(1), Histograms(1)
    plain.update(usual)
    both.update(np.concatenate([usual, wild]))
    late.update(wild)
    assert late.channel(0).counts.size == 0
    late.update(usual)
    for histograms in (both, late):
        bins = histograms.channel(0)
        assert bins.out_of_range == 4
        np.testing.assert_array_equal(bins.counts, plain.channel(0).counts)
        np.testing.assert_array_equal(bins.edges, plain.channel(0).edges)
    nearly = Histograms(1)
    nearly.update(np.full((3, 1), np.nextafter(np.float32(LARGEST), np.float32(0))))
    assert (nearly.channel(0).counts.tolist(), nearly.channel(0).out_of_range) == ([3], 0)


# ------------------------------------------------------------------------------------------------ normalizers


def fed(chunks: np.ndarray, block: int = 7) -> ChannelStatistics:
    channels = ChannelStatistics()
    for start in range(0, len(chunks), block):
        channels.update(chunks[start : start + block].reshape(-1, 20))
    return channels


def test_limits_equal_the_fit_on_all_chunks_at_once():
    chunks = smooth_chunks(300, seed=3)
    chunks[:, :, 19] = 0.05  # a gripper that never moves
    ours = fit_normalizer(fed(chunks)).normalizer.field("action")
    theirs = LinearNormalizer.fit_actions(chunks).field("action")
    np.testing.assert_array_equal(ours.scale, theirs.scale)
    np.testing.assert_array_equal(ours.offset, theirs.offset)
    np.testing.assert_array_equal(ours.input_stats.min, theirs.input_stats.min)
    np.testing.assert_array_equal(ours.input_stats.max, theirs.input_stats.max)
    for name in ("mean", "std"):
        ours_value, theirs_value = getattr(ours.input_stats, name), getattr(theirs.input_stats, name)
        np.testing.assert_allclose(ours_value, theirs_value, rtol=2**-23, atol=1e-15)


def test_gaussian_gives_mean_zero_and_deviation_one_and_leaves_rotations():
    chunks = smooth_chunks(200, seed=4)
    chunks[:, :, 9] = 0.02
    fit = fit_normalizer(fed(chunks), "gaussian")
    normalized = fit.normalizer.normalize(chunks).reshape(-1, 20).astype(np.float64)
    moving = [c for c in OTHERS if c != 9]
    np.testing.assert_allclose(normalized[:, OTHERS].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(normalized[:, moving].std(axis=0), 1, rtol=1e-5)
    np.testing.assert_array_equal(normalized[:, 9], 0)
    np.testing.assert_array_equal(normalized[:, ROTATION], chunks.reshape(-1, 20)[:, ROTATION])
    assert fit.outside is None
    with pytest.raises(DataError, match="quantiles are limits"):
        fit_normalizer(fed(chunks), "gaussian", (0.1, 0.9))


def test_quantile_limits_say_what_lies_outside():
    chunks = smooth_chunks(300, seed=5)
    fit = fit_normalizer(fed(chunks), "limits", (0.02, 0.97))
    report = fit.normalizer.out_of_range(chunks)
    assert fit.outside is not None
    np.testing.assert_allclose(fit.outside[OTHERS], report.fraction[OTHERS], atol=1e-9)
    assert 0.03 < fit.outside[0] <= 0.05
    np.testing.assert_array_equal(fit.outside[ROTATION], 0)
    # the statistics are still those of the data
    np.testing.assert_array_equal(fit.normalizer.field("action").input_stats.max, chunks.max(axis=(0, 1)))


def test_quantiles_that_squeeze_a_moving_channel_to_a_point_are_refused():
    chunks = smooth_chunks(100, seed=6)
    chunks[:, :, 9] = 0.088
    chunks[0, 0, 9] = 0.0
    with pytest.raises(DataError, match="right width"):
        fit_normalizer(fed(chunks), "limits", (0.01, 0.99))
    with pytest.raises(DataError, match="no quantiles"):
        fit_normalizer(fed(chunks), "limits", (0.9, 0.1))
    with pytest.raises(DataError, match="no frame"):
        fit_normalizer(ChannelStatistics())


# ---------------------------------------------------------------------------------------------- whole datasets


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Forty good samples in four shards, one question, one chunk with NaN."""
    samples = good_samples(40)
    broken = dict(samples[0])
    chunk = smooth_chunks(1, 9)[0]
    chunk[3, 4] = np.nan
    broken["action.npy"] = action_members(image_jpeg=b"x", action=chunk, instruction_key=0)["action.npy"]
    question = question_members(image_jpeg=samples[0]["image.jpg"], turns=[Turn("What is it?", "A cup.")])
    return write_shards(tmp_path_factory.mktemp("stats"), [*samples, broken, question])


def test_one_pass_counts_everything_and_does_not_depend_on_threads(damaged):
    source = open_source(damaged)
    seen = []
    alone = collect_statistics(source, workers=1, progress=seen.append)
    many = collect_statistics(open_source(damaged), workers=7)
    assert (alone.samples, alone.questions, alone.frames) == (40, 1, 960)
    assert alone.tally.counts() == {"not-finite": 1}
    assert sum(seen) == 42
    np.testing.assert_array_equal(alone.channels.moments.mean, many.channels.moments.mean)
    np.testing.assert_array_equal(alone.channels.moments.squares, many.channels.moments.squares)
    with pytest.raises(SampleError, match="NaN"):
        collect_statistics(open_source(damaged, tally=Tally(strict=True)))


def test_the_command_writes_normalizer_report_and_picture(damaged, tmp_path):
    out, report, plot = tmp_path / "n.npz", tmp_path / "r.json", tmp_path / "p.png"
    arguments = [str(damaged), "--out", str(out), "--report", str(report), "--plot", str(plot), "--json"]
    result = CliRunner().invoke(stats, arguments)
    assert result.exit_code == 0, result.output
    printed, written = json.loads(result.output), json.loads(report.read_text())
    assert printed["samples"] == written["samples"] == 40
    assert written["problems"]["reasons"]["not-finite"]["count"] == 1
    assert written["channels"][0]["name"] == "right x"
    assert list(written["channels"][0]["quantiles"]) == sorted(written["channels"][0]["quantiles"], key=float)
    chunks = smooth_chunks(40, 0)
    field = LinearNormalizer.load(out).field("action")
    np.testing.assert_array_equal(field.scale, LinearNormalizer.fit_actions(chunks).field("action").scale)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_says_in_words_what_lies_outside(damaged, tmp_path):
    arguments = [str(damaged), "--out", str(tmp_path / "n.json"), "--quantiles", "0.05", "0.95"]
    result = CliRunner().invoke(stats, arguments)
    assert result.exit_code == 0, result.output
    assert "of a channel's values lie outside" in result.output
    assert "1 x not-finite" in result.output
    wrong = CliRunner().invoke(stats, [str(damaged), "--out", str(tmp_path / "n.pt")])
    assert isinstance(wrong.exception, DataError)


def test_a_channel_far_off_is_reported_and_drawn(tmp_path):
    samples = good_samples(3)
    chunks = smooth_chunks(3, 0)
    chunks[:, :, 0] += 1e13  # every value
    chunks[1, 2, 11] = -2e12  # one value
    for members, chunk in zip(samples, chunks, strict=True):
        members.update(action_members(image_jpeg=members["image.jpg"], action=chunk, instruction_key=0))
    report, plot = tmp_path / "r.json", tmp_path / "p.png"
    arguments = [str(write_shards(tmp_path / "shards", samples)), "--out", str(tmp_path / "n.npz")]
    result = CliRunner().invoke(stats, [*arguments, "--report", str(report), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    beyond = [row["beyond_histogram"] for row in json.loads(report.read_text())["channels"]]
    assert beyond == [3 * 24, *[0] * 10, 1, *[0] * 8]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--out", "{0}/missing/n.npz"), "an existing folder"),
        (("--out", "{0}/n.pt"), "ending in .npz or .json"),
        (("--out", "{0}/folder.npz"), "a folder"),
        (("--report", "{0}/missing/r.json"), "an existing folder"),
        (("--report", "{0}/n.json"), "would replace"),
        (("--plot", "{0}/missing/p.png"), "an existing folder"),
        (("--quantiles", "0.9", "0.1"), "0 <= low < high <= 1"),
        (("--quantiles", "nan", "0.9"), "0 <= low < high <= 1"),
        (("--kind", "gaussian", "--quantiles", "0.1", "0.9"), "quantiles are limits"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(more, message, tmp_path):
    (tmp_path / "folder.npz").mkdir()
    arguments = ["no shards here", "--out", str(tmp_path / "n.json"), *(part.format(tmp_path) for part in more)]
    result = CliRunner().invoke(stats, arguments)
    assert isinstance(result.exception, DataError)
    assert message in str(result.exception)


def test_strict_stops_the_command_at_the_first_problem(damaged, tmp_path, capsys):
    out = tmp_path / "n.npz"
    with pytest.raises(SystemExit) as stopped:
        main(["data", "stats", str(damaged), "--out", str(out), "--strict"])
    assert stopped.value.code == 2
    assert "sample 000000040, action.npy" in capsys.readouterr().err
    assert not out.exists()


def test_a_dataset_without_a_usable_chunk_says_why(tmp_path):
    samples = good_samples(2)
    for members in samples:
        del members["action.npy"]
    result = CliRunner().invoke(stats, [str(write_shards(tmp_path, samples)), "--out", str(tmp_path / "n.npz")])
    assert isinstance(result.exception, DataError)
    assert "2 x missing-member" in str(result.exception)


def test_no_more_than_a_few_results_wait():
    taken = []

    def items():
        for number in range(1000):
            taken.append(number)
            yield number

    for done, _ in enumerate(in_order(lambda x: x, items(), workers=2)):
        assert len(taken) <= done + 1 + 6


def test_results_come_in_order_and_an_error_ends_the_rest():
    assert list(in_order(lambda x: x * x, range(100), workers=5)) == [x * x for x in range(100)]
    begun = []

    def fails_at_three(x: int) -> int:
        begun.append(x)
        if x == 3:
            raise ValueError("three")
        return x

    with pytest.raises(ValueError, match="three"):
        list(in_order(fails_at_three, range(10_000), workers=2))
    assert len(begun) < 100
