"""`rdt2`, the one command line. Sub-commands come from every package through entry points.

A package contributes a command by an entry point of the group `rdt2.commands`; a dotted name puts it inside a group
(`tokenizer.train` becomes `rdt2 tokenizer train`), wherever that group was defined. Modules named there import
nothing heavier than click at the top: heavy libraries are imported inside the functions that need them, so that
`rdt2 --help` stays instant. Errors of ours are printed without a traceback and exit with status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from rdt2_jax.errors import MissingExtraError, Rdt2Error, missing_extra

COMMAND_GROUP = "rdt2.commands"

_EXTRA_OF_LIBRARY = {
    "jax": "model",
    "jaxlib": "model",
    "flax": "model",
    "orbax": "model",
    "safetensors": "model",
    "ml_dtypes": "model",
    "PIL": "model",
    "tokenizers": "model",
    "huggingface_hub": "model",
    "fsspec": "data",
    "grain": "data",
    "simplejpeg": "data",
    "av": "convert",
    "imagecodecs": "convert",
    "pyarrow": "convert",
    "rosbags": "convert",
    "zarr": "convert",
    "ray": "ray",
    "rerun": "view",
    "optax": "train",
    "tensorboardX": "train",
    "matplotlib": "train",
    "mujoco": "sim",
    "dm_control": "sim",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rdt2-jax")
def rdt2() -> None:
    """RDT2: train, inspect, simulate and run bimanual vision-language-action models."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `rdt2` script."""
    try:
        _attach_commands(rdt2, entry_points(group=COMMAND_GROUP))
        status = rdt2.main(args=arguments, prog_name="rdt2", standalone_mode=False)
        if isinstance(status, int):  # what `ctx.exit(n)` and `raise Exit(n)` come back as
            sys.exit(status)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Rdt2Error as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a denied permission: nobody's bug, and a traceback helps nobody
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


def _attach_commands(root: click.Group, contributed: Sequence[EntryPoint] | Any) -> None:
    for point in sorted(contributed, key=lambda p: p.name):  # a group's name sorts before what goes inside it
        *parents, name = point.name.split(".")
        group: click.Command | None = root
        for parent in parents:
            group = group.commands.get(parent) if isinstance(group, click.Group) else None
        if not isinstance(group, click.Group):
            raise Rdt2Error(
                "a command was contributed to a group that does not exist",
                where=f"entry point {point.name} of {COMMAND_GROUP}",
                fix="reinstall the package that defines the group",
            )
        if name in group.commands:
            # `main` may be called twice in one process; then the very same commands come again.
            if group.commands[name] is point.load():
                continue
            raise Rdt2Error(
                "two packages contribute the same command",
                where=f"entry point {point.name} of {COMMAND_GROUP}",
                fix="uninstall one of them",
            )
        group.add_command(_load_command(point), name)


def _load_command(point: EntryPoint) -> click.Command:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise Rdt2Error(
            "a command cannot be loaded",
            where=f"entry point {point.name} = {point.value}",
            found=str(error),
            fix="reinstall the package it belongs to",
        ) from error


@contextmanager
def needs_libraries(purpose: str) -> Iterator[None]:
    """Turns the ImportError of an optional library into an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in _EXTRA_OF_LIBRARY:
            raise
        raise missing_extra(library, _EXTRA_OF_LIBRARY[library], purpose) from error


def command_needs(purpose: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command function so that an absent optional library gives a clear error."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with needs_libraries(purpose):
                return function(*args, **kwargs)

        return wrapped

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


def print_json(document: Any) -> None:
    """Prints one JSON document; not-a-number becomes null, as JSON has no word for it."""
    click.echo(json.dumps(_without_nan(document), indent=2))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if hasattr(value, "tolist"):
        return _without_nan(value.tolist())
    if isinstance(value, float) and not (value == value and abs(value) != float("inf")):
        return None
    return value


__all__ = [
    "COMMAND_GROUP",
    "MissingExtraError",
    "command_needs",
    "json_option",
    "main",
    "needs_libraries",
    "print_json",
    "rdt2",
]
