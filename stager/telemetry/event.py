"""Events: what happens to the checkpoints of a run, as listeners get it (``listeners.py``).

    PlannedEvent -> StagedEvent -> WrittenEvent -> CommittedEvent
         |              |              |
         +--------------+--------------+--> FailedEvent          SkippedEvent: no buffer was free (arena.when_full: skip)
                                       '--> CancelledEvent: its checkpoint was deleted

    FellBackEvent: a damaged checkpoint was passed over                PrunedEvent: checkpoints were removed

Each rank has the events of its own part of a save; only rank 0 prunes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar

from stager.telemetry.report import SaveReport
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, SkippedCheckpoint
from stager.workers.checkpoint.maintenance.retention import PruneFate, PruneReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to the checkpoints of a run; the base of every event.

    Attributes:
        name: the kind of event, as one word: "committed".
        time: when it happened, unix time.
    """

    name: ClassVar[str]
    time: float = field(default_factory=time.time)

    def __str__(self) -> str:
        """Return the event as one short line, for a log."""
        return self.name


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

    def __str__(self) -> str:
        details = self._details()
        return f"step {self.step} {self.name}" + (f": {details}" if details else "")

    def _details(self) -> str:
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEvent(SaveEvent):
    """A save knows what it has to copy and write: ``report`` has ``nbytes``, ``num_tensors`` and ``num_objects``."""

    name: ClassVar[str] = "planned"

    def _details(self) -> str:
        report = self.report
        return f"{report.nbytes:,} bytes, tensors: {report.num_tensors:,}, objects: {report.num_objects:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedEvent(SaveEvent):
    """A snapshot is whole, and the workers have it: the save is committed even if this process is killed now."""

    name: ClassVar[str] = "staged"

    def _details(self) -> str:
        return _after(self.report.staged_secs)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenEvent(SaveEvent):
    """The bytes of this rank are written and synced. The checkpoint may still wait for other ranks."""

    name: ClassVar[str] = "written"

    def _details(self) -> str:
        return _after(self.report.synced_secs)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedEvent(SaveEvent):
    """A save is a checkpoint now.

    Attributes:
        info: of the checkpoint.
    """

    name: ClassVar[str] = "committed"
    info: CheckpointInfo

    def _details(self) -> str:
        return ", ".join(filter(None, (_after(self.report.committed_secs), f"{self.info.nbytes:,} bytes")))


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedEvent(SaveEvent):
    """A save has failed, on every rank; whatever ``persistence.on_save_error`` says.

    Attributes:
        error: why. ``LeftRunningError``: ``close()`` had no time left, and the workers commit it alone.
    """

    name: ClassVar[str] = "failed"
    error: BaseException

    def _details(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedEvent(SaveEvent):
    """A save was not taken, because every buffer was in flight and ``arena.when_full`` is "skip"."""

    name: ClassVar[str] = "skipped"

    def _details(self) -> str:
        return "every buffer was in flight"


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelledEvent(SaveEvent):
    """A save ended without a checkpoint, because ``delete()`` was called while it was in flight."""

    name: ClassVar[str] = "cancelled"

    def _details(self) -> str:
        return "its checkpoint was deleted"


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

    def __str__(self) -> str:
        taken = "no checkpoint" if self.step is None else f"step {self.step}"
        return f"fell back to {taken}: {'; '.join(f'{one.name} skipped: {one.reason}' for one in self.skipped)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedEvent(Event):
    """Checkpoints were removed by ``retention`` or ``delete()``, or should have been and were left.

    Attributes:
        report: what became of each checkpoint, and the bytes that were freed.
    """

    name: ClassVar[str] = "pruned"
    report: PruneReport

    def __str__(self) -> str:
        fates = (("removed", PruneFate.REMOVED), ("left", PruneFate.LEFT))
        steps = [
            f"{what} step{'s' * (len(found) > 1)} {', '.join(map(str, found))}"
            for what, fate in fates
            if (found := self.report.steps(fate))
        ]
        return f"pruned; {'; '.join([*steps, f'bytes freed: {self.report.freed_bytes:,}'])}"


def _after(secs: float | None) -> str:
    return "" if secs is None else f"after {secs:.3g} s"
