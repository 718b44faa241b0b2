"""Kills are told, and are failures when they hit nothing; losses on other numbers of ranks are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from stager.demo.checks import check_close, check_kills, check_resumes
from stager.demo.events import Resumed, SaveFailed, write_loss
from stager.demo.leg import Aim, Kill, Leg
from stager.demo.results import Check
from tests.demo.saves import begun, said, whole_save


def write_losses(path: Path, losses: dict[int, float]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for step, loss in losses.items():
            write_loss(file, step, loss)


TRUTH = {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}


def compared(tmp_path: Path, losses: dict[int, float], failed: list[SaveFailed] | None = None) -> Check:
    """A run resumed on four ranks after step 2."""
    truth, leg = Leg("truth", tmp_path / "truth", 2), Leg("on-4", tmp_path / "on-4", 4)
    leg.first.failed += failed or []
    write_losses(leg.losses, losses)
    write_losses(truth.losses, TRUTH)
    return check_close(truth, leg, range(3, 5), tolerance=1e-4)


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


def killed(aim: Aim, committed: bool = False, exit_code: int = 1, num_ranks: int = 2) -> Leg:
    """A leg killed in the save at step 6, where it was aimed at."""
    leg = Leg("killed-1", Path("."), num_ranks)
    leg.kill = Kill(aim, 6, 0.0, aim is Aim.WRITING, committed, True, 2, exit_code, 1.5, 0.1, ())
    return leg


def test_kills_in_the_middle_of_a_save_are_told() -> None:
    check = check_kills([killed(Aim.WRITING), killed(Aim.STAGING)])
    assert (check.ok, check.problems) == (True, ())
    assert check.detail == (
        "all ranks, step 6 while it was written; "
        "one rank, step 6 while its snapshot was taken (the job ended 1.5 s later)"
    )


def test_kills_of_a_single_rank_are_told_without_ranks() -> None:
    check = check_kills([killed(Aim.STAGING, num_ranks=1), killed(Aim.WRITING, num_ranks=1)])
    assert check.ok
    assert check.detail == "step 6 while its snapshot was taken; step 6 while it was written"


@pytest.mark.parametrize("late", Aim)
def test_kill_that_came_too_late_is_a_failure(late: Aim) -> None:
    check = check_kills([killed(aim, committed=aim is late) for aim in Aim])
    assert (check.ok, len(check.problems)) == (False, 1)
    assert late.value in check.problems[0]
    assert "step 6 after its commit" in check.detail


def test_kill_that_never_came_is_a_failure() -> None:
    assert not check_kills([killed(Aim.STAGING)]).ok
    assert not check_kills([killed(Aim.WRITING)]).ok


def test_job_that_ends_well_without_one_of_its_ranks_is_a_failure() -> None:
    check = check_kills([killed(Aim.WRITING), killed(Aim.STAGING, exit_code=0)])
    assert check.problems == ("killed-1: the exit code is 0 after a kill",)


def resumed_from(step: int) -> Leg:
    leg = Leg("resumed", Path("."), 2)
    leg.first.resumed = Resumed(step)
    return leg


@pytest.mark.parametrize(("step", "ok"), [(3, True), (6, True), (0, False), (9, False)])
def test_resume_after_the_loss_of_a_rank_is_from_that_save_or_the_one_before(step: int, ok: bool) -> None:
    leg = killed(Aim.STAGING)
    for event in [*said(0, *whole_save(3)), *said(1, *whole_save(3)), *said(0, begun(6))]:
        leg.note(event)
    check = check_resumes([leg, resumed_from(step)])
    assert check.ok is ok
    assert ok or f"resumed from step {step}, expected 3 or 6" in check.problems


def test_save_that_only_one_rank_had_staged_is_not_expected() -> None:
    leg = killed(Aim.STAGING)
    for event in [*said(0, *whole_save(3)), *said(1, *whole_save(3)), *said(0, *whole_save(5)[:-1])]:
        leg.note(event)
    assert check_resumes([leg, resumed_from(3)]).ok


def test_leg_that_was_not_killed_is_a_failure() -> None:
    check = check_resumes([Leg("killed-1", Path(".")), resumed_from(3)])
    assert check.problems == ("killed-1 was not killed",)


def test_save_in_which_another_rank_was_killed_may_fail_and_no_other() -> None:
    leg = killed(Aim.STAGING)
    leg.first.failed.append(SaveFailed(6, "rank 1 died"))
    assert check_resumes([leg, resumed_from(6)]).ok
    leg.first.failed.append(SaveFailed(3, "no space"))
    assert check_resumes([leg, resumed_from(6)]).problems == ("killed-1: save at step 3: no space",)
