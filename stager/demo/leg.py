"""One leg of the killed training run: from its start, or its resume, to a kill or to the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from stager.demo.events import Event, Resumed, SaveBegun, SaveCommitted, SaveFailed, SaveReturned, SaveStaged, StepDone


class Aim(Enum):
    """Where in a save the trainer is killed."""

    STAGING = "while its snapshot was taken"
    WRITING = "while it was written"


@dataclass(frozen=True)
class Kill:
    """What was seen of one SIGKILL of the trainer.

    Attributes:
        aim: where in the save the kill was to come.
        step: the save that was under way.
        time: when the signal was sent, in seconds since the epoch.
        staged: the trainer lived to see its snapshot complete.
        committed: the trainer lived to see it committed: the kill did not come in the middle of this save.
        partial: the save's partial directory was on disk right after the death.
        num_workers: worker processes that the trainer had.
        gone_secs: seconds until none was alive.
        left: pids still alive when the demo stopped waiting.
    """

    aim: Aim
    step: int
    time: float
    staged: bool
    committed: bool
    partial: bool
    num_workers: int
    gone_secs: float
    left: tuple[int, ...]

    @property
    def hit(self) -> Aim | None:
        """Where in the save it came; None: after it."""
        if self.committed:
            return None
        return Aim.WRITING if self.staged else Aim.STAGING


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

    To hit the taking of a snapshot it waits for a save that returned before its snapshot was complete, which
    ``guard()`` makes the rule; where snapshots are too small for that, it strikes when the next save begins.
    """

    aim: Aim
    first_step: int
    has_checkpoint: bool
    snapshot_is_quick: bool = False

    def sprung_by(self, leg: Leg, event: Event) -> int | None:
        """The step of the save in which to kill, at once, upon this event; None: not yet."""
        if isinstance(event, SaveCommitted):
            self.has_checkpoint = True
        if not isinstance(event, (SaveBegun, SaveReturned, SaveStaged)):
            return None
        if event.step < self.first_step or event.step in leg.committed or not self.has_checkpoint:
            return None
        if isinstance(event, SaveReturned) and event.staged:
            self.snapshot_is_quick = True
        return event.step if self._awaits(event) else None

    def _awaits(self, event: SaveBegun | SaveReturned | SaveStaged) -> bool:
        if self.aim is Aim.WRITING:
            return isinstance(event, SaveStaged)
        if isinstance(event, SaveReturned):
            return not event.staged
        return isinstance(event, SaveBegun) and self.snapshot_is_quick


def has_partial(checkpoints: Path, step: int) -> bool:
    """Whether a save of this step has been begun on disk and not committed."""
    return any(checkpoints.glob(f"step-{step:08d}.partial-*"))
