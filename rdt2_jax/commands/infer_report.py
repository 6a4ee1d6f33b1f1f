"""What `rdt2 infer` was asked for, what came of it, and how that is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import click

from rdt2_jax.cli import print_json

if TYPE_CHECKING:
    from rdt2_jax.actions.types import ActionChunk
    from rdt2_jax.policy.instructions import InstructionAdvice
    from rdt2_jax.policy.results import InvalidGeneration, TokenEntry, VqTokens


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, after the options were checked against each other."""

    kind: str
    parts: dict[str, Any]
    random_weights: str | None
    left: Path | None
    right: Path | None
    resize: bool
    instruction: str
    state: Path | None
    noise: Path | None
    seed: int
    out: Path | None
    plot: Path | None
    jpeg_quality: int | Literal["published"] | None
    int8: bool
    repeat: int
    as_json: bool
    constrained: bool
    show_tokens: bool


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        result: of the last run; all runs see the same noise.
        calls: of each run, milliseconds by stage; "total" is the whole call with the waits between the stages, "call"
            another one without them.
        loading_s, first_call_s: until the policy was there; of its first call, which compiles.
        tokens: where they were asked for.
    """

    result: ActionChunk | InvalidGeneration
    calls: list[dict[str, float]]
    loading_s: float
    first_call_s: float
    tokens: VqTokens | None


def report(request: Request, advice: InstructionAdvice, answer: Answer) -> bool:
    """Writes the files that were asked for and prints the rest.

    Returns:
        whether there was a chunk.

    Raises:
        Rdt2Error: a file that cannot be written.
    """
    from rdt2_jax.policy.results import InvalidGeneration

    document = _document(request, advice, answer)
    if isinstance(answer.result, InvalidGeneration):
        _report_invalid(request, answer.result, document)
        return False
    _report_chunk(request, answer, answer.result, document)
    return True


def note(line: str) -> None:
    """A remark for people, where it does not get between machines and the answer."""
    click.echo(line, err=True)


def _document(request: Request, advice: InstructionAdvice, answer: Answer) -> dict[str, Any]:
    """What is told of any answer."""
    import jax

    device = jax.devices()[0]
    return {
        "policy": request.kind,
        "instruction": request.instruction,
        "advice": {"corrected": advice.corrected, "reasons": advice.reasons, "tasks": advice.tasks},
        "device": device.device_kind,
        "platform": device.platform,
        "random_weights": request.random_weights,
        "seed": request.seed,
        "loading_s": answer.loading_s,
        "first_call_s": answer.first_call_s,
        "repeat": request.repeat,
        "latency_ms": _latencies(answer.calls),
    }


def _latencies(calls: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Stage -> median, least and most over the runs [ms]."""
    by_stage = {stage: [call[stage] for call in calls] for stage in calls[0]}
    return {stage: {"median": median(times), "min": min(times), "max": max(times)} for stage, times in by_stage.items()}


def _report_invalid(request: Request, invalid: InvalidGeneration, document: dict[str, Any]) -> None:
    if request.as_json:
        found = {
            "reason": invalid.reason,
            "tokens": invalid.tokens,
            "num_tokens_before_end": invalid.num_tokens_before_end,
            "foreign_ids": invalid.foreign_ids,
        }
        print_json({**document, "valid": False, "invalid": found, "chunk": None})
    else:
        _print_latencies(document)
    note(f"the model generated no chunk: {invalid.reason}; nothing was written")
    note("without --free nothing but whole chunks can be generated")


def _report_chunk(request: Request, answer: Answer, chunk: ActionChunk, document: dict[str, Any]) -> None:
    from rdt2_jax.actions.layout import ARM_NAMES
    from rdt2_jax.policy.motion import arm_motion

    if request.out is not None:
        _write_chunk(request.out, request, chunk)
    if request.plot is not None:
        from rdt2_jax.policy.plot import plot_chunk

        random = ", random weights" if request.random_weights else ""
        plot_chunk(chunk, request.plot, instruction=request.instruction, source=f"policy {request.kind}{random}")
    summary = {arm: arm_motion(chunk, arm).summary() for arm in ARM_NAMES}
    tokens = [] if answer.tokens is None else list(answer.tokens.entries())
    if request.as_json:
        written = {"out": request.out and str(request.out), "plot": request.plot and str(request.plot)}
        listed = {"tokens": [asdict(token) for token in tokens]} if tokens else {}
        print_json({**document, "valid": True, **written, "summary": summary, **listed, "chunk": _chunk_json(chunk)})
        return
    if tokens:
        _print_tokens(tokens)
    _print_latencies(document)
    _print_summary(summary)
    for path, what in ((request.out, "the chunk"), (request.plot, "its picture")):
        if path is not None:
            click.echo(f"wrote {path}: {what}")


