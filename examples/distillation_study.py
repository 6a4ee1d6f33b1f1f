"""The two ways of distilling a one-step policy, compared on a problem with two right answers; see docs/distillation.md.

Minutes on a CPU. `examples/bimodal.py` is the problem.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import bimodal
import click
import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.action_expert.distill import DistillConfig
from rdt2_jax.action_expert.flow import ONE_STEP, Schedule
from rdt2_jax.io.files import atomic_write
from rdt2_jax.progress import progress_bar

CHUNKS = 4096
TEACHER_STEP_COUNTS = (1, 2, 5, 10)
NEAR = 0.2
"""A chunk counts as right within this distance of a right one, in amplitudes."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one way of sampling; distances in amplitudes.

    Attributes:
        name: who samples, and how.
        evaluations: runs of the network per chunk.
        gap_mean, gap_rms: distance from the teacher's five steps from the same noise.
        error: mean distance from the nearest right chunk.
        right: share of chunks within `NEAR` of one.
        other_side: share of chunks that went the other way than the teacher's five steps.
        positive: share of chunks on the side of +m; half of the right chunks are there.
        training_s: wall-clock seconds of training, compilation included; None: nothing was trained.
    """

    name: str
    evaluations: int
    gap_mean: float
    gap_rms: float
    error: float
    right: float
    other_side: float
    positive: float
    training_s: float | None = None


ROBUST: dict[str, Any] = {"distance": "pseudo_huber", "huber_scale": bimodal.HUBER_SCALE}
STUDENTS: dict[str, tuple[DistillConfig, bool]] = {
    "regression": (DistillConfig(objective="regression"), False),
    "regression, pseudo-Huber": (DistillConfig(objective="regression", **ROBUST), False),
    "consistency on data": (DistillConfig(objective="consistency"), True),
    "consistency on data, pseudo-Huber": (DistillConfig(objective="consistency", **ROBUST), True),
    "consistency on rollouts, pseudo-Huber": (DistillConfig(objective="consistency", **ROBUST), False),
    "consistency on data, pseudo-Huber, 20 steps": (
        DistillConfig(objective="consistency", num_steps=20, **ROBUST),
        True,
    ),
}
"""Name -> how it is distilled, and whether from actions."""


def study(teacher_steps: int, student_steps: dict[str, int]) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Trains everything; the table, and by name where each chunk lies between the two right ones."""
    problem = bimodal.make_problem()
    noise, which = bimodal.fresh_noise(CHUNKS, seed=99)
    total = teacher_steps + sum(student_steps[config.objective] for config, _ in STUDENTS.values())
    chunks: dict[str, tuple[jax.Array, int, float | None]] = {}
    with progress_bar("training", total, "steps") as advance:
        teacher = bimodal.train_teacher(problem, teacher_steps, progress=advance)
        for count in TEACHER_STEP_COUNTS:
            found = bimodal.sample(problem, teacher, noise, which, Schedule(count))
            chunks[f"teacher, {count} step{'s' if count > 1 else ''}"] = found, count, None
        for name, (config, from_actions) in STUDENTS.items():
            start = time.perf_counter()
            steps = student_steps[config.objective]
            student = bimodal.train_student(
                problem, teacher, config, steps, from_actions=from_actions, progress=advance
            )
            jax.block_until_ready(student)
            seconds = time.perf_counter() - start
            chunks[name] = bimodal.sample(problem, student, noise, which, ONE_STEP), 1, seconds
    reference = chunks["teacher, 5 steps"][0]
    sides = {name: np.asarray(problem.sides(found, which)) for name, (found, _, _) in chunks.items()}
    rows = []
    for name, (found, evaluations, seconds) in chunks.items():
        gap, error = bimodal.distance(found, reference), problem.errors(found, which)
        row = Row(
            name,
            evaluations,
            float(gap.mean()),
            float(jnp.sqrt(jnp.mean(jnp.square(gap)))),
            float(error.mean()),
            float(jnp.mean(error < NEAR)),
            float(np.mean(sides[name] * sides["teacher, 5 steps"] < 0)),
            float(np.mean(sides[name] > 0)),
            seconds,
        )
        rows.append(row)
    return rows, sides


def table(rows: list[Row]) -> str:
    """As Markdown."""
    columns = (
        "",
        "network runs",
        "from the teacher's 5 steps: mean",
        "rms",
        "from a right answer",
        "right",
        "other side",
        "+m",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (
            row.name,
            row.evaluations,
            f"{row.gap_mean:.3f}",
            f"{row.gap_rms:.3f}",
            f"{row.error:.3f}",
            f"{row.right:.0%}",
            f"{row.other_side:.1%}",
            f"{row.positive:.0%}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(rows: list[Row], sides: dict[str, np.ndarray], path: Path) -> None:
    """Writes a PNG: where every chunk lies between the two right answers, per way of sampling."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, 5, sharex=True, sharey=True).ravel()
    bins = np.linspace(-1.4, 1.4, 57)
    for axis, row in zip(axes, rows, strict=True):
        color = "#30638e" if row.name.startswith("teacher") else "#d1495b"
        shown = np.clip(sides[row.name], bins[0], bins[-1])
        axis.hist(shown, bins, weights=np.full(len(shown), 100 / len(shown)), color=color)
        for side in (-1, 1):
            axis.axvline(side, color="0.4", linewidth=0.8, linestyle=":")
        axis.set_title(row.name.replace(", ", ",\n", 1) if len(row.name) > 20 else row.name, fontsize=9)
        caption = f"{row.right:.0%} right\n{row.evaluations} run{'s' if row.evaluations > 1 else ''} of the network"
        axis.text(0.5, 0.95, caption, transform=axis.transAxes, ha="center", va="top", fontsize=8)
    axes[0].set(ylim=(0.0, None))
    figure.supxlabel("place between the two right answers: -1 and +1 are right, 0 is their mean", fontsize=9)
    figure.supylabel("chunks [%]", fontsize=9)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="write the picture here")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all training lengths")
    arguments = parser.parse_args()
    teacher_steps = round(arguments.scale * bimodal.TEACHER_STEPS)
    student_steps = {name: round(arguments.scale * steps) for name, steps in bimodal.STUDENT_STEPS.items()}
    rows, sides = study(teacher_steps, student_steps)
    click.echo(table(rows))
    for row in rows:
        if row.training_s is not None:
            click.echo(f"{row.name}: trained in {row.training_s:.0f} s")
    if arguments.json is not None:
        with atomic_write(arguments.json) as file:
            file.write((json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n").encode())
    if arguments.plot is not None:
        plot(rows, sides, arguments.plot)
        click.echo(f"picture: {arguments.plot}")


if __name__ == "__main__":
    main()
