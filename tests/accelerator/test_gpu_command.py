"""``python -m tests.gpu``, the program for a machine with an accelerator, runs on the simulated one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerator import build
from tests.gpu.__main__ import PEERS, ROOT

pytestmark = pytest.mark.costly_fixture  # the build


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu", "--dry", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    try:
        build.build()
    except build.CannotBuildError as error:
        pytest.skip(str(error))


@pytest.mark.timeout(300)
def test_tests_and_measurements_make_a_report(tmp_path: Path) -> None:
    few = ("--tests", "tests/device/test_rng_state.py", "--case", "small", "--peer", "stager")
    ended = _run("--out", str(tmp_path), *few)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "device.json").read_text())
    assert found["tests"]["failed"] == [] and "passed" in found["tests"]["summary"]
    (ours,) = found["measured"]
    assert ours["outcome"] == "ok" and ours["correct"] is True and len(ours["staged_secs"]) == 3
    assert "## small: " in (tmp_path / "device.md").read_text()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_everything_small(tmp_path: Path) -> None:
    ended = _run("--out", str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "device.json").read_text())
    assert [row["peer"] for row in found["measured"]] == [*PEERS, *PEERS]
    (only_stages, _) = (row for row in found["measured"] if row["peer"] == "torch-stager")
    assert only_stages["outcome"] == "ok" and "load_secs" not in only_stages


@pytest.mark.timeout(300)
def test_what_does_not_fit_into_the_time_is_left_out_and_said(tmp_path: Path) -> None:
    ended = _run("--out", str(tmp_path), "--tests", "--case", "small", "--peer", "stager", "--minutes", "0.05")
    assert ended.returncode == 1
    (row,) = json.loads((tmp_path / "device.json").read_text())["measured"]
    assert row["outcome"] == "no time was left"
