"""The HTML page of a dataset: one file, nothing loaded from anywhere, no script.

Every text that comes from the data is escaped. A content security policy forbids the page to fetch or run anything, so
that a dataset of strangers can be looked at without a second thought.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rdt2_data.inspection.overlay import TIME_COLOURS
from rdt2_data.inspection.summary import DatasetSummary, GallerySample
from rdt2_data.inspection.svg import Curve, curves_chart, histogram_chart
from rdt2_data.statistics.collect import CHANNEL_NAMES
from rdt2_jax.actions.layout import (
    ACTION_DIM,
    ACTION_RATE_HZ,
    ARM_NAMES,
    CHUNK_LENGTH,
    MAX_POLICY_WIDTH,
    POSITION,
    WIDTH,
    arm_slice,
)
from rdt2_jax.fisheye import WristCameraConfig

MAX_ROWS = 500
"""Instructions listed; more would hide what comes below. The rest is counted."""

ARM_COLOURS = {"left": "#30638e", "right": "#d1495b"}
_AXIS_COLOURS = ("#c1121f", "#2e8b57", "#1d4ed8")
_LINKS_PER_INSTRUCTION = 12

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1rem 1.5rem; color: #1c2430; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dae1; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
th { color: #5a6675; font-weight: 600; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem 2.4rem; margin: 1rem 0; }
.facts b { display: block; font-size: 1.35rem; } .facts span, .note { color: #5a6675; font-size: .88rem; }
.bad { color: #b3261e; } .good { color: #2e7d32; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
article { border: 1px solid #d5dae1; border-radius: 8px; padding: .8rem; margin: 1rem 0; }
article img { width: 100%; max-width: 768px; height: auto; border-radius: 4px; display: block; }
article:target { border-color: #30638e; box-shadow: 0 0 0 2px #30638e44; }
.sides { display: flex; max-width: 768px; color: #5a6675; font-size: .85rem; } .sides span { flex: 1; }
.charts { display: flex; flex-wrap: wrap; gap: .4rem; }
.bar { display: inline-block; width: 9rem; height: .7rem; border-radius: 3px; vertical-align: middle; }
.share { background: #30638e; height: .6rem; display: inline-block; border-radius: 2px; }
svg { background: #fafbfc; border: 1px solid #e6e9ee; border-radius: 4px; }
svg text { font: 10px system-ui, sans-serif; fill: #5a6675; } svg text.name { font-weight: 600; fill: #1c2430; }
svg polyline { fill: none; stroke-width: 1.5; }
svg .axis { fill: none; stroke: #b4bcc8; } svg .mark { stroke: #b4bcc8; stroke-dasharray: 3 3; }
svg .mean { stroke: #1c2430; stroke-width: 1; }
code { font: 12px ui-monospace, monospace; overflow-wrap: anywhere; }
"""


def render_page(
    title: str,
    summary: DatasetSummary,
    samples: Sequence[GallerySample],
    cameras: Mapping[str, WristCameraConfig],
    *,
    seed: int,
) -> str:
    """The page as text.

    Args:
        title: name of the dataset.
        summary: of the whole.
        samples: for the gallery.
        cameras: with which paths were drawn.
        seed: with which the samples were drawn.
    """
    assumed = [name for name, camera in cameras.items() if camera.source == "assumed"]
    sections = [
        f"<h1>{_text(title)}</h1>",
        _overview(summary),
        _problems(summary),
        _instructions(summary, samples),
        _gallery(samples, summary, assumed, seed),
        _channels(summary),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


# ------------------------------------------------------------------------------------------------- sections


def _overview(summary: DatasetSummary) -> str:
    statistics = summary.statistics
    facts = [
        (f"{statistics.samples:,}", "samples with a chunk"),
        (
            f"{statistics.hours:.2f} h",
            f"samples / {ACTION_RATE_HZ:g} Hz: the recorded time, if every frame is a sample",
        ),
        (f"{summary.shards:,}", "shards"),
        (_bytes(summary.total_bytes), "in all"),
        (f"{len(summary.instruction_counts):,}", "instructions in use"),
        (f"{summary.with_tokens:,}", "samples with action tokens"),
        (f"{statistics.tally.total:,}", "problems"),
    ]
    if statistics.questions:
        facts.insert(1, (f"{statistics.questions:,}", "questions"))
    cells = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for value, name in facts)
    return f'<section class="facts">{cells}</section>'


