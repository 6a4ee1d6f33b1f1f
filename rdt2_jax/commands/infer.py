"""`rdt2 infer`: one observation from files to an action chunk, with the time that every stage takes."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rdt2_jax.cli import command_needs, json_option
from rdt2_jax.commands.infer_report import Answer, Request, note, report

if TYPE_CHECKING:
    import numpy as np

    from rdt2_jax.actions.types import Observation

INVALID_GENERATION_STATUS = 3
"""Exit status where the model generated something that is no chunk."""

OBSERVATION_ID = "rdt2-infer"

_path = click.Path(path_type=Path)

_SHARED_OPTIONS = (
    click.option("--vlm", metavar="DIR", help="Backbone: a model folder or a name on the hub."),
    click.option("--normalizer", type=_path, help="Normalizer (.pt as published, .npz or .json)."),
    click.option(
        "--random-weights",
        type=click.Choice(["tiny", "7b"]),
        help="Everything random, in place of all folders and the normalizer: to try and to time it.",
    ),
    click.option("--left", type=_path, help="Image of the left wrist camera, 384 x 384."),
    click.option("--right", type=_path, help="Image of the right wrist camera, 384 x 384."),
    click.option(
        "--resize", is_flag=True, help="Scale images of other sizes; see docs/policies.md before relying on it."
    ),
    click.option("--instruction", required=True, help='What to do, like "Pick up the apple."'),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of all randomness."),
    click.option("--out", type=_path, help="Write the chunk here: .npy (24, 20), or .json with times and units."),
    click.option("--plot", type=_path, help="Draw the chunk here (.png)."),
    click.option(
        "--jpeg-quality", type=click.IntRange(1, 100), help="Send the image through JPEG; default: as published."
    ),
    click.option("--no-jpeg", is_flag=True, help="Leave the image as it is."),
    click.option("--int8", is_flag=True, help="The backbone's decoder in eight bits."),
    click.option(
        "--repeat", type=click.IntRange(1), default=1, show_default=True, help="Times to run it; medians count."
    ),
    json_option,
)
_EXPERT = click.option("--expert", metavar="DIR", help="Action expert: a folder or a name on the hub.")
_NOISE = click.option("--noise", type=_path, help="Noise to start from, (24, 20), .npy; default: drawn from the seed.")
_STATE = click.option("--state", type=_path, help="Proprioceptive state, (20,), .npy; default: none.")
_TOKENIZER = click.option("--tokenizer", type=_path, metavar="DIR", help="Action tokenizer: a folder.")


@click.group()
def infer() -> None:
    """Run a policy on one observation: two images and an instruction become a chunk of actions."""


def _policy_command(kind: str, *own_options: Callable[..., Any]) -> Callable[[Callable[..., Any]], click.Command]:
    """A sub-command for one kind of policy: shared options after its own."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def command(**options: Any) -> None:
            _run(_request(kind, options))

        wrapped: Callable[..., Any] = command_needs("running a policy")(command)
        for option in reversed((*own_options, *_SHARED_OPTIONS)):
            wrapped = option(wrapped)
        return infer.command(kind)(wrapped)

    return decorate


@_policy_command(
    "vq",
    _TOKENIZER,
    click.option("--show-tokens", is_flag=True, help="Print every token with its probability."),
    click.option("--free", is_flag=True, help="Let the model generate any token, not action tokens alone."),
)
def vq() -> None:
    """The backbone writes action tokens, which the action tokenizer turns into a chunk.

    Exits with status 3 when --free lets the model write something that is no chunk.
    """


@_policy_command("fm", _EXPERT, _STATE, _NOISE)
def fm() -> None:
    """The action expert follows the flow from noise to a chunk, in five steps."""


@_policy_command("one-step", _EXPERT, _STATE, _NOISE)
def one_step() -> None:
    """The distilled action expert, in one step."""


