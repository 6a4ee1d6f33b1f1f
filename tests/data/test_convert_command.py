"""`rdt2 data convert` as a command, and Ray beside the pool of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner, Result
from convert_sources import dataset_files, small_image
from rdt2_data.converters.commands import convert
from rdt2_data.problems import SampleError

from rdt2_jax.errors import ConfigError, DataError, Rdt2Error

RAY = """
import os, sys
from contextlib import contextmanager
from convert_sources import SmallReader
from rdt2_data.converters.convert import convert
from rdt2_data.converters.options import ConvertOptions
from rdt2_data.converters.runners import LocalRunner, RayRunner
from rdt2_jax.errors import DataError

folder, options = sys.argv[1], ConvertOptions(name="small", samples_per_shard=10)

class Failing(SmallReader):
    def load(self, episode):
        if episode.index == 2 and os.path.exists(folder + "/flag"):
            raise RuntimeError("the disk is on fire")
        return super().load(episode)

class PlanOnly:
    @contextmanager
    def start(self, shared):
        def run(jobs):
            for job in jobs:
                if job.name.startswith("shard"):
                    raise DataError("no place to run")
                yield job, job.perform(shared)
        yield run

def fails(runner):
    try:
        convert(reader, folder + "/ray", options, runner=runner)
    except DataError as error:
        return str(error)
    raise SystemExit("it should fail")

reader = Failing((40, 20, 28, 40), unreadable=(3,))
fails(PlanOnly())
open(folder + "/flag", "w").close()
message = fails(RayRunner(workers=2))
assert "1 of 4 shards could not be made" in message and "shard-000001: RuntimeError: the disk" in message, message
assert sum(name.endswith(".tar") for name in os.listdir(folder + "/ray")) == 3
import ray
assert not ray.is_initialized()
os.remove(folder + "/flag")
convert(reader, folder + "/ray", options, runner=LocalRunner(workers=1))
convert(reader, folder + "/local", options, runner=LocalRunner(workers=1))
"""


def run(*arguments: Any) -> Result:
    """Errors of ours come out as they are."""
    return CliRunner().invoke(convert, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replay buffer of two episodes, the second with a black image."""
    path = tmp_path_factory.mktemp("umi") / "buffer.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=2)
    generator = np.random.default_rng(0)
    for number in (0, 1):
        images = np.stack([small_image(number, row, (96, 96)) for row in range(70)])
        images[40] = 0
        arrays = {
            f"data/robot{number}_eef_pos": generator.uniform(-0.5, 0.5, (70, 3)),
            f"data/robot{number}_eef_rot_axis_angle": generator.normal(size=(70, 3)),
            f"data/robot{number}_gripper_width": generator.uniform(0, 0.088, (70, 1)),
            f"data/camera{number}_rgb": images,
        }
        for name, array in arrays.items():
            group.create_array(name, shape=array.shape, dtype=array.dtype)[:] = array
    group.create_array("meta/episode_ends", shape=(2,), dtype=np.int64)[:] = [30, 70]
    return path


def arguments(source: Path, destination: Path, *more: Any) -> list[Any]:
    return [
        "--from",
        "umi-zarr",
        source,
        destination,
        "--instruction",
        "Pick up the cup.",
        "--fps",
        30,
        "--workers",
        1,
        *more,
    ]


def test_text_and_json(source: Path, tmp_path: Path) -> None:
    result = run(*arguments(source, tmp_path / "cups", "--samples-per-shard", 8))
    assert result.exit_code == 0
    assert "21 samples in 3 shards" in result.output
    assert "left out: 48 frames after the last pose or width" in result.output
    assert "1 x blank-image" in result.output
    assert "note: " not in result.output  # the images are square
    again = run(*arguments(source, tmp_path / "cups", "--samples-per-shard", 8, "--json"))
    report = json.loads(again.stdout)
    assert (report["samples"], report["planned"], report["made"]) == (21, 22, 0)
    assert report["problems"]["reasons"]["blank-image"]["count"] == 1
    assert json.loads((tmp_path / "cups" / "manifest.json").read_text())["options"]["name"] == "cups"


