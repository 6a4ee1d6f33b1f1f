"""The command line: lazy, helpful, readable by machines, and never half done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from rdt2_jax import cli
from rdt2_jax.errors import MissingExtraError, Rdt2Error

HEAVY = ("jax", "mujoco", "transformers", "flax", "orbax", "torch", "matplotlib")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["tokenizer", "--help"], ["tokenizer", "train", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys\nfrom rdt2_jax.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('loaded:', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = run_python(code)
    assert "loaded: []" in out
    assert "Usage: rdt2" in out


def test_importing_the_package_loads_nothing_heavy():
    assert run_python(f"import sys, rdt2_jax; print([m for m in {HEAVY!r} if m in sys.modules])").strip() == "[]"


def invoke(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rdt2_jax", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_help_lists_commands_of_every_package():
    out = invoke("--help").stdout
    for name in ("doctor", "tokenizer", "data"):
        assert name in out
    assert "train" in invoke("tokenizer", "--help").stdout


def test_unknown_command():
    result = invoke("tokenise")
    assert result.returncode == 2
    assert "No such command" in result.stderr


def test_doctor_json_is_complete():
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["devices"]["devices"]
    assert report["extras"]["model"]["missing"] == []
    for extra in report["extras"].values():
        assert (extra["fix"] is None) == (not extra["missing"])
    assert set(report["renderers"]) == {"egl", "osmesa"}


def test_doctor_names_what_a_missing_extra_would_add(monkeypatch):
    from rdt2_jax.commands import doctor

    installed = doctor._installed_version
    monkeypatch.setattr(doctor, "_installed_version", lambda name: None if name == "ur-rtde" else installed(name))
    result = CliRunner().invoke(doctor.doctor, [], terminal_width=200)
    assert result.exit_code == 0
    assert "ur-rtde" in result.output
    assert "rdt2-jax[ur5e]" in "".join(result.output.split())


def test_missing_library_names_the_extra():
    with pytest.raises(MissingExtraError, match=r"rdt2-jax\[train\]"), cli.needs_libraries("training"):
        raise ModuleNotFoundError("No module named 'optax'", name="optax")


def test_other_import_errors_are_not_disguised():
    with pytest.raises(ModuleNotFoundError), cli.needs_libraries("training"):
        raise ModuleNotFoundError("No module named 'rdt2_oops'", name="rdt2_oops")


class Point:
    """The part of importlib's EntryPoint that the command line uses."""

    def __init__(self, name, command):
        self.name, self.command, self.value = name, command, "somewhere:something"

    def load(self):
        return self.command


def test_commands_are_attached_to_groups_by_name():
    root, group, inner = click.Group("root"), click.Group("group"), click.Command("inner")
    cli._attach_commands(root, [Point("group.inner", inner), Point("group", group)])
    assert root.commands["group"].commands["inner"] is inner


@pytest.mark.parametrize("status", [0, 1, 3])
def test_a_command_may_end_with_a_status_of_its_own(monkeypatch, status):
    @click.command()
    def ending() -> None:
        raise click.exceptions.Exit(status)

    monkeypatch.setitem(cli.rdt2.commands, "ending", ending)
    with pytest.raises(SystemExit) as end:
        cli.main(["ending"])
    assert end.value.code == status


def test_two_commands_of_one_name_are_an_error():
    root = click.Group("root")
    cli._attach_commands(root, [Point("one", click.Command("one"))])
    with pytest.raises(Rdt2Error, match="two packages contribute"):
        cli._attach_commands(root, [Point("one", click.Command("other"))])


def test_a_command_that_cannot_be_imported_is_named():
    class Broken(Point):
        def load(self):
            raise ImportError("no module rdt2_gone")

    with pytest.raises(Rdt2Error, match=r"(?s)entry point broken.*rdt2_gone"):
        cli._attach_commands(click.Group("root"), [Broken("broken", None)])


def test_a_command_without_its_group_is_an_error():
    with pytest.raises(Rdt2Error, match="group that does not exist"):
        cli._attach_commands(click.Group("root"), [Point("nowhere.inner", click.Command("inner"))])


def test_json_has_null_for_not_a_number(capsys):
    cli.print_json({"a": float("nan"), "b": np.float32(2), "c": np.array([1, 2])})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": 2.0, "c": [1, 2]}


