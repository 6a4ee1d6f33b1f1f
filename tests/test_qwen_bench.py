"""The benchmark of Qwen2.5-VL runs in both of its kinds and reports every row; how fast is not asked here."""

from __future__ import annotations

import json

import pytest
from benchmark_runs import run_benchmark


def run(*arguments, absent=()):
    return run_benchmark("qwen2_5_vl.py", *arguments, absent=absent)


@pytest.mark.torch_peer
def test_rows_beside_transformers(tmp_path):
    done = run("--device", "cpu", "--quick", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    tasks = [row["task"] for row in report["rows"]]
    for task in (
        "processor",
        "vision tower",
        "keys and values of 1 layers, beside the peer's 2",
        "keys and values of 1 layers, beside the peer's 1",
        "decoder prefill",
        "decoder prefill, scanned layers",
        "vision tower + 1 layers, beside the peer's tower + 2",
        "vision tower + decoder prefill",
        "decode, per token",
        "generate, 4 tokens with image",
    ):
        assert tasks.count(task) == 1, tasks
        assert task in done.stdout
    assert all(row["ours_ms"] > 0 and row["peer_ms"] > 0 and row["ratio"] > 0 for row in report["rows"])
    # tiny sizes are not judged
    assert all(row["bar"] is None and row["met"] is None for row in report["rows"])
    assert report["threads"]["torch"] >= 1
    assert report["differences"]["logits with image"] < 1e-4
    assert report["differences"]["decoded tokens, share that differs"] == 0.0


def test_rows_beside_floors_without_torch(tmp_path):
    options = "--device", "cpu", "--quick", "--preset", "tiny", "--json", str(tmp_path / "report.json")
    done = run(*options, absent=("torch", "transformers"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["task"], row["attention"]) for row in report["rows"]] == [
        ("vision tower", "xla"),
        ("vision tower, keys and values of 2 layers", "xla"),
        ("vision tower, prefill of all layers, logits", "xla"),
        ("decode, per token", "-"),
        ("decode, per token, int8 weights", "-"),
    ]
    for row in report["rows"]:
        assert row["error"] is None
        assert row["ms"] > 0
        assert row["arithmetic_floor_ms"] > 0
        assert row["memory_floor_ms"] > 0
    wide, narrow = report["rows"][-2:]
    assert narrow["memory_floor_ms"] < 0.6 * wide["memory_floor_ms"]
    assert report["matmul_tflops"] > 0
    assert report["bandwidth_gb_s"] > 0


def test_a_gpu_that_is_not_there():
    done = run("--device", "gpu")
    assert done.returncode != 0
    assert "there is no GPU that jax can use" in done.stderr
