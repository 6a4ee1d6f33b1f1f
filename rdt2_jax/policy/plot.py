"""The picture of an action chunk: where both arms go, how they turn, what the grippers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rdt2_jax.actions.layout import ARM_NAMES, CHUNK_LENGTH, MAX_POLICY_WIDTH, ArmName
from rdt2_jax.actions.types import ActionChunk
from rdt2_jax.errors import DataError
from rdt2_jax.io.files import atomic_write
from rdt2_jax.policy.motion import arm_motion

ARM_COLORS: dict[ArmName, str] = {"left": "#30638e", "right": "#d1495b"}
"""One colour per arm, in every panel."""

_AXIS_COLORS = ("#c1121f", "#2e8b57", "#1d4ed8")
"""x, y, z of the gripper's frame."""

_TRIADS = 6
"""Orientations drawn along a path."""

_SMALLEST_VIEW_MM = 20.0
"""Half the side of the cube shown at least: a path shorter than that is not blown up to fill the panel."""


def plot_chunk(chunk: ActionChunk, path: Path, *, instruction: str | None = None, source: str | None = None) -> None:
    """Writes a PNG: the path of each arm above, gripper widths, rotation angles and distances over time below.

    Paths are relative to each arm's own pose at its anchor time, in the POLICY frame; both cubes have one scale. Along
    a path stand small triads, the gripper's axes x, y, z in red, green, blue.

    Args:
        chunk: the answer of a policy.
        path: a file name that ends in `.png`.
        instruction: stands in the title.
        source: what the chunk came from, e.g. "fm policy, random weights"; stands below the title.

    Raises:
        DataError: another suffix.
        Rdt2Error: the folder does not exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_plot_path(path)
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 6, height_ratios=(2, 1))
    half_side_mm = _half_side_mm(chunk)
    for column, arm in enumerate(("left", "right")):  # as the wrist images stand in the composite picture
        # drawn in the order of zorder: sorted by depth, a line's middle would hide the marks of start and end
        axes = figure.add_subplot(grid[0, 3 * column : 3 * column + 3], projection="3d", computed_zorder=False)
        _draw_path(axes, chunk, arm, half_side_mm)
    panels = [figure.add_subplot(grid[1, 2 * i : 2 * i + 2]) for i in range(3)]
    _draw_curves(panels, chunk)
    figure.suptitle(_title(chunk, instruction, source), fontsize=12)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def check_plot_path(path: Path) -> None:
    """Raises DataError for a picture that is not called `.png`."""
    if Path(path).suffix.lower() != ".png":
        raise DataError("pictures are written as PNG", where=path, expected="a file name that ends in .png")


def _half_side_mm(chunk: ActionChunk) -> float:
    """Half the side of a cube in which either path fits, around the path's own middle."""
    spans = [np.ptp(arm_motion(chunk, arm).positions_mm, axis=0).max() for arm in ARM_NAMES]
    return max(_SMALLEST_VIEW_MM, 0.55 * max(spans))


def _draw_path(axes: Any, chunk: ActionChunk, arm: ArmName, half_side_mm: float) -> None:
    from matplotlib.ticker import MaxNLocator

    motion = arm_motion(chunk, arm)
    positions, rotations = motion.positions_mm, motion.rotations
    color = ARM_COLORS[arm]
    middle = (positions.min(axis=0) + positions.max(axis=0)) / 2
    floor_mm = middle[2] - half_side_mm
    # its shadow, and how high it is above it, make the depth readable
    axes.plot(*positions[:, :2].T, floor_mm, color="0.7", linewidth=1.4)
    for end in (positions[0], positions[-1]):
        axes.plot(*np.stack([end, [*end[:2], floor_mm]]).T, color="0.7", linewidth=0.8, linestyle=":")
    axes.plot(*positions.T, color=color, linewidth=2, zorder=4)
    axes.scatter(*positions[1:].T, color=color, s=10, depthshade=False, zorder=5)
    for frame in np.unique(np.linspace(0, len(positions) - 1, _TRIADS).round().astype(int)):
        for axis, axis_color in enumerate(_AXIS_COLORS):
            tip = positions[frame] + 0.2 * half_side_mm * rotations[frame][:, axis]
            axes.plot(*np.stack([positions[frame], tip]).T, color=axis_color, linewidth=1.6, zorder=6)
    ends = {"depthshade": False, "edgecolor": "black", "zorder": 7}
    axes.scatter(*positions[0], color="white", marker="o", s=70, label="start", **ends)
    axes.scatter(*positions[-1], color=color, marker="s", s=40, label="end", **ends)
    for name, axis_color in zip("xyz", _AXIS_COLORS, strict=True):
        axes.plot([], [], [], color=axis_color, linewidth=1.6, label=f"{name} of the gripper")
    limits = np.stack([middle - half_side_mm, middle + half_side_mm])
    axes.set(xlim=limits[:, 0], ylim=limits[:, 1], zlim=limits[:, 2])
    axes.set(xlabel="x [mm]", ylabel="y [mm]", zlabel="z [mm]")
    axes.set_box_aspect((1, 1, 1), zoom=1.05)
    axes.view_init(elev=24, azim=-50)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_pane_color((0.97, 0.97, 0.98))
    axes.set_title(f"{arm} arm, from its own pose when the image was taken", fontsize=10, color=color)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=8, loc="upper left")


def _draw_curves(panels: list[Any], chunk: ActionChunk) -> None:
    widths, angles, distances = panels
    for arm in ("left", "right"):
        motion = arm_motion(chunk, arm)
        style: dict[str, Any] = {"color": ARM_COLORS[arm], "marker": ".", "markersize": 4, "linewidth": 1.3}
        widths.plot(motion.times_s[1:], motion.widths_mm, label=arm, **style)
        angles.plot(motion.times_s, motion.angles_deg, label=arm, **style)
        distances.plot(motion.times_s, motion.distances_mm, label=arm, **style)
    for limit, name in ((0.0, "closed"), (1e3 * MAX_POLICY_WIDTH, "open")):
        widths.axhline(limit, color="0.6", linewidth=0.8, linestyle="--")
        widths.annotate(name, (0, limit), xytext=(2, 2), textcoords="offset points", fontsize=7, color="0.4")
    low, high = widths.get_ylim()
    widths.set(ylim=(min(low, -5), max(high, 1.12e3 * MAX_POLICY_WIDTH)))
    titles = ("gripper width [mm of the policy gripper]", "rotated by [deg]", "moved by [mm]")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.set(xlabel="time after the image [s]", xlim=(0, CHUNK_LENGTH / chunk.fps))
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
    distances.legend(fontsize=8)
    for panel, least in ((angles, 5.0), (distances, 10.0)):
        panel.set_ylim(0, max(least, panel.get_ylim()[1]))


def _title(chunk: ActionChunk, instruction: str | None, source: str | None) -> str:
    seconds = CHUNK_LENGTH / chunk.fps
    first = f"“{instruction}”" if instruction else f"Answer to observation {chunk.observation_id}"
    # a text between two dollar signs would be read as a formula
    first = first if len(first) <= 110 else first[:107] + "…”"
    below = f"{CHUNK_LENGTH} actions, {seconds:.1f} s"
    return "\n".join([first, f"{source}: {below}" if source else below]).replace("$", r"\$")
