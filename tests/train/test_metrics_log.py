"""The log of a run: what a line holds, what resuming drops, what reaches TensorBoard, W&B and trackio."""

from __future__ import annotations

import json
import math
import struct
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdt2_train.metrics_log import MetricsLog, Resumed, read_log
from rdt2_train.metrics_sinks import TrackioOptions, WandbOptions

from rdt2_jax.errors import DataError, MissingExtraError, Rdt2Error


def plain(out: Path, **choices) -> MetricsLog:
    return MetricsLog(out, tensorboard=False, **choices)


def write_steps(out: Path, steps, start: int | None = None):
    """A run that goes on after step `start` and writes the given ones."""
    with plain(out) as log:
        resumed = None if start is None else log.resume(start)
        for step in steps:
            log.write(step, {"loss": 1 / step, "lr": 1e-4})
    return resumed


def events(folder: Path) -> list[tuple[int, dict[str, float], bool]]:
    """(step, scalars, whether earlier files are forgotten from here) of every event, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found = []
    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content, place = file.read_bytes(), 0
        while place < len(content):  # length, its checksum, record, its checksum
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 16 + length
            scalars = {value.tag: value.simple_value for value in event.summary.value}
            if scalars or event.HasField("session_log"):
                found.append((event.step, scalars, event.HasField("session_log")))
    return found


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    with plain(tmp_path / "new" / "run") as log:
        log.write(1, {"loss": np.float32(0.5), "finite": True, "bytes": 2**40, "norm": jnp.float32(2)})
        lines = log.path.read_text().splitlines()
        log.write(2, {})
    assert lines == ['{"step": 1, "loss": 0.5, "finite": true, "bytes": 1099511627776, "norm": 2.0}']
    assert read_log(tmp_path / "new" / "run" / "log.jsonl")[1] == {"step": 2}


def test_what_is_not_finite_is_null(tmp_path):
    with plain(tmp_path) as log:
        log.write(3, {"a": float("nan"), "b": float("-inf"), "c": np.float32("inf"), "d": 0.0})
    content = (tmp_path / "log.jsonl").read_text()
    assert json.loads(content, parse_constant=pytest.fail) == {"step": 3, "a": None, "b": None, "c": None, "d": 0.0}


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 40))
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path_factory, killed_at, checkpoint, half):
    """Killed after some step, half a line further, and resumed from an earlier checkpoint."""
    total, checkpoint = 12, min(checkpoint, killed_at)
    straight, stopped = tmp_path_factory.mktemp("straight"), tmp_path_factory.mktemp("stopped")
    write_steps(straight, range(1, total + 1))
    write_steps(stopped, range(1, killed_at + 1))
    with (stopped / "log.jsonl").open("ab") as file:
        file.write(json.dumps({"step": killed_at + 1, "loss": 0.123456789, "lr": 1e-4}).encode()[:half])
    resumed = write_steps(stopped, range(checkpoint + 1, total + 1), start=checkpoint)
    assert resumed == Resumed(kept=checkpoint, later=killed_at - checkpoint, damaged=int(half > 0))
    assert (stopped / "log.jsonl").read_bytes() == (straight / "log.jsonl").read_bytes()


def test_a_whole_line_without_its_end_is_kept(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}')
    assert write_steps(tmp_path, [2], start=1) == Resumed(1, 0, 0)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_what_was_dropped_is_said(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    with plain(tmp_path) as log:
        assert str(log.resume(1)) == "1 lines of the log kept, 2 of later steps and 0 half-written ones dropped"


def test_an_interrupted_clean_up_leaves_the_old_log(tmp_path, monkeypatch):
    write_steps(tmp_path, [1, 2, 3])
    before = (tmp_path / "log.jsonl").read_bytes()

    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rdt2_jax.io.files.publish_file", power_cut)
    with pytest.raises(KeyboardInterrupt):
        write_steps(tmp_path, [], start=1)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', "", "[2]", '{"loss": 1.0}', '{"step": true}', "\0\0"])
def test_damage_in_the_middle_is_refused_and_at_the_end_dropped(tmp_path, damage):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with plain(tmp_path) as log, pytest.raises(DataError, match=r"(?s)damaged.*log\.jsonl, line 2"):
        log.resume(1)
    path.write_text(f'{{"step": 1}}\n{damage}\n')
    assert write_steps(tmp_path, [], start=1) == Resumed(1, 0, 1)


def test_lines_of_an_earlier_run_have_to_be_looked_at(tmp_path):
    write_steps(tmp_path, [1, 2])
    with plain(tmp_path) as log, pytest.raises(Rdt2Error, match=r"(?s)lines of an earlier run.*resume"):
        log.write(3, {"loss": 1.0})
    with plain(tmp_path) as log:
        log.resume(2)
        log.write(3, {"loss": 1.0})
        with pytest.raises(Rdt2Error, match="written already"):
            log.resume(2)


@pytest.mark.parametrize("call", [lambda log: log.write(1, {}), lambda log: log.resume(0)])
def test_a_log_has_to_be_open(tmp_path, call):
    log = plain(tmp_path)
    with pytest.raises(Rdt2Error, match="not open"):
        call(log)
    with log:
        pass
    with pytest.raises(Rdt2Error, match="not open"):
        call(log)


@pytest.mark.parametrize("values", [{"step": 1.0}, {"loss": "low"}, {"loss": np.zeros(3)}, {"loss": None}])
def test_values_that_are_no_scalars(tmp_path, values):
    with plain(tmp_path) as log, pytest.raises(DataError, match=r"(?s)step 5.*" + next(iter(values))):
        log.write(5, values)
    assert read_log(log.path) == []


def test_a_full_disk_is_said(tmp_path):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    with plain(tmp_path) as log:
        log._file = Full()  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(Rdt2Error, match=r"(?s)could not be written.*log\.jsonl.*No space left"):
            log.write(1, {"loss": 1.0})


def test_other_processes_do_nothing(tmp_path):
    with MetricsLog(tmp_path / "run", wandb=WandbOptions(project="p"), enabled=False) as log:
        assert log.resume(3) == Resumed(0, 0, 0)
        log.write(4, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_numbers_as_they_are(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5, "finite": True})
        log.write(2, {"loss": float("nan")})
    loss, finite, spoilt = events(tmp_path / "tensorboard")
    assert (loss, finite) == ((1, {"loss": 0.5}, False), (1, {"finite": 1.0}, False))
    assert spoilt[0] == 2
    assert math.isnan(spoilt[1]["loss"])


def test_tensorboard_forgets_what_a_resumed_run_says_again(tmp_path):
    for resume_from, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with MetricsLog(tmp_path) as log:
            log.resume(resume_from)
            for step in steps:
                log.write(step, {"loss": float(step)})
    found = events(tmp_path / "tensorboard")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert found[0] == (1, {}, True)
    assert found[4] == (3, {}, True)
    assert [step for step, scalars, _ in found if scalars] == [1, 2, 3, 3, 4]


class Run:
    """What W&B and trackio return, as far as it is used."""

    def __init__(self, options) -> None:
        self.options, self.logged, self.finished, self.metrics = options, [], False, []

    def log(self, values, step=None) -> None:
        self.logged.append((values, step))

    def define_metric(self, name, step_metric=None) -> None:
        self.metrics.append((name, step_metric))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    """`fake(name)`: a module in the place of a library, and the runs that it began."""

    def install(name):
        runs, module = [], types.ModuleType(name)

        def init(**options):
            runs.append(Run(options))
            return runs[-1]

        module.init = init  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, name, module)
        return runs

    return install


def test_wandb_continues_its_run(tmp_path, fake):
    runs = fake("wandb")
    for resume_from in (0, 1):
        with plain(tmp_path / "apples", wandb=WandbOptions(project="rdt2", mode="offline")) as log:
            log.resume(resume_from)
            log.write(resume_from + 1, {"loss": float("nan"), "lr": 0.5})
    first, second = (run.options for run in runs)
    assert first == second
    assert (first["project"], first["name"], first["mode"], first["resume"]) == ("rdt2", "apples", "offline", "allow")
    assert first["id"] == (tmp_path / "apples" / "wandb_id.txt").read_text()
    ((values, step),) = runs[1].logged
    assert step is None  # W&B's own counter cannot go back
    assert (values["step"], values["lr"], math.isnan(values["loss"])) == (2, 0.5, True)
    assert ("*", "step") in runs[0].metrics
    assert all(run.finished for run in runs)


def test_trackio_is_asked_for_by_its_options(tmp_path, fake):
    runs = fake("trackio")
    with plain(tmp_path, trackio=TrackioOptions(project="rdt2", name="pears")) as log:
        log.write(7, {"loss": 0.25})
    assert runs[0].options == {"project": "rdt2", "name": "pears", "space_id": None, "resume": "allow"}
    assert runs[0].logged == [({"loss": 0.25}, 7)]
    assert runs[0].finished


def fail_in_a_run(log):
    with log:
        log.write(1, {"loss": 1.0})
        raise KeyError


def test_sinks_are_closed_when_training_fails(tmp_path, fake):
    runs = fake("trackio")
    with pytest.raises(KeyError):
        fail_in_a_run(plain(tmp_path, trackio=TrackioOptions(project="p")))
    assert runs[0].finished


@pytest.mark.parametrize(
    ("library", "choices", "remedy"),
    [
        ("tensorboardX", {"tensorboard": True}, r"rdt2-jax\[train\]"),
        ("wandb", {"tensorboard": False, "wandb": WandbOptions(project="p")}, "pip install wandb"),
        ("trackio", {"tensorboard": False, "trackio": TrackioOptions(project="p")}, "pip install trackio"),
    ],
)
def test_a_missing_library_is_named_before_anything_is_written(tmp_path, monkeypatch, library, choices, remedy):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(MissingExtraError, match=rf"(?s){library}.*not installed.*{remedy}"):
        MetricsLog(tmp_path / "run", **choices).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'protobuf'", name="protobuf")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="protobuf"):
        MetricsLog(tmp_path).__enter__()
