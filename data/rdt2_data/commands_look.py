"""`rdt2 data stats`, `rdt2 data check`, `rdt2 data inspect` and `rdt2 view`: looking at datasets and episodes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rdt2_jax.cli import command_needs, json_option, print_json

if TYPE_CHECKING:
    from rdt2_data.check import CheckReport
    from rdt2_data.check_sample import CheckOptions
    from rdt2_data.problems import SampleError, Tally

ASSUMED_CAMERA = "camera/wrist_fisheye_assumed.yaml"

_shards = click.argument("shards", nargs=-1, required=True)
_instructions = click.option(
    "--instructions", type=click.Path(path_type=Path), help="instructions.json: key -> sentence."
)
_workers = click.option("--workers", type=click.IntRange(1), help="Threads; one per core by default.")
_strict = click.option("--strict", is_flag=True, help="Stop at the first problem.")


@click.command()
@_shards
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The normalizer: .npz or .json.")
@click.option("--kind", type=click.Choice(["limits", "gaussian"]), default="limits", show_default=True)
@click.option("--quantiles", type=(float, float), help="Limits at these shares, such as 0.01 0.99, not the extremes.")
@click.option("--report", type=click.Path(path_type=Path), help="All numbers, .json.")
@click.option("--plot", type=click.Path(path_type=Path), help="Histograms of all channels, .png.")
@_workers
@_strict
@json_option
@command_needs("statistics of a dataset")
def stats(
    shards: tuple[str, ...],
    out: Path,
    kind: Any,
    quantiles: tuple[float, float] | None,
    report: Path | None,
    plot: Path | None,
    workers: int | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Make a normalizer from all chunks of SHARDS (a folder, files, or patterns), read once.

    limits maps positions and widths to [-1, 1], gaussian their mean and standard deviation to 0 and 1; rotations stay
    as they are. Problems are counted and reported.
    """
    from rdt2_data.problems import Tally
    from rdt2_data.shards.source import open_source
    from rdt2_data.statistics.collect import collect_statistics
    from rdt2_data.statistics.normalizers import fit_normalizer, require_quantiles
    from rdt2_data.statistics.report import plot_statistics, statistics_report
    from rdt2_jax.errors import DataError
    from rdt2_jax.progress import progress_bar

    require_quantiles(kind, quantiles)
    _require_output(out, ".npz", ".json")
    _require_output(report, ".json")
    _require_output(plot, ".png")
    _require_apart(out, report)
    source = open_source(shards, tally=Tally(strict=strict))
    with progress_bar("reading actions", len(source), "samples") as advance:
        statistics = collect_statistics(source, workers=workers, progress=advance)
    if not statistics.frames:
        found = statistics.tally.text() or f"{statistics.questions} questions"
        raise DataError("there is no chunk to fit a normalizer to", where=", ".join(shards), found=found)
    fit = fit_normalizer(statistics.channels, kind, quantiles)
    fit.normalizer.save(out)
    document = statistics_report(statistics, fit)
    if report is not None:
        _write_json(report, document)
    if plot is not None:
        plot_statistics(statistics, plot, fit)
    if as_json:
        print_json({"out": str(out), **document})
    else:
        _print_statistics(out, statistics, fit)


