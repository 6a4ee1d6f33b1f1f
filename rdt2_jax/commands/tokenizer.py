"""`rdt2 tokenizer`: chunks to tokens, tokens to chunks, and whether a tokenizer fits a set of actions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rdt2_jax.cli import command_needs, json_option, print_json

if TYPE_CHECKING:
    from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer
    from rdt2_jax.action_tokenizer.report import TokenizerReport

checkpoint_option = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder with config.json and model.safetensors.",
)
normalizer_option = click.option(
    "--normalizer",
    type=click.Path(path_type=Path),
    help="Normalizer (.pt as published, .npz or .json); default: normalizer.npz inside the checkpoint, if there.",
)
batch_option = click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)


@click.group()
def tokenizer() -> None:
    """Encode, decode, check and train the RVQ action tokenizer."""


@tokenizer.command()
@checkpoint_option
@normalizer_option
@click.option("--in", "source", type=click.Path(path_type=Path), required=True, help="Chunks (N, 24, 20), .npy.")
@click.option("--out", "target", type=click.Path(path_type=Path), required=True, help="Tokens (N, 27) int16, .npy.")
@batch_option
@json_option
@command_needs("the action tokenizer")
def encode(
    checkpoint: Path, normalizer: Path | None, source: Path, target: Path, batch_size: int, as_json: bool
) -> None:
    """Turn action chunks into tokens.

    Without a normalizer the chunks are taken to be normalised already, as the published tokenizer wants them.
    """
    import numpy as np

    from rdt2_jax.action_tokenizer import tokenizer as action_tokenizer
    from rdt2_jax.action_tokenizer.report import check_chunks
    from rdt2_jax.io.arrays import read_array, write_array

    loaded = _load(checkpoint, normalizer)
    chunks = check_chunks(read_array(source), loaded.config, where=str(source), normalized=loaded.normalizer is None)

    def encode_batch(batch: Any) -> Any:
        return action_tokenizer.encode(loaded.params, loaded.config, loaded.normalize(batch))

    tokens = _in_batches("encoding", chunks, batch_size, encode_batch).astype(np.int16)
    write_array(target, tokens)
    _report_written(target, tokens, loaded.normalizer is not None, as_json)


@tokenizer.command()
@checkpoint_option
@normalizer_option
@click.option("--in", "source", type=click.Path(path_type=Path), required=True, help="Tokens (N, 27), .npy.")
@click.option("--out", "target", type=click.Path(path_type=Path), required=True, help="Chunks (N, 24, 20), .npy.")
@batch_option
@json_option
@command_needs("the action tokenizer")
def decode(
    checkpoint: Path, normalizer: Path | None, source: Path, target: Path, batch_size: int, as_json: bool
) -> None:
    """Turn tokens back into action chunks (normalised ones, when there is no normalizer)."""
    import numpy as np

    from rdt2_jax.action_tokenizer import tokenizer as action_tokenizer
    from rdt2_jax.io.arrays import read_array, write_array

    loaded = _load(checkpoint, normalizer)
    tokens = action_tokenizer.check_tokens(read_array(source), loaded.config, where=str(source))

    def decode_batch(batch: Any) -> Any:
        return loaded.unnormalize(np.asarray(action_tokenizer.decode(loaded.params, loaded.config, batch)))

    chunks = _in_batches("decoding", tokens, batch_size, decode_batch).astype(np.float32)
    write_array(target, chunks)
    _report_written(target, chunks, loaded.normalizer is not None, as_json)


@tokenizer.command()
@checkpoint_option
@normalizer_option
@click.option(
    "--actions", type=click.Path(path_type=Path), required=True, help="Chunks (N, 24, 20) in metres, not normalised."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write the picture here (.png).")
@batch_option
@json_option
@command_needs("the tokenizer check")
def check(
    checkpoint: Path,
    normalizer: Path | None,
    actions: Path,
    plot: Path | None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Does this tokenizer fit these actions? Errors in mm and degrees, codebook use, bounds, rotation outliers.

    Exits with status 1 when something is out of bounds or a rotation explodes.
    """
    from rdt2_jax.action_tokenizer.report import check_chunks, examine, reconstruct
    from rdt2_jax.errors import DataError
    from rdt2_jax.io.arrays import read_array
    from rdt2_jax.progress import progress_bar

    loaded = _load(checkpoint, normalizer)
    if loaded.normalizer is None:
        raise DataError(
            "no normalizer: errors in millimetres need one",
            where=checkpoint,
            fix="give --normalizer FILE (.pt, .npz or .json)",
        )
    chunks = check_chunks(read_array(actions), loaded.config, where=str(actions))
    with progress_bar("checking", len(chunks), "chunks") as advance:
        reconstruction = reconstruct(
            loaded.params,
            loaded.config,
            loaded.normalizer,
            chunks,
            batch_size=batch_size,
            progress=advance,
            where=str(actions),
        )
    report = examine(reconstruction, loaded.config, loaded.normalizer)
    if plot is not None:
        from rdt2_jax.action_tokenizer.plot import plot_report

        plot_report(reconstruction, report, plot)
    if as_json:
        print_json(report.to_json() | {"plot": plot and str(plot), "fits": report.fits})
    else:
        print_report(report)
    if not report.fits:
        raise click.exceptions.Exit(1)


