"""The benchmark of the policies runs in both of its kinds and reports every row; how fast is not asked here. Its peer
is the published network, and its reader of compiled programs sees copies of weights."""

from __future__ import annotations

import importlib.util
import json

import pytest
from benchmark_runs import REPOSITORY, run_benchmark

BENCHMARKS = REPOSITORY / "benchmarks"


def run(*arguments, absent=()):
    return run_benchmark("policies.py", *arguments, absent=absent)


def module(name, path):
    """A module of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.torch_peer
def test_rows_beside_torch_and_transformers(tmp_path):
    done = run("--device", "cpu", "--quick", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["task"] for row in report["rows"]] == [
        "expert (in proportion): one velocity",
        "expert (in proportion): sample of 5 steps",
        "expert (in proportion): sample of 1 step",
        "chunk, fm (expert in proportion)",
        "chunk, one-step (expert in proportion)",
        "chunk, vq",
    ]
    for row in report["rows"]:
        assert row["task"] in done.stdout
        assert row["ours_ms"] > 0
        assert row["peer_ms"] > 0
        assert row["ratio"] > 0
        assert row["of_prefill"] > 0
    differences = report["differences"]
    assert differences.pop("action tokens, share that differs") == 0.0
    assert len(differences) == 6
    assert max(differences.values()) < 1e-4
    assert set(report["stages_ms"]) == {"fm", "one-step", "vq"}


def test_rows_beside_floors_without_torch(tmp_path):
    options = "--device", "cpu", "--quick", "--preset", "tiny", "--json", str(tmp_path / "report.json")
    done = run(*options, absent=("torch", "transformers"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    whole, infer = "pixels on the device to chunk", "infer: images on the host to chunk"
    stages = {
        "fm": [whole, "vision", "prefill", "expert", infer],
        "one-step": [whole, "vision", "prefill", "expert", infer],
        "vq": [whole, "vision", "prefill", "decode", "detokenise", infer],
        "vq int8": [whole, "vision", "prefill", "decode", "detokenise", infer],
    }
    for policy, tasks in stages.items():
        rows = [row for row in report["rows"] if row["policy"] == policy]
        assert [row["task"] for row in rows] == tasks
        floors = {row["task"]: row["floor_ms"] for row in rows}
        assert floors.pop(infer) is None
        assert floors.pop(whole) == pytest.approx(sum(floors.values()))
        assert min(floors.values()) > 0
    host = [row for row in report["rows"] if row["policy"] == "host"]
    assert len(host) == 5
    for row in report["rows"]:
        assert row["error"] is None
        assert row["ms"] > 0
        assert row["of_prefill"] > 0
        # bars are those of the published sizes on one kind of device
        assert row["bar"] is None
    floor = {(row["policy"], row["task"]): row["floor_ms"] for row in report["rows"]}
    assert floor["one-step", "expert"] < floor["fm", "expert"] < 5 * floor["one-step", "expert"] * 1.01
    assert floor["one-step", "prefill"] == floor["fm", "prefill"] < floor["vq", "prefill"]
    assert floor["vq int8", "decode"] < floor["vq", "decode"]
    assert max(report["differences"].values()) < 1e-4


@pytest.mark.torch_peer
def test_the_peer_of_the_expert_is_the_published_network(golden):
    import torch

    from rdt2_jax.action_expert.config import read_config

    folder = REPOSITORY / "tests" / "golden" / "rdt_tiny"
    peer = module("rdt_torch", BENCHMARKS / "peers" / "rdt_torch.py")
    config, arrays = read_config(folder), golden("rdt_tiny", "io.npz")

    def given(name):
        return torch.from_numpy(arrays[f"in/{name}"])

    expert = peer.ActionExpert.from_file(config, folder / "model.safetensors")
    keys_values = [(given(f"k{i}"), given(f"v{i}")) for i in range(config.num_layers)]
    rest = keys_values, given("mask"), given("state")[:, 0]
    velocities = {
        "velocity_t0": torch.zeros(3),
        "velocity_t0.5": torch.full((3,), 0.5),
        "velocity_t_per_sample": given("timesteps_f32"),
    }
    for name, t in velocities.items():
        found = expert.velocity(given("action"), t, *rest).numpy()
        assert found == pytest.approx(arrays[f"f32/{name}"], abs=2e-5)
    for steps in (1, 5):
        found = expert.sample(given("init"), *rest, steps).numpy()
        assert found == pytest.approx(arrays[f"f32/sample_{steps}step"], abs=2e-5)


CONVERTED_AS_IT_IS_READ = """
HloModule decode, is_scheduled=true