def _request(kind: str, options: dict[str, Any]) -> Request:
    """Checks which options go together.

    Raises:
        click.UsageError: they do not.
    """
    part = "tokenizer" if kind == "vq" else "expert"
    parts = {name: options.pop(name) for name in ("vlm", part, "normalizer")}
    given = [f"--{name}" for name, value in parts.items() if value is not None]
    if options["random_weights"] is not None and given:
        raise click.UsageError(f"--random-weights stands in for {', '.join(given)}: leave one or the other out")
    if options["random_weights"] is None:
        needed = {**parts, "left": options["left"], "right": options["right"]}
        missing = [f"--{name}" for name, value in needed.items() if value is None]
        if missing:
            raise click.UsageError(f"missing: {', '.join(missing)} (or try --random-weights tiny)")
    if options["no_jpeg"] and options["jpeg_quality"] is not None:
        raise click.UsageError("--jpeg-quality or --no-jpeg, not both")
    free, show_tokens = options.pop("free", False), options.pop("show_tokens", False)
    if free and show_tokens:
        raise click.UsageError("--show-tokens shows constrained decoding: leave --free out")
    quality = None if options.pop("no_jpeg") else options.pop("jpeg_quality") or "published"
    options = {"state": None, "noise": None, **options, "jpeg_quality": quality}
    return Request(kind=kind, parts=parts, constrained=not free, show_tokens=show_tokens, **options)


def _run(request: Request) -> None:
    from rdt2_jax.policy.instructions import instruction_advice

    _check_targets(request)
    observation, noise = _observation(request), _noise(request)
    advice = instruction_advice(request.instruction)
    if not advice.fine:
        note('this instruction is not like those of the training data ("Pick up the apple."):')
        for line in advice.lines():
            note(f"  {line}")
    answer = _answer(request, observation, noise)
    if not report(request, advice, answer):
        raise click.exceptions.Exit(INVALID_GENERATION_STATUS)


# ------------------------------------------------------------------------------------------------ what goes in


def _check_targets(request: Request) -> None:
    """Wrong names of output files are found before anything is loaded.

    Raises:
        DataError: another suffix, no place to write to, or a file that this command reads or writes for another option.
    """
    from rdt2_jax.errors import DataError
    from rdt2_jax.policy.plot import check_plot_path

    if request.plot is not None:
        check_plot_path(request.plot)
    if request.out is not None and request.out.suffix.lower() not in (".npy", ".json"):
        raise DataError("chunks are written as .npy or .json", where=request.out, expected="a name that ends so")
    for path in (request.out, request.plot):
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise DataError("the folder to write into does not exist", where=path, fix="create it first")
        if path.is_dir():
            raise DataError("a folder has that name", where=path, expected="a file", fix="choose another name")
        for option, source in _files_read(request):
            if _are_one_file(path, source):
                what = f"this would overwrite what {option} reads"
                raise DataError(what, where=path, found=source, fix="choose another name")
    if request.out is not None and request.plot is not None and _are_one_file(request.out, request.plot):
        raise DataError("--out and --plot are one file", where=f"{request.out}, {request.plot}", fix="write to two")


def _files_read(request: Request) -> Iterator[tuple[str, Path]]:
    """Files that a chunk or a picture could take the place of, each with its option."""
    sources = {"left": request.left, "right": request.right, "state": request.state, "noise": request.noise}
    for name, source in {**sources, **request.parts}.items():
        if source is None:
            continue
        folder = Path(source)  # or a file, or a name on the hub, which is neither
        for file in folder.glob("*.json") if folder.is_dir() else [folder]:
            yield f"--{name}", file


