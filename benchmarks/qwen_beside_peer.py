"""Rows of Qwen2.5-VL beside transformers: the same weights, threads and dtype; outputs are compared before any timing.

Ours is in the layout that policies use on one device, a tree per layer; rows of the scanned layout stand beside it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bystanders import QUIET, in_quiet
from peers.qwen_transformers import image_processor
from qwen_match import Match, Setting, decoder_arguments, decoders, equal_threads, make_match, must_agree
from qwen_workload import first_keys_values, full_prefill, vision_tokens
from rates import Rates, measure_rates
from timing import Timing, paired_ratio

from rdt2_jax.params import count_parameters
from rdt2_jax.qwen2_5_vl import cost
from rdt2_jax.qwen2_5_vl.generate import generate_jit
from rdt2_jax.qwen2_5_vl.processor import PUBLISHED, process

HALF_BAR, PREFILL_BAR, DECODE_BAR = 0.7, 1.1, 1.0
"""Our time over the peer's: half of the layers beside all of them, all beside all, one token."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        task: what was done.
        ours_ms, peer_ms: medians; of one token where the task says so.
        ratio: ours / peer, median over rounds of the pairs.
        bar: the largest ratio that is good enough; None: shown only.
        floor_ms: what our row would take at the rates measured in this run; None: not counted.
        others: share of the processors that other processes used in the busiest round.
    """

    task: str
    ours_ms: float
    peer_ms: float
    ratio: float
    bar: float | None = None
    floor_ms: float | None = None
    others: float = 0.0

    @property
    def met(self) -> bool | None:
        """Whether the bar is; None without one, and where others took part."""
        return None if self.bar is None or self.others > QUIET else self.ratio <= self.bar


def measure(match: Match, rates: Rates) -> list[Row]:
    """All rows, each printed to stderr as soon as it is known."""
    rows: list[Row] = []
    for make in (processor_rows, vision_rows, prefill_rows, prefill_with_image_rows, decode_rows, generate_rows):
        for row in make(match, rates):
            print(f"{row.task}: {row.ours_ms:.2f} ms, peer {row.peer_ms:.2f} ms, {row.ratio:.2f}", file=sys.stderr)
            rows.append(row if match.setting.judged else dataclasses.replace(row, bar=None))
    return rows


Contest = tuple[str, str, str, float | None, float | None]
"""Task, names of our contestant and of the peer's, bar, floor in milliseconds."""