@click.command()
@_shards
@_instructions
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Tokenizer checkpoint: chunks fit its normalizer.")
@click.option("--normalizer", type=click.Path(path_type=Path), help="Chunks fit this normalizer.")
@click.option("--max-gap", "max_gap_s", type=float, default=0.1, show_default=True, help="Between samples [s].")
@click.option("--min-entropy", type=float, default=1.0, show_default=True, help="Of each wrist image [bits].")
@click.option("--sample", type=click.IntRange(1), help="Look at so many samples, evenly spread; all by default.")
@click.option("--shuffled", is_flag=True, help="Samples lie in no order; known by itself of data pack --shuffle.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Counts and examples, .json; every single problem goes into the .problems.jsonl beside it.",
)
@_workers
@_strict
@json_option
@click.pass_context
@command_needs("checking a dataset")
def check(
    context: click.Context,
    shards: tuple[str, ...],
    instructions: Path | None,
    tokenizer: Path | None,
    normalizer: Path | None,
    max_gap_s: float,
    min_entropy: float,
    sample: int | None,
    shuffled: bool,
    report: Path | None,
    workers: int | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Look at every sample of SHARDS (a folder, files, or patterns) and count what is wrong.

    The exit status is 1 when there is a problem, 0 for a clean dataset.
    """
    from rdt2_data.check_sample import CheckOptions
    from rdt2_data.problems import SampleError

    _require_output(report, ".json")
    log = None if report is None else report.with_suffix(".problems.jsonl")
    _require_output(log, ".jsonl")
    options = CheckOptions(
        instructions=_load_instructions(instructions),
        normalizer=_load_normalizer(tokenizer, normalizer),
        max_gap_s=max_gap_s,
        min_entropy_bits=min_entropy,
        sample=sample,
        shuffled=shuffled,
        workers=workers,
    )
    with _tally(log, strict) as tally:
        found = _run_check(shards, tally, options)
    if isinstance(found, SampleError):
        document: dict[str, Any] = {"clean": False}
        document["stopped_at"] = {"reason": found.reason, "problem": found.line()}
    else:
        document = found.to_json()
    if report is not None and log is not None:
        document["problems_file"] = log.name
        _write_json(report, document)
    if as_json:
        print_json(document)
    elif isinstance(found, SampleError):
        click.echo(f"stopped at the first problem, {found.reason}: {found}", err=True)
    else:
        _print_check(found)
        if log is not None:
            click.echo(f"wrote {report}, and every problem to {log}")
    context.exit(0 if document["clean"] else 1)


@click.command("inspect")
@_shards
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The page, .html.")
@_instructions
@click.option("--camera", default=ASSUMED_CAMERA, show_default=True, help="Model of the left (or both) wrist cameras.")
@click.option("--camera-right", help="Model of the right wrist camera; that of --camera by default.")
@click.option("--samples", type=click.IntRange(0), default=12, show_default=True, help="In the gallery.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Which samples are shown.")
@click.option("--title", help="Of the page; the name of the first folder or file by default.")
@_workers
@_strict
@json_option
@command_needs("a page about a dataset")
def inspect_command(
    shards: tuple[str, ...],
    out: Path,
    instructions: Path | None,
    camera: str,
    camera_right: str | None,
    samples: int,
    seed: int,
    title: str | None,
    workers: int | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Make one HTML page about SHARDS (a folder, files, or patterns): it needs no network and runs no script."""
    from rdt2_data.inspection.overlay import require_cameras
    from rdt2_data.inspection.page import render_page
    from rdt2_data.inspection.summary import gallery, summarize
    from rdt2_data.problems import Tally
    from rdt2_data.shards.source import find_shards, open_source
    from rdt2_jax.config import load_config
    from rdt2_jax.fisheye import WristCameraConfig
    from rdt2_jax.io.files import atomic_write
    from rdt2_jax.progress import progress_bar

    _require_output(out, ".html", ".htm")
    sentences = _load_instructions(instructions)
    cameras = {
        "left_wrist": load_config(WristCameraConfig, camera),
        "right_wrist": load_config(WristCameraConfig, camera_right or camera),
    }
    require_cameras(cameras)
    source = open_source(shards, tally=Tally(strict=strict))
    with progress_bar("reading", len(source), "samples") as advance:
        summary = summarize(source, find_shards(shards), sentences, workers=workers, progress=advance)
    shown = gallery(source, samples, seed, cameras)
    page = render_page(title or Path(shards[0]).name, summary, shown, cameras, seed=seed).encode()
    with atomic_write(out) as file:
        file.write(page)
    statistics = summary.statistics
    if as_json:
        counts = {"samples": statistics.samples, "questions": statistics.questions, "shards": summary.shards}
        more = {"instructions": summary.instruction_counts, "shown": [sample.index for sample in shown]}
        print_json({"out": str(out), "bytes": len(page), **counts, **more, "problems": statistics.tally.report()})
        return
    click.echo(f"wrote {out}: {statistics.samples} samples, {len(shown)} of them shown, {len(page)} bytes")
    _print_problems(statistics.tally)


@click.command()
@click.argument("paths", nargs=-1, required=True, type=str)
@_instructions
@click.option("--save", type=click.Path(path_type=Path), help="Write a .rrd file instead of opening a window.")
@click.option("--limit", type=click.IntRange(1), default=300, show_default=True, help="Samples of shards to show.")
@click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="First sample of shards to show.")
@click.option("--robot", type=click.Choice(["ur5e", "fr3"]), help="Of an episode; by default, what the episode says.")
@json_option
@command_needs("the viewer")
def view(
    paths: tuple[str, ...],
    instructions: Path | None,
    save: Path | None,
    limit: int,
    start: int,
    robot: Any,
    as_json: bool,
) -> None:
    """Show PATHS in Rerun: shards (a folder, files, or patterns), or one episode (.mcap, .mcap.partial)."""
    from rdt2_data.view import view_episode, view_shards

    _require_output(save, ".rrd")
    sentences = _load_instructions(instructions)
    if any(Path(path).name.endswith((".mcap", ".mcap.partial")) for path in paths):
        if len(paths) != 1 or instructions is not None:
            raise click.UsageError("an episode is shown alone, and brings its instructions")
        shown = view_episode(Path(paths[0]), save=save, robot=robot)
    else:
        shown = view_shards(paths, instructions=sentences, save=save, start=start, limit=limit)
    if as_json:
        print_json(shown)
        return
    click.echo(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in shown["counts"].items()))
    for line in shown["notes"]:
        click.echo(line, err=True)
    if save is not None:
        click.echo(f"wrote {save}")