%gemm_computation (weight: s8[256,512], x: bf16[1,512]) -> f32[1,256] {
  %weight = s8[256,512]{1,0} parameter(0)
  %x = bf16[1,512]{1,0} parameter(1)
  %convert.1 = bf16[256,512]{1,0} convert(%weight)
  ROOT %dot.1 = f32[1,256]{1,0} dot(%x, %convert.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (weight.1: s8[256,512], x.1: bf16[1,512]) -> (f32[1,256], bf16[131072]) {
  %weight.1 = s8[256,512]{1,0} parameter(0)
  %x.1 = bf16[1,512]{1,0} parameter(1)
  %unrelated = bf16[131072]{0} broadcast(%x.1), dimensions={}
  %gemm_fusion = f32[1,256]{1,0} fusion(%weight.1, %x.1), kind=kCustom, calls=%gemm_computation
  ROOT %tuple.1 = (f32[1,256]{1,0}, bf16[131072]{0}) tuple(%gemm_fusion, %unrelated)
}
"""

CONVERTED_BEFORE_THE_LOOP = """
HloModule decode, is_scheduled=true

%convert_computation (p: s8[256,512]) -> bf16[512,256] {
  %p = s8[256,512]{1,0} parameter(0)
  %convert.1 = bf16[256,512]{1,0} convert(%p)
  ROOT %transpose.1 = bf16[512,256]{0,1} transpose(%convert.1), dimensions={1,0}
}

%body (state: (s32[], bf16[1,512], /*index=2*/bf16[512,256])) -> (s32[], bf16[1,512], bf16[512,256]) {
  %state = (s32[], bf16[1,512]{1,0}, /*index=2*/bf16[512,256]{0,1}) parameter(0)
  %weight.2 = bf16[512,256]{0,1} get-tuple-element(%state), index=2
}

ENTRY %main (weight.1: s8[256,512]) -> bf16[1,512] {
  %weight.1 = s8[256,512]{1,0} parameter(0)
  %hoisted = bf16[512,256]{0,1} fusion(%weight.1), kind=kLoop, calls=%convert_computation
  %start = (s32[], bf16[1,512]{1,0}, /*index=2*/bf16[512,256]{0,1}) tuple(%zero, %x, %hoisted)
  %while.1 = (s32[], bf16[1,512]{1,0}, /*index=2*/bf16[512,256]{0,1}) while(%start), condition=%more, body=%body
  ROOT %last = bf16[1,512]{1,0} get-tuple-element(%while.1), index=1
}
"""

CONVERTED_IN_TWO_RESULTS = """
ENTRY %main (weight.1: s8[256,512]) -> bf16[1,512] {
  %weight.1 = s8[256,512]{1,0} parameter(0)
  %plain = bf16[256,512]{1,0} convert(s8[256,512]{1,0} %weight.1)
  %both = (s8[256,512]{1,0}, f32[256,512]{1,0}) fusion(%weight.1), kind=kLoop, calls=%split
}
"""


@pytest.mark.parametrize(
    ("text", "copies"),
    [
        (CONVERTED_AS_IT_IS_READ, []),
        (CONVERTED_BEFORE_THE_LOOP, ["main: %hoisted"]),
        (CONVERTED_IN_TWO_RESULTS, ["main: %plain", "main: %both"]),
    ],
)
def test_copies_of_weights_are_seen(text, copies):
    found = module("policies_hlo", BENCHMARKS / "policies_hlo.py").float_copies(text, {256 * 512})
    assert [line.split(" = ")[0] for line in found] == copies


def test_weights_of_other_sizes_are_no_copies():
    hlo = module("policies_hlo", BENCHMARKS / "policies_hlo.py")
    assert hlo.float_copies(CONVERTED_BEFORE_THE_LOOP, {100}) == []


def test_copies_in_a_program_that_xla_compiled():
    """The reader follows what XLA writes today: a weight that two products share in a loop, and one product."""
    import jax
    import jax.numpy as jnp

    float_copies = module("policies_hlo", BENCHMARKS / "policies_hlo.py").float_copies

    def once(weight, x):
        return x @ weight.astype(jnp.float32).T

    def written(weight, x):
        return weight.astype(jnp.float32), x

    arguments = jnp.ones((256, 512), jnp.int8), jnp.ones((1, 512))
    assert float_copies(jax.jit(once).lower(*arguments).compile().as_text(), {256 * 512}) == []
    (line,) = float_copies(jax.jit(written).lower(*arguments).compile().as_text(), {256 * 512})
    assert "f32[256,512]" in line


def test_what_fails_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    failures = module("policies", BENCHMARKS / "policies.py").failures
    fine = {"policy": "fm", "task": "chunk", "ms": 14.0, "bar": 15.0, "met": True, "error": None}
    over = {**fine, "policy": "vq", "ms": 130.0, "bar": 120.0, "met": False}
    broken = {**fine, "task": "vision", "ms": None, "bar": None, "met": None, "error": "RuntimeError: no memory"}
    beside_peer = {"task": "chunk, fm", "ours_ms": 1.0, "peer_ms": 0.5, "ratio": 2.0}
    assert failures({"rows": [fine, beside_peer]}) == []
    agreement = {"differences": {"fm": 1e-3, "vq": float("nan")}, "differences_tolerance": 0.05}
    assert failures({"rows": [fine, over, broken], **agreement}) == [
        "over the bar: vq, chunk: 130.0 ms > 120.0 ms",
        "failed: fm, vision: RuntimeError: no memory",
        "what was timed is not what the policy does: vq, relative difference nan",
    ]
