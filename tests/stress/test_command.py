"""The command line: exit codes, what is printed, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Outcome

# One run of one trainer with one worker, three saves, nothing that needs mounting.
SHORT = (
    "stress.max_saves=3",
    "stress.max_faults=0",
    "stress.faults=[point]",
    "workers.count=1",
    "arena.when_full=wait",
)


def run(out: Path, *arguments: str) -> Outcome:
    settings = [word for setting in SHORT for word in ("--set", setting)]
    return Outcome("stress", "--out", out, "--seed", "5", "--episode", "7", *settings, *arguments)


def test_nothing_wrong_is_0_and_leaves_the_results_only(tmp_path: Path) -> None:
    ended = run(tmp_path, "--json")
    assert ended.code == 0, ended.out
    assert ended.json == json.loads((tmp_path / "stress.json").read_text())
    counts = ended.json["counts"]
    assert ended.json["ok"] and (counts["episodes"], counts["committed"], counts["violations"]) == (1, 3, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server.log", "stress.json"]


def test_violation_is_1_with_seed_episode_evidence_and_the_command_that_repeats_it(tmp_path: Path) -> None:
    ended = run(tmp_path, "--set", "stress.run_deadline_secs=0.01")
    assert ended.code == 1
    assert "VIOLATION in episode 7" in ended.out
    assert "the trainer hung" in ended.out
    assert "stager stress --seed 5 --episode 7" in ended.out
    assert (tmp_path / "episode-00007" / "plan.json").exists()
    assert not json.loads((tmp_path / "stress.json").read_text())["ok"]


def test_wrong_use_is_2(tmp_path: Path) -> None:
    (tmp_path / "something of mine").touch()
    assert Outcome("stress", "--out", tmp_path).code == 2
    outcome = Outcome("stress", "--out", tmp_path / "new", "--set", "stress.max_fault=1")
    assert outcome.code == 2
    assert "did you mean stress.max_faults?" in outcome.err
    assert not (tmp_path / "new").exists()
