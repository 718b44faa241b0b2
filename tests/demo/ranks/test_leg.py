"""When the job, or one of its ranks, is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stager.demo.events import Event, SaveReturned
from stager.demo.ranks.events import RankEvent
from stager.demo.ranks.leg import JobLeg, JobTrap, RankTrap
from tests.demo.saves import begun, committed, staged


def said(rank: int, *events: Event) -> list[RankEvent]:
    return [RankEvent(rank, event) for event in events]


def first_spring(trap: JobTrap | RankTrap, events: list[RankEvent]) -> tuple[int, RankEvent] | None:
    """The step that the trap names first, and the event upon which it does."""
    leg = JobLeg("leg", Path("."), 2)
    for event in events:
        leg.note(event)
        step = trap.sprung_by(leg, event)
        if step is not None:
            return step, event
    return None


@pytest.mark.parametrize("last", [0, 1])
def test_job_is_killed_when_the_last_rank_has_staged(last: int) -> None:
    first = said(1 - last, begun(6), SaveReturned(6, False), staged(6))
    second = said(last, begun(6), SaveReturned(6, False), staged(6))
    assert first_spring(JobTrap(6, True), [*first, *second]) == (6, RankEvent(last, staged(6)))
    assert first_spring(JobTrap(6, True), first) is None


def test_job_is_not_killed_before_a_checkpoint_is_committed() -> None:
    save = [*said(0, staged(6)), *said(1, staged(6))]
    assert first_spring(JobTrap(6, False), save) is None
    assert first_spring(JobTrap(6, False), [*said(1, committed(3)), *save]) is not None


def test_save_that_another_rank_saw_committed_is_left_alone() -> None:
    assert first_spring(JobTrap(6, True), [*said(0, staged(6), committed(6)), *said(1, staged(6))]) is None


def test_save_before_the_one_aimed_at_is_left_alone() -> None:
    assert first_spring(JobTrap(6, True), [*said(0, staged(3)), *said(1, staged(3))]) is None


def test_rank_is_killed_while_its_own_part_is_staged() -> None:
    save = said(0, begun(6), SaveReturned(6, False)) + said(1, begun(6), SaveReturned(6, False))
    assert first_spring(RankTrap(1, 6, True), save) == (6, RankEvent(1, SaveReturned(6, False)))
    assert first_spring(RankTrap(0, 6, True), save) == (6, RankEvent(0, SaveReturned(6, False)))
