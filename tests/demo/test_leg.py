"""When a rank, or all, are killed, and what the kill is said to have hit."""

from __future__ import annotations

from pathlib import Path

import pytest

from stager.demo.events import Event, RankEvent, Resumed, SaveReturned, StepDone
from stager.demo.leg import Aim, Kill, Leg, Trap
from stager.demo.runner import has_partial
from tests.demo.saves import begun, committed, said, staged, whole_save


def first_spring_on(num_ranks: int, trap: Trap, events: list[RankEvent]) -> tuple[int, RankEvent] | None:
    """The step that the trap names first, and the event upon which it does."""
    leg = Leg("leg", Path("."), num_ranks)
    for event in events:
        leg.note(event)
        step = trap.sprung_by(leg, event)
        if step is not None:
            return step, event
    return None


def first_spring(trap: Trap, events: list[Event]) -> tuple[int, Event] | None:
    """The same for one rank."""
    sprung = first_spring_on(1, trap, said(0, *events))
    return sprung and (sprung[0], sprung[1].event)


def test_snapshot_still_being_taken_when_save_returns_is_hit() -> None:
    events = [*whole_save(3), *whole_save(6)]
    assert first_spring(Trap(Aim.STAGING, 6, False), events) == (6, SaveReturned(6, False))


def test_snapshot_too_quick_to_hit_makes_the_next_save_be_hit_as_it_begins() -> None:
    events = [*whole_save(3), *whole_save(6, quick=True), *whole_save(9, quick=True)]
    assert first_spring(Trap(Aim.STAGING, 6, False), events) == (9, begun(9))


def test_staged_save_is_hit_before_its_commit() -> None:
    events = [*whole_save(3), *whole_save(6)]
    assert first_spring(Trap(Aim.WRITING, 6, False), events) == (6, staged(6))


@pytest.mark.parametrize("aim", Aim)
def test_nothing_is_killed_before_a_checkpoint_is_committed(aim: Aim) -> None:
    without_commit: list[Event] = whole_save(3)[:-1]
    assert first_spring(Trap(aim, 3, has_checkpoint=False), without_commit) is None
    assert first_spring(Trap(aim, 3, has_checkpoint=True), without_commit) is not None


def test_save_whose_commit_was_heard_first_is_left_alone() -> None:
    events: list[Event] = [begun(6), SaveReturned(6, True), committed(6), staged(6)]
    assert first_spring(Trap(Aim.WRITING, 6, True), events) is None


def test_other_events_never_spring_a_trap() -> None:
    events: list[Event] = [Resumed(3), StepDone(4, 1.0, 1.0), committed(6)]
    assert first_spring(Trap(Aim.STAGING, 1, True), events) is None


@pytest.mark.parametrize(
    ("was_staged", "was_committed", "hit"),
    [(False, False, Aim.STAGING), (True, False, Aim.WRITING), (True, True, None), (False, True, None)],
)
def test_what_a_kill_hit_is_told_by_what_the_trainer_lived_to_say(
    was_staged: bool, was_committed: bool, hit: Aim | None
) -> None:
    kill = Kill(Aim.STAGING, 6, 0.0, was_staged, was_committed, True, 2, -9, 0.1, 0.1, ())
    assert kill.hit is hit


@pytest.mark.parametrize("last", [0, 1])
def test_all_ranks_are_killed_when_the_last_of_them_has_staged(last: int) -> None:
    first = said(1 - last, begun(6), SaveReturned(6, False), staged(6))
    second = said(last, begun(6), SaveReturned(6, False), staged(6))
    assert first_spring_on(2, Trap(Aim.WRITING, 6, True), [*first, *second]) == (6, RankEvent(last, staged(6)))
    assert first_spring_on(2, Trap(Aim.WRITING, 6, True), first) is None


def test_ranks_are_not_killed_before_any_of_them_has_seen_a_commit() -> None:
    save = [*said(0, staged(6)), *said(1, staged(6))]
    assert first_spring_on(2, Trap(Aim.WRITING, 6, False), save) is None
    assert first_spring_on(2, Trap(Aim.WRITING, 6, False), [*said(1, committed(3)), *save]) is not None


def test_save_that_another_rank_saw_committed_is_left_alone() -> None:
    events = [*said(0, staged(6), committed(6)), *said(1, staged(6))]
    assert first_spring_on(2, Trap(Aim.WRITING, 6, True), events) is None


def test_save_before_the_one_aimed_at_is_left_alone() -> None:
    events = [*said(0, staged(3)), *said(1, staged(3))]
    assert first_spring_on(2, Trap(Aim.WRITING, 6, True), events) is None


def test_last_rank_is_killed_while_its_own_part_is_staged() -> None:
    first, last = (said(rank, begun(6), SaveReturned(6, False)) for rank in range(2))
    assert first_spring_on(2, Trap(Aim.STAGING, 6, True), [*first, *last]) == (6, last[1])
    assert first_spring_on(2, Trap(Aim.STAGING, 6, True), first) is None


def test_save_is_staged_when_every_rank_said_so_and_committed_when_one_did() -> None:
    leg = Leg("leg", Path("."), 2)
    for event in said(0, staged(6), committed(6)):
        leg.note(event)
    assert (leg.is_staged(6), leg.is_committed(6)) == (False, True)
    leg.note(RankEvent(1, staged(6)))
    assert leg.is_staged(6)


@pytest.mark.remains
def test_partial_directory_is_seen_and_a_committed_one_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "step-00000006").mkdir()
    (tmp_path / "step-00000009.partial-abc").mkdir()
    assert not has_partial(str(tmp_path), 6)
    assert has_partial(str(tmp_path), 9)
