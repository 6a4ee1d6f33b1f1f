"""The training stream beside webdataset with torch's DataLoader, and beside decoding alone.

All read the same shards on the same processors, shuffle and decode; they take turns, and the medians of their turns are
compared. Also: how indexing time grows, and how much memory a dataset of 1,000 shards takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from data_workload import BATCH, THREADS, make_shards, many_shards, our_dataset
from rich.console import Console
from rich.table import Table

from rdt2_jax.progress import progress_bar

GOAL_OVER_PEER, GOAL_OVER_BARE, GOAL_MB = 1.5, 0.75, 400
GOAL_INDEX_GROWTH = 1.5
"""Time to index a sample in the largest dataset over that in the smallest: 1 where it is linear."""

GOAL_MB_GROWTH = 40
"""Memory of a dataset of ten times as many shards may be larger by so much."""

Loader = Callable[[], Iterator[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and small shards: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = measure(Path(name), arguments.quick)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    failures = [] if arguments.quick else failed(report)
    if failures:
        raise SystemExit("\n".join(failures))


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """All numbers of one run."""
    shards, samples = (2, 8) if quick else (4, 500)
    info = make_shards(folder / "shards", shards, samples)
    effort = Effort(1, 1, 1) if quick else Effort(5, 40, 2 * THREADS + 2)
    rates = interleaved(loaders(folder / "shards"), effort)
    peer = max((name for name in rates if name.startswith("webdataset")), key=lambda name: rates[name]["median"])
    published = "webdataset, Pillow"
    published = max((name for name in rates if name.startswith(published)), key=lambda name: rates[name]["median"])
    ours = rates["ours"]["median"]
    return {
        "processors": len(os.sched_getaffinity(0)),
        "batch": BATCH,
        "threads": THREADS,
        **info,
        "samples_per_second": rates,
        "best_peer": peer,
        "ours_over_best_peer": ours / rates[peer]["median"],
        "ours_over_best_peer_with_pillow": ours / rates[published]["median"],
        "ours_over_decode_and_collate": ours / rates["decode and collate alone"]["median"],
        "index": index_times(folder, (1, 2) if quick else (2, 4, 8, 16), 50 if quick else 500),
        "memory": [memory(folder, count, 1 if quick else 60) for count in ((2, 4) if quick else (100, 1000))],
    }


def loaders(shards: Path) -> dict[str, Loader]:
    """Name -> makes an iterator over batches."""
    from peers.data_webdataset import decode_and_collate, webdataset_batches

    def ours() -> Iterator[Any]:
        from rdt2_data.pipeline.stream import StreamConfig, TrainingStream

        config = StreamConfig(batch_size=BATCH, threads=THREADS)
        iterator = iter(TrainingStream(our_dataset(shards), config))
        with closing(iterator):
            yield from iterator

    found: dict[str, Loader] = {"ours": ours, "decode and collate alone": lambda: decode_and_collate(shards)}
    for decoder in ("simplejpeg", "Pillow"):
        for workers in (0, THREADS):
            name = f"webdataset, {decoder}, {workers} workers"
            found[name] = lambda d=decoder, w=workers: webdataset_batches(shards, d, w)
    return found


class Effort(NamedTuple):
    """Turns of every loader; batches counted in a turn, and before them to warm up."""

    rounds: int
    batches: int
    warm_up: int


def interleaved(loaders: dict[str, Loader], effort: Effort) -> dict[str, dict[str, Any]]:
    """Samples per second of every loader, each in turn."""
    rounds, batches, warm_up = effort
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    with progress_bar("measuring", rounds * len(loaders), "turns") as advance:
        for _ in range(rounds):
            for name, make in loaders.items():
                iterator = make()
                for _ in range(warm_up):
                    next(iterator)
                start = time.perf_counter()
                for _ in range(batches):
                    next(iterator)
                rates[name].append(batches * BATCH / (time.perf_counter() - start))
                del iterator
                advance()
    return {
        name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in rates.items()
    }


def index_times(folder: Path, counts: tuple[int, ...], samples: int) -> list[dict[str, float]]:
    """Seconds to index more and more shards, by one process."""
    from rdt2_data.shards.source import TarShards

    found = []
    for count in counts:
        shards = many_shards(folder / f"index-{count}", folder / "shards", count, samples)
        start = time.perf_counter()
        source = TarShards([str(path) for path in shards], workers=1)
        seconds = time.perf_counter() - start
        found.append({"samples": len(source), "seconds": seconds, "us_per_sample": seconds / len(source) * 1e6})
    return found


def memory(folder: Path, shards: int, batches: int) -> dict[str, Any]:
    """Peak resident memory of a process that does nothing but load."""
    paths = many_shards(folder / f"memory-{shards}", folder / "shards", shards, None)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import data_workload; "
    code += f"data_workload.print_memory({str(paths[0].parent)!r}, {batches})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"shards": shards, **json.loads(done.stdout)}


def failed(report: dict[str, Any]) -> list[str]:
    """What falls short of the goals, a line each."""
    index, memory = report["index"], report["memory"]
    checks = [
        (index[-1]["us_per_sample"] / index[0]["us_per_sample"], "<=", GOAL_INDEX_GROWTH, "indexing time, growth"),
        (memory[-1]["peak_mb"] - memory[0]["peak_mb"], "<=", GOAL_MB_GROWTH, "MB more for ten times the shards"),
        (report["ours_over_best_peer"], ">=", GOAL_OVER_PEER, "samples/s over the best peer's"),
        (report["ours_over_decode_and_collate"], ">=", GOAL_OVER_BARE, "samples/s over decode and collate alone"),
        (report["memory"][-1]["peak_mb"], "<=", GOAL_MB, "MB of memory"),
    ]
    return [
        f"{what}: {value:.2f}, the goal is {sign} {goal}"
        for value, sign, goal, what in checks
        if (value < goal if sign == ">=" else value > goal)
    ]


def show(report: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table(title=f"Samples per second, {report['processors']} processors, batches of {report['batch']}")
    for column in ("loader", "median", "least", "most", "ours / it"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    ours = report["samples_per_second"]["ours"]["median"]
    for name, row in report["samples_per_second"].items():
        numbers = [f"{row[key]:.0f}" for key in ("median", "least", "most")]
        table.add_row(name, *numbers, f"{ours / row['median']:.2f}")
    console.print(table)
    console.print(f"images: {report['jpeg_kb']:.0f} KB each; {report['shards']} shards, {report['samples']} samples")
    console.print(f"ours / best peer: {report['ours_over_best_peer']:.2f} ({report['best_peer']})")
    console.print(
        f"ours / best peer that decodes with Pillow, as published: {report['ours_over_best_peer_with_pillow']:.2f}"
    )
    console.print(f"ours / decode and collate alone: {report['ours_over_decode_and_collate']:.2f}")
    for row in report["index"]:
        console.print(f"index: {row['samples']} samples in {row['seconds']:.2f} s, {row['us_per_sample']:.0f} us each")
    for row in report["memory"]:
        console.print(
            f"memory: {row['shards']} shards, {row['samples']} samples: peak {row['peak_mb']:.0f} MB, of which "
            f"{row['imported_mb']:.0f} MB were there before the first shard was opened"
        )


if __name__ == "__main__":
    main()
