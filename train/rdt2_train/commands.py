"""`rdt2 tokenizer train`, and what later stages add."""

from __future__ import annotations

from pathlib import Path

import click

from rdt2_jax.cli import command_needs, json_option, print_json


@click.command()
@click.option(
    "--config", "config_name", default="train/tokenizer.yaml", show_default=True, help="Path or name of a YAML."
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; continued if it exists."
)
@click.argument("overrides", nargs=-1)
@json_option
@command_needs("training the action tokenizer")
def train_tokenizer(config_name: str, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train an action tokenizer from scratch; OVERRIDES look like steps=1000 model.hidden_size=32.

    A run that was stopped continues from its last checkpoint.
    """
    from rdt2_jax.commands.tokenizer import print_report
    from rdt2_jax.config import load_config
    from rdt2_train.tokenizer import TokenizerTrainingConfig
    from rdt2_train.tokenizer import train_tokenizer as train

    report = train(load_config(TokenizerTrainingConfig, config_name, overrides), out)
    if as_json:
        print_json(report.to_json() | {"checkpoint": str(out / "checkpoint")})
        return
    print_report(report)
    click.echo(f"wrote {out / 'checkpoint'}")