def contest(match: Match, contestants: dict[str, Callable[[], Any]], rows: list[Contest], per: int = 1) -> list[Row]:
    """Lets all contestants take turns; `per` is how many tokens one run makes, where rows are of one token."""
    setting = match.setting
    # where there is no bar, a rough number will do
    wanted = setting.rounds if any(bar is not None for _, _, _, bar, _ in rows) else -(-setting.rounds // 2)
    repeats = {}
    for name, function in contestants.items():
        function()  # compiled before anything counts
        repeats[name] = max(1, round(setting.seconds / elapsed_s(function)))
    rounds, others = in_quiet(
        lambda: {name: elapsed_s(function, repeats[name]) for name, function in contestants.items()}, wanted
    )
    timings = {name: Timing(tuple(turn[name] for turn in rounds)) for name in contestants}
    return [
        Row(
            task,
            1e3 * timings[ours].median_s / per,
            1e3 * timings[peer].median_s / per,
            paired_ratio(timings[ours], timings[peer]),
            bar,
            floor,
            others,
        )
        for task, ours, peer, bar, floor in rows
    ]


def elapsed_s(function: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of one call, the mean of some."""
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats


def processor_rows(match: Match, rates: Rates) -> list[Row]:
    image, theirs = match.prompt.image, image_processor(PUBLISHED)
    contestants = {
        "ours": lambda: process(image, PUBLISHED),
        "peer": lambda: theirs(images=[image], return_tensors="np"),
    }
    return contest(match, contestants, [("processor", "ours", "peer", None, None)])


def vision_rows(match: Match, rates: Rates) -> list[Row]:
    config, inputs, compute = match.config, match.prompt.inputs, match.compute
    contestants = {
        "ours": lambda: vision_tokens(match.unrolled, config, inputs, compute).block_until_ready(),
        "scanned": lambda: vision_tokens(match.stacked, config, inputs, compute).block_until_ready(),
        "peer": lambda: match.peer.vision(match.arguments),
    }
    floor = rates.compute_ms(cost.vision_flops(config.vision, inputs.grid))
    rows: list[Contest] = [
        ("vision tower", "ours", "peer", None, floor),
        ("vision tower, scanned blocks", "scanned", "peer", None, floor),
    ]
    return contest(match, contestants, rows)


def prefill_rows(match: Match, rates: Rates) -> list[Row]:
    """The decoder alone."""
    config, inputs, compute, half = match.config, match.prompt.without_image, match.compute, match.half
    part, arguments = match.peer.decoder(half), decoder_arguments(match)
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(full_prefill(match.unrolled, config, inputs, compute)),
        "peer": lambda: match.peer.prefill_decoder(match.arguments),
        "half": lambda: jax.block_until_ready(
            first_keys_values(match.unrolled, config, inputs, compute, num_layers=half)
        ),
        "peer half": lambda: part(**arguments, use_cache=True),
        "scanned": lambda: jax.block_until_ready(full_prefill(match.stacked, config, inputs, compute)),
    }
    length, layers = match.prompt.length, config.text.num_layers
    floor = rates.compute_ms(cost.prefill_flops(config, length))
    half_floor = rates.compute_ms(cost.prefill_flops(config, length, half, keys_values_only=True))
    rows: list[Contest] = [
        (f"keys and values of {half} layers, beside the peer's {layers}", "half", "peer", HALF_BAR, half_floor),
        (f"keys and values of {half} layers, beside the peer's {half}", "half", "peer half", None, half_floor),
        ("decoder prefill", "ours", "peer", PREFILL_BAR, floor),
        ("decoder prefill, scanned layers", "scanned", "peer", None, floor),
    ]
    return contest(match, contestants, rows)


def prefill_with_image_rows(match: Match, rates: Rates) -> list[Row]:
    config, inputs, compute, half = match.config, match.prompt.inputs, match.compute, match.half
    contestants = {
        "ours": lambda: jax.block_until_ready(full_prefill(match.unrolled, config, inputs, compute)),
        "peer": lambda: match.peer.prefill(match.arguments),
        "half": lambda: jax.block_until_ready(
            first_keys_values(match.unrolled, config, inputs, compute, num_layers=half)
        ),
    }
    length, layers, grid = match.prompt.length, config.text.num_layers, inputs.grid
    floor = rates.compute_ms(cost.prefill_flops(config, length, grid=grid))
    half_floor = rates.compute_ms(cost.prefill_flops(config, length, half, grid=grid, keys_values_only=True))
    rows: list[Contest] = [
        (f"vision tower + {half} layers, beside the peer's tower + {layers}", "half", "peer", None, half_floor),
        ("vision tower + decoder prefill", "ours", "peer", None, floor),
    ]
    return contest(match, contestants, rows)


def decode_rows(match: Match, rates: Rates) -> list[Row]:
    config, steps = match.config, match.setting.steps
    middle = match.prompt.length + steps // 2
    floor = rates.memory_ms(cost.decode_bytes(match.stacked.text, config.text, middle, jnp.float32))
    rows: list[Contest] = [
        ("decode, per token", "unrolled", "peer", DECODE_BAR, floor),
        ("decode, per token, scanned layers", "scanned", "peer", None, floor),
    ]
    return contest(match, decoders(match), rows, per=steps)


def generate_rows(match: Match, rates: Rates) -> list[Row]:
    """Both models' own loops, prefill included. Neither stops early: our stop token is one that never comes."""
    config, inputs, compute, steps = match.config, match.prompt.inputs, match.compute, match.setting.steps
    expected = match.peer.generate(match.arguments, steps)
    never = next(token for token in range(steps + 1) if token not in expected)

    def ours() -> np.ndarray:
        generated = generate_jit(
            match.unrolled, config, inputs, compute, max_new_tokens=steps, stop_ids=(never,), pad_id=0
        )
        return np.asarray(generated.tokens[0])

    if not np.array_equal(ours(), expected):
        raise SystemExit(f"the networks generate different tokens: {ours()} and {expected}")
    contestants = {"ours": ours, "peer": lambda: match.peer.generate(match.arguments, steps)}
    return contest(match, contestants, [(f"generate, {steps} tokens with image", "ours", "peer", None, None)])


def run(setting: Setting) -> dict[str, Any]:
    """Everything that the report says."""
    threads = equal_threads(required=setting.judged)
    size, megabytes = (2048, 512) if setting.judged else (128, 1)
    measured, _ = in_quiet(
        lambda: measure_rates(jnp.float32, size=size, megabytes=megabytes, seconds=setting.seconds, rounds=2), 3
    )
    rates = Rates(max(r.flops_per_s for r in measured), max(r.bytes_per_s for r in measured))
    match = make_match(setting)
    config = setting.config
    return {
        "mode": "beside transformers",
        "backend": jax.default_backend(),
        "threads": threads,
        "dtype": "float32",
        "prompt": {
            "tokens": match.prompt.length,
            "image_tokens": match.prompt.length - setting.num_words,
            "grid": list(match.prompt.inputs.grid or ()),
        },
        "parameters": {
            "vision": count_parameters(match.stacked.vision),
            "decoder_layers": count_parameters(match.stacked.text.layers),
            "all": count_parameters(match.stacked),
        },
        "config": repr(config),
        "matmul_gflops": rates.flops_per_s / 1e9,
        "bandwidth_gb_s": rates.bytes_per_s / 1e9,
        "differences": must_agree(match),
        "rows": [{**dataclasses.asdict(row), "met": row.met} for row in measure(match, rates)],
    }