def test_options_reach_the_dataset(source: Path, tmp_path: Path) -> None:
    more = ["--every", 2, "--at-end", "hold", "--crop-rows", "0:48", "--jpeg-quality", 50, "--name", "half"]
    result = run(*arguments(source, tmp_path / "out", *more, "--normalizer-path", "norm.pt", "--fps", 60, "--json"))
    assert json.loads(result.stdout)["samples"] == 34
    options = json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]
    assert (options["name"], options["images"]["crop_rows"], options["images"]["jpeg_quality"]) == ("half", [0, 48], 50)
    assert "normalizer_path: norm.pt" in (tmp_path / "out" / "dataset.yaml").read_text()
    with pytest.raises(DataError, match=r"options\.chunks\.every: 2 before, 1 now"):
        run(*arguments(source, tmp_path / "out"))


def test_strict_stops_and_also_sees_what_an_earlier_start_counted(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="every pixel is"):
        run(*arguments(source, tmp_path / "one", "--strict"))
    run(*arguments(source, tmp_path / "one"))
    with pytest.raises(DataError, match="an earlier start without --strict") as caught:
        run(*arguments(source, tmp_path / "one", "--strict"))
    assert "1 x blank-image" in str(caught.value)


def test_verify_finds_shards_that_have_changed(source: Path, tmp_path: Path) -> None:
    run(*arguments(source, tmp_path / "out"))
    with open(tmp_path / "out" / "shard-000000.tar", "r+b") as file:
        file.seek(5000)
        file.write(b"rust")
    for more, made in (([], 0), (["--verify"], 1)):
        result = run(*arguments(source, tmp_path / "out", "--json", *more))
        assert json.loads(result.stdout)["made"] == made


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--mapping", "x.yaml"], "--mapping belongs to --from lerobot or rosbag"),
        (["--robot", "fr3"], "--robot belongs to --from episodes"),
        (["--tokenizer-normalizer", __file__], "needs --tokenizer"),
        (["--ray-address", "auto"], "needs --runner ray"),
        (["--crop-rows", "10:5"], "no range such as 61:1057"),
        (["--crop-columns", "all"], "no range such as 61:1057"),
        (["--every", "0"], "--every"),
        (["--max-gap", "0"], "--max-gap"),
        (["--pose-latency", "-0.1"], "--pose-latency"),
        (["--videos", "missing.json"], "does not exist"),
    ],
)
def test_wrong_options_are_explained(source: Path, tmp_path: Path, more: list[str], named: str) -> None:
    result = run(*arguments(source, tmp_path / "out", *more))
    assert result.exit_code == 2
    assert named in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_wrong_values_and_places(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="camera_s"):
        run(*arguments(source, tmp_path / "out", "--camera-latency", "nan"))
    with pytest.raises(DataError, match="no such replay buffer"):
        run(*arguments(tmp_path / "missing", tmp_path / "out"))
    with pytest.raises(DataError, match="holds no instructions"):
        run("--from", "umi-zarr", source, tmp_path / "out", "--fps", 30)
    (tmp_path / "file").touch()
    with pytest.raises(Rdt2Error, match="cannot be created"):
        run(*arguments(source, tmp_path / "file" / "out"))
    assert run(*arguments(source, tmp_path / "out", "--camera-latency", "-1")).exit_code == 2
    assert run(source, tmp_path / "out").exit_code == 2


def test_the_help_lists_options_under_headings() -> None:
    text = run("--help").output
    headings = ["Source:", "Samples:", "Images:", "Action tokens:", "Dataset:", "Work:"]
    positions = [text.index(heading) for heading in headings]
    assert positions == sorted(positions)
    assert text.index("Images:") < text.index("--jpeg-quality") < text.index("Action tokens:")


def test_the_module_of_the_command_is_light() -> None:
    code = "import sys, rdt2_data.converters.commands; print([m for m in ('numpy', 'jax', 'zarr') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert result.stdout.strip() == "[]"


def test_ray_makes_the_same_bytes_and_names_what_fails(tmp_path: Path) -> None:
    """In a process of its own: Ray leaves threads and signal handlers behind."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", RAY, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, check=False, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert dataset_files(tmp_path / "ray") == dataset_files(tmp_path / "local")
