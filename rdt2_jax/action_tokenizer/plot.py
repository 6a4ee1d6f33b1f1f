"""The picture of a tokenizer report: chunks before and after, error distributions, codebook use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rdt2_jax.action_tokenizer.report import Reconstruction, TokenizerReport
from rdt2_jax.actions.layout import ACTION_RATE_HZ, ARM_NAMES, POSITION, ROT6D, WIDTH, arm_slice
from rdt2_jax.actions.rotations import matrix_to_rotvec, rot6d_to_matrix
from rdt2_jax.io.files import atomic_write

_AXIS_COLORS = ("#d1495b", "#2e8b57", "#30638e")
_ARM_STYLES = {"right": "-", "left": "--"}
_UNITS = {
    "position_mm": ("position error [mm]", "#30638e"),
    "rotation_deg": ("rotation error [deg]", "#d1495b"),
    "width_mm": ("width error [mm]", "#2e8b57"),
}


def plot_report(reconstruction: Reconstruction, report: TokenizerReport, path: Path) -> None:
    """Writes a PNG: the chunk of median position error above, error distributions and codebook use below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _plot_chunk(axes[0], reconstruction, _median_chunk(reconstruction))
    _plot_errors(axes[1, 0], reconstruction)
    _plot_code_use(axes[1, 1], report)
    _plot_rotation_scatter(axes[1, 2], reconstruction)
    figure.suptitle(f"Action tokenizer on {report.num_chunks} chunks, {reconstruction.tokens.shape[1]} tokens each")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _median_chunk(reconstruction: Reconstruction) -> int:
    error = reconstruction.position_mm.mean(axis=(1, 2))
    return int(np.argsort(error)[len(error) // 2])


def _plot_chunk(axes, reconstruction: Reconstruction, chunk: int) -> None:
    time_s = (np.arange(reconstruction.actions.shape[1]) + 1) / ACTION_RATE_HZ
    curves = {
        "position [mm]": lambda arm: 1e3 * arm[:, POSITION],
        "rotation vector [deg]": lambda arm: np.degrees(matrix_to_rotvec(rot6d_to_matrix(arm[:, ROT6D]))),
        "gripper width [mm]": lambda arm: 1e3 * arm[:, WIDTH],
    }
    for axis, (label, curve) in zip(axes, curves.items(), strict=True):
        for arm in ARM_NAMES:
            true = curve(reconstruction.actions[chunk][:, arm_slice(arm)])
            decoded = curve(reconstruction.decoded[chunk][:, arm_slice(arm)])
            for component in range(true.shape[1]):
                color = _AXIS_COLORS[component]
                name = f"{arm} {'xyz'[component]}" if true.shape[1] == 3 else arm
                axis.plot(time_s, true[:, component], _ARM_STYLES[arm], color=color, linewidth=1, label=name)
                axis.plot(time_s, decoded[:, component], "." if arm == "right" else "x", color=color, markersize=4)
        axis.set(xlabel="time [s]", title=label)
        axis.legend(fontsize=7, ncols=2)
        axis.grid(alpha=0.3)
    axes[0].set_title(f"position [mm], chunk {chunk} (lines: given, marks: decoded)")


def _plot_errors(axis, reconstruction: Reconstruction) -> None:
    for unit, (label, color) in _UNITS.items():
        errors = np.sort(getattr(reconstruction, unit).ravel())
        share = np.linspace(0, 100, len(errors))
        axis.plot(np.maximum(errors, 1e-3), share, color=color, label=label)
    axis.axhline(50, color="0.7", linewidth=0.8)
    axis.set(xscale="log", xlabel="error", ylabel="frames below [%]", title="Error over frames and arms", ylim=(0, 100))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _plot_code_use(axis, report: TokenizerReport) -> None:
    names = [f"{group} {level}" for group, levels in report.code_use.items() for level in range(len(levels))]
    use = [100 * value for levels in report.code_use.values() for value in levels]
    axis.bar(names, use, color="#30638e")
    axis.set(ylabel="codes used [%]", title="Codebook use per level", ylim=(0, 100))
    axis.tick_params(axis="x", rotation=60)


def _plot_rotation_scatter(axis, reconstruction: Reconstruction) -> None:
    rotations = rot6d_to_matrix(
        np.stack([reconstruction.actions[..., arm_slice(arm)][..., ROT6D] for arm in ARM_NAMES], axis=2)
    )
    turned = np.degrees(np.linalg.norm(matrix_to_rotvec(rotations), axis=-1))[:2000]
    axis.plot(turned.ravel(), reconstruction.rotation_deg[:2000].ravel(), ",", color="#d1495b", alpha=0.4)
    axis.set(
        xlabel="true rotation [deg]", ylabel="rotation error [deg]", title="Do small rotations explode?", ylim=(0, None)
    )
    axis.grid(alpha=0.3)
