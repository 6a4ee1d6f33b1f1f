"""The plan: made by all workers, kept episode by episode, continued after a kill, compared when started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from convert_sources import SmallReader, dataset_files
from rdt2_data.converters.convert import convert
from rdt2_data.converters.messages import hidden_text
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.plan import source_settings
from rdt2_data.converters.recording import EpisodeRef, Recording
from rdt2_data.converters.runners import LocalRunner
from rdt2_data.problems import SampleError

from rdt2_jax.errors import DataError

HERE = LocalRunner(workers=1)
TEN = ConvertOptions(name="small", samples_per_shard=10)
STRICT = TEN.model_copy(update={"strict": True})

CHILD = """
import sys, time
from pathlib import Path
from convert_sources import SmallReader
from rdt2_data.converters.convert import convert
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.runners import LocalRunner

class Slow(SmallReader):
    def load(self, episode):
        if not Path(sys.argv[1], "plan.json").exists():
            Path(sys.argv[2], f"{episode.index}-{time.monotonic_ns()}").touch()
            time.sleep(0.01)
        return super().load(episode)

convert(Slow((30,) * 20), sys.argv[1], ConvertOptions(samples_per_shard=80), runner=LocalRunner(workers=1))
"""


def test_a_kill_while_planning_costs_an_episode_at_most(tmp_path: Path) -> None:
    folder, loads = tmp_path / "dataset", tmp_path / "loads"
    loads.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", CHILD, str(folder), str(loads)]
    for wanted in (4, 10):
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 60
        while len(list(loads.iterdir())) < wanted:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "plan.json").exists()
        with open(folder / "plan.partial.jsonl", "ab") as file:
            file.write(b'{"episode": {"name": "episode_3')  # a line that was cut off
    subprocess.run(command, env=environment, check=True)
    assert 20 <= len(list(loads.iterdir())) <= 22
    assert len({path.name.split("-")[0] for path in loads.iterdir()}) == 20
    assert not (folder / "plan.partial.jsonl").exists()
    options = ConvertOptions(samples_per_shard=80)
    convert(SmallReader((30,) * 20), tmp_path / "undisturbed", options, runner=HERE)
    assert dataset_files(folder) == dataset_files(tmp_path / "undisturbed")


@dataclass(frozen=True)
class StoppingReader(SmallReader):
    """Fails at an episode."""

    stop: int = -1
    lists: str = ""

    def episodes(self) -> list[EpisodeRef]:
        if self.lists:
            with open(self.lists, "a") as file:
                file.write("listed\n")
        return super().episodes()

    def load(self, episode: EpisodeRef) -> Recording:
        if episode.index == self.stop:
            raise RuntimeError("no more")
        return super().load(episode)

    def fingerprint(self) -> str:
        return f"version {self.version}"


def test_planned_episodes_count_only_for_the_same_source_and_options(tmp_path: Path) -> None:
    reader, folder = StoppingReader((40, 40, 40), stop=2), tmp_path / "dataset"
    with pytest.raises(DataError, match="episode episode_2 could not be planned") as caught:
        convert(reader, folder, TEN, runner=HERE)
    assert "RuntimeError: no more" in str(caught.value)
    assert len((folder / "plan.partial.jsonl").read_text().splitlines()) == 3
    with pytest.raises(DataError, match="episode_0 could not be planned"):  # planned anew: another source
        convert(replace(reader, version="2", stop=0), folder, TEN, runner=HERE)
    with pytest.raises(DataError, match="episode_2 could not be planned"):
        convert(reader, folder, TEN, runner=HERE)
    # Episode 0 cannot be read any more, but it is planned; its shard then fails.
    with pytest.raises(DataError, match="of 5 shards could not be made"):
        convert(replace(reader, stop=0), folder, TEN, runner=HERE)
    assert convert(replace(reader, stop=-1), folder, TEN, runner=HERE).samples == 48


def test_the_episodes_are_listed_once(tmp_path: Path) -> None:
    reader = StoppingReader((40, 40, 40), lists=str(tmp_path / "lists"))
    convert(reader, tmp_path / "dataset", TEN, runner=LocalRunner(workers=2))
    assert (tmp_path / "lists").read_text() == "listed\n"


@dataclass(frozen=True)
class WordyReader(SmallReader):
    """Every episode has a sentence of its own and a path in its problem."""

    home: str = "/recordings"

    def load(self, episode: EpisodeRef) -> Recording:
        if episode.index == 1:
            raise SampleError("bad-recording", where=f"{self.home}/cups/1.bin", found=f"{self.home}/cups/1.bin is cut")
        recording = super().load(episode)
        return replace(recording, instructions=[(0.0, f"Do {episode.index}."), (1e6, "Never said.")])


def test_a_shard_is_told_only_the_sentences_it_needs_and_paths_are_relative(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    report = convert(WordyReader((40, 40, 40)), folder, TEN, runner=HERE, hide="/recordings")
    assert json.loads((folder / "instructions.json").read_text()) == {"0": "Do 0.", "1": "Do 2."}
    plan = json.loads((folder / "plan.json").read_text())
    assert [episode["instructions"] for episode in plan["episodes"]] == [[0], [], [1]]
    assert "cups/1.bin: a recording cannot be read, found cups/1.bin is cut" in report.problems.text()
    assert not [path for path in folder.rglob("*.json") if "/recordings" in path.read_text()]


@pytest.mark.parametrize(
    ("text", "hide", "expected"),
    [
        ("/a/b.bag: bad", "/a", "b.bag: bad"),
        ("found '/a/b' and (/a/c)", "/a", "found 'b' and (c)"),
        ("/x/a/b and ./a/b and m/a/s", "/a", "/x/a/b and ./a/b and m/a/s"),
        ("/ab/c", "/a", "/ab/c"),
        ("/cups.bag: 3/4 of /right/pose", "/", "/cups.bag: 3/4 of /right/pose"),
        ("/a/b", "", "/a/b"),
        ("/a.b/c and /aXb/c", "/a.b", "c and /aXb/c"),
    ],
)
def test_only_leading_paths_are_hidden(text: str, hide: str, expected: str) -> None:
    assert hidden_text(text, hide) == expected


# ------------------------------------------------------------------------------------------ comparing


@dataclass(frozen=True)
class SettledReader(SmallReader):
    """Names its options."""

    fps: float = 30.0
    file: str = ""

    def settings(self) -> dict[str, Any]:
        return {"fps": self.fps, "file": self.file, "nested": {"deep": [self.file]}}

    def fingerprint(self) -> str:
        return self.version


def test_what_differs_is_named(tmp_path: Path) -> None:
    (tmp_path / "videos.json").touch()
    reader, folder = SettledReader((40,), file=str(tmp_path / "videos.json")), tmp_path / "dataset"
    convert(reader, folder, TEN, settings={"format": "small"}, runner=HERE)
    settings = json.loads((folder / "plan.json").read_text())["source"]["settings"]
    assert settings == {"format": "small", "fps": 30.0, "file": "videos.json", "nested": {"deep": ["videos.json"]}}
    with pytest.raises(DataError) as caught:
        convert(replace(reader, fps=25.0, version="2"), folder, TEN, settings={"format": "small"}, runner=HERE)
    assert "settings.fps: 30.0 before, 25.0 now" in str(caught.value)
    assert "the files of the source have changed" in str(caught.value)
    assert "file:" not in str(caught.value)


def test_settings_below_the_source_keep_their_place(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    given = {"a": tmp_path / "deep", "b": "/right/pose", "c": 3}
    assert source_settings(given, str(tmp_path.parent)) == {"a": f"{tmp_path.name}/deep", "b": "/right/pose", "c": 3}


def test_a_plan_of_another_release_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    convert(SmallReader((40,)), folder, TEN, runner=HERE)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, "version": 1}))
    with pytest.raises(DataError, match="another release"):
        convert(SmallReader((40,)), folder, TEN, runner=HERE)


# --------------------------------------------------------------------------------------------- strict


def test_strict_sees_problems_that_an_earlier_start_kept_in_its_plan(tmp_path: Path) -> None:
    reader, folder = WordyReader((40, 40)), tmp_path / "dataset"
    convert(reader, folder, TEN, runner=HERE)
    files = dataset_files(folder)
    with pytest.raises(DataError, match="an earlier start without --strict") as caught:
        convert(reader, folder, STRICT, runner=HERE)
    assert "cups/1.bin" in str(caught.value)
    assert dataset_files(folder) == files


def test_strict_sees_problems_of_finished_shards_and_of_half_a_plan(tmp_path: Path) -> None:
    reader, folder = SmallReader((40,), unreadable=(3,)), tmp_path / "dataset"
    convert(reader, folder, TEN, runner=HERE)
    with pytest.raises(DataError, match="1 x corrupt-jpeg"):
        convert(reader, folder, STRICT, runner=HERE)

    @dataclass(frozen=True)
    class Half(WordyReader):
        def load(self, episode: EpisodeRef) -> Recording:
            if episode.index == 2:
                raise RuntimeError("no more")
            return super().load(episode)

    with pytest.raises(DataError, match="episode_2"):
        convert(Half((40, 40, 40)), tmp_path / "half", TEN, runner=HERE)
    with pytest.raises(DataError, match="1 x bad-recording"):
        convert(Half((40, 40, 40)), tmp_path / "half", STRICT, runner=HERE)
