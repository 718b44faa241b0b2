"""Records of one run of a trainer, and of an episode: plain data that ``judge.py`` and ``outcomes.py`` read."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from stager.stress.checker import Found
from stager.stress.damage import Damaged
from stager.stress.diary import Diary
from stager.stress.episode import Episode, RunPlan
from stager.stress.fault_kinds import Fault
from stager.stress.inflictor import Fired


@dataclass
class RunRecord:
    """What was seen of one run.

    Attributes:
        plan, diary, fired: what was planned, what the trainer saw, which faults occurred.
        damaged: checkpoints that were damaged before the run.
        started, ended: of the trainer, in seconds since the epoch.
        exitcode: of the trainer, as in ``subprocess``; None if it hung and was killed.
        gone_secs: from the trainer's end until its last process had ended.
        left: processes that had not ended by the deadline.
        before, found: what the checker found before and after the run.
        peeks: violations that the checker found during the run.
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


class FaultResult(Enum):
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
    """One fault of an episode, what came of it, and how long the recovery took (None: there was nothing to wait for)."""

    fault: Fault
    outcome: FaultResult
    recovery_secs: float | None = None
    why: str = ""


@dataclass
class EpisodeResult:
    """What came of an episode.

    Attributes:
        violations: one line each.
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
