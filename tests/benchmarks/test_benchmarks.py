"""The benchmark runs, tiny, so that it keeps running."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_benchmark_runs_and_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.benchmarks", "--rounds", "1", "--scale", "0.001", "--out", str(out)]
    subprocess.run([*command, "--directory", str(tmp_path)], check=True, stdout=subprocess.PIPE)
    results = json.loads(out.read_text())
    assert set(results["cases"]) == {"big", "small"}
    for case in results["cases"].values():
        assert {"stager", "torch.save + fsync", "dcp.async_save", "limits"} == set(case["samples"])
        assert all(values and min(values) > 0 for figures in case["samples"].values() for values in figures.values())
