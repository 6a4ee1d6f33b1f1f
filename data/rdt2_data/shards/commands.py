"""`rdt2 data pack`."""

from __future__ import annotations

from pathlib import Path

import click

from rdt2_jax.cli import command_needs, json_option, print_json


@click.command("pack")
@click.argument("source", nargs=-1, required=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", "container", type=click.Choice(["tar", "array-record"]), required=True)
@click.option("--samples-per-shard", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--shuffle", "shuffle_seed", type=click.IntRange(0), help="Write in an order drawn from this seed.")
@click.option("--strict", is_flag=True, help="Stop at the first sample that cannot be read.")
@json_option
@command_needs("packing shards")
def pack_command(
    source: tuple[str, ...],
    folder: Path,
    container: str,
    samples_per_shard: int,
    shuffle_seed: int | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Write the samples of SOURCE (folders, files, patterns) into shards in FOLDER.

    Changes the container, the size of the shards, or the order of the samples. Keys become numbers; the members stay
    byte for byte. Run again, it makes what is missing.
    """
    from rdt2_data.shards.pack import PackOptions, pack

    options = PackOptions("tar" if container == "tar" else "array_record", samples_per_shard, shuffle_seed)
    report = pack(source, folder, options, strict=strict)
    if as_json:
        counts = {"samples": report.samples, "written": report.written, "kept": report.kept}
        print_json({"folder": str(folder), **counts, "problems": report.tally.report()})
        return
    click.echo(f"{report.samples} samples in {report.written} shards written, {report.kept} were there: {folder}")
    if report.tally.total:
        click.echo(report.tally.text(), err=True)
