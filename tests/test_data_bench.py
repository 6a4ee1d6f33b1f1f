"""The benchmark of the training stream runs and reports every row; how fast is not asked here."""

from __future__ import annotations

import json

import pytest
from benchmark_runs import run_benchmark


@pytest.mark.torch_peer
def test_rows_beside_webdataset(tmp_path):
    done = run_benchmark("data.py", "--quick", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["samples_per_second"]) == {
        "ours",
        "decode and collate alone",
        "webdataset, simplejpeg, 0 workers",
        "webdataset, simplejpeg, 2 workers",
        "webdataset, Pillow, 0 workers",
        "webdataset, Pillow, 2 workers",
    }
    assert all(row["least"] > 0 for row in report["samples_per_second"].values())
    assert [row["samples"] for row in report["index"]] == [50, 100]
    assert [row["shards"] for row in report["memory"]] == [2, 4]
    assert all(row["imported_mb"] < row["peak_mb"] for row in report["memory"])