@pytest.fixture(scope="module")
def chunks_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chunks") / "chunks.npy"
    assert invoke("data", "synthesize", "--chunks", 40, "--out", path).returncode == 0
    return path


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return Path(__file__).parents[2] / "assets" / "tokenizer_small"


class TestTokenizerCommands:
    def test_encode_then_decode(self, chunks_file, checkpoint, tmp_path):
        tokens, decoded = tmp_path / "tokens.npy", tmp_path / "decoded.npy"
        result = invoke(
            "tokenizer", "encode", "--checkpoint", checkpoint, "--in", chunks_file, "--out", tokens, "--json"
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["shape"] == [40, 27]
        assert np.load(tokens).dtype == np.int16
        result = invoke("tokenizer", "decode", "--checkpoint", checkpoint, "--in", tokens, "--out", decoded)
        assert result.returncode == 0, result.stderr
        error = np.abs(np.load(decoded) - np.load(chunks_file))
        assert np.median(error[..., [0, 1, 2, 10, 11, 12]]) < 0.005

    def test_check_reports_and_draws(self, chunks_file, checkpoint, tmp_path):
        plot = tmp_path / "check.png"
        result = invoke(
            "tokenizer", "check", "--checkpoint", checkpoint, "--actions", chunks_file, "--plot", plot, "--json"
        )
        report = json.loads(result.stdout)
        assert report["num_chunks"] == 40
        assert result.returncode == (0 if report["fits"] else 1)
        assert plot.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda p: None, "no such file"),
            (lambda p: p.write_bytes(b"not numpy"), "not a readable .npy file"),
            (lambda p: np.save(p, np.zeros((3, 24, 19), np.float32)), "not an array of action chunks"),
            (lambda p: np.save(p, np.zeros((0, 24, 20), np.float32)), "at least one chunk"),
            (lambda p: np.save(p, np.full((2, 24, 20), np.nan, np.float32)), "finite|NaN|nan"),
            (lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "not a readable .npy file"),
        ],
    )
    def test_bad_chunks_leave_nothing_behind(self, tmp_path, checkpoint, make, message):
        source, target = tmp_path / "in.npy", tmp_path / "out.npy"
        make(source)
        result = invoke("tokenizer", "encode", "--checkpoint", checkpoint, "--in", source, "--out", target)
        assert result.returncode == 2
        assert str(source) in result.stderr
        assert any(part in result.stderr for part in message.split("|")), result.stderr
        assert "Traceback" not in result.stderr
        assert [f.name for f in tmp_path.iterdir()] in ([], ["in.npy"])

    def test_tokens_out_of_range(self, tmp_path, checkpoint):
        np.save(tmp_path / "in.npy", np.full((2, 27), -1, np.int16))
        result = invoke(
            "tokenizer",
            "decode",
            "--checkpoint",
            checkpoint,
            "--in",
            tmp_path / "in.npy",
            "--out",
            tmp_path / "out.npy",
        )
        assert result.returncode == 2
        assert "invalid gripper" in result.stderr
        assert not (tmp_path / "out.npy").exists()

    def test_missing_checkpoint(self, tmp_path, chunks_file):
        result = invoke(
            "tokenizer", "encode", "--checkpoint", tmp_path, "--in", chunks_file, "--out", tmp_path / "out.npy"
        )
        assert result.returncode == 2
        assert "config.json and model.safetensors" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["data", "synthesize", "--seed", "-1", "--out", "x.npy"], "--seed"),
            (["tokenizer", "train", "--out", __file__], "is a file"),
            (["tokenizer", "train", "--out", "run", "seed=-1"], "'seed'"),
            (
                ["tokenizer", "encode", "--checkpoint", __file__, "--in", "x", "--out", "y"],
                "no tokenizer configuration",
            ),
        ],
    )
    def test_wrong_values_give_no_traceback(self, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        result = invoke(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert list(tmp_path.iterdir()) == []

    def test_check_of_a_single_number(self, tmp_path, checkpoint):
        np.save(tmp_path / "in.npy", np.float32(1))
        result = invoke("tokenizer", "check", "--checkpoint", checkpoint, "--actions", tmp_path / "in.npy")
        assert result.returncode == 2
        assert "not an array of action chunks" in result.stderr

    def test_unknown_override(self, tmp_path):
        result = invoke("tokenizer", "train", "--out", tmp_path / "run", "batchsize=3")
        assert result.returncode == 2
        assert "did you mean 'batch_size'" in result.stderr
        assert not (tmp_path / "run").exists()
