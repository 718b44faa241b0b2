"""The whole demo on ranks, once, small, as a user starts it; and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stager import Checkpointer
from stager.demo.job import job_environment
from stager.demo.workspace import Workspace
from tests import forked_subprocess
from tests.demo.conftest import TINY_ON_RANKS

pytestmark = [pytest.mark.costly_fixture, pytest.mark.timeout(400)]  # seven jobs


def torchrun(num_ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--log-dir", os.devnull]
    command = [sys.executable, "-m", *launcher, "--nproc-per-node", str(num_ranks), "-m", "stager", "demo"]
    environment = {**job_environment(os.environ), forked_subprocess.LAUNCHES: "1"}
    return forked_subprocess.run([*command, *map(str, arguments)], env=environment)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Workspace]:
    """All acts of a tiny demo, and what they left."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "tiny.yaml").write_text(yaml.safe_dump({"demo": TINY_ON_RANKS}))
    out = directory / "out"
    return torchrun(2, "--config", directory / "tiny.yaml", "--out", out), Workspace(out)


@pytest.fixture(scope="module")
def results(told: tuple[subprocess.CompletedProcess[str], Workspace]) -> dict[str, Any]:
    done, workspace = told
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(workspace.results.read_text())
    return found


def test_demo_on_two_ranks_shows_everything(results: dict[str, Any]) -> None:
    assert results["ok"] is True
    assert [check["name"] for check in results["checks"]] == [
        "SIGKILL in the middle of a save",
        "No worker alive 10 s after a kill",
        "Resumed from the newest valid checkpoint",
        "Losses equal, bit for bit",
        "Final state equal, bit for bit",
        "Resumed from 2 to 1 rank: losses within 0.0001",
        "Stock dcp.load, no stager imported, equal",
    ]
    assert [check for check in results["checks"] if not check["ok"]] == []


def test_job_and_rank_were_killed_and_the_run_went_on_from_a_checkpoint_each_time(results: dict[str, Any]) -> None:
    assert len(results["kills"]) >= 2
    assert {kill["aim"] for kill in results["kills"]} == {"staging", "writing"}
    assert all(kill["num_workers"] > 0 and kill["left"] == [] for kill in results["kills"])
    first, *others = results["resumed_from"]
    assert first == 0
    assert others == sorted(others)
    assert others[0] > 0


def test_report_is_printed_once(told: tuple[subprocess.CompletedProcess[str], Workspace], results: object) -> None:
    done, workspace = told
    assert done.stdout.count("What was shown") == 1
    assert "all shown in" in done.stdout
    assert "NO" not in done.stdout
    assert str(workspace.chart) in done.stdout
    assert workspace.chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_last_checkpoint_has_each_ranks_own_state(
    told: tuple[subprocess.CompletedProcess[str], Workspace], results: object
) -> None:
    _, workspace = told
    loaded = Checkpointer(workspace.checkpoints, read_only=True).load()
    assert loaded is not None
    assert loaded.step == TINY_ON_RANKS["steps"]
    rng = loaded.state["rng"]
    assert list(rng) == ["rank-0", "rank-1"]
    assert not torch.equal(rng["rank-0"]["torch"], rng["rank-1"]["torch"])
    assert loaded.state["model"]["tokens.weight"].shape == (256, TINY_ON_RANKS["n_embd"])


def test_large_files_of_a_demo_that_went_well_are_removed(
    told: tuple[subprocess.CompletedProcess[str], Workspace], results: object
) -> None:
    _, workspace = told
    assert list(workspace.root.glob("runs/*/final.pt")) == []
    assert list(workspace.root.glob("runs/*/checkpoints")) == []
    assert len(list(Path(workspace.checkpoints).glob("step-*"))) == 3


def test_jobs_logged_nothing_but_what_happened_to_them(
    told: tuple[subprocess.CompletedProcess[str], Workspace], results: dict[str, Any]
) -> None:
    """Nothing of stager's warns on the happy path."""
    _, workspace = told
    for name in ("on-1", "resumed"):
        log = (workspace.root / "runs" / name / "log.txt").read_text()
        warned = [line for line in log.splitlines() if "Warning" in line and "left by an earlier run" not in line]
        assert warned == []


def test_directory_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    done = torchrun(2, "--out", tmp_path)
    assert done.returncode == 1
    assert "not empty and not from an earlier demo" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_without_torchrun_it_says_how_to_start_it() -> None:
    command = [sys.executable, "-m", "stager", "demo", "--config", "configs/torchrun.yaml"]
    root = Path(__file__).parents[2]
    done = forked_subprocess.run(command, cwd=root, env=job_environment(os.environ))
    assert (done.returncode, done.stdout) == (2, "")
    assert "torchrun --nproc-per-node 2 -m stager demo --config configs/torchrun.yaml" in done.stderr
