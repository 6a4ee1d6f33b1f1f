"""The house rules that a machine can check."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rdt2_jax", "data/rdt2_data", "train/rdt2_train", "hardware/rdt2_hardware", "sim/rdt2_sim")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_constraints_are_plain_pins():
    """Hash-free, no index, no local path: a host name there would follow every user."""
    lines = (ROOT / "constraints.txt").read_text().split("\n")
    pins = [line for line in lines if line.strip()]
    assert len(pins) > 50
    for line in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!_]+", line), line


def test_constraints_cover_what_is_asked_for():
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(d for extra in ("model", "data", "convert", "ray", "train", "sim", "view", "dev") for d in extras[extra]),
    ]
    names = {re.split(r"[\[<>=!~ ]", name)[0].lower().replace("_", "-") for name in wanted} - {"rdt2-jax"}
    assert names <= pinned, names - pinned


def test_extras():
    extras = pyproject()["project"]["optional-dependencies"]
    expected = "model data convert ray train sim ur5e fr3 camera tracker view tpu cuda12 all dev"
    assert set(extras) == set(expected.split())


def test_doctor_knows_every_extra():
    from rdt2_jax.commands.doctor import _EXTRAS

    assert set(_EXTRAS) == set(pyproject()["project"]["optional-dependencies"]) - {"all"}


def test_every_room_of_the_model_is_open_or_closed_to_the_robot_side():
    """A contract that forbids by name forgets what comes later: every room must be listed, or known to be light."""
    light = {"actions", "fisheye", "io", "errors", "config", "cli", "commands", "progress", "__main__", "__init__"}
    contract = (ROOT / ".importlinter").read_text().split("contract:hardware]")[1].split("[importlinter")[0]
    closed = set(re.findall(r"rdt2_jax\.(\w+)", contract))
    rooms = {
        path.stem for path in (ROOT / "rdt2_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms == closed | light


def test_every_command_loads():
    points = entry_points(group="rdt2.commands")
    assert {point.name for point in points} == set(pyproject()["project"]["entry-points"]["rdt2.commands"])
    for point in points:
        assert isinstance(point.load(), click.Command)


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("rdt2_jax.actions", ("jax", "flax", "mujoco")),
        ("rdt2_jax.io.torch_archive", ("jax", "torch")),
        ("rdt2_hardware", ("jax", "flax", "mujoco", "rdt2_jax.params")),
    ],
)
def test_light_rooms_stay_light(package, absent):
    code = f"import sys, {package}; print([m for m in {absent!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_partition_specs_live_in_one_file():
    users = [path.name for path in SOURCES if "PartitionSpec" in path.read_text()]
    assert users == ["sharding.py"]


def test_no_torch_at_runtime():
    for path in SOURCES:
        assert not re.search(r"^\s*(import|from) torch\b", path.read_text(), re.MULTILINE), path


def test_files_have_docstrings_and_one_noun():
    for path in SOURCES:
        text = path.read_text()
        assert text.startswith('"""'), path
        assert len(text.splitlines()) <= 420, f"{path} has grown; which two things does it hold?"


def test_documented_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for document in ("README.md", "WORKSPACE.md"):
        mentioned = set(re.findall(r"`?make ([a-z-]+)", (ROOT / document).read_text()))
        assert mentioned <= targets, mentioned - targets


def test_continuous_integration_runs_the_readme_command():
    assert "make check" in (ROOT / ".ci" / "run").read_text()


def test_ignore_patterns_are_anchored():
    """An unanchored `data/` would drop the package rdt2_data from the wheel."""
    for line in (ROOT / ".gitignore").read_text().split():
        assert "/" not in line.strip("/") or line.startswith("/"), line
        assert line.strip("/") not in ("data", "sim", "train", "hardware"), line
