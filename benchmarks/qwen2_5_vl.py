"""Latency of Qwen2.5-VL: on a CPU beside transformers, on an accelerator beside what its arithmetic and memory allow.

Without options: on a CPU, a model of the 7B's proportions in float32, the same weights and threads for both sides,
ratios of our time to the peer's (below one is faster); on an accelerator, the 7B itself with random bfloat16 weights at
batch 1. `--preset` asks for the second kind on any device.
"""

from __future__ import annotations

from command import Report, run_benchmark
from rich.table import Table

from rdt2_jax.qwen2_5_vl.config import PRESETS


def beside_peer(quick: bool) -> tuple[Report, Table]:
    from qwen_beside_peer import run
    from qwen_match import FULL, QUICK

    report = run(QUICK if quick else FULL)
    return report, peer_table(report)


def beside_floors(preset: str, quick: bool) -> tuple[Report, Table]:
    from qwen_beside_floors import FULL_RUN, QUICK_RUN, run_preset

    report = run_preset(preset, QUICK_RUN if quick else FULL_RUN)
    return report, floor_table(report)


def failures(report: Report) -> list[str]:
    """Rows over their bar, and rows that could not be measured."""
    judged = [row for row in report["rows"] if row.get("bar") is not None]
    over = [
        f"over the bar: {row['task']}, {row['ratio']:.2f} > {row['bar']:.2f}" for row in judged if row["met"] is False
    ]
    over += [
        f"not judged, others used {row['others']:.0%} of the processors: {row['task']}"
        for row in judged
        if row["met"] is None
    ]
    broken = [
        f"failed: {row['task']} ({row['attention']}): {row['error']}" for row in report["rows"] if row.get("error")
    ]
    difference = report.get("kernel_difference")
    wrong = difference is not None and not difference <= report["kernel_difference_tolerance"]
    return over + broken + ([f"attention kernels disagree: relative difference {difference:.1e}"] if wrong else [])


def peer_table(report: Report) -> Table:
    """Ours beside the peer."""
    threads = report["threads"]
    table = Table(
        title=f"float32, threads: torch {threads['torch']}, XLA {threads['xla']}; {report['prompt']['tokens']} tokens, "
        f"{report['parameters']['all'] / 1e6:.0f}M parameters; measured {report['matmul_gflops']:.0f} GFLOP/s, "
        f"{report['bandwidth_gb_s']:.1f} GB/s"
    )
    table.add_column("task")
    for column in ("ours ms", "peer ms", "ours/peer", "bar", "met", "floor ms", "others"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["task"],
            f"{row['ours_ms']:.2f}",
            f"{row['peer_ms']:.2f}",
            f"{row['ratio']:.2f}",
            "" if row["bar"] is None else f"{row['bar']:.1f}",
            "" if row["bar"] is None else {None: "busy", True: "yes", False: "NO"}[row["met"]],
            "" if row["floor_ms"] is None else f"{row['floor_ms']:.1f}",
            f"{row['others']:.0%}",
        )
    return table


def floor_table(report: Report) -> Table:
    """Latencies beside the two floors."""
    table = Table(
        title=f"{report['device']}, {report['preset']}, bfloat16, batch 1, {report['prompt']['tokens']} tokens; "
        f"measured {report['matmul_tflops']:.1f} TFLOP/s, {report['bandwidth_gb_s']:.0f} GB/s"
    )
    table.add_column("task")
    for column in ("attention", "ms", "arithmetic floor ms", "memory floor ms", "of the floor", "compiling s"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        measured = row["error"] is None
        table.add_row(
            row["task"],
            row["attention"],
            f"{row['ms']:.2f}" if measured else "failed",
            f"{row['arithmetic_floor_ms']:.2f}",
            f"{row['memory_floor_ms']:.2f}",
            f"{row['share_of_floor']:.0%}" if measured else "",
            f"{row['compiling_s']:.1f}" if measured else "",
        )
    return table


if __name__ == "__main__":
    run_benchmark(__doc__, PRESETS, beside_peer, beside_floors, failures)