def _problems(summary: DatasetSummary) -> str:
    report = summary.statistics.tally.report()
    note = "Keys of instructions were not looked up. " if summary.instructions is None else ""
    note += "Images are not decoded for this page, but for the gallery: rdt2 data check looks at every one."
    if not report["total"]:
        return f'<h2>Problems</h2><p class="good">None found.</p><p class="note">{note}</p>'
    rows = []
    for reason, entry in report["reasons"].items():
        examples = "".join(f"<div><code>{_text(line)}</code></div>" for line in entry["examples"])
        rows.append(
            f'<tr><td class="n">{entry["count"]:,}</td><td class="bad">{_text(reason)}</td>'
            f"<td>{_text(entry['meaning'])}{examples}</td></tr>"
        )
    head = '<tr><th class="n">count</th><th>reason</th><th>what it means, and the first of them</th></tr>'
    return f'<h2>Problems</h2><table>{head}{"".join(rows)}</table><p class="note">{note}</p>'


def _instructions(summary: DatasetSummary, samples: Sequence[GallerySample]) -> str:
    total = max(1, sum(summary.instruction_counts.values()))
    shown: dict[str, list[int]] = {}
    for sample in samples:
        if sample.instruction_key is not None:
            shown.setdefault(sample.instruction_key, []).append(sample.index)
    rows = []
    for number, (key, count) in enumerate(summary.instruction_counts.items()):
        if number < MAX_ROWS or key in shown:
            links = ", ".join(f'<a href="#sample-{i}">{i}</a>' for i in shown.get(key, [])[:_LINKS_PER_INSTRUCTION])
            rows.append(
                f'<tr id="{_anchor(key)}"><td><code>{_text(key)}</code></td><td>{_sentence(summary, key)}</td>'
                f'<td class="n">{count:,}</td><td class="n">{count / total:.1%}</td>'
                f'<td><span class="share" style="width:{120 * count / total:.1f}px"></span></td><td>{links}</td></tr>'
            )
    head = (
        '<tr><th>key</th><th>instruction</th><th class="n">samples</th><th class="n">share</th><th></th>'
        "<th>in the gallery</th></tr>"
    )
    rest = len(summary.instruction_counts) - len(rows)
    notes = [f"{rest:,} more instructions are not listed."] if rest > 0 else []
    if summary.instructions is None:
        notes.append("The sentences are not known: give the instructions to see them.")
    else:
        unused = len(set(summary.instructions) - set(summary.instruction_counts))
        notes += [f"{unused:,} of {len(summary.instructions):,} instructions have no sample."] if unused else []
    return f"<h2>Instructions</h2><table>{head}{''.join(rows)}</table>{_notes(notes)}"


def _gallery(samples: Sequence[GallerySample], summary: DatasetSummary, assumed: Sequence[str], seed: int) -> str:
    colours = ", ".join(f"rgb{colour}" for colour in TIME_COLOURS)
    seconds = CHUNK_LENGTH / ACTION_RATE_HZ
    legend = (
        f'<p>Lines: where the fingertips go. <span class="bar" style="background:linear-gradient(to right, {colours})">'
        f"</span> from the image to {seconds:.1f} s after it. White dot: now. Bars: the two fingertips, as far apart "
        "as the gripper is open.</p>"
    )
    notes = [f"{len(samples)} samples, drawn at random with seed {seed}."]
    if assumed:
        notes.append(
            f"The camera model of {' and '.join(assumed)} is assumed, not calibrated: "
            "expect the lines to lie some way off the fingers."
        )
    cards = "".join(_card(sample, summary) for sample in samples)
    return f"<h2>Samples</h2>{legend}{_notes(notes)}{cards}"


