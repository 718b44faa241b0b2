"""The milestones of each save, in seconds since it was begun, from what the trainer reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stager.demo.events import SaveBegun, SaveCommitted
from stager.demo.leg import Leg

# The events of SaveHandle.report that end each part of a save.  Workers write and sync side by side, so a part is
# over when the last of its events is.
PARTS = {"staged": ("plan", "stage"), "written": ("hand over", "write"), "synced": ("sync",), "committed": ("commit",)}


@dataclass(frozen=True)
class SaveLine:
    """One save on the time axis; 0 is the call of ``save()``.

    Attributes:
        milestones: part of the save to the second at which it was over, in order and never decreasing; parts that
            the trainer did not live to hear of are missing.
        blocked_secs: how long the call took; None if it never returned.
        step_ends: when training steps ended after the call.
        killed_secs: when the trainer was killed, if it did not live to see this save committed.
        ending: what became of a save that the trainer did not see committed.
    """

    label: str
    milestones: dict[str, float]
    blocked_secs: float | None
    step_ends: tuple[float, ...]
    killed_secs: float | None = None
    ending: str = ""


def save_lines(legs: Sequence[Leg]) -> list[SaveLine]:
    """Every save that was begun, in the order of time."""
    lines = []
    for index, leg in enumerate(legs):
        follower = legs[index + 1] if index + 1 < len(legs) else None
        for step, begun in leg.begun.items():
            if step in leg.committed:
                lines.append(_committed_line(leg, begun, leg.committed[step]))
            else:
                lines.append(_cut_line(leg, begun, follower))
    return lines


def _committed_line(leg: Leg, begun: SaveBegun, committed: SaveCommitted) -> SaveLine:
    milestones: dict[str, float] = {}
    last = 0.0
    for part, names in PARTS.items():
        ends = [phase.end - begun.time for phase in committed.phases if phase.name in names]
        last = milestones[part] = max([last, *ends])
    return SaveLine(
        f"step {begun.step}", milestones, committed.blocked_secs, tuple(_steps_after(leg, begun.time, last))
    )


def _cut_line(leg: Leg, begun: SaveBegun, follower: Leg | None) -> SaveLine:
    staged = leg.staged.get(begun.step)
    milestones = {"staged": staged.time - begun.time} if staged else {}
    killed_secs = leg.kill.time - begun.time if leg.kill else None
    finished = follower is not None and follower.resumed is not None and follower.resumed.step >= begun.step
    steps = tuple(_steps_after(leg, begun.time, killed_secs or 0.0))
    ending = "finished by its workers" if finished else "discarded"
    return SaveLine(f"step {begun.step}", milestones, None, steps, killed_secs, ending)


def _steps_after(leg: Leg, start: float, secs: float) -> Iterator[float]:
    for step in leg.steps:
        if start < step.time <= start + secs:
            yield step.time - start
