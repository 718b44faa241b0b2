"""The milestones of each save, in seconds since it was begun, from what the trainer reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stager.demo.events import SaveBegun, SaveCommitted
from stager.demo.leg import Leg


@dataclass(frozen=True)
class SaveLine:
    """One save on the time axis, as rank 0 saw it; 0 is the call of ``save()``.

    Attributes:
        leg: where its training process had gone on from.
        milestones: part of the save to the second at which it was over, in order; parts that
            the trainer did not live to hear of are missing.
        blocked_secs: how long the call took; None if it never returned.
        step_ends: when training steps ended after the call.
        killed_secs: when the trainer was killed, if it did not live to see this save committed.
        ending: what became of a save that the trainer did not see committed.
    """

    leg: str
    label: str
    milestones: dict[str, float]
    blocked_secs: float | None
    step_ends: tuple[float, ...]
    killed_secs: float | None = None
    ending: str = ""


def save_lines(legs: Sequence[Leg]) -> list[SaveLine]:
    """Return every save that was begun, in the order of time."""
    lines = []
    for index, leg in enumerate(legs):
        follower = legs[index + 1] if index + 1 < len(legs) else None
        for step, begun in leg.first.begun.items():
            if step in leg.first.committed:
                lines.append(_committed_line(leg, begun, leg.first.committed[step]))
            else:
                lines.append(_cut_line(leg, begun, follower))
    return lines


def _committed_line(leg: Leg, begun: SaveBegun, committed: SaveCommitted) -> SaveLine:
    reached = {
        "staged": committed.staged_secs,
        "written": committed.written_secs,
        "synced": committed.synced_secs,
        "committed": committed.committed_secs,
    }
    milestones = {part: secs for part, secs in reached.items() if secs is not None}
    steps = tuple(_steps_after(leg, begun.time, max(milestones.values(), default=0.0)))
    return SaveLine(leg.origin, f"step {begun.step}", milestones, committed.blocked_secs, steps)


def _cut_line(leg: Leg, begun: SaveBegun, follower: Leg | None) -> SaveLine:
    staged = leg.first.staged.get(begun.step)
    milestones = {"staged": staged.time - begun.time} if staged else {}
    killed_secs = leg.kill.time - begun.time if leg.kill else None
    finished = follower is not None and follower.first.resumed.step >= begun.step
    steps = tuple(_steps_after(leg, begun.time, killed_secs or 0.0))
    ending = "finished by its workers" if finished else "discarded"
    return SaveLine(leg.origin, f"step {begun.step}", milestones, None, steps, killed_secs, ending)


def _steps_after(leg: Leg, start: float, secs: float) -> Iterator[float]:
    for step in leg.first.steps:
        if start < step.time <= start + secs:
            yield step.time - start
