"""`rdt2 data`: making and inspecting training data."""

from __future__ import annotations

from pathlib import Path

import click

from rdt2_jax.cli import json_option, print_json


@click.group()
def data() -> None:
    """Make training data."""


@data.command()
@click.option("--chunks", type=click.IntRange(1), default=20_000, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Chunks (N, 24, 20) float32, .npy.")
@json_option
def synthesize(chunks: int, seed: int, out: Path, as_json: bool) -> None:
    """Write smooth synthetic bimanual action chunks: at most 0.3 m/s and 1 rad/s."""
    from rdt2_data.synthetic import smooth_chunks
    from rdt2_jax.io.arrays import write_array
    from rdt2_jax.progress import progress_bar

    with progress_bar("synthesizing", chunks, "chunks") as advance:
        array = smooth_chunks(chunks, seed, progress=advance)
    write_array(out, array)
    if as_json:
        print_json({"out": str(out), "shape": array.shape, "seed": seed})
    else:
        click.echo(f"wrote {out}: {array.dtype} {array.shape}")