def _write_chunk(path: Path, request: Request, chunk: ActionChunk) -> None:
    from rdt2_jax.io.arrays import write_array
    from rdt2_jax.io.files import atomic_write

    if path.suffix.lower() == ".npy":
        write_array(path, chunk.actions)
        return
    document = {"policy": request.kind, "instruction": request.instruction, **_chunk_json(chunk)}
    with atomic_write(path) as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())


def _chunk_json(chunk: ActionChunk) -> dict[str, Any]:
    """A chunk as JSON; floats in the shortest form that gives the same float32."""
    from rdt2_jax.actions.layout import ARM_NAMES

    return {
        "frame": "policy; relative to each arm's pose at its anchor time",
        "layout": [
            f"{arm} {name}"
            for arm in ARM_NAMES
            for name in ("x_m", "y_m", "z_m", *(f"rot6d_{i}" for i in range(6)), "width_policy_units")
        ],
        "fps": chunk.fps,
        "anchor_time_s": dict(chunk.anchor_time_s),
        "capture_time_s": dict(chunk.capture_time_s),
        "observation_id": chunk.observation_id,
        "actions": [[float(str(value)) for value in frame] for frame in chunk.actions],
    }


def _print_latencies(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    repeat = document["repeat"]
    title = f"policy {document['policy']} on {document['device']}"
    columns = ["median, ms", "min", "max"] if repeat > 1 else ["ms"]
    table = Table("stage", *(Column(name, justify="right") for name in columns), title=title, title_style="bold")
    names = {"total": "total, waiting after each stage", "call": "total, as in use"}
    for stage, times in document["latency_ms"].items():
        values = (times["median"], times["min"], times["max"])[: len(columns)]
        table.add_row(names.get(stage, stage), *(f"{value:.2f}" for value in values), end_section=stage == "detokenise")
    console = Console()
    console.print(table)
    console.print(
        f"made in {document['loading_s']:.1f} s, first call (compiles) {document['first_call_s']:.1f} s, "
        f"then {repeat} {'run' if repeat == 1 else 'runs'}",
        highlight=False,
    )


def _print_summary(summary: dict[str, dict[str, float]]) -> None:
    for arm, motion in summary.items():
        click.echo(
            f"{arm + ' arm:':<11} moves {motion['moved_mm']:.1f} mm (at most {motion['farthest_mm']:.1f}), "
            f"turns {motion['turned_deg']:.1f} deg (at most {motion['most_turned_deg']:.1f}), "
            f"gripper {motion['width_from_mm']:.1f} -> {motion['width_to_mm']:.1f} mm"
        )


def _print_tokens(tokens: list[TokenEntry]) -> None:
    """One table: a row per group and latent step, a column per level."""
    from rich.console import Console
    from rich.table import Table

    levels = 1 + max(token.level for token in tokens)
    table = Table(
        "group",
        "latent",
        *(f"level {level}" for level in range(levels)),
        "stop",
        title="Tokens, and their probability among all action and stop tokens",
    )
    rows: dict[tuple[str, int], list[TokenEntry]] = {}
    for token in tokens:
        rows.setdefault((token.group, token.latent), []).append(token)
    for (group, latent), row in rows.items():
        cells = [f"{token.token:4d} {token.probability:4.0%}" for token in row]
        stop = f"{max(token.stop_probability for token in row):.0%}"
        last = latent == max(other for name, other in rows if name == group)
        table.add_row(
            group if latent == 0 else "", str(latent), *cells, *[""] * (levels - len(cells)), stop, end_section=last
        )
    Console(width=max(80, 32 + 14 * levels)).print(table)
