"""The smaller benchmarks run, tiny."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forked_subprocess
from tests.benchmarks import listeners, object_store, weights
from tests.benchmarks.launch import ROOT
from tests.benchmarks.python_values import CASES


def _run(module: str, out: Path, *arguments: str) -> list[dict[str, Any]]:
    forked_subprocess.run([sys.executable, "-m", module, "--out", str(out), *arguments], check=True, cwd=ROOT)
    results: list[dict[str, Any]] = json.loads(out.read_text())
    return results


def test_loading(tmp_path: Path) -> None:
    results = _run("tests.benchmarks.loading", tmp_path / "out.json", "--scale", "0.001", "--rounds", "1")
    assert [one["case"] for one in results] == ["big", "small"]
    assert all(one["dcp.load / stager"] > 0 for one in results)


def test_python_values(tmp_path: Path) -> None:
    arguments = ("--scale", "0.001", "--rounds", "1")
    results = _run("tests.benchmarks.python_values", tmp_path / "out.json", *arguments)
    assert [one["case"] for one in results] == list(CASES)
    for one in results:
        assert all(one[ratio] > 0 for ratio in ("stall / torch.save", "size / torch.save", "load / torch.load"))


def test_many_tensors(tmp_path: Path) -> None:
    arguments = ("--count", "50", "--rounds", "1")
    results = _run("tests.benchmarks.many_tensors", tmp_path / "out.json", *arguments)
    assert [one["tensors"] for one in results] == [50]
    assert all(one[name] > 0 for one in results for name in ("first_ms", "later_ms", "stored_ms", "loaded_ms"))


def test_ranks(tmp_path: Path) -> None:
    arguments = ("--ranks", "2", "--mib", "2", "--pairs", "1", "--stretch", "2")
    results = _run("tests.benchmarks.ranks", tmp_path / "out.json", *arguments)
    assert [(one["ranks"], one["peer"]) for one in results] == [
        (2, peer) for peer in ("stager", "stager-replicated", "dcp-thread")
    ]
    assert all(one["blocked_ms"] > 0 for one in results)


def test_replication(tmp_path: Path) -> None:
    arguments = ("--mib", "1", "--rounds", "1", "--memory", str(tmp_path))
    (result,) = _run("tests.benchmarks.replication", tmp_path / "out.json", *arguments)
    assert list(result["resume"]) == ["disk, cold", "disk, warm", "memory"]
    assert all(row["both_secs"] > 0 for row in result["resume"].values())
    assert result["to_partner_secs"] > 0


@pytest.mark.long  # a dozen processes that import torch
def test_weights(tmp_path: Path) -> None:
    arguments = ["--mib", "8", "--rounds", "1", "--directory", str(tmp_path), "--out", str(tmp_path / "out.json")]
    result = weights.main(arguments)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert list(result["legs"]) == ["raw", "stager", "stager, bfloat16", "dcp"]
    assert all(one["secs"] > 0 and one["peak_bytes"] > 0 for one in result["legs"].values())


@pytest.mark.long  # needs the extra bench, and a dozen processes that import torch
def test_object_store(tmp_path: Path) -> None:
    pytest.importorskip("s3torchconnector", reason="pip install 's3torchconnector[dcp]'")
    result = object_store.main(["--mib", "64", "--rounds", "1", "--out", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert list(result["legs"]) == ["obstore", "stager", "s3torchconnector"]
    assert all(one["secs"] > 0 for phases in result["legs"].values() for one in phases.values())


def test_worker_stager(tmp_path: Path) -> None:
    arguments = ("--scale", "0.001", "--rounds", "1", "--case", "gpt2")
    (one,) = _run("tests.benchmarks.worker_stager", tmp_path / "out.json", *arguments)
    assert one["failed"] == {}
    assert all(ratio["staged"] > 0 for ratio in one["ratios"].values())


def test_listeners(capsys: pytest.CaptureFixture[str]) -> None:
    listeners.main(["--rounds", "1", "--scale", "0.001"])
    out = capsys.readouterr().out
    assert (
        all(f"{state}, in save()" in out for state in ("256 MiB", "20,000 x 1 KiB")) and out.count("OpenTelemetry") == 8
    )
