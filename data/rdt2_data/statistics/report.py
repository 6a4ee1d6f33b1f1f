"""The statistics of a dataset in words, as JSON, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rdt2_data.statistics.collect import CHANNEL_NAMES, DatasetStatistics
from rdt2_data.statistics.histogram import LARGEST
from rdt2_data.statistics.normalizers import Fit
from rdt2_jax.actions.layout import ACTION_DIM
from rdt2_jax.io.files import atomic_write

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)

_COLUMNS = 5


def statistics_report(statistics: DatasetStatistics, fit: Fit | None = None) -> dict[str, Any]:
    """For machines: counts, problems, and moments and quantiles per channel in physical units.

    Args:
        statistics: of at least one frame.
        fit: the normalizer made of them, described beside them.
    """
    channels = statistics.channels
    moments, std = channels.moments, channels.moments.std
    quantiles = channels.sketch.quantiles(QUANTILES)
    rows = [
        {
            "channel": channel,
            "name": CHANNEL_NAMES[channel],
            "min": float(moments.minimum[channel]),
            "max": float(moments.maximum[channel]),
            "mean": float(moments.mean[channel]),
            "std": float(std[channel]),
            "beyond_histogram": channels.histograms.channel(channel).out_of_range,
            "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles[:, channel], strict=True)},
        }
        for channel in range(ACTION_DIM)
    ]
    report: dict[str, Any] = {
        "samples": statistics.samples,
        "questions": statistics.questions,
        "frames": statistics.frames,
        "hours_at_30_samples_a_second": statistics.hours,
        "quantile_rank_error_at_most": channels.sketch.rank_error,
        "channels": rows,
        "problems": statistics.tally.report(),
    }
    if fit is not None:
        report["normalizer"] = fit_report(fit)
    return report


def fit_report(fit: Fit) -> dict[str, Any]:
    """How a normalizer was made, and for quantile limits the share of values of each channel beyond [-1, 1]."""
    field = fit.normalizer.field("action")
    report: dict[str, Any] = {
        "kind": fit.kind,
        "limits": "none" if fit.kind == "gaussian" else list(fit.quantiles) if fit.quantiles else "extremes",
        "rotations": "as they are",
        "scale": field.scale.tolist(),
        "offset": field.offset.tolist(),
    }
    if fit.outside is not None:
        report["share_outside"] = fit.outside.tolist()
    return report


def statistics_table(statistics: DatasetStatistics, fit: Fit | None = None) -> Any:
    """For people: a rich table, one line a channel."""
    from rich.table import Table

    channels = statistics.channels
    outside = fit.outside if fit is not None and fit.quantiles is not None else None
    names = ("min", "1%", "median", "99%", "max", "mean", "std", *(("outside",) if outside is not None else ()))
    quantiles = channels.sketch.quantiles((0.01, 0.5, 0.99))
    moments, std = channels.moments, channels.moments.std
    columns = [moments.minimum, quantiles[0], quantiles[1], quantiles[2], moments.maximum, moments.mean, std]
    # narrow enough for a terminal of 80 columns
    table = Table(title="positions in m, rot6d, widths in policy units", box=None, padding=(0, 1, 0, 0))
    table.add_column("channel", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for channel in range(ACTION_DIM):
        cells = [f"{v:.4f}" if abs(v) < 1e4 else f"{v:.3g}" for v in (column[channel] for column in columns)]
        if outside is not None:
            cells.append(f"{outside[channel]:.2%}")
        table.add_row(f"{channel} {CHANNEL_NAMES[channel]}".replace("rot6d", "rot"), *cells)
    return table


def plot_statistics(statistics: DatasetStatistics, path: Path, fit: Fit | None = None) -> None:
    """Writes a PNG: the histogram of every channel, with mean, extremes and the limits of the normalizer.

    Args:
        statistics: of at least one frame.
        path: ends in `.png`.
        fit: for "limits": what is mapped to -1 and 1 is marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 10), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.ravel(figure.subplots(ACTION_DIM // _COLUMNS, _COLUMNS))
    for channel, panel in enumerate(panels):
        _draw_channel(panel, statistics, fit, channel)
    title = f"{statistics.samples} chunks, {statistics.frames} frames"
    figure.suptitle(f"{title}: positions in m, rot6d, widths in policy units; counts on a logarithmic scale")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=90)


def _draw_channel(panel: Any, statistics: DatasetStatistics, fit: Fit | None, channel: int) -> None:
    bins = statistics.channels.histograms.channel(channel)
    colour = "#30638e" if channel >= ACTION_DIM // 2 else "#d1495b"
    if bins.counts.size:
        panel.stairs(bins.counts, bins.edges, fill=True, color=colour)
    panel.axvline(statistics.channels.moments.mean[channel], color="black", linewidth=1)
    if fit is not None and fit.kind == "limits" and "rot6d" not in CHANNEL_NAMES[channel]:
        field = fit.normalizer.field("action")
        for end in (-1, 1):
            panel.axvline((end - field.offset[channel]) / field.scale[channel], color="0.4", linestyle="--")
    panel.set_yscale("log")
    title = f"{channel} {CHANNEL_NAMES[channel]}"
    if bins.out_of_range:
        title += f", {bins.out_of_range} beyond ±{LARGEST:.1e}"
        if bins.counts.size:
            panel.set_xlim(bins.edges[0], bins.edges[-1])  # mean and limits may lie with those beyond
    panel.set_title(title, fontsize=10)
    panel.tick_params(labelsize=7)
