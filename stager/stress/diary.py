"""What a trainer has lived to see: one JSON line per event, each by a single write to a file opened with O_APPEND.

A line is there once the write has returned, however the trainer dies after it, and no line is ever there in part.
"""

from __future__ import annotations

import os
import time
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class Up:
    """The Checkpointer is made. ``num_fds``: descriptors that the trainer had open before."""

    time: float
    num_fds: int
    kind: Literal["up"] = "up"


@dataclass(frozen=True)
class Resumed:
    """After loading: from which step (-1: from the start), the hash of what was loaded, and what was passed over."""

    time: float
    step: int
    digest: str
    skipped: tuple[str, ...] = ()
    kind: Literal["resumed"] = "resumed"


@dataclass(frozen=True)
class Begun:
    """Right before ``save()``. ``fds``: open descriptors by process: the trainer's and its workers'."""

    time: float
    step: int
    fds: dict[int, int]
    kind: Literal["begun"] = "begun"


@dataclass(frozen=True)
class Staged:
    """``staging_completion`` is done: the checkpoint is safe."""

    time: float
    step: int
    kind: Literal["staged"] = "staged"


@dataclass(frozen=True)
class Committed:
    """``upload_completion`` is done."""

    time: float
    step: int
    kind: Literal["committed"] = "committed"


@dataclass(frozen=True)
class Skipped:
    """No buffer was free, and ``arena.when_full`` is skip."""

    time: float
    step: int
    kind: Literal["skipped"] = "skipped"


@dataclass(frozen=True)
class Failed:
    """The save failed; ``was_staged``: after ``staging_completion``. ``errno``: of an OSError. ``lost``: nobody was told,
    neither by a Future that was looked at nor by a call; it is known only because the diary looks at all of them in the end.
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
class Left:
    """The trainer was told to go in the midst of waiting: the staged save is left to the workers, who must commit it."""

    time: float
    step: int
    kind: Literal["left"] = "left"


@dataclass(frozen=True)
class Finished:
    """The run has reached its last step, with this state."""

    time: float
    step: int
    digest: str
    kind: Literal["finished"] = "finished"


@dataclass(frozen=True)
class Closed:
    """``close()`` has returned; ``num_fds`` as in :class:`Up`."""

    time: float
    num_fds: int
    kind: Literal["closed"] = "closed"


Entry = Annotated[
    Up | Resumed | Begun | Staged | Committed | Skipped | Failed | Left | Finished | Closed,
    Field(discriminator="kind"),
]
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


class DiaryWriter:
    """Any thread may write."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, entry: Entry) -> None:
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
        """What is new since the last call."""
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
        self, kind: type[Begun] | type[Staged] | type[Committed] | type[Skipped] | type[Failed] | type[Left]
    ) -> set[int]:
        """The steps whose saves got that far."""
        return {entry.step for entry in self.entries if isinstance(entry, kind)}

    @property
    def failures(self) -> list[Failed]:
        return [entry for entry in self.entries if isinstance(entry, Failed)]


def now() -> float:
    return time.time()
