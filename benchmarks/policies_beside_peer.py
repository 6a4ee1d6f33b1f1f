"""Rows of the action expert and of whole policies beside torch and transformers, and beside our own prefill.

The peer does what the public code does: all layers of the backbone, modulations in every step, tokens without
constraints. Outputs are compared before any timing.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from bystanders import in_quiet
from policies_contestants import (
    PeerPolicies,
    expert_tasks,
    must_agree,
    policies,
    prefill_function,
    vq_policy,
)
from policies_match import ExpertMatch, PolicyMatch, PolicySetting, make_policy_match
from qwen_beside_peer import contest
from qwen_match import equal_threads
from rates import Rates, measure_rates

from rdt2_jax.action_expert import cost
from rdt2_jax.params import count_parameters
from rdt2_jax.policy.base import BackbonePolicy
from rdt2_jax.policy.clock import StageClock


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; nothing is asked of it.

    Attributes:
        task: what was done.
        ours_ms, peer_ms: medians.
        ratio: ours / peer, median over rounds of the pairs.
        of_prefill: ours / our prefill of half of the layers, likewise.
        floor_ms: what ours would take at the rates measured in this run; None: not counted.
        others: share of the processors that other processes used in the busiest round.
    """

    task: str
    ours_ms: float
    peer_ms: float
    ratio: float
    of_prefill: float
    floor_ms: float | None
    others: float


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Something that both sides do."""

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    floor_ms: float | None = None


def tasks(both: PolicyMatch, rates: Rates) -> Iterator[list[Task]]:
    """What is timed; tasks of one list take turns with each other."""
    peers = PeerPolicies(both)
    for name, expert in both.experts.items():
        sides = expert_tasks(both, expert)
        floors = expert_floors_ms(both, expert, rates)
        yield [
            Task(f"expert ({name}): {task}", ours, sides.peer[task], floor)
            for (task, ours), floor in zip(sides.ours.items(), floors, strict=True)
        ]
        for policy, steps in zip(policies(both, expert), (expert.config.num_steps, 1), strict=True):
            if steps > 1 or expert is both.proportionate:
                ours = infer(policy, both)
                yield [Task(f"chunk, {policy.kind} (expert {name})", ours, lambda e=expert, n=steps: peers.flow(e, n))]
    yield [Task("chunk, vq", infer(vq_policy(both), both), peers.vq)]


def infer(policy: BackbonePolicy, both: PolicyMatch) -> Callable[[], Any]:
    return lambda: policy.infer(both.observation)


def expert_floors_ms(both: PolicyMatch, expert: ExpertMatch, rates: Rates) -> tuple[float, float, float]:
    """Of one velocity, of all steps, of one step: what each part takes by arithmetic or by memory."""
    config, params = expert.config, expert.loaded.params
    length = int(both.inputs.valid.sum())
    read = rates.memory_ms(cost.velocity_bytes(params, config, length, jnp.float32))
    velocity = max(rates.compute_ms(cost.velocity_flops(config, length)), read)

    def whole(num_velocities: int) -> float:
        prepared = rates.compute_ms(cost.prepare_flops(config, num_velocities))
        return max(prepared, rates.memory_ms(cost.prepare_bytes(params))) + num_velocities * velocity

    return whole(1), whole(config.num_steps), whole(1)


def measure(both: PolicyMatch, rates: Rates) -> list[Row]:
    """All rows, each printed to stderr as soon as it is known; our prefill takes turns with everything."""
    prefill, rows = prefill_function(both), []
    for group in tasks(both, rates):
        contestants: dict[str, Callable[[], Any]] = {"prefill": prefill}
        wanted = []
        for task in group:
            contestants |= {task.name: task.ours, f"{task.name}, peer": task.peer}
            wanted += [
                (task.name, task.name, f"{task.name}, peer", None, task.floor_ms),
                (task.name, task.name, "prefill", None, None),
            ]
        found = contest(both.match, contestants, wanted)
        for beside_peer, beside_prefill in zip(found[::2], found[1::2], strict=True):
            row = Row(
                beside_peer.task,
                beside_peer.ours_ms,
                beside_peer.peer_ms,
                beside_peer.ratio,
                beside_prefill.ratio,
                beside_peer.floor_ms,
                beside_peer.others,
            )
            shown = f"{row.ours_ms:.2f} ms, peer {row.peer_ms:.2f} ms, {row.ratio:.2f}; {row.of_prefill:.2f} prefills"
            print(f"{row.task}: {shown}", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def stages_ms(both: PolicyMatch) -> dict[str, dict[str, float]]:
    """Milliseconds of every stage of one chunk of each of our policies, the best of three."""
    found = {}
    for policy in (*policies(both, both.proportionate), vq_policy(both)):
        runs = []
        for _ in range(3):
            clock = StageClock()
            policy.infer_batch([both.observation], clock=clock)
            runs.append(clock)
        found[policy.kind] = min(runs, key=lambda run: run.total_ms).milliseconds
    return found


def run(setting: PolicySetting) -> dict[str, Any]:
    """Everything that the report says."""
    judged = setting.backbone.judged
    threads = equal_threads(required=judged)
    size, megabytes = (2048, 512) if judged else (128, 1)
    seconds = setting.backbone.seconds
    measured, _ = in_quiet(
        lambda: measure_rates(jnp.float32, size=size, megabytes=megabytes, seconds=seconds, rounds=2), 3
    )
    rates = Rates(max(r.flops_per_s for r in measured), max(r.bytes_per_s for r in measured))
    both = make_policy_match(setting)
    return {
        "mode": "beside torch and transformers",
        "backend": jax.default_backend(),
        "threads": threads,
        "dtype": "float32",
        "prompt": {"tokens": int(both.inputs.valid.sum()), "padded": both.inputs.valid.shape[1]},
        "layers": {"ours": both.match.half, "peer": both.match.config.text.num_layers},
        "parameters": {
            "backbone": count_parameters(both.match.stacked),
            **{f"expert, {name}": count_parameters(e.loaded.params) for name, e in both.experts.items()},
        },
        "matmul_gflops": rates.flops_per_s / 1e9,
        "bandwidth_gb_s": rates.bytes_per_s / 1e9,
        "differences": must_agree(both),
        "rows": [dataclasses.asdict(row) for row in measure(both, rates)],
        "stages_ms": stages_ms(both),
    }
