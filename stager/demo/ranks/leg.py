"""One leg of the training run on ranks: from its start, or its resume, to a kill or to the end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from stager.demo.events import Event, SaveCommitted, SaveStaged
from stager.demo.leg import Aim, Leg, Trap
from stager.demo.ranks.events import RankEvent


class Victim(Enum):
    """What is killed."""

    JOB = "the whole job"
    RANK = "one rank"


@dataclass(frozen=True)
class End:
    """How a job ended of which one rank was killed: torchrun's exit code, and the seconds since the kill."""

    exit_code: int
    secs: float


class JobLeg:
    """What the demo has seen of one leg, rank by rank.

    Attributes:
        ranks: a leg for each; that of rank 0 has the losses, and the job's kill.
        victim: what was killed, if anything.
        end: of a job that lost one rank.
    """

    def __init__(self, name: str, directory: Path, num_ranks: int) -> None:
        self.name = name
        self.directory = directory
        self.ranks = [Leg(name, directory) for _ in range(num_ranks)]
        self.victim: Victim | None = None
        self.end: End | None = None

    @property
    def first(self) -> Leg:
        """Of rank 0."""
        return self.ranks[0]

    def note(self, said: RankEvent) -> None:
        """Add what a rank said."""
        self.ranks[said.rank].note(said.event)

    def is_staged(self, step: int) -> bool:
        """Whether every rank has said that its part of the snapshot is taken: then this save is safe."""
        return all(step in leg.staged for leg in self.ranks)

    def is_committed(self, step: int) -> bool:
        """Whether any rank has said that this save is committed."""
        return any(step in leg.committed for leg in self.ranks)


@dataclass
class JobTrap:
    """Says when the whole job is to be killed: when a save is staged on all ranks, and not yet committed.

    Not before there is a committed checkpoint to compare with.
    """

    first_step: int
    has_checkpoint: bool

    def sprung_by(self, leg: JobLeg, said: RankEvent) -> int | None:
        """The step of the save in which to kill, at once, upon this event; None: not yet."""
        event: Event = said.event
        if isinstance(event, SaveCommitted):
            self.has_checkpoint = True
        if not isinstance(event, SaveStaged) or event.step < self.first_step or not self.has_checkpoint:
            return None
        return event.step if leg.is_staged(event.step) and not leg.is_committed(event.step) else None


class RankTrap:
    """Says when one rank is to be killed: while its part of a snapshot is taken."""

    def __init__(self, rank: int, first_step: int, has_checkpoint: bool) -> None:
        self.rank = rank
        self._trap = Trap(Aim.STAGING, first_step, has_checkpoint)

    def sprung_by(self, leg: JobLeg, said: RankEvent) -> int | None:
        """The step of the save in which to kill, at once, upon this event; None: not yet."""
        return self._trap.sprung_by(leg.ranks[self.rank], said.event) if said.rank == self.rank else None
