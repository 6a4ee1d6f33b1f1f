"""Latency of the policies, from images to action chunks: on a CPU beside torch and transformers, on an accelerator
beside what arithmetic and memory allow.

Without options: on a CPU, a backbone of the 7B's proportions in float32 and its experts, the same weights and threads
for both sides, ratios of our time to the peer's (below one is faster) and to our own prefill; on an accelerator, the
published sizes with random bfloat16 weights at batch 1. `--preset` asks for the second kind on any device.
"""

from __future__ import annotations

from command import Report, run_benchmark
from rich.table import Table

from rdt2_jax.policy.random_weights import SIZES


def beside_peer(quick: bool) -> tuple[Report, Table]:
    from policies_beside_peer import run
    from policies_match import FULL_POLICIES, QUICK_POLICIES

    report = run(QUICK_POLICIES if quick else FULL_POLICIES)
    return report, peer_table(report)


def beside_floors(preset: str, quick: bool) -> tuple[Report, Table]:
    from policies_beside_floors import FULL_RUN, QUICK_RUN, run_preset

    report = run_preset(preset, QUICK_RUN if quick else FULL_RUN)
    return report, floor_table(report)


def failures(report: Report) -> list[str]:
    """Rows over their bar, rows that could not be measured, stages that do not do what the policy does."""
    rows = report["rows"]
    bad = [
        f"over the bar: {row['policy']}, {row['task']}: {row['ms']:.1f} ms > {row['bar']:.1f} ms"
        for row in rows
        if row.get("met") is False
    ]
    bad += [f"failed: {row['policy']}, {row['task']}: {row['error']}" for row in rows if row.get("error")]
    tolerance = report.get("differences_tolerance")
    if tolerance is not None:
        bad += [
            f"what was timed is not what the policy does: {name}, relative difference {difference:.1e}"
            for name, difference in report["differences"].items()
            if not difference <= tolerance
        ]
    return bad


def peer_table(report: Report) -> Table:
    """Ours beside the peer, and beside our prefill."""
    threads, layers = report["threads"], report["layers"]
    sizes = ", ".join(f"{name} {count / 1e6:.0f}M" for name, count in report["parameters"].items())
    table = Table(
        title=f"float32, threads: torch {threads['torch']}, XLA {threads['xla']}; {report['prompt']['tokens']} tokens; "
        f"backbone layers: ours {layers['ours']} (vq {layers['peer']}), peer {layers['peer']}; {sizes}; measured "
        f"{report['matmul_gflops']:.0f} GFLOP/s, {report['bandwidth_gb_s']:.1f} GB/s",
        caption=f"prefill: our decoder's first {layers['ours']} layers over the prompt, without the vision tower",
    )
    table.add_column("task")
    for column in ("ours ms", "peer ms", "ours/peer", "ours/prefill", "floor ms", "others"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["task"],
            f"{row['ours_ms']:.2f}",
            f"{row['peer_ms']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['of_prefill']:.2f}",
            "" if row["floor_ms"] is None else f"{row['floor_ms']:.1f}",
            f"{row['others']:.0%}",
        )
    return table


def floor_table(report: Report) -> Table:
    """Latencies beside floors, and beside bars where there are any."""
    table = Table(
        title=f"{report['device']}, {report['preset']}, {report['dtype']}, batch 1, "
        f"{report['prompt']['tokens']} tokens; measured {report['matmul_tflops']:.1f} TFLOP/s, "
        f"{report['bandwidth_gb_s']:.0f} GB/s"
    )
    table.add_column("policy")
    table.add_column("task")
    for column in ("ms", "floor ms", "of the floor", "ms/prefill", "bar ms", "met"):
        table.add_column(column, justify="right")
    for i, row in enumerate(report["rows"]):
        if i and row["policy"] != report["rows"][i - 1]["policy"]:
            table.add_section()
        table.add_row(
            row["policy"],
            row["task"],
            "failed" if row["ms"] is None else f"{row['ms']:.2f}",
            "" if row["floor_ms"] is None else f"{row['floor_ms']:.2f}",
            "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}",
            "" if row["of_prefill"] is None else f"{row['of_prefill']:.2f}",
            "" if row["bar"] is None else f"{row['bar']:.0f}",
            {None: "", True: "yes", False: "NO"}[row["met"]],
        )
    return table


if __name__ == "__main__":
    run_benchmark(__doc__, SIZES, beside_peer, beside_floors, failures)
