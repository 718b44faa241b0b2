"""The diary of a trainer: one JSON line per event, each by a single write to a file opened with O_APPEND.

Once the write has returned the line survives any death of the trainer, and no line is ever incomplete.
"""

from __future__ import annotations

import os
import time
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class UpEntry:
    """The Checkpointer exists. ``num_fds``: descriptors that the trainer had open before it was made."""

    time: float
    num_fds: int
    kind: Literal["up"] = "up"


@dataclass(frozen=True)
class ResumedEntry:
    """The trainer resumed from ``step`` (-1: from the start). ``digest``: hash of the state. ``skipped``: checkpoints."""

    time: float
    step: int
    digest: str
    skipped: tuple[str, ...] = ()
    kind: Literal["resumed"] = "resumed"


@dataclass(frozen=True)
class BegunEntry:
    """The trainer is about to call ``save()``. ``fds``: number of open descriptors of trainer and workers, by pid."""

    time: float
    step: int
    fds: dict[int, int]
    kind: Literal["begun"] = "begun"


@dataclass(frozen=True)
class StagedEntry:
    """``staging_completion`` is done: the checkpoint is safe."""

    time: float
    step: int
    kind: Literal["staged"] = "staged"


@dataclass(frozen=True)
class CommittedEntry:
    """``upload_completion`` is done."""

    time: float
    step: int
    kind: Literal["committed"] = "committed"


@dataclass(frozen=True)
class SkippedEntry:
    """No buffer was free, and ``arena.when_full`` is skip."""

    time: float
    step: int
    kind: Literal["skipped"] = "skipped"


@dataclass(frozen=True)
class FailedEntry:
    """The save failed.

    Attributes:
        errno: of an OSError.
        was_staged: it failed after ``staging_completion``.
        lost: no call raised the error and no Future that was looked at had it; the diary found it at the end.
    """

    time: float
    step: int
    error: str
    message: str
    errno: int | None
    was_staged: bool
    lost: bool = False
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class DetachedEntry:
    """The trainer was told to end while it waited. The workers are detached and must commit the staged save."""

    time: float
    step: int
    kind: Literal["detached"] = "detached"


@dataclass(frozen=True)
class FinishedEntry:
    """The run has reached its last step. ``digest``: hash of its state."""

    time: float
    step: int
    digest: str
    kind: Literal["finished"] = "finished"


@dataclass(frozen=True)
class ClosedEntry:
    """``close()`` has returned; ``num_fds`` as in :class:`UpEntry`."""

    time: float
    num_fds: int
    kind: Literal["closed"] = "closed"


Entry = Annotated[
    UpEntry
    | ResumedEntry
    | BegunEntry
    | StagedEntry
    | CommittedEntry
    | SkippedEntry
    | FailedEntry
    | DetachedEntry
    | FinishedEntry
    | ClosedEntry,
    Field(discriminator="kind"),
]
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


class DiaryWriter:
    """Writes a diary. Thread-safe."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, entry: Entry) -> None:
        """Append an entry; it is in the file when this returns."""
        os.write(self._fd, _ENTRY.dump_json(entry) + b"\n")


class Diary:
    """Reads a diary as it grows.

    Attributes:
        entries: what was read so far.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._offset = 0
        self.entries: list[Entry] = []

    def read(self) -> list[Entry]:
        """Read and return the entries that are new since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        new = [_ENTRY.validate_json(line) for line in whole.splitlines()]
        self.entries += new
        return new

    def steps(
        self,
        kind: type[BegunEntry]
        | type[StagedEntry]
        | type[CommittedEntry]
        | type[SkippedEntry]
        | type[FailedEntry]
        | type[DetachedEntry],
    ) -> set[int]:
        """The steps whose saves got that far."""
        return {entry.step for entry in self.entries if isinstance(entry, kind)}

    @property
    def failures(self) -> list[FailedEntry]:
        """The failed saves, in order."""
        return [entry for entry in self.entries if isinstance(entry, FailedEntry)]


def now() -> float:
    """The time of an entry, in seconds since the epoch."""
    return time.time()
