"""Latencies of whole policies at batch 1 with random weights, from pixels on the device to chunks, beside their floors.

A floor is what arithmetic or memory traffic takes at least, whichever is more, at the rates measured in the same run:
counted stage by stage, in the expert and in decoding step by step, and summed. Host stages stand beside.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from policies_hlo import float_copies
from policies_subjects import Name, Subject, subjects
from policies_workload import JPEG_QUALITY, PROMPT_LENGTH, random_observation
from rates import Rates, measure_rates
from timing import take_turns

from rdt2_jax.actions.types import Observation
from rdt2_jax.errors import Rdt2Error
from rdt2_jax.layers.compute import default_compute
from rdt2_jax.params import named_leaves
from rdt2_jax.policy.prompts import through_jpeg
from rdt2_jax.policy.random_weights import (
    Size,
)
from rdt2_jax.qwen2_5_vl.grid import token_positions
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED, composite, process
from rdt2_jax.qwen2_5_vl.prompt import action_prompt, left_pad

TOLERANCE = 0.05
"""Relative difference between what is timed and what the policy does that two compilations in bfloat16 explain."""

BARS_MS: dict[Name, float] = {"fm": 15.0, "one-step": 12.0, "vq": 120.0, "vq int8": 80.0}
"""Of the preset "7b" on an H200, from pixels on the device to the chunk."""

BAR_DEVICE, BAR_PRESET = "H200", "7b"


@dataclasses.dataclass(frozen=True)
class Run:
    """How long it is timed: length of one turn in seconds, and turns, of which the median counts."""

    seconds: float
    rounds: int


FULL_RUN, QUICK_RUN = Run(seconds=0.3, rounds=7), Run(seconds=0.001, rounds=2)


@dataclasses.dataclass(frozen=True)
class Row:
    """One latency.

    Attributes:
        policy: which one; "host" for what all share.
        task: what was done.
        ms: median; None if it failed.
        floor_ms: see above; None where nothing runs on the device.
        share_of_floor: `floor_ms` / `ms`.
        of_prefill: `ms` / that of the fm policy's stage "prefill"; None if one of them failed.
        bar: the most that it may take; None: shown only.
        met: whether it takes no more.
        error: why it failed.
    """

    policy: str
    task: str
    ms: float | None
    floor_ms: float | None = None
    share_of_floor: float | None = None
    of_prefill: float | None = None
    bar: float | None = None
    met: bool | None = None
    error: str | None = None


def measure(
    policy: str,
    task: str,
    function: Callable[[], Any],
    run: Run,
    floor_ms: float | None = None,
    bar: float | None = None,
) -> Row:
    """Times a function that waits for its result; one that cannot run becomes a row that says why."""
    try:
        function()
    except (RuntimeError, ValueError, Rdt2Error) as error:
        return Row(policy, task, None, floor_ms, bar=bar, error=f"{type(error).__name__}: {error}"[:500])
    ms = 1e3 * take_turns({task: function}, min_seconds=run.seconds, rounds=run.rounds, warm_up=1)[task].median_s
    share = None if floor_ms is None else floor_ms / ms
    return Row(policy, task, ms, floor_ms, share, bar=bar, met=None if bar is None else ms <= bar)


def device_rows(subject: Subject, observation: Observation, rates: Rates, run: Run, bar: float | None) -> Iterator[Row]:
    """The whole chunk, then its stages, then what the policy does with an observation."""
    floors = [sum(work.floor_ms(rates) for work in stage.work) for stage in subject.stages]
    yield measure(
        subject.name,
        "pixels on the device to chunk",
        lambda: subject.chunk().block_until_ready(),
        run,
        sum(floors),
        bar,
    )
    for stage, floor in zip(subject.stages, floors, strict=True):
        yield measure(subject.name, stage.name, stage.function, run, floor)
    yield measure(subject.name, "infer: images on the host to chunk", lambda: subject.policy.infer(observation), run)


def host_rows(subject: Subject, observation: Observation, run: Run) -> Iterator[Row]:
    """What happens before: the same for all policies, but for JPEG, which is VQ's."""
    left, right = (observation.images[name] for name in ("left_wrist", "right_wrist"))
    preprocessor, image = subject.policy.backbone.preprocessor, composite(left, right)
    patches, host_inputs = process(image, PUBLISHED), jax.device_get(subject.inputs)
    image_tokens = len(patches.values) // preprocessor.config.vision.merge_unit
    device = subject.policy.backbone.device

    def prompt() -> Any:
        ids = action_prompt(preprocessor.tokenizer, observation.instruction, image_tokens)
        batch = left_pad([ids], preprocessor.tokenizer.control.endoftext, length=PROMPT_LENGTH)
        return token_positions(preprocessor.config, batch.input_ids, batch.mask, [[patches.grid]])

    for task, function in (
        ("composite", lambda: composite(left, right)),
        (f"JPEG, quality {JPEG_QUALITY} (vq alone)", lambda: through_jpeg(image, JPEG_QUALITY)),
        ("resize and patches", lambda: process(image, PUBLISHED)),
        ("tokens, padding, positions", prompt),
        ("transfer to the device", lambda: jax.block_until_ready(jax.device_put(host_inputs, device))),
    ):
        yield measure("host", task, function, run)


