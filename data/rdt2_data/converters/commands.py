"""`rdt2 data convert`: recordings into a dataset of shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rdt2_jax.cli import command_needs, json_option, print_json

if TYPE_CHECKING:
    from rdt2_data.converters.convert import ConversionReport
    from rdt2_data.converters.options import ConvertOptions, Latencies
    from rdt2_data.converters.recording import RecordingReader
    from rdt2_data.converters.runners import Runner

_UMI, _LEROBOT, _ROSBAG, _EPISODES = FORMATS = ("umi-zarr", "lerobot", "rosbag", "episodes")
_FORMATS_OF_OPTION = {
    "mapping": (_LEROBOT, _ROSBAG),
    "fps": (_UMI,),
    "instruction": (_UMI,),
    "instructions": (_UMI,),
    "videos": (_UMI,),
    "robot": (_EPISODES,),
}
"""Options that mean something to some readers only; given to another one they are an error."""


_OTHER = "Other options"


class Range(click.ParamType):
    """`61:1057`, rows or columns from the first up to, but without, the last."""

    name = "FIRST:STOP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parses it; click reports what does not fit."""
        if isinstance(value, tuple):
            return value
        first, colon, stop = str(value).partition(":")
        if not (colon and first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
            self.fail(f"{value!r} is no range such as 61:1057", param, ctx)
        return int(first), int(stop)


class GroupedCommand(click.Command):
    """A command whose help lists its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one list for each group, in the order in which groups first appear."""
        groups: dict[str, list[tuple[str, str]]] = {}
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        for option in sorted(options, key=lambda option: not isinstance(option, _GroupedOption)):  # the others last
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(option, "group", _OTHER), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class _GroupedOption(click.Option):
    def __init__(self, *args: Any, group: str = _OTHER, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def _group(heading: str, *options: tuple[Sequence[str], Mapping[str, Any]]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for names, settings in reversed(options):
            function = click.option(*names, cls=_GroupedOption, group=heading, **settings)(function)
        return function

    return decorate


def _option(*names: str, **settings: Any) -> tuple[Sequence[str], Mapping[str, Any]]:
    return names, settings


_WHERE = "options of the command"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_SECONDS = click.FloatRange(0)


@click.command(cls=GroupedCommand)
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.argument("destination", type=click.Path(path_type=Path), metavar="DST")
@_group(
    "Source",
    _option("--from", "source_format", type=click.Choice(FORMATS), required=True, help="Format of SRC."),
    _option("--mapping", type=click.Path(path_type=Path), help="lerobot, rosbag: YAML that says which column is what."),
    _option(
        "--fps", type=click.FloatRange(0, min_open=True), help="umi-zarr: rows in a second; needed without timestamps."
    ),
    _option("--instruction", help="umi-zarr: the sentence of all episodes."),
    _option("--instructions", type=_FILE, help="umi-zarr: JSON list with an entry for each episode."),
    _option("--videos", type=_FILE, help="umi-zarr: JSON list of the videos (default: videos.json beside SRC)."),
    _option("--robot", type=click.Choice(["ur5e", "fr3"]), help="episodes: instead of the robot named in the files."),
    _option("--camera-latency", type=_SECONDS, default=0.0, show_default=True, help="s, off stamps of images."),
    _option("--pose-latency", type=_SECONDS, default=0.0, show_default=True, help="s, off stamps of poses."),
    _option("--gripper-latency", type=_SECONDS, default=0.0, show_default=True, help="s, off stamps of widths."),
)
@_group(
    "Samples",
    _option("--every", type=click.IntRange(1), default=1, show_default=True, help="Take every N-th frame."),
    _option("--at-end", type=click.Choice(["drop", "hold"]), default="drop", show_default=True, help="Late chunks."),
    _option(
        "--max-gap",
        type=click.FloatRange(0, min_open=True),
        default=0.1,
        show_default=True,
        help="s between rows of a track.",
    ),
    _option("--max-skew", type=_SECONDS, default=0.02, show_default=True, help="s between the two images."),
    _option("--strict", is_flag=True, help="Stop at the first problem instead of counting it."),
)
@_group(
    "Images",
    _option("--crop-rows", type=Range(), help="Rows to keep; 61:1057 in the published system."),
    _option("--crop-columns", type=Range(), help="Columns to keep; 224:1235 in the published system."),
    _option("--jpeg-quality", type=click.IntRange(1, 100), default=95, show_default=True),
)
@_group(
    "Action tokens",
    _option("--tokenizer", type=click.Path(path_type=Path), help="Checkpoint folder of the action tokenizer."),
    _option("--tokenizer-normalizer", type=_FILE, help="Its normalizer, if it is not in the folder."),
)
@_group(
    "Dataset",
    _option("--name", help="Of the dataset (default: name of DST)."),
    _option("--samples-per-shard", type=click.IntRange(1), default=1000, show_default=True),
    _option("--normalizer-path", help="Of dataset.yaml, and relative to it."),
)
@_group(
    "Work",
    _option("--workers", type=click.IntRange(1), help="Processes (default: all cores)."),
    _option("--verify", is_flag=True, help="Check finished shards by checksum, not by size alone."),
    _option("--runner", type=click.Choice(["local", "ray"]), default="local", show_default=True),
    _option("--ray-address", help="Of a Ray cluster that shares SRC and DST (default: start Ray here)."),
)
@json_option
@command_needs("converting recordings")
def convert(source: Path, destination: Path, source_format: str, name: str | None, as_json: bool, **given: Any) -> None:
    """Turn recordings SRC into a dataset of shards DST.

    Started again after it was stopped, it goes on where it was; the result is the same to the last bit.
    """
    from rdt2_data.converters.convert import convert as run_conversion
    from rdt2_data.converters.tokens import Tokenizing

    for option, formats in _FORMATS_OF_OPTION.items():
        if given[option] is not None and source_format not in formats:
            raise click.UsageError(f"--{option} belongs to --from {' or '.join(formats)}, not to {source_format}")
    if given["tokenizer"] is None and given["tokenizer_normalizer"] is not None:
        raise click.UsageError("--tokenizer-normalizer needs --tokenizer")
    latencies = _latencies(given)
    source = source.absolute()  # workers of Ray have a working directory of their own
    reader = _reader(source_format, source, latencies, given)
    report = run_conversion(
        reader,
        destination,
        _options(name or destination.absolute().name, given),
        settings={"format": source_format},
        tokenizing=given["tokenizer"] and Tokenizing(given["tokenizer"], given["tokenizer_normalizer"]),
        runner=_runner(given),
        hide=str(source.parent),
        where=source,
        verify=given["verify"],
    )
    if as_json:
        print_json({"out": str(destination), **report.to_json()})
    else:
        _print_report(destination, report)


def _latencies(given: Mapping[str, Any]) -> Latencies:
    from rdt2_data.converters.options import Latencies
    from rdt2_jax.config import parse_config

    values = {f"{what}_s": given[f"{what}_latency"] for what in ("camera", "pose", "gripper")}
    return parse_config(Latencies, values, where=_WHERE)


def _reader(source_format: str, source: Path, latencies: Latencies, given: Mapping[str, Any]) -> RecordingReader:
    if source_format == _UMI:
        from rdt2_data.converters.umi_zarr import UmiZarrOptions, UmiZarrReader
        from rdt2_jax.config import parse_config

        names = ("fps", "instruction", "instructions", "videos")
        chosen = {name: given[name] for name in names if given[name] is not None}
        return UmiZarrReader(source, parse_config(UmiZarrOptions, chosen, where=_WHERE), latencies)
    if source_format == _LEROBOT:
        from rdt2_data.converters.lerobot import LeRobotReader

        return LeRobotReader(source, given["mapping"], latencies)
    if source_format == _ROSBAG:
        from rdt2_data.converters.rosbag import RosbagReader

        return RosbagReader(source, given["mapping"], latencies)
    from rdt2_data.converters.episodes import EpisodesOptions, EpisodesReader

    return EpisodesReader(source, EpisodesOptions(robot=given["robot"]), latencies)


def _options(name: str, given: Mapping[str, Any]) -> ConvertOptions:
    from rdt2_data.converters.options import ConvertOptions
    from rdt2_jax.config import parse_config

    chunks = {"every": "every", "at_end": "at_end", "max_gap": "max_gap_s", "max_skew": "max_skew_s"}
    values = {
        "name": name,
        "samples_per_shard": given["samples_per_shard"],
        "chunks": {field: given[option] for option, field in chunks.items()},
        "images": {field: given[field] for field in ("crop_rows", "crop_columns", "jpeg_quality")},
        "normalizer_path": given["normalizer_path"],
        "strict": given["strict"],
    }
    return parse_config(ConvertOptions, values, where=_WHERE)


def _runner(given: Mapping[str, Any]) -> Runner:
    from rdt2_data.converters.runners import LocalRunner, RayRunner

    if given["runner"] == "ray":
        return RayRunner(given["ray_address"], given["workers"])
    if given["ray_address"] is not None:
        raise click.UsageError("--ray-address needs --runner ray")
    return LocalRunner(given["workers"])


def _print_report(destination: Path, report: ConversionReport) -> None:
    size = f"{report.samples} samples in {report.shards} shards, {report.bytes / 1e6:.1f} MB"
    click.echo(f"wrote {destination}: {size}, {report.seconds / 60:.1f} min of recordings")
    for edge, count in report.left_out.items():
        click.echo(f"left out: {count} frames {edge}")
    for episode, note in report.notes.items():
        click.echo(f"{episode}: {note}")
    for note in report.image_notes:
        click.echo(f"note: {note}")
    if report.gripper_unmeasured:
        click.echo(f"{report.gripper_unmeasured} samples have no measured width of a gripper")
    if report.problems.total:
        click.echo(report.problems.text())
