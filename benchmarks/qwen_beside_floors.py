"""Latencies of Qwen2.5-VL at batch 1 in bfloat16 beside two floors: its arithmetic and its weights at measured rates.

Weights are random and made on the device, layer by layer, in the layout that policies use on one device. The 7B needs
about 30 GB: 17 of weights, 8 more for the decoder in eight bits.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qwen_workload import (
    Prompt,
    decode_tokens,
    first_keys_values,
    full_prefill,
    make_prompt,
    start_decoding,
    vision_tokens,
)
from rates import Rates, measure_rates
from timing import take_turns

from rdt2_jax.errors import Rdt2Error
from rdt2_jax.layers.attention import AttentionBackend, default_backend
from rdt2_jax.layers.compute import Compute
from rdt2_jax.params import tree_bytes
from rdt2_jax.policy.random_weights import random_backbone_params
from rdt2_jax.qwen2_5_vl import cost
from rdt2_jax.qwen2_5_vl.config import Qwen25VLConfig, preset
from rdt2_jax.qwen2_5_vl.int8 import quantize_decoder
from rdt2_jax.qwen2_5_vl.model import Qwen25VLParams

DTYPE = jnp.bfloat16

TOLERANCE = 0.05
"""Relative difference of keys and values between attention kernels that bfloat16 explains; more is a wrong kernel."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Sizes.

    Attributes:
        image_size: of the composite image, height and width in pixels.
        num_words: tokens beside those of the image.
        steps: tokens to decode.
        seconds: length of one turn.
        rounds: turns, of which the median counts.
    """

    image_size: tuple[int, int]
    num_words: int
    steps: int
    seconds: float
    rounds: int


FULL_RUN = Run(image_size=(384, 768), num_words=42, steps=64, seconds=0.3, rounds=7)

QUICK_RUN = Run(image_size=(112, 168), num_words=10, steps=4, seconds=0.001, rounds=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Something to time.

    Attributes:
        name: what is done.
        attention: kernel, "-" where there is one query and no choice.
        function: does it and waits for the device.
        flops, num_bytes: what it has to compute and to read and write.
        per: tokens that one call makes.
    """

    name: str
    attention: str
    function: Callable[[], Any]
    flops: float
    num_bytes: float
    per: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One latency.

    Attributes:
        task, attention: as in `Task`.
        ms: median; of one token where the task says so; None if it failed.
        arithmetic_floor_ms, memory_floor_ms: at the rates measured in this run.
        share_of_floor: the larger floor over `ms`.
        compiling_s: the first call.
        error: why it failed.
    """

    task: str
    attention: str
    ms: float | None
    arithmetic_floor_ms: float
    memory_floor_ms: float
    share_of_floor: float | None
    compiling_s: float | None
    error: str | None = None


def tasks(params: Qwen25VLParams, config: Qwen25VLConfig, prompt: Prompt, run: Run) -> Iterator[Task]:
    """What is timed, in the order of interest. Each is made when it is asked for, as are the weights in eight bits."""
    default = default_backend(jax.devices()[0].platform, DTYPE)
    backends = list(dict.fromkeys([default, AttentionBackend.XLA]))
    for backend in backends:
        yield from prefill_tasks(params, config, prompt, backend)
    # without the fused kernel, which decoding does not use; both decoders start from the same cache
    logits, keys_values = full_prefill(params, config, prompt.inputs, Compute(dtype=DTYPE))
    start = start_decoding(logits, keys_values, prompt.length, run.steps)
    yield decode_task("decode, per token", params, config, prompt, start, run.steps)
    quantized, _ = quantize_decoder(params, head=params.text.head is not None)
    yield decode_task("decode, per token, int8 weights", quantized, config, prompt, start, run.steps)


def prefill_tasks(
    params: Qwen25VLParams, config: Qwen25VLConfig, prompt: Prompt, backend: AttentionBackend
) -> Iterator[Task]:
    """One kernel's passes over the prompt."""
    compute, inputs, length = Compute(dtype=DTYPE, attention=backend), prompt.inputs, prompt.length
    grid, half, layers = inputs.grid, config.text.num_layers // 2, params.text.layers
    head = params.text.embedding if params.text.head is None else params.text.head
    vision_bytes = tree_bytes(params.vision) + inputs.patches.nbytes
    yield Task(
        "vision tower",
        backend.value,
        lambda: vision_tokens(params, config, inputs, compute).block_until_ready(),
        cost.vision_flops(config.vision, grid),
        vision_bytes,
    )
    yield Task(
        f"vision tower, keys and values of {half} layers",
        backend.value,
        lambda: jax.block_until_ready(first_keys_values(params, config, inputs, compute, num_layers=half)),
        cost.prefill_flops(config, length, half, grid=grid, keys_values_only=True),
        vision_bytes + tree_bytes(layers[:half]) + cost.cache_bytes(config.text, length, half, DTYPE),
    )
    yield Task(
        "vision tower, prefill of all layers, logits",
        backend.value,
        lambda: jax.block_until_ready(full_prefill(params, config, inputs, compute)),
        cost.prefill_flops(config, length, grid=grid),
        vision_bytes + tree_bytes((layers, head)) + cost.cache_bytes(config.text, length, dtype=DTYPE),
    )


