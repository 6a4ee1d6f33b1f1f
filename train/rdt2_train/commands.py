"""`rdt2 tokenizer train` and `rdt2 train`."""

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


STAGES = {
    "vq": ("rdt2_train.vq", "VqConfig", "vq_run", "train/vq.yaml"),
    "fm": ("rdt2_train.fm", "FmConfig", "fm_run", "train/fm.yaml"),
    "one-step": ("rdt2_train.one_step", "OneStepConfig", "one_step_run", "train/one_step.yaml"),
}
"""Stage -> module, its configuration, what makes a run of it, and the configuration of the paper."""


@click.command()
@click.argument("stage", type=click.Choice(list(STAGES)))
@click.option("--config", "config_name", help="Path or name of a YAML; the paper's by default.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; continued if it exists."
)
@click.argument("overrides", nargs=-1)
@json_option
@command_needs("training")
def train(stage: str, config_name: str | None, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train a STAGE; OVERRIDES look like loop.steps=1000 data.dataset=task.yaml.

    A run that was stopped continues from its last checkpoint. Several processes train together where
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, or a cluster says so itself.
    """
    from importlib import import_module

    from rdt2_jax.config import load_config
    from rdt2_train.claim import claim
    from rdt2_train.distributed import join_processes
    from rdt2_train.loop import train as run_loop

    join_processes()
    module_name, config_class, maker, default = STAGES[stage]
    module = import_module(module_name)
    config = load_config(getattr(module, config_class), config_name or default, overrides)
    claim(out, config)
    state = run_loop(getattr(module, maker)(config), config.loop, out)
    report = {"stage": stage, "steps": int(state.step), "out": str(out)}
    if as_json:
        print_json(report)
        return
    click.echo(f"{report['steps']} steps done; checkpoints in {out / 'state'}, log in {out / 'log.jsonl'}")
