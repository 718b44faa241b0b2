"""One leg of the killed training run: from its start, or its resume, to a kill or to the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from stager.demo.events import Event, Resumed, SaveBegun, SaveCommitted, SaveFailed, SaveStaged, StepDone


class Aim(Enum):
    """Where in a save the trainer is killed."""

    STAGING = "while its snapshot was taken"
    WRITING = "while it was written"


@dataclass(frozen=True)
class Kill:
    """What was seen of one SIGKILL of the trainer.

    Attributes:
        step: the save that was under way.
        time: when the signal was sent, in seconds since the epoch.
        staged: the trainer lived to see its snapshot complete.
        too_late: the trainer lived to see it committed: the kill did not come in the middle of this save.
        partial: the save's partial directory was on disk right after the death.
        num_workers: worker processes alive right after the death.
        gone_secs: seconds until none was.
        left: pids still alive when the demo stopped waiting.
    """

    aim: Aim
    step: int
    time: float
    staged: bool
    too_late: bool
    partial: bool
    num_workers: int
    gone_secs: float
    left: tuple[int, ...]


@dataclass
class Leg:
    """What the parent has seen of one leg."""

    name: str
    directory: Path
    resumed: Resumed | None = None
    steps: list[StepDone] = field(default_factory=list)
    begun: dict[int, SaveBegun] = field(default_factory=dict)
    staged: dict[int, SaveStaged] = field(default_factory=dict)
    committed: dict[int, SaveCommitted] = field(default_factory=dict)
    failed: list[SaveFailed] = field(default_factory=list)
    kill: Kill | None = None

    def note(self, event: Event) -> None:
        """Add an event of the child."""
        match event:
            case Resumed():
                self.resumed = event
            case StepDone():
                self.steps.append(event)
            case SaveBegun():
                self.begun[event.step] = event
            case SaveStaged():
                self.staged[event.step] = event
            case SaveCommitted():
                self.committed[event.step] = event
            case SaveFailed():
                self.failed.append(event)

    @property
    def losses(self) -> Path:
        """The file with the exact loss of each step."""
        return self.directory / "losses.jsonl"


@dataclass
class Trap:
    """Says, event by event, when a leg is in the middle of a save and may be killed.

    A leg is not killed before its run has a committed checkpoint, or there would be nothing to resume from; nor in a
    save whose commit has been heard of.  What the kill really hit is told afterwards, by the events that the dead
    trainer had sent before: see :class:`Kill`.
    """

    aim: Aim
    first_step: int
    has_checkpoint: bool

    def sprung_by(self, leg: Leg, event: Event) -> bool:
        """True at the event upon which to kill at once."""
        if isinstance(event, SaveCommitted):
            self.has_checkpoint = True
        awaited = SaveBegun if self.aim is Aim.STAGING else SaveStaged
        return (
            isinstance(event, awaited)
            and event.step >= self.first_step
            and event.step not in leg.committed
            and self.has_checkpoint
        )


def has_partial(checkpoints: Path, step: int) -> bool:
    """Whether a save of this step has been begun on disk and not committed."""
    return any(checkpoints.glob(f"step-{step:08d}.partial-*"))
