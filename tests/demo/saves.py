"""Events of a save, as the ranks tell them."""

from __future__ import annotations

from stager.demo.events import Event, RankEvent, SaveBegun, SaveCommitted, SaveReturned, SaveStaged


def begun(step: int) -> SaveBegun:
    return SaveBegun(step, float(step))


def staged(step: int) -> SaveStaged:
    return SaveStaged(step, float(step))


def committed(step: int) -> SaveCommitted:
    return SaveCommitted(step, 1, 0.1, 0.2, 0.3, 0.4, 0.5)


def whole_save(step: int, quick: bool = False) -> list[Event]:
    return [begun(step), SaveReturned(step, quick), staged(step), committed(step)]


def said(rank: int, *events: Event) -> list[RankEvent]:
    return [RankEvent(rank, event) for event in events]
