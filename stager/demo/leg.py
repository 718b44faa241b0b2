"""One leg of the training run: from its start, or a resume, to a kill or to the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from stager.demo.events import (
    RankEvent,
    Resumed,
    SaveBegun,
    SaveCommitted,
    SaveFailed,
    SaveReturned,
    SaveStaged,
    StepDone,
)


class Aim(Enum):
    """Where in a save a kill comes."""

    STAGING = "while its snapshot was taken"
    WRITING = "while it was written"


@dataclass(frozen=True)
class Kill:
    """What was seen of one SIGKILL: of all ranks (``Aim.WRITING``) or of the last rank (``Aim.STAGING``).

    Attributes:
        aim: where in the save the kill was to come.
        step: the save that was under way.
        time: when the signal was sent, in seconds since the epoch.
        staged: every rank lived to see its part of the snapshot complete.
        committed: a rank lived to see the save committed: the kill did not come in the middle of this save.
        partial: the save's partial directory was on disk right after the death.
        num_workers: worker processes that the job had.
        exit_code: of the job; negative: the signal that killed it.
        ended_secs: seconds from the signal to the end of the job.
        gone_secs: seconds from then until no worker was alive.
        left: pids still alive when the demo stopped waiting.
    """

    aim: Aim
    step: int
    time: float
    staged: bool
    committed: bool
    partial: bool
    num_workers: int
    exit_code: int
    ended_secs: float
    gone_secs: float
    left: tuple[int, ...]

    @property
    def hit(self) -> Aim | None:
        """Where in the save it came; None: after it."""
        if self.committed:
            return None
        return Aim.WRITING if self.staged else Aim.STAGING


@dataclass
class RankLog:
    """What one rank has said in one leg."""

    resumed: Resumed = field(default_factory=lambda: Resumed(0))
    steps: list[StepDone] = field(default_factory=list)
    begun: dict[int, SaveBegun] = field(default_factory=dict)
    staged: dict[int, SaveStaged] = field(default_factory=dict)
    committed: dict[int, SaveCommitted] = field(default_factory=dict)
    failed: list[SaveFailed] = field(default_factory=list)


@dataclass
class Leg:
    """What the demo has seen of one leg, rank by rank.

    Attributes:
        directory: where rank 0 writes its losses and final state, and the job its log.
        kill: how the leg ended; None: it reached the end of the run.
        ranks: what each rank has said.
    """

    name: str
    directory: Path
    num_ranks: int = 1
    kill: Kill | None = None
    ranks: list[RankLog] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ranks = self.ranks or [RankLog() for _ in range(self.num_ranks)]

    @property
    def first(self) -> RankLog:
        """What rank 0 has said."""
        return self.ranks[0]

    @property
    def losses(self) -> Path:
        """The file with the exact loss of each step."""
        return self.directory / "losses.jsonl"

    @property
    def final(self) -> Path:
        """The file with the state at the end of the run."""
        return self.directory / "final.pt"

    def note(self, said: RankEvent) -> None:
        """Add an event of one rank."""
        log, event = self.ranks[said.rank], said.event
        match event:
            case Resumed():
                log.resumed = event
            case StepDone():
                log.steps.append(event)
            case SaveBegun():
                log.begun[event.step] = event
            case SaveStaged():
                log.staged[event.step] = event
            case SaveCommitted():
                log.committed[event.step] = event
            case SaveFailed():
                log.failed.append(event)

    def is_staged(self, step: int) -> bool:
        """Whether every rank has said that its part of the snapshot is complete: then the save is safe."""
        return all(step in log.staged for log in self.ranks)

    def is_committed(self, step: int) -> bool:
        """Whether any rank has said that the save is committed."""
        return any(step in log.committed for log in self.ranks)

    @property
    def origin(self) -> str:
        """Where the leg began, for people."""
        step = self.first.resumed.step
        return f"resumed from step {step}" if step else "from the start"


def ranks_text(num_ranks: int) -> str:
    """Return ``1 rank`` or ``N ranks``."""
    return f"{num_ranks} rank{'s' * (num_ranks > 1)}"


@dataclass
class Trap:
    """Says, event by event, when a leg is in the middle of a save and may be killed.

    To hit the writing, it waits until every rank has staged the save.  To hit the taking of a snapshot, it waits until
    ``save()`` of the last rank returns before the snapshot is complete, which ``guard()`` makes the rule; where snapshots
    are too small for that, it kills when the next save begins.

    Nothing is killed before the run has a committed checkpoint to resume from, nor in a save whose commit has been heard
    of.  What the kill really hit shows afterwards, in the events that the dead ranks had sent before: see :class:`Kill`.

    Attributes:
        first_step: the first save that may be hit.
    """

    aim: Aim
    first_step: int
    has_checkpoint: bool
    snapshot_is_quick: bool = False

    def sprung_by(self, leg: Leg, said: RankEvent) -> int | None:
        """Return the step of the save in which to kill, at once, upon this event; None: not yet."""
        event = said.event
        if isinstance(event, SaveCommitted):
            self.has_checkpoint = True
        if not isinstance(event, (SaveBegun, SaveReturned, SaveStaged)):
            return None
        if event.step < self.first_step or leg.is_committed(event.step) or not self.has_checkpoint:
            return None
        if self.aim is Aim.WRITING:
            return event.step if isinstance(event, SaveStaged) and leg.is_staged(event.step) else None
        return event.step if said.rank == leg.num_ranks - 1 and self._is_staging(event) else None

    def _is_staging(self, event: SaveBegun | SaveReturned | SaveStaged) -> bool:
        if isinstance(event, SaveReturned):
            self.snapshot_is_quick = self.snapshot_is_quick or event.staged
            return not event.staged
        return isinstance(event, SaveBegun) and self.snapshot_is_quick
