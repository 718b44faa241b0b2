from __future__ import annotations

import os
from pathlib import Path

import pytest

from stager.workers.checkpoint.directory.protected import change_protected_steps
from tests.cli.conftest import Outcome, flip_bit
from tests.retention.runs import everything_in


def names(run: Path) -> list[str]:
    return sorted(name for name in os.listdir(run) if name.startswith("step-"))


def test_removes_what_no_rule_keeps(run: Path) -> None:
    outcome = Outcome("prune", run, "--keep-latest", 1)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "kept     step 300: one of the newest 1" and lines[1] == "removed  step 20: no rule keeps it"
    assert lines[-1].endswith(" freed")
    assert names(run) == ["step-00000300"]


def test_dry_run_changes_nothing(run: Path) -> None:
    before = everything_in(run)
    outcome = Outcome("prune", run, "--keep-latest", 1, "--dry-run")
    assert outcome.code == 0
    assert "would remove  step 20: no rule keeps it" in outcome.out and "would be freed" in outcome.out
    assert everything_in(run) == before


def test_json_and_every_rule(run: Path) -> None:
    change_protected_steps(str(run), lambda steps: steps | {1})
    answer = Outcome("prune", run, "--keep-every", 100, "--protect", 20, "--json").json
    assert (answer["ok"], answer["dry_run"], answer["freed_bytes"]) == (True, False, 0)
    assert [(row["step"], row["fate"], row["reason"]) for row in answer["checkpoints"]] == [
        (300, "kept", "one of the newest 1"),
        (20, "kept", "protected"),
        (1, "kept", "protected"),
    ]


def test_damaged_newest_is_a_no_and_the_one_before_stays(run: Path) -> None:
    flip_bit(run / "step-00000300" / "__0_0.distcp", 5000)
    outcome = Outcome("prune", run, "--keep-latest", 1)
    assert outcome.code == 1
    assert "left     step 300: damaged: " in outcome.out and "kept     step 20: " in outcome.out
    assert names(run) == ["step-00000020", "step-00000300"]
    assert Outcome("prune", run, "--keep-latest", 1, "--quick").code == 0  # names and sizes are as committed
    assert names(run) == ["step-00000300"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--keep-latest, --keep-every, --keep-every-secs and --keep-best"),
        (("--protect", "1"), "--keep-latest, --keep-every, --keep-every-secs and --keep-best"),
        (("--keep-latest", "0"), "keep-latest"),
        (("--keep-every", "-1"), "keep-every"),
        (("--keep-every-secs", "0"), "keep_every_secs is 0"),
        (("--keep-best", "loss:0"), "count must be at least 1"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], words: str, saved_run: Path) -> None:
    outcome = Outcome("prune", saved_run, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


def test_one_checkpoint_and_no_directory(saved_run: Path) -> None:
    assert Outcome("prune", saved_run / "step-00000001", "--keep-latest", 1).code == 2
    outcome = Outcome("prune", saved_run / "none", "--keep-latest", 1)
    assert outcome.code == 1 and "no such directory" in outcome.err
