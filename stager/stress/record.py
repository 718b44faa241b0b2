"""What was seen of one run of a trainer, and of an episode. Plain data; ``judge.py`` and ``outcomes.py`` read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from stager.stress.checker import Found
from stager.stress.damage import Damaged
from stager.stress.diary import Diary
from stager.stress.episode import Episode, RunPlan
from stager.stress.faults import Fault
from stager.stress.inflictor import Fired


@dataclass
class Run:
    """Attributes:
    plan, diary, fired: what was to happen, what the trainer saw, what was done to it.
    damaged: what was damaged before it started.
    started, ended: of the trainer, in seconds since the epoch.
    exitcode: as in ``subprocess``; None: it hung and was killed.
    gone_secs: from the trainer's end until its last process had ended.
    left: processes that had not ended by the deadline.
    before, found: what the checker found before and after the run.
    peeks: problems that the checker found while the run went on.
    """

    plan: RunPlan
    diary: Diary
    before: Found
    fired: list[Fired] = field(default_factory=list)
    damaged: list[Damaged] = field(default_factory=list)
    started: float = 0.0
    ended: float = 0.0
    exitcode: int | None = None
    gone_secs: float = 0.0
    left: list[str] = field(default_factory=list)
    found: Found | None = None
    peeks: list[str] = field(default_factory=list)


class Outcome(Enum):
    """What came of a fault."""

    COMMITTED = "committed"
    MOVED = "moved to another worker"
    FINISHED = "finished after trainer's death"
    DISCARDED = "discarded before staging"
    REPORTED = "failed, error reported"
    FELL_BACK = "fell back"
    LOST = "lost: trainer and workers killed"
    NOT_MET = "did not come about"
    VIOLATION = "VIOLATION"


@dataclass(frozen=True)
class FaultOutcome:
    """One fault of one episode, what came of it, and how long it took until nothing was to be seen of it any more (None:
    nothing had to be waited for)."""

    fault: Fault
    outcome: Outcome
    recovery_secs: float | None = None
    why: str = ""


@dataclass
class EpisodeResult:
    """Attributes:
    violations: one line each; none: all was as it must be.
    num_saves, num_committed, num_failed, num_skipped: saves begun, and what became of them by the end.
    directory: where the evidence is kept, if there are violations.
    """

    episode: Episode
    outcomes: list[FaultOutcome] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    num_runs: int = 0
    num_saves: int = 0
    num_committed: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    secs: float = 0.0
    directory: str = ""