def _card(sample: GallerySample, summary: DatasetSummary) -> str:
    head = f"<h3>{sample.index}: "
    place = f'<p class="note">{_text(sample.where)}</p>'
    if sample.problem is not None or sample.action is None or sample.instruction_key is None:
        body = f'<p class="bad">{_text(sample.problem or "nothing to show")}</p>'
        return f'<article id="sample-{sample.index}">{head}not shown</h3>{place}{body}</article>'
    key = sample.instruction_key
    image = base64.b64encode(sample.picture_jpeg).decode()
    inside = sample.frames_in_picture or {}
    sides = "".join(
        f"<span>{arm} wrist: {inside.get(arm, 0)} of {CHUNK_LENGTH} frames of the path in the picture</span>"
        for arm in ("left", "right")
    )
    return (
        f'<article id="sample-{sample.index}">{head}<a href="#{_anchor(key)}">{_sentence(summary, key)}</a></h3>'
        f'<img alt="both wrist images of sample {sample.index}" src="data:image/jpeg;base64,{image}">'
        f'<div class="sides">{sides}</div>{place}<div class="charts">{_chunk_charts(sample.action)}</div>'
        f"{_tokens(sample.token)}</article>"
    )


def _chunk_charts(action: np.ndarray) -> str:
    times_s = np.arange(1, CHUNK_LENGTH + 1) / ACTION_RATE_HZ
    charts = []
    for arm in ("left", "right"):
        position_mm = 1e3 * action[:, arm_slice(arm)][:, POSITION].astype(np.float64)
        curves = [Curve(name, colour, v) for name, colour, v in zip("xyz", _AXIS_COLOURS, position_mm.T, strict=True)]
        charts.append(curves_chart(f"{arm} position [mm]", curves, times_s=times_s, least_span=20.0))
    widths = [
        Curve(arm, ARM_COLOURS[arm], 1e3 * action[:, arm_slice(arm)][:, WIDTH][:, 0].astype(np.float64))
        for arm in ("left", "right")
    ]
    bounds = (0.0, 1e3 * MAX_POLICY_WIDTH)
    charts.append(curves_chart("width [mm, policy]", widths, times_s=times_s, least_span=1.0, bounds=bounds))
    return "".join(charts)


def _tokens(token: np.ndarray | None) -> str:
    if token is None:
        return ""
    return f'<p class="note">tokens <code>{" ".join(str(int(t)) for t in token)}</code></p>'


def _channels(summary: DatasetSummary) -> str:
    statistics = summary.statistics
    if not statistics.frames:
        return "<h2>Channels</h2><p>There is no chunk to show.</p>"
    half = ACTION_DIM // len(ARM_NAMES)
    parts = ["<h2>Channels</h2>"]
    for number, arm in enumerate(ARM_NAMES):
        charts = [
            histogram_chart(
                CHANNEL_NAMES[channel],
                statistics.channels.histograms.channel(channel),
                mean=float(statistics.channels.moments.mean[channel]),
                colour=ARM_COLOURS[arm],
            )
            for channel in range(number * half, (number + 1) * half)
        ]
        parts.append(f'<h3>{arm} arm</h3><div class="charts">{"".join(charts)}</div>')
    note = (
        f"All {statistics.frames:,} frames; positions in m, widths in policy units; heights are logarithms of counts."
    )
    return "".join(parts) + _notes([note])


# -------------------------------------------------------------------------------------------------- details


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _sentence(summary: DatasetSummary, key: str) -> str:
    if summary.instructions is None:
        return f"key {_text(key)}"
    if key not in summary.instructions:
        return f'<span class="bad">unknown key {_text(key)}</span>'
    return _text(summary.instructions[key])


def _anchor(key: str) -> str:
    """A name for links that is one whatever the key holds."""
    return f"instruction-{key.encode().hex()}"


def _notes(lines: Iterable[str]) -> str:
    return "".join(f'<p class="note">{_text(line)}</p>' for line in lines)


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