def int8_copies(subject: Subject) -> list[str]:
    """Instructions of the program that decodes which write weights in eight bits down in floats."""
    leaves = named_leaves(subject.policy.backbone.params.text.layers)
    sizes = {leaf.size for name, leaf in leaves.items() if name.endswith(".values")}
    return float_copies(subject.decoding or "", sizes)


def beside_prefill(rows: list[Row]) -> list[Row]:
    """The same rows with `of_prefill`."""
    prefill = next(row.ms for row in rows if (row.policy, row.task) == ("fm", "prefill"))
    if prefill is None:
        return rows
    return [row if row.ms is None else dataclasses.replace(row, of_prefill=row.ms / prefill) for row in rows]


def run_preset(size: Size, run: Run) -> dict[str, Any]:
    """Everything that the report says."""
    device, dtype = jax.devices()[0], default_compute().dtype
    edge, megabytes = (512, 64) if device.platform == "cpu" else (8192, 4096)
    rates = measure_rates(dtype, size=edge, megabytes=megabytes, seconds=run.seconds)
    judged = BAR_DEVICE in device.device_kind and size == BAR_PRESET
    observation, rows, differences, startup_s = random_observation(), [], {}, {}
    tokens, copies = 0, []
    for subject in subjects(size, observation):
        tokens, startup_s[subject.name] = int(subject.inputs.valid.sum()), subject.startup_s
        differences[subject.name] = subject.disagreement()
        found = list(device_rows(subject, observation, rates, run, BARS_MS[subject.name] if judged else None))
        if subject.name == "vq int8":
            copies = int8_copies(subject)
            found += host_rows(subject, observation, run)
        for row in found:
            shown = row.error or f"{row.ms:.3f} ms"
            print(f"{row.policy}, {row.task}: {shown}", file=sys.stderr, flush=True)
        rows += found
        del subject
        gc.collect()
    stats = device.memory_stats() or {}
    return {
        "mode": "beside floors",
        "device": device.device_kind,
        "preset": size,
        "dtype": jnp.dtype(dtype).name,
        "prompt": {"tokens": tokens, "padded": PROMPT_LENGTH},
        "matmul_tflops": rates.flops_per_s / 1e12,
        "bandwidth_gb_s": rates.bytes_per_s / 1e9,
        "peak_memory_gb": stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
        "differences": differences,
        "differences_tolerance": TOLERANCE,
        "startup_s": startup_s,
        "int8_weights_written_in_floats": {"instructions": len(copies), "first": copies[:1]},
        "rows": [dataclasses.asdict(row) for row in beside_prefill(rows)],
    }
