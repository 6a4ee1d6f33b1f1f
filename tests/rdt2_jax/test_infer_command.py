"""`rdt2 infer`: from files to a chunk, for people and for machines, and one clear error for whatever is wrong."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_policy
from click.testing import CliRunner, Result
from PIL import Image
from qwen_vocabulary import byte_ranks, tokenizer_json

from rdt2_jax.action_expert.checkpoint import save_expert
from rdt2_jax.action_tokenizer.checkpoint import save_tokenizer
from rdt2_jax.actions.types import ActionChunk, Observation
from rdt2_jax.cli import main
from rdt2_jax.commands import infer as infer_command
from rdt2_jax.commands.infer import infer
from rdt2_jax.errors import ConfigError, DataError, Rdt2Error
from rdt2_jax.policy import load_policy, random_weights
from rdt2_jax.policy.image_files import read_wrist_image
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.policy.results import InvalidGeneration
from rdt2_jax.qwen2_5_vl.flax_module import Qwen25VL
from rdt2_jax.qwen2_5_vl.processor import to_published

STAGES = {
    "vq": ["processor", "vision", "prefill", "decode", "detokenise", "total", "call"],
    "fm": ["processor", "vision", "prefill", "expert", "detokenise", "total", "call"],
    "one-step": ["processor", "vision", "prefill", "expert", "detokenise", "total", "call"],
}
INSTRUCTION = "Pick up the apple."
LENGTHS = (64, 80)


@pytest.fixture(scope="module", autouse=True)
def shared_policies() -> Iterator[None]:
    """A policy is made where choices are new, and taken again for the same ones; images are a few tokens.

    Policies with images of the published size are run in `policy/test_random_weights.py`.
    """
    published = random_weights.random_policy

    @functools.cache
    def make(*choices: Any, options: PolicyOptions, **others: Any) -> Any:
        return published(*choices, **others, options=options.model_copy(update={"prompt_lengths": LENGTHS}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_weights, "PUBLISHED", small_policy.SMALL_IMAGES)
        patch.setattr(random_weights, "random_policy", make)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """left.png, right.jpg; wide.png of another size; what is no image."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, size in (("left.png", (384, 384)), ("right.jpg", (384, 384)), ("wide.png", (480, 640))):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "text.png").write_text("no image")
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(infer, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def random_run(kind: str, *arguments: Any, instruction: str = INSTRUCTION) -> Result:
    return run(kind, "--random-weights", "tiny", "--instruction", instruction, *arguments)


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def error_of(result: Result) -> str:
    assert isinstance(result.exception, Rdt2Error), (result.output, result.exception)
    return str(result.exception)


@pytest.mark.parametrize("kind", ["vq", "fm", "one-step"])
def test_end_to_end(kind, images, tmp_path):
    told = document(
        random_run(
            kind,
            *("--left", images / "left.png", "--right", images / "right.jpg", "--repeat", 2, "--json"),
            *("--out", tmp_path / "chunk.json"),
        )
    )
    assert (told["policy"], told["valid"], told["platform"]) == (kind, True, "cpu")
    assert list(told["latency_ms"]) == STAGES[kind]
    for stage, times in told["latency_ms"].items():
        assert 0 < times["min"] <= times["median"] <= times["max"], stage
    assert told["advice"] == {"corrected": None, "reasons": [], "tasks": []}
    assert set(told["summary"]) == {"right", "left"}
    written = json.loads((tmp_path / "chunk.json").read_text())
    assert (written["policy"], written["instruction"], written["fps"]) == (kind, INSTRUCTION, 30)
    assert len(written["layout"]) == 20
    assert written["layout"][0] == "right x_m"
    assert {key: written[key] for key in told["chunk"]} == told["chunk"]
    chunk = ActionChunk(
        actions=np.asarray(written["actions"], np.float32),
        **{key: written[key] for key in ("anchor_time_s", "capture_time_s", "observation_id", "fps")},
    )
    final_mm = 1e3 * np.linalg.norm(chunk.actions[-1, 10:13])
    assert told["summary"]["left"]["moved_mm"] == pytest.approx(final_mm, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["chunk.json"]


def test_text_for_people(tmp_path):
    result = random_run("fm", "--out", tmp_path / "chunk.npy", instruction="pick up the apple")
    assert result.exit_code == 0, result.output
    for part in ("policy fm", "expert", "total", "compiles", "right arm:", "left arm:", "mm", "deg", "chunk.npy"):
        assert part in result.stdout, part
    assert "Tokens" not in result.stdout
    for part in ("grey noise", "means nothing", "capital letter", 'write: "Pick up the apple."'):
        assert part in result.stderr, part
        assert part not in result.stdout
    actions = np.load(tmp_path / "chunk.npy")
    assert (actions.dtype, actions.shape) == (np.float32, (24, 20))


def test_advice_for_machines():
    told = document(random_run("one-step", "--json", instruction="pick up the apple and then put it down"))
    assert told["advice"]["corrected"] is None
    assert told["advice"]["tasks"] == ["Pick up the apple.", "Put it down."]
    # advised, not changed
    assert told["instruction"] == "pick up the apple and then put it down"


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "noise.npy"
    np.save(path, np.random.default_rng(5).standard_normal((24, 20)))
    return path


def actions_of(*arguments: Any) -> np.ndarray:
    return np.asarray(document(random_run(*arguments, "--json"))["chunk"]["actions"])


def test_noise_and_seed_are_reproducible(noise, tmp_path):
    one, two = actions_of("fm", "--noise", noise), actions_of("fm", "--noise", noise, "--repeat", 2)
    np.testing.assert_array_equal(one, two)
    np.save(tmp_path / "batch.npy", np.load(noise)[None].astype(np.float32))
    np.testing.assert_array_equal(one, actions_of("fm", "--noise", tmp_path / "batch.npy"))
    drawn = actions_of("fm")
    np.testing.assert_array_equal(drawn, actions_of("fm"))
    assert np.abs(drawn - one).max() > 1e-3
    assert np.abs(drawn - actions_of("fm", "--seed", 1)).max() > 1e-3


def test_state_jpeg_and_eight_bits_change_the_answer(noise, images, tmp_path):
    np.save(tmp_path / "state.npy", np.linspace(-1, 1, 20))
    shared = ("fm", "--noise", noise, "--left", images / "left.png", "--right", images / "right.jpg")
    plain = actions_of(*shared)
    np.testing.assert_array_equal(plain, actions_of(*shared, "--no-jpeg"))  # published: flow policies see no JPEG
    for option in (("--state", tmp_path / "state.npy"), ("--jpeg-quality", 5), ("--int8",)):
        changed = np.abs(actions_of(*shared, *option) - plain).max()
        assert 1e-7 < changed < 1, option


def test_tokens_are_shown():
    told = document(random_run("vq", "--show-tokens", "--json"))
    tokens = told["tokens"]
    assert [token["group"] for token in tokens] == ["pos"] * 18 + ["rot"] * 6 + ["grip"] * 3
    assert [(token["latent"], token["level"]) for token in tokens[4:8]] == [(0, 4), (0, 5), (1, 0), (1, 1)]
    for token in tokens:
        assert token["token_id"] == 151642 - token["token"]
        assert 0 <= token["token"] < 1024
        assert 0 < token["probability"] <= 1
        assert 0 <= token["stop_probability"] < 1
    table = random_run("vq", "--show-tokens").stdout
    for part in ("pos", "rot", "grip", "level 5", f"{tokens[0]['token']} ", f"{tokens[26]['token']} "):
        assert part in table


def test_no_chunk_is_said_and_not_written(tmp_path):
    """Random weights say anything but action tokens when they are free to."""
    arguments = ("vq", "--free", "--out", tmp_path / "chunk.npy", "--plot", tmp_path / "chunk.png")
    result = random_run(*arguments)
    assert result.exit_code == 3
    assert "generated no chunk" in result.stderr
    assert "nothing was written" in result.stderr
    told = random_run(*arguments, "--json")
    assert told.exit_code == 3
    found = json.loads(told.stdout)
    assert (found["valid"], found["chunk"]) == (False, None)
    assert found["invalid"]["reason"]
    assert found["invalid"]["tokens"]
    assert set(found["invalid"]) >= {"reason", "tokens", "num_tokens_before_end", "foreign_ids"}
    assert set(found["invalid"]) <= set(InvalidGeneration.__dataclass_fields__)
    assert list(tmp_path.iterdir()) == []


class TestImages:
    def test_other_sizes_are_refused_or_scaled_on_request(self, images):
        arguments = ("fm", "--left", images / "wide.png", "--right", images / "right.jpg")
        message = error_of(random_run(*arguments))
        for part in ("wide.png", "384 x 384", "640 x 480", "--resize"):
            assert part in message
        result = random_run(*arguments, "--resize")
        assert result.exit_code == 0
        assert "scaled from 640 x 480" in result.stderr
        assert "right.jpg" not in result.stderr
        assert "same picture" not in result.stderr

    def test_one_picture_for_both_cameras_is_remarked(self, images):
        result = random_run("fm", "--left", images / "left.png", "--right", images / "left.png")
        assert result.exit_code == 0
        assert "both wrist images are the same picture" in result.stderr

    @pytest.mark.parametrize(
        ("name", "message"), [("text.png", "not an image that can be read"), ("absent.png", "no such image")]
    )
    def test_no_image(self, images, name, message):
        found = error_of(random_run("fm", "--left", images / name))
        assert message in found
        assert name in found

    def test_what_pillow_opens(self, tmp_path):
        grey = np.arange(384 * 384, dtype=np.uint32).reshape(384, 384) % 251
        Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "grey.png")
        image, remark = read_wrist_image(tmp_path / "grey.png")
        assert (image.dtype, image.shape, remark) == (np.uint8, (384, 384, 3), None)
        np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))
        colors = np.random.default_rng(0).integers(0, 256, (384, 384, 4), np.uint8)
        Image.fromarray(colors).save(tmp_path / "alpha.png")
        np.testing.assert_array_equal(read_wrist_image(tmp_path / "alpha.png")[0], colors[..., :3])
        Image.fromarray(colors[..., :3]).save(tmp_path / "lossless.webp", lossless=True)
        np.testing.assert_array_equal(read_wrist_image(tmp_path / "lossless.webp")[0], colors[..., :3])

    def test_exif_turns(self, tmp_path):
        pixels = np.zeros((384, 384, 3), np.uint8)
        pixels[:192] = 255
        exif = Image.Exif()
        exif[0x0112] = 3  # turned upside down
        Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
        np.testing.assert_array_equal(read_wrist_image(tmp_path / "turned.png")[0], pixels[::-1])

    def test_sixteen_bits_are_refused(self, tmp_path):
        Image.fromarray(np.full((384, 384), 40000, np.uint16)).save(tmp_path / "deep.png")
        with pytest.raises(DataError, match=r"eight bits a channel(?s:.*)I;16"):
            read_wrist_image(tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("option", "array", "message"),
    [
        ("--noise", np.zeros((24, 19)), "not noise"),
        ("--noise", np.zeros((2, 24, 20)), "not noise"),
        ("--noise", np.zeros((24, 20), np.int32), "not noise"),
        ("--noise", np.full((24, 20), np.inf), "noise must be finite"),
        ("--noise", np.full((24, 20), 1e300), "noise must be finite"),
        ("--state", np.zeros(19), "not a state"),
        ("--state", np.full(20, np.nan), "a state must be finite"),
        ("--state", np.full(20, -1e300), "a state must be finite"),
        ("--state", None, "no such file"),
    ],
)
def test_wrong_numbers(option, array, message, tmp_path):
    path = tmp_path / "numbers.npy"
    if array is not None:
        np.save(path, array)
    found = error_of(random_run("fm", option, path))
    assert message in found
    assert str(path) in found
    assert "expected: float32" not in found  # any floats will do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "chunk.txt"), r"written as \.npy or \.json"),
        (("--out", "chunk"), r"written as \.npy or \.json"),
        (("--plot", "chunk.jpg"), "written as PNG"),
        (("--out", "absent/chunk.npy"), "folder to write into does not exist"),
        (("--plot", "absent/chunk.png"), "folder to write into does not exist"),
        (("--out", "folder.npy"), "a folder has that name"),
        (("--plot", "folder.png"), "a folder has that name"),
    ],
)
def test_wrong_targets_are_found_first(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder.npy", "folder.png"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(random_weights, "random_policy", lambda *_, **__: pytest.fail("too late"))
    result = random_run("fm", *arguments)
    with pytest.raises(Rdt2Error, match=message):
        raise result.exception or AssertionError(result.output)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_suffixes_in_capitals_mean_the_same(tmp_path):
    array, text, plot = (tmp_path / f"CHUNK.{suffix}" for suffix in ("NPY", "JSON", "PNG"))
    told = document(random_run("fm", "--out", array, "--plot", plot, "--json"))
    assert (told["out"], told["plot"]) == (str(array), str(plot))
    assert random_run("fm", "--out", text).exit_code == 0
    actions = np.asarray(json.loads(text.read_text())["actions"], np.float32)
    np.testing.assert_array_equal(actions, np.load(array))
    with Image.open(plot) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    assert set(tmp_path.iterdir()) == {array, text, plot}


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (("fm", "--left"), "left.png"),
        (("fm", "--right"), "right.png"),
        (("fm", "--noise"), "noise.npy"),
        (("one-step", "--state"), "state.npy"),
        (("fm", "--normalizer"), "normalizer.json"),
        (("vq", "--vlm"), "folder/config.json"),
        (("vq", "--tokenizer"), "folder/config.json"),
        (("fm", "--expert"), "folder/config.json"),
    ],
)
@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_what_is_read_is_not_overwritten(option, name, link, tmp_path, monkeypatch):
    """Here the whole command would fail later, for want of the other parts; it must fail before it reads any."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer_command, "_observation", lambda *_: pytest.fail("too late"))
    (tmp_path / "folder").mkdir()
    source = target = tmp_path / name
    source.write_text("precious")
    if link is not None:
        target = tmp_path / f"other{source.suffix}"
        getattr(target, link)(source)
    kind, read = option
    given = Path(name).parent if "/" in name else name  # a relative name of what the target names in full
    part = "tokenizer" if kind == "vq" else "expert"
    others = [argument for other in ("vlm", part, "normalizer", "left", "right") for argument in (f"--{other}", "x")]
    # the last of two options of one name counts
    written = "--plot" if source.suffix == ".png" else "--out"
    result = run(kind, *others, read, given, written, target, "--instruction", INSTRUCTION)
    message = error_of(result)
    assert f"would overwrite what {read} reads" in message
    assert str(target) in message
    assert source.read_text() == "precious"


@pytest.mark.parametrize(("link", "exists"), [("symlink_to", True), ("symlink_to", False), ("hardlink_to", True)])
def test_chunk_and_picture_go_to_different_files(link, exists, tmp_path):
    out, plot = tmp_path / "chunk.npy", tmp_path / "chunk.png"
    if exists:
        out.write_text("old")
    getattr(plot, link)(out)
    assert "are one file" in error_of(random_run("fm", "--out", out, "--plot", plot))
    assert out.exists() == exists


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fm",), "--vlm, --expert, --normalizer, --left, --right"),
        (("vq", "--vlm", "x", "--normalizer", "x"), "missing: --tokenizer, --left, --right"),
        (("fm", "--random-weights", "tiny", "--vlm", "x"), "--random-weights stands in for --vlm"),
        (("fm", "--random-weights", "3b"), "'3b'"),
        (("fm", "--random-weights", "tiny", "--no-jpeg", "--jpeg-quality", "90"), "not both"),
        (("fm", "--random-weights", "tiny", "--jpeg-quality", "101"), "101"),
        (("fm", "--random-weights", "tiny", "--repeat", "0"), "--repeat"),
        (("fm", "--random-weights", "tiny", "--tokenizer", "x"), "--tokenizer"),
        (("fm", "--random-weights", "tiny", "--show-tokens"), "--show-tokens"),
        (("vq", "--random-weights", "tiny", "--noise", "x"), "--noise"),
        (("vq", "--random-weights", "tiny", "--state", "x"), "--state"),
        (("vq", "--random-weights", "tiny", "--free", "--show-tokens"), "leave --free out"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    result = run(*arguments, "--instruction", INSTRUCTION)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_an_instruction_that_is_too_long():
    message = error_of(random_run("fm", instruction="Pick up the apple " + "and the orange " * 60))
    assert "too long" in message
    assert "at most 80 tokens" in message


def test_blank_instruction():
    assert "instruction must be text" in error_of(random_run("fm", instruction="  "))


def test_weights_that_do_not_fit_are_not_made(monkeypatch):
    monkeypatch.setattr(random_weights, "random_policy_bytes", lambda *_, **__: 10**16)
    result = random_run("vq")
    assert isinstance(result.exception, ConfigError)
    assert "do not fit into memory" in str(result.exception)
    assert "10000000.00 GB" in result.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small policy of each kind, in files."""
    root, backbone = tmp_path_factory.mktemp("parts"), small_policy.byte_backbone()
    paths = {name: root / name for name in ("vlm", "expert", "tokenizer", "normalizer.npz")}
    Qwen25VL(backbone.config, small_policy.stacked_params(backbone.config)).save_pretrained(paths["vlm"])
    (paths["vlm"] / "tokenizer.json").write_text(json.dumps(tokenizer_json(byte_ranks())))
    (paths["vlm"] / "preprocessor_config.json").write_text(json.dumps(to_published(small_policy.SMALL_IMAGES)))
    save_expert(small_policy.expert(), paths["expert"])
    paths["tokenizer"].mkdir()
    save_tokenizer(small_policy.codec(256), paths["tokenizer"])
    small_policy.normalizer().save(paths["normalizer.npz"])
    return paths