def _are_one_file(one: Path, other: Path) -> bool:
    """Whether two names lead to one file, or will when it is written."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _observation(request: Request) -> Observation:
    from rdt2_jax.actions.types import Observation
    from rdt2_jax.policy.image_files import grey_noise, read_wrist_image

    images = {}
    for place, path in (("left", request.left), ("right", request.right)):
        if path is None:
            images[f"{place}_wrist"] = grey_noise(request.seed, place)
            note(f"no --{place}: an image of grey noise stands in for it")
        else:
            images[f"{place}_wrist"], remark = read_wrist_image(path, resize=request.resize)
            if remark:
                note(remark)
    if (images["left_wrist"] == images["right_wrist"]).all():
        note("both wrist images are the same picture")
    return Observation(
        images=images,
        # files do not say when they were captured: the chunk counts from the images' own time
        capture_time_s=dict.fromkeys(images, 0.0),
        instruction=request.instruction,
        id=OBSERVATION_ID,
        state=None if request.state is None else _numbers(request.state, "a state", 1),
    )


def _noise(request: Request) -> np.ndarray | None:
    """(1, 24, 20), or None."""
    if request.noise is None:
        return None
    noise = _numbers(request.noise, "noise", 3)
    return noise[None] if noise.ndim == 2 else noise


def _numbers(path: Path, what: str, most_axes: int) -> np.ndarray:
    """float32 numbers of a `.npy` file, all finite: whatever is wrong is told with the name of the file.

    Raises:
        DataError: a file that cannot be read, another shape or type, or numbers that are not finite as float32.
    """
    import numpy as np

    from rdt2_jax.actions.layout import ACTION_DIM, CHUNK_LENGTH, STATE_DIM
    from rdt2_jax.errors import DataError
    from rdt2_jax.io.arrays import read_array

    array = read_array(path)
    shapes = [(STATE_DIM,)] if most_axes == 1 else [(CHUNK_LENGTH, ACTION_DIM), (1, CHUNK_LENGTH, ACTION_DIM)]
    if array.dtype.kind != "f" or array.shape not in shapes:
        expected = f"floats {' or '.join(map(str, shapes))}"
        raise DataError(f"not {what}", where=path, expected=expected, found=f"{array.dtype} {array.shape}")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
        numbers = np.array(array, np.float32)
    if not np.isfinite(numbers).all():
        found = f"{(~np.isfinite(numbers)).sum()} values are not"
        raise DataError(f"{what} must be finite", where=path, expected="finite numbers in float32", found=found)
    return numbers


# ------------------------------------------------------------------------------------------------ running it


def _answer(request: Request, observation: Observation, noise: np.ndarray | None) -> Answer:
    from rdt2_jax.policy.clock import StageClock

    started = time.perf_counter()
    policy = _policy(request)
    loading_s = time.perf_counter() - started

    def call(clock: StageClock | None = None) -> tuple[Any, float]:
        policy.reset()  # the same noise every time
        began = time.perf_counter()
        (result,) = policy.infer_batch([observation], noise=noise, clock=clock)
        return result, 1e3 * (time.perf_counter() - began)

    # only the prompt length that is needed is compiled, which is why it was not done when the policy was made
    result, first_call_ms = call()
    calls: list[dict[str, float]] = []
    for _ in range(request.repeat):
        clock = StageClock()
        _, total_ms = call(clock)
        result, call_ms = call()
        calls.append({**clock.milliseconds, "total": total_ms, "call": call_ms})
    tokens = policy.tokens([observation]) if request.show_tokens else None
    return Answer(result, calls, loading_s, first_call_ms / 1e3, tokens)


def _policy(request: Request) -> Any:
    from rdt2_jax.policy.options import PolicyOptions

    options = PolicyOptions(
        jpeg_quality=request.jpeg_quality,
        compile_at_start=False,
        seed=request.seed,
        constrained=request.constrained,
    )
    if request.random_weights is None:
        from rdt2_jax.policy import load_policy

        note(f"loading the policy {request.kind}")
        return load_policy(request.kind, **request.parts, quantize=request.int8, **options.model_dump())
    from rdt2_jax.policy.random_weights import random_policy, random_policy_bytes, require_memory

    kind: Any = request.kind
    size: Any = request.random_weights
    num_bytes = random_policy_bytes(kind, size, int8=request.int8)
    note(f"random weights: {num_bytes / 1e9:.2f} GB; what comes out means nothing")
    require_memory(num_bytes)
    return random_policy(kind, size, request.seed, int8=request.int8, options=options)
