"""Small charts as SVG text: curves over a chunk, and histograms. No library, no script."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rdt2_data.statistics.histogram import LARGEST, Bins

WIDTH, HEIGHT = 250, 120
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 6, 18, 16
_LINE_HEIGHT = 11


@dataclass(frozen=True, eq=False)
class Curve:
    """One line of a chart: values (N,), a colour and a name."""

    name: str
    colour: str
    values: np.ndarray


def curves_chart(
    title: str, curves: Sequence[Curve], *, times_s: np.ndarray, least_span: float, bounds: tuple[float, ...] = ()
) -> str:
    """A chart of curves over time.

    Args:
        title: with the unit.
        curves: values (N,) each.
        times_s: (N,), increasing [s].
        least_span: the vertical axis covers at least that much, so that noise does not fill the chart.
        bounds: values that are marked by dashed lines.
    """
    values = np.concatenate([curve.values for curve in curves] + [np.asarray(bounds, np.float64)])
    least, most = float(values.min()), float(values.max())
    low, high = least, most
    spare = max(0.0, least_span - (high - low)) / 2 + 0.04 * max(high - low, least_span)
    low, high = low - spare, high + spare
    last = float(times_s[-1])
    parts = [_frame(title), _label(_LEFT - 3, _y(most, low, high) + 3, _number(most), "end")]
    if _y(least, low, high) - _y(most, low, high) > _LINE_HEIGHT:
        parts.append(_label(_LEFT - 3, _y(least, low, high) + 3, _number(least), "end"))
    parts.append(_label(_LEFT, HEIGHT - 4, "0 s") + _label(WIDTH - _RIGHT, HEIGHT - 4, f"{last:.1f} s", "end"))
    for bound in (*bounds, *((0.0,) if low < 0 < high else ())):
        y = _y(bound, low, high)
        parts.append(f'<path class="mark" d="M{_LEFT},{y:.1f}H{WIDTH - _RIGHT}"/>')
    for number, curve in enumerate(curves):
        places = [
            f"{_x(t, 0.0, last):.1f},{_y(v, low, high):.1f}"
            for t, v in zip(times_s.tolist(), curve.values.tolist(), strict=True)
        ]
        parts.append(f'<polyline points="{" ".join(places)}" stroke="{curve.colour}"/>')
        x = WIDTH - _RIGHT - 34 * (len(curves) - 1 - number)
        parts.append(
            f'<text x="{x}" y="12" text-anchor="end" style="fill:{curve.colour}">{html.escape(curve.name)}</text>'
        )
    return _svg("".join(parts), title)


def histogram_chart(title: str, bins: Bins, *, mean: float, colour: str) -> str:
    """A histogram with its range and its mean; heights are logarithms of counts, so that rare values show.

    Args:
        title: of the channel.
        bins: at least one value, in a bin or out of range.
        mean: marked by a line.
        colour: of the bars.
    """
    beyond = f"{bins.out_of_range} values beyond ±{LARGEST:.1e}"
    if not bins.counts.size:
        return _svg(_frame(title) + _label(_LEFT + 4, HEIGHT / 2, beyond), f"{title}: {beyond}")
    counts, edges = bins.counts, bins.edges
    low, high = float(edges[0]), float(edges[-1])
    heights = np.log1p(counts) / np.log1p(counts.max())
    floor = HEIGHT - _BOTTOM
    steps = [f"M{_x(low, low, high):.1f},{floor}"]
    for height, left, right in zip(heights.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        y = floor - height * (floor - _TOP)
        steps.append(f"L{_x(left, low, high):.1f},{y:.1f}H{_x(right, low, high):.1f}")
    steps.append(f"V{floor}Z")
    x = _x(min(max(mean, low), high), low, high)  # values out of range may draw the mean out of the chart
    text = f"{int(counts.sum())} values, most in a bin {int(counts.max())}, mean {mean:.5g}"
    parts = [
        _frame(title),
        f'<path d="{"".join(steps)}" fill="{colour}"/>',
        f'<path class="mean" d="M{x:.1f},{_TOP}V{floor}"/>',
        _label(_LEFT, HEIGHT - 4, _number(low)),
        _label(WIDTH - _RIGHT, HEIGHT - 4, _number(high), "end"),
    ]
    if bins.out_of_range:
        parts.append(_label(WIDTH - _RIGHT, _TOP + 10, beyond, "end"))
        text += f", {beyond}"
    return _svg("".join(parts), f"{title}: {text}")


def _svg(content: str, description: str) -> str:
    title = f"<title>{html.escape(description)}</title>"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">{title}{content}</svg>'


def _frame(title: str) -> str:
    box = f'<path class="axis" d="M{_LEFT},{_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>'
    return f'<text x="2" y="12" class="name">{html.escape(title)}</text>{box}'


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _x(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return _LEFT + share * (WIDTH - _RIGHT - _LEFT)


def _y(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)


def _number(value: float) -> str:
    return f"{value:.3g}"