@pytest.mark.parametrize(("kind", "part"), [("vq", "tokenizer"), ("fm", "expert"), ("one-step", "expert")])
def test_policies_from_folders(kind, part, folders, images):
    files = images / "left.png", images / "right.jpg"
    parts = {"vlm": folders["vlm"], part: folders[part], "normalizer": folders["normalizer.npz"]}
    options = [argument for name, path in parts.items() for argument in (f"--{name}", path)]
    given = ("--left", files[0], "--right", files[1], "--instruction", INSTRUCTION)
    out = folders[part] / "chunk.npy"  # beside the files of a model, and again and again: takes nothing from anyone
    out.touch()
    told = document(run(kind, *options, *given, "--out", out, "--json"))
    assert told["random_weights"] is None
    policy = load_policy(kind, **parts, compile_at_start=False)
    left, right = (read_wrist_image(file)[0] for file in files)
    seen = Observation(
        images={"left_wrist": left, "right_wrist": right},
        capture_time_s={"left_wrist": 0.0, "right_wrist": 0.0},
        instruction=INSTRUCTION,
        id="x",
    )
    actions = np.asarray(told["chunk"]["actions"], np.float32)
    np.testing.assert_array_equal(actions, policy.infer(seen).actions)
    np.testing.assert_array_equal(actions, np.load(out))


