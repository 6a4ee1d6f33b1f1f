"""`make demo`: the action tokenizer on action chunks it has never seen, from chunks to tokens and back, with a picture.

Uses the tokenizer in `assets/tokenizer_small`, trained from scratch by `rdt2 tokenizer train` on smooth synthetic
motion; its training report lies beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import click
import numpy as np
from rdt2_data.synthetic import smooth_chunks

from rdt2_jax.action_tokenizer.checkpoint import load_tokenizer
from rdt2_jax.action_tokenizer.plot import plot_report
from rdt2_jax.action_tokenizer.report import examine, reconstruct
from rdt2_jax.commands.tokenizer import print_report
from rdt2_jax.errors import CheckpointError
from rdt2_jax.io.arrays import write_array
from rdt2_jax.progress import progress_bar

CHECKPOINT = Path(__file__).parent.parent / "assets" / "tokenizer_small"
UNSEEN_SEED = 2026


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--chunks", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    loaded = load_tokenizer(CHECKPOINT)
    if loaded.normalizer is None:
        raise CheckpointError("the demo's checkpoint has lost its normalizer", where=CHECKPOINT)
    chunks = smooth_chunks(arguments.chunks, UNSEEN_SEED)
    with progress_bar("tokenizing", len(chunks), "chunks") as advance:
        reconstruction = reconstruct(loaded.params, loaded.config, loaded.normalizer, chunks, progress=advance)
    report = examine(reconstruction, loaded.config, loaded.normalizer)
    picture = arguments.out / "tokenizer.png"
    plot_report(reconstruction, report, picture)
    write_array(arguments.out / "tokens.npy", reconstruction.tokens.astype(np.int16))

    first = chunks[0]
    click.echo(f"one chunk: {first.shape[0]} frames x {first.shape[1]} numbers, {first.nbytes} bytes")
    click.echo(f"as tokens: {' '.join(map(str, reconstruction.tokens[0]))}")
    print_report(report)
    click.echo(f"picture: {picture}")


if __name__ == "__main__":
    main()
