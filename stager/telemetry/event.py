"""Events: what happens to the checkpoints of a run, as listeners get it (``listeners.py``).

    PlannedEvent -> StagedEvent -> WrittenEvent -> CommittedEvent
         |              |              |
         +--------------+--------------+--> FailedEvent          SkippedEvent: no buffer was free (arena.when_full: skip)

    FellBackEvent: a damaged checkpoint was passed over                PrunedEvent: checkpoints were removed

Each rank has the events of its own part of a save; only rank 0 prunes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar

from stager.telemetry.report import SaveReport
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, SkippedCheckpoint
from stager.workers.checkpoint.maintenance.retention import PruneReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to the checkpoints of a run; the base of every event.

    Attributes:
        name: the kind of event, as one word: "committed".
        time: when it happened, unix time.
    """

    name: ClassVar[str]
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveEvent(Event):
    """Something that happened to one save; the base of the events that have a report.

    Attributes:
        report: the save's figures at that moment.
    """

    report: SaveReport

    @property
    def step(self) -> int:
        """The training step of the save."""
        return self.report.step


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEvent(SaveEvent):
    """A save knows what it has to copy and write: ``report`` has ``nbytes``, ``num_tensors`` and ``num_objects``."""

    name: ClassVar[str] = "planned"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedEvent(SaveEvent):
    """A snapshot is whole, and the workers have it: the save is committed even if this process is killed now."""

    name: ClassVar[str] = "staged"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenEvent(SaveEvent):
    """The bytes of this rank are written and synced. The checkpoint may still wait for other ranks."""

    name: ClassVar[str] = "written"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedEvent(SaveEvent):
    """A save is a checkpoint now.

    Attributes:
        info: of the checkpoint.
    """

    name: ClassVar[str] = "committed"
    info: CheckpointInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedEvent(SaveEvent):
    """A save has failed, on every rank; whatever ``persistence.on_save_error`` says.

    Attributes:
        error: why. ``LeftRunningError``: ``close()`` had no time left, and the workers commit it alone.
    """

    name: ClassVar[str] = "failed"
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedEvent(SaveEvent):
    """A save was not taken, because every buffer was in flight and ``arena.when_full`` is "skip"."""

    name: ClassVar[str] = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class FellBackEvent(Event):
    """``latest()`` or ``load()`` passed over newer checkpoints, which are damaged.

    Attributes:
        step: of the checkpoint that was taken; None: there is no valid one.
        skipped: those that were passed over, newest first, and why.
    """

    name: ClassVar[str] = "fell back"
    step: int | None
    skipped: tuple[SkippedCheckpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedEvent(Event):
    """Checkpoints were removed by ``retention`` or ``delete()``, or should have been and were left.

    Attributes:
        report: what became of each checkpoint, and the bytes that were freed.
    """

    name: ClassVar[str] = "pruned"
    report: PruneReport
