"""The command line that benchmarks share: on a CPU beside a peer, on an accelerator beside what it could reach."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

Report = dict[str, Any]


def run_benchmark(
    description: str | None,
    presets: Sequence[str],
    beside_peer: Callable[[bool], tuple[Report, Table]],
    beside_floors: Callable[[str, bool], tuple[Report, Table]],
    failures: Callable[[Report], list[str]],
) -> None:
    """Reads the options, measures, prints, and ends with an error where something fails.

    Args:
        description: for `--help`.
        presets: sizes of models with random weights, for the second kind; "7b" where none is named.
        beside_peer: (quick) -> report and table, on a CPU. It imports the peer: the other kind runs without one.
        beside_floors: (preset, quick) -> report and table.
        failures: what is wrong with a report, a line each.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--preset", choices=presets, help="this size with random weights, beside its floors")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and few rounds: shows that it runs, not how fast"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif arguments.device == "gpu":
        try:
            jax.devices("gpu")
        except RuntimeError as error:
            raise SystemExit(f"there is no GPU that jax can use: {error}") from error
    if arguments.preset is None and jax.default_backend() == "cpu":
        report, table = beside_peer(arguments.quick)
    else:
        report, table = beside_floors(arguments.preset or "7b", arguments.quick)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console = Console(width=120)
    for key, value in report.items():
        if key != "rows":
            console.print(f"{key}: {value}", highlight=False, soft_wrap=True, markup=False)
    console.print(table)
    bad = failures(report)
    if bad:
        raise SystemExit("\n".join(bad))