def test_what_loading_says_comes_through(folders, images, tmp_path):
    given = ("--left", images / "left.png", "--right", images / "right.jpg", "--instruction", INSTRUCTION)
    parts = ("fm", "--vlm", tmp_path / "absent", "--expert", folders["expert"], *given)
    assert "absent" in error_of(run(*parts, "--normalizer", folders["normalizer.npz"]))
    assert "normalizer.npy" in error_of(run(*parts, "--normalizer", tmp_path / "normalizer.npy"))
    absent = error_of(run(*parts, "--vlm", folders["vlm"], "--normalizer", tmp_path / "absent.pt"))
    assert "normalizer file does not exist" in absent
    assert "absent.pt" in absent


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom rdt2_jax.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print('jax' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "infer", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "False\n")
    for kind in ("vq", "fm", "one-step"):
        assert kind in told.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--left", "absent.png"), 2, "error: no such image"),
        (("--free",), 3, "generated no chunk"),
        (("--state", "x"), 2, "No such option"),
    ],
)
def test_status_through_the_one_command_line(arguments, status, message, capsys):
    """Exit statuses as the script leaves with them."""
    with pytest.raises(SystemExit) as left:
        main(["infer", "vq", "--random-weights", "tiny", "--instruction", INSTRUCTION, *arguments])
    assert left.value.code == status
    assert message in capsys.readouterr().err
