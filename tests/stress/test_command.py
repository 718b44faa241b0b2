"""The command line: exit codes, what is printed, what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import Outcome


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command, which may give itself mounts of its own."""
    command = [sys.executable, "-m", "stager", "stress", "--out", str(out), "--set", "stress.max_saves=3"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=150, check=False)


def test_nothing_wrong_is_0_and_leaves_the_results_only(tmp_path: Path) -> None:
    ended = run(tmp_path, "--seed", "5", "--episode", "1", "--set", "stress.max_faults=0", "--json")
    assert ended.returncode == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed == json.loads((tmp_path / "stress.json").read_text())
    assert printed["ok"] and printed["counts"]["episodes"] == 1 and printed["counts"]["committed"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server.log", "stress.json"]


def test_violation_is_1_with_seed_episode_evidence_and_the_command_that_repeats_it(tmp_path: Path) -> None:
    arguments = (
        "--seed",
        "5",
        "--episode",
        "1",
        "--set",
        "stress.max_faults=0",
        "--set",
        "stress.run_deadline_secs=0.01",
    )
    ended = run(tmp_path, *arguments)
    assert ended.returncode == 1, ended.stderr
    assert "VIOLATION in episode 1" in ended.stdout
    assert "the trainer hung" in ended.stdout
    assert "stager stress --seed 5 --episode 1" in ended.stdout
    assert (tmp_path / "episode-00001" / "plan.json").exists()
    assert not json.loads((tmp_path / "stress.json").read_text())["ok"]


def test_wrong_use_is_2(tmp_path: Path) -> None:
    (tmp_path / "something of mine").touch()
    assert Outcome("stress", "--out", tmp_path).code == 2
    outcome = Outcome("stress", "--out", tmp_path / "new", "--set", "stress.max_fault=1")
    assert outcome.code == 2
    assert "did you mean stress.max_faults?" in outcome.err
    assert not (tmp_path / "new").exists()
