"""What the demo on ranks shows, and that it fails when what it compares differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from stager.demo.events import SaveFailed, write_loss
from stager.demo.leg import Aim, Kill
from stager.demo.ranks.checks import check_close, check_job_kill, check_rank_kill
from stager.demo.ranks.leg import End, JobLeg, Victim
from stager.demo.results import Check


def write_losses(path: Path, losses: dict[int, float]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for step, loss in losses.items():
            write_loss(file, step, loss)
    return path


TRUTH = {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}


def compared(tmp_path: Path, losses: dict[int, float], failed: list[SaveFailed] | None = None) -> Check:
    """A run resumed on four ranks after step 2."""
    leg = JobLeg("on-4", tmp_path / "on-4", 4)
    leg.first.failed += failed or []
    write_losses(leg.first.losses, losses)
    return check_close(write_losses(tmp_path / "truth" / "losses.jsonl", TRUTH), leg, 2, 3, 4, tolerance=1e-4)


def test_losses_that_are_nearly_equal_are_shown_with_their_largest_difference(tmp_path: Path) -> None:
    check = compared(tmp_path, {3: 3.0, 4: 2.0 + 5e-5})
    assert (check.ok, check.problems) == (True, ())
    assert check.name == "Resumed from 2 to 4 ranks: losses within 0.0001"
    assert check.detail == "2 losses, at most 5.0e-05 apart"


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        ({3: 3.0, 4: 2.0002}, "on-4: loss of step 4 differs by 2.00e-04"),
        ({3: 3.0, 4: float("nan")}, "on-4: loss of step 4 differs by nan"),
        ({3: 3.0}, r"on-4: steps [3] instead of 3 to 4"),
        ({1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}, r"on-4: steps [1, 2, 3, 4] instead of 3 to 4"),
    ],
    ids=["too far", "not a number", "not to the end", "from the start"],
)
def test_losses_that_differ_are_a_failure(losses: dict[int, float], problem: str, tmp_path: Path) -> None:
    check = compared(tmp_path, losses)
    assert (check.ok, check.problems) == (False, (problem,))


def test_save_that_failed_is_a_failure(tmp_path: Path) -> None:
    check = compared(tmp_path, {3: 3.0, 4: 2.0}, [SaveFailed(4, "no space")])
    assert (check.ok, check.problems) == (False, ("on-4: save at step 4: no space",))


def killed(victim: Victim, staged: bool = True, committed: bool = False, exit_code: int = 1) -> JobLeg:
    leg = JobLeg("killed-1", Path("."), 2)
    leg.victim = victim
    leg.first.kill = Kill(Aim.WRITING, 6, 0.0, staged, committed, True, 2, 0.1, ())
    leg.end = End(exit_code, 1.5) if victim is Victim.RANK else None
    return leg


def test_kills_in_the_middle_of_a_save_are_told() -> None:
    legs = [killed(Victim.JOB), killed(Victim.RANK, staged=False)]
    assert check_job_kill(legs).detail == "step 6 while it was written"
    assert check_rank_kill(legs).detail == "step 6 while its snapshot was taken, and the job ended 1.5 s later"
    assert check_job_kill(legs).ok
    assert check_rank_kill(legs).ok


def test_kills_that_came_too_late_are_a_failure() -> None:
    legs = [killed(Victim.JOB, committed=True), killed(Victim.RANK, committed=True)]
    assert not check_job_kill(legs).ok
    assert not check_rank_kill(legs).ok


def test_job_that_ends_well_without_one_of_its_ranks_is_a_failure() -> None:
    check = check_rank_kill([killed(Victim.RANK, exit_code=0)])
    assert check.problems == ("killed-1: torchrun's exit code is 0, although a rank was killed",)
