"""What a save cost, and how far it is: the record that users, JSON lines and traces get."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from stager.telemetry.timeline import Timing


class SaveState(str, Enum):
    """How far a save is. ``saving/save.py`` draws the transitions. Prints, and is written to JSON, as its value."""

    PLANNED = "planned"
    STAGING = "staging"
    STAGED = "staged"
    PERSISTING = "persisting"
    COMMITTED = "committed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save cost. Times are seconds since ``save()`` was called; None: that point is not reached.

    Attributes:
        step, state: which save, and how far it is.
        nbytes: bytes of the tensors and pickled objects.
        num_tensors, num_objects: items; tied tensors count once.
        blocked_secs: how long the call of ``save()`` took, which is what training lost.
        staged_secs: until the snapshot was whole and handed over to the workers.
        written_secs, synced_secs, committed_secs: until the last byte was written, until it was synced, and until the
            checkpoint was visible.
        written_bytes, linked_bytes: bytes of the checkpoint's files that were written, and bytes of unchanged files that
            were hard-linked from an earlier checkpoint (``persistence.incremental``). None: not committed.
        timings: what was done when, in which process.
        notes: what is worth knowing about how this save was done.
    """

    step: int
    state: SaveState
    nbytes: int = 0
    num_tensors: int = 0
    num_objects: int = 0
    blocked_secs: float | None = None
    staged_secs: float | None = None
    written_secs: float | None = None
    synced_secs: float | None = None
    committed_secs: float | None = None
    written_bytes: int | None = None
    linked_bytes: int | None = None
    timings: tuple[Timing, ...] = ()
    notes: tuple[str, ...] = ()

    def scalars(self, prefix: str = "checkpoint/") -> dict[str, float]:
        """Return the figures as W&B, TensorBoard and the like take them: a flat mapping of names to numbers.

        Figures that are None are left out. ``wandb.log(report.scalars(), step=...)``

        Args:
            prefix: before each name: ``checkpoint/blocked_secs``.
        """
        values = ((one.name, getattr(self, one.name)) for one in fields(self) if one.name != "step")
        return {prefix + name: float(value) for name, value in values if type(value) in (int, float)}