# -------------------------------------------------------------------------------------------------- details


def _load_instructions(path: Path | None) -> Any:
    from rdt2_data.instructions import Instructions

    return None if path is None else Instructions.load(path)


def _load_normalizer(tokenizer: Path | None, normalizer: Path | None) -> Any:
    from rdt2_data.check import require_action_field
    from rdt2_jax.actions.normalizer import LinearNormalizer
    from rdt2_jax.errors import CheckpointError

    if tokenizer is not None and normalizer is not None:
        raise click.UsageError("give --tokenizer or --normalizer, not both")
    path = normalizer
    if tokenizer is not None:
        path = tokenizer / "normalizer.npz"
        if not path.is_file():
            fix = "the published checkpoint has its normalizer elsewhere: give that file with --normalizer"
            raise CheckpointError("the tokenizer's folder holds no normalizer", where=path, fix=fix)
    if path is None:
        return None
    loaded = LinearNormalizer.load(path)
    require_action_field(loaded, path)
    return loaded


def _require_output(path: Path | None, *suffixes: str) -> None:
    """Before hours of reading: that a file of this name can be written when they are over."""
    from rdt2_jax.errors import DataError

    if path is None:
        return
    what, folder = "this file cannot be written", path.resolve().parent
    if path.suffix.lower() not in suffixes:
        expected = "a name ending in " + " or ".join(suffixes)
        raise DataError(what, where=path, expected=expected, found=path.suffix or "none")
    if not folder.is_dir():
        raise DataError(what, where=path, expected=f"an existing folder {folder}", fix="create the folder first")
    if path.is_dir():
        raise DataError(what, where=path, expected="the name of a file", found="a folder")
    if not os.access(folder, os.W_OK):
        raise DataError(what, where=path, expected=f"a folder that you may write to: {folder}")


def _require_apart(out: Path, report: Path | None) -> None:
    from rdt2_jax.errors import DataError

    if report is not None and report.resolve() == out.resolve():
        expected = "files of different names for --out and --report"
        raise DataError("one file would replace the other", where=report, expected=expected)


@contextmanager
def _tally(log: Path | None, strict: bool) -> Iterator[Tally]:
    """Counts problems, and writes every one into a file that appears when the pass is over."""
    from rdt2_data.problem_log import ProblemLog
    from rdt2_data.problems import Tally
    from rdt2_jax.io.files import atomic_write

    if log is None:
        yield Tally(strict=strict)
        return
    with atomic_write(log) as file:
        yield ProblemLog(file, strict=strict)


def _run_check(shards: tuple[str, ...], tally: Tally, options: CheckOptions) -> CheckReport | SampleError:
    """What was found; or the problem at which a strict check has stopped."""
    from rdt2_data.check import check_dataset
    from rdt2_data.problems import SampleError
    from rdt2_data.shards.source import open_source
    from rdt2_jax.progress import progress_bar

    try:
        source = open_source(shards, tally=tally)
        with progress_bar("checking", min(options.sample or len(source), len(source)), "samples") as advance:
            return check_dataset(source, options, progress=advance)
    except SampleError as problem:
        if not tally.strict:
            raise
        return problem


def _write_json(path: Path, document: Any) -> None:
    from rdt2_jax.io.files import atomic_write

    with atomic_write(path) as file:
        file.write(json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")


def _print_statistics(out: Path, statistics: Any, fit: Any) -> None:
    from rich.console import Console

    from rdt2_data.statistics.report import statistics_table

    Console().print(statistics_table(statistics, fit))
    click.echo(f"wrote {out}: {fit.kind}, from {statistics.samples} chunks")
    if fit.quantiles is not None:
        worst = float(fit.outside.max())
        error = statistics.channels.sketch.rank_error
        click.echo(
            f"up to {worst:.2%} of a channel's values lie outside (told to {error:.2%}); nothing is clipped here"
        )
    _print_problems(statistics.tally)


def _print_check(found: Any) -> None:
    click.echo(f"checked {found.checked} of {found.samples} samples, {found.questions} of them questions")
    click.echo(f"{found.with_tokens} with action tokens, {found.with_times} with capture times")
    for camera, bits in found.entropies.items():
        click.echo(f"{camera}: entropy of grey levels at least {bits['min']:.2f}, median {bits['median']:.2f} bits")
    if found.outside is not None:
        from rdt2_data.statistics.collect import CHANNEL_NAMES

        for name, share in zip(CHANNEL_NAMES, found.outside, strict=True):
            if share > 0:
                click.echo(f"{name}: {share:.3%} of values beyond the bounds of the normalizer")
    for note in found.notes:
        click.echo(note)
    _print_problems(found.tally)


def _print_problems(tally: Any) -> None:
    click.echo(tally.text() or "no problems", err=bool(tally.total))