def decode_task(
    name: str,
    params: Qwen25VLParams,
    config: Qwen25VLConfig,
    prompt: Prompt,
    start: tuple[jax.Array, Any],
    steps: int,
) -> Task:
    """Tokens in a compiled loop; `start` is the first token and the cache."""
    compute, middle = Compute(dtype=DTYPE), prompt.length + steps // 2
    return Task(
        name,
        "-",
        lambda: decode_tokens(params, config, prompt.inputs, compute, *start, steps=steps).block_until_ready(),
        cost.decode_flops(config.text, middle),
        cost.decode_bytes(params.text, config.text, middle, DTYPE),
        per=steps,
    )


def measure(task: Task, rates: Rates, run: Run) -> Row:
    """Times one task; one that cannot run becomes a row that says why, so that the others are still measured."""
    floors = rates.compute_ms(task.flops), rates.memory_ms(task.num_bytes)
    started = time.perf_counter()
    try:
        task.function()
    except (RuntimeError, ValueError, Rdt2Error) as error:
        return Row(task.name, task.attention, None, *floors, None, None, f"{type(error).__name__}: {error}"[:500])
    first_s = time.perf_counter() - started
    timing = take_turns({"ours": task.function}, min_seconds=run.seconds, rounds=run.rounds, warm_up=1)["ours"]
    ms = 1e3 * timing.median_s / task.per
    return Row(task.name, task.attention, ms, *floors, max(floors) / ms, first_s)


def kernel_difference(params: Qwen25VLParams, config: Qwen25VLConfig, prompt: Prompt) -> float | None:
    """|a - b| / |b| of keys and values of half of the layers, default kernel and XLA's; None where these are one."""
    default, half = default_backend(jax.devices()[0].platform, DTYPE), config.text.num_layers // 2
    if default is AttentionBackend.XLA:
        return None
    fused, plain = (
        first_keys_values(params, config, prompt.inputs, Compute(dtype=DTYPE, attention=backend), num_layers=half)
        for backend in (default, AttentionBackend.XLA)
    )
    pairs = zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True)
    errors = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in errors)


def run_preset(name: str, run: Run) -> dict[str, Any]:
    """Everything that the report says."""
    device = jax.devices()[0]
    size, megabytes = (512, 64) if device.platform == "cpu" else (8192, 4096)
    rates = measure_rates(DTYPE, size=size, megabytes=megabytes, seconds=run.seconds)
    config = preset(name)
    params = jax.block_until_ready(random_backbone_params(config, jax.random.key(0), DTYPE))
    prompt = make_prompt(config, run.image_size, run.num_words)
    rows = []
    for task in tasks(params, config, prompt, run):
        row = measure(task, rates, run)
        shown = row.error or f"{row.ms:.3f} ms, first call {row.compiling_s:.1f} s"
        print(f"{row.task} ({row.attention}): {shown}", file=sys.stderr, flush=True)
        rows.append(row)
    failed = any(row.error for row in rows)
    difference = None if failed else kernel_difference(params, config, prompt)
    stats = device.memory_stats() or {}
    return {
        "mode": "beside floors",
        "device": device.device_kind,
        "preset": name,
        "dtype": jnp.dtype(DTYPE).name,
        "prompt": {
            "tokens": prompt.length,
            "image_tokens": prompt.length - run.num_words,
            "grid": list(prompt.inputs.grid or ()),
        },
        "matmul_tflops": rates.flops_per_s / 1e12,
        "bandwidth_gb_s": rates.bytes_per_s / 1e9,
        "weights_gb": tree_bytes(params) / 1e9,
        "peak_memory_gb": stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
        "kernel_difference": difference,
        "kernel_difference_tolerance": TOLERANCE,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
