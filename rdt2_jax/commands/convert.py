"""`rdt2 convert`: published weights into what this project restores quickly, and back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from rdt2_jax.cli import command_needs, json_option, print_json


@click.group()
def convert() -> None:
    """Convert published weights, and converted ones back."""


@convert.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--num-layers", type=click.IntRange(1), help="Keep the first decoder layers alone, without final norm and head."
)
@click.option("--no-vision", is_flag=True, help="Leave the vision tower out.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), help="Convert to this dtype; default: as published."
)
@click.option("--to-safetensors", is_flag=True, help="The way back: SRC is converted, DST gets published names.")
@click.option(
    "--max-shard-gb",
    type=click.FloatRange(0, min_open=True),
    help="Largest data in one safetensors file, in 10^9 bytes; default: 5.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace DST if it holds weights of the kind that is written, and nothing else."
)
@json_option
@command_needs("converting weights")
def weights(
    source: str,
    target: Path,
    num_layers: int | None,
    no_vision: bool,
    dtype: str | None,
    to_safetensors: bool,
    max_shard_gb: float | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Qwen2.5-VL weights from safetensors to a model folder, or back with --to-safetensors.

    SRC is a local folder or a name on the Hugging Face hub (organisation/name[@revision]). One stack of layers is in
    memory at a time, so a model may be larger than the memory. Tokenizer and configuration files are copied.
    """
    if to_safetensors and (num_layers is not None or no_vision or dtype is not None):
        raise click.UsageError("--num-layers, --no-vision and --dtype belong to the way in, not to --to-safetensors")
    if max_shard_gb is not None and not to_safetensors:
        raise click.UsageError("--max-shard-gb belongs to --to-safetensors")
    started = time.monotonic()
    if to_safetensors:
        document = _export(source, target, max_shard_gb, overwrite)
    else:
        document = _convert(source, target, num_layers, not no_vision, dtype, overwrite)
    document |= {"seconds": round(time.monotonic() - started, 1)}
    if as_json:
        print_json(document)
    else:
        _print_summary(document)


@convert.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), help="Convert to this dtype; default: as published."
)
@click.option("--overwrite", is_flag=True, help="Replace DST if it holds safetensors of an expert, and nothing else.")
@json_option
@command_needs("converting weights")
def expert(source: str, target: Path, dtype: str | None, overwrite: bool, as_json: bool) -> None:
    """An action expert (RDT2-FM or a distilled one) to safetensors, whose names and layout stay the published ones.

    SRC is a local folder or a name on the Hugging Face hub, with config.json and pytorch_model.bin or
    model.safetensors. The torch file is read without executing what is in it.
    """
    from rdt2_jax.action_expert.checkpoint import load_expert, save_expert
    from rdt2_jax.params import named_leaves

    started = time.monotonic()
    with _progress("reading") as progress:
        loaded = load_expert(source, dtype=dtype, progress=progress)
    saved = save_expert(loaded, target, overwrite=overwrite)
    document = {
        "target": str(target),
        "tensors": saved.num_tensors,
        "leaves": len(named_leaves(loaded.params)),
        "bytes": saved.nbytes,
        "ignored": {} if loaded.report is None else dict(loaded.report.ignored),
        "casts": {} if loaded.report is None else dict(loaded.report.casts),
        "files": sorted(file.name for file in target.iterdir()),
        "seconds": round(time.monotonic() - started, 1),
    }
    if as_json:
        print_json(document)
    else:
        _print_summary(document)


def _convert(
    source: str, target: Path, num_layers: int | None, vision: bool, dtype: str | None, overwrite: bool
) -> dict[str, Any]:
    from rdt2_jax.qwen2_5_vl import checkpoint

    with _progress("converting") as progress:
        report = checkpoint.convert(
            source,
            target,
            num_layers=num_layers,
            vision=vision,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
    return {
        "target": str(target),
        "tensors": report.loaded.num_tensors,
        "leaves": report.saved.num_leaves,
        "bytes": report.saved.nbytes,
        "parts": report.saved.num_parts,
        "ignored": dict(report.loaded.ignored),
        "casts": dict(report.loaded.casts),
        "files": list(report.files),
    }


def _export(source: str, target: Path, max_shard_gb: float | None, overwrite: bool) -> dict[str, Any]:
    from rdt2_jax.qwen2_5_vl import checkpoint

    size = {} if max_shard_gb is None else {"max_shard_bytes": int(max_shard_gb * 1e9)}
    with _progress("exporting") as progress:
        report = checkpoint.export(source, target, overwrite=overwrite, progress=progress, **size)
    return {
        "target": str(target),
        "tensors": report.num_tensors,
        "bytes": report.nbytes,
        "ignored": dict(report.left_out),
        "files": [file.name for file in report.files],
    }


@contextmanager
def _progress(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar in MiB that appears with the first report: only then the total is known."""
    from rdt2_jax.progress import progress_bar

    with ExitStack() as stack:
        advance: Callable[..., None] | None = None
        shown = 0

        def progress(name: str, done: int, total: int) -> None:
            nonlocal advance, shown
            if advance is None:
                advance = stack.enter_context(progress_bar(description, total >> 20, "MiB"))
            advance((done >> 20) - shown, status=name)
            shown = done >> 20

        yield progress


def _print_summary(document: Mapping[str, Any]) -> None:
    size = f"{document['bytes'] / 1e9:.2f} GB" if document["bytes"] >= 1e8 else f"{document['bytes']:,} bytes"
    click.echo(f"wrote {document['target']}: {document['tensors']} tensors, {size}, in {document['seconds']} s")
    for reason, count in Counter(document["ignored"].values()).items():
        click.echo(f"  {count} tensors ignored: {reason}")
    if document.get("casts"):
        click.echo(f"  {len(document['casts'])} of {document['leaves']} leaves converted to another dtype")
    click.echo(f"  files: {', '.join(document['files'])}")