def print_report(report: TokenizerReport) -> None:
    """Prints a report as tables."""
    from rich.console import Console
    from rich.table import Table

    from rdt2_jax.action_tokenizer.report import BOUND, OUTLIER_DEG, SMALL_ROTATION_DEG

    console = Console()
    errors = Table("", "arm", *report.errors["position_mm"]["both"], title=f"Error over {report.num_chunks} chunks")
    for unit, arms in report.errors.items():
        for arm, percentiles in arms.items():
            label = unit.replace("_", " ") if arm == "both" else ""
            errors.add_row(label, arm, *(f"{value:.2f}" for value in percentiles.values()))
    console.print(errors)
    codes = Table("group", "level", "codes used", "perplexity", title="Codebooks")
    for group, levels in report.code_use.items():
        for level, (use, perplexity) in enumerate(zip(levels, report.code_perplexity[group], strict=True)):
            codes.add_row(group, str(level), f"{use:.1%}", f"{perplexity:.0f}")
    console.print(codes)
    for channel in report.ranges:
        if not channel.fits:
            console.print(
                f"channel {channel.channel} leaves +-{BOUND:g}: these chunks [{channel.low:.3f}, {channel.high:.3f}] "
                f"with {channel.outside:.2%} of values outside, the normalizer's statistics "
                f"[{channel.statistics_low:.3f}, {channel.statistics_high:.3f}]; "
                "was the tokenizer trained with this normalizer?"
            )
    console.print(
        f"{len(report.rotation_outliers)} rotation outliers (decoded more than {OUTLIER_DEG:g} deg off) "
        f"among {report.small_rotations} arms that turn less than {SMALL_ROTATION_DEG:g} deg"
    )
    for outlier in report.rotation_outliers[:10]:
        console.print(f"  {outlier}")


def _load(checkpoint: Path, normalizer: Path | None) -> LoadedTokenizer:
    from rdt2_jax.action_tokenizer.checkpoint import WEIGHTS_FILE, load_tokenizer
    from rdt2_jax.progress import progress_bar

    weights = checkpoint / WEIGHTS_FILE
    done = 0
    with progress_bar("loading", weights.stat().st_size >> 20 if weights.is_file() else 0, "MiB") as advance:

        def progress(_: str, read_bytes: int, __: int) -> None:
            nonlocal done
            advance((read_bytes >> 20) - done)
            done = read_bytes >> 20

        return load_tokenizer(checkpoint, normalizer=normalizer, progress=progress)


def _in_batches(description: str, rows: Any, batch_size: int, function: Any) -> Any:
    """Applies a compiled function to all rows, under a progress bar."""
    import numpy as np

    from rdt2_jax.action_tokenizer.batches import padded_batches
    from rdt2_jax.progress import progress_bar

    results = []
    with progress_bar(description, len(rows), "chunks") as advance:
        for batch, count in padded_batches(rows, batch_size):
            results.append(np.asarray(function(batch))[:count])
            advance(count)
    return np.concatenate(results)


def _report_written(path: Path, array: Any, normalizer_used: bool, as_json: bool) -> None:
    if as_json:
        print_json(
            {"out": str(path), "shape": array.shape, "dtype": str(array.dtype), "normalizer_used": normalizer_used}
        )
        return
    click.echo(f"wrote {path}: {array.dtype} {array.shape}")
    if not normalizer_used:
        click.echo("no normalizer given: chunks are in normalised units", err=True)
