"""What the processes of a job tell the demo: one JSON line per event, each with the rank that sent it.

All ranks of a job write into one FIFO, each line at once and shorter than PIPE_BUF, so lines never mix.  Workers do not
inherit it, so the demo reads end-of-file when the last rank, and torchrun if there is one, is dead; what it has read by
then is all that the ranks lived to see.  That is how the demo knows, without a clock, whether a kill came in the middle
of a save.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import IO, Annotated, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

MAX_TEXT_CHARS = 300  # of an error: a line stays below PIPE_BUF; the log has all of it
MAX_TEXTS = 3


@dataclass(frozen=True)
class Started:
    """First event of each rank: the process to kill."""

    pid: int
    kind: Literal["started"] = "started"


@dataclass(frozen=True)
class Resumed:
    """Sent before the first step of a rank with checkpoints: the step it resumed from (0: from the start)."""

    step: int
    skipped: tuple[str, ...] = ()
    kind: Literal["resumed"] = "resumed"


@dataclass(frozen=True)
class StepDone:
    """Sent after each optimizer step."""

    step: int
    loss: float
    time: float
    kind: Literal["step"] = "step"


@dataclass(frozen=True)
class SaveBegun:
    """Sent right before a rank calls ``save``."""

    step: int
    time: float
    kind: Literal["begun"] = "begun"


@dataclass(frozen=True)
class SaveReturned:
    """Sent when ``save`` has returned; ``staged``: the snapshot was complete by then."""

    step: int
    staged: bool
    kind: Literal["returned"] = "returned"


@dataclass(frozen=True)
class SaveStaged:
    """Sent when ``staging_completion`` is done: the snapshot no longer needs the trainer."""

    step: int
    time: float
    kind: Literal["staged"] = "staged"


@dataclass(frozen=True)
class SaveCommitted:
    """Sent when ``upload_completion`` is done: the checkpoint is durable.

    Times as in :class:`stager.SaveReport`: seconds since ``save()`` was called; None: not known yet.
    """

    step: int
    nbytes: int
    blocked_secs: float | None
    staged_secs: float | None
    written_secs: float | None
    synced_secs: float | None
    committed_secs: float | None
    kind: Literal["committed"] = "committed"


@dataclass(frozen=True)
class SaveFailed:
    """Sent when a save's Future holds an exception."""

    step: int
    error: str
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Stretch:
    """From the measuring process: one measured stretch of training steps without a save."""

    num_steps: int
    secs: float
    kind: Literal["stretch"] = "stretch"


@dataclass(frozen=True)
class MeasuredSave:
    """From the measuring process: a stretch of training steps with one save at its start.

    ``lost_secs`` is what the stretch took beyond ``num_steps`` steps of the stretches before and after it.
    ``done_secs`` is the time from the call until its API said the save was complete.
    """

    method: str
    blocked_secs: float
    lost_secs: float
    done_secs: float
    num_steps: int
    step_secs: float
    nbytes: int
    kind: Literal["measured"] = "measured"


SaveEvent = SaveBegun | SaveReturned | SaveStaged | SaveCommitted | SaveFailed
Event = Annotated[
    Started | Resumed | StepDone | SaveEvent | Stretch | MeasuredSave,
    Field(discriminator="kind"),
]
SendEvent = Callable[[Event], None]
"""Where a training run reports its progress. Any thread may call it."""


@dataclass(frozen=True)
class RankEvent:
    """One line of the FIFO: an event and the rank that sent it."""

    rank: int
    event: Event


_LINE: TypeAdapter[RankEvent] = TypeAdapter(RankEvent)


class EventWriter:
    """One rank's end of the FIFO.  Any thread may send: the events of a save come from the thread of its callbacks.

    Args:
        path: of the FIFO, which the demo reads.
        rank: of this process.

    Raises:
        OSError: nobody reads.
    """

    def __init__(self, path: str, rank: int = 0) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # without a reader a blocking open never returns
        os.set_blocking(self._fd, True)
        self._lock = threading.Lock()
        self._rank = rank
        self.send(Started(os.getpid()))

    def send(self, event: Event) -> None:
        """Write one line.

        Raises:
            BrokenPipeError: the reader is gone.
        """
        left = memoryview(_LINE.dump_json(RankEvent(self._rank, _shortened(event))) + b"\n")
        with self._lock:
            while left:
                left = left[os.write(self._fd, left) :]

    def close(self) -> None:
        """Close this end: the rank sends nothing more."""
        os.close(self._fd)


def _shortened(event: Event) -> Event:
    match event:
        case SaveFailed():
            return replace(event, error=event.error[:MAX_TEXT_CHARS])
        case Resumed():
            return replace(event, skipped=tuple(text[:MAX_TEXT_CHARS] for text in event.skipped[:MAX_TEXTS]))
        case _:
            return event


def decode_line(line: bytes) -> RankEvent:
    """Decode one line of the FIFO.

    Raises:
        pydantic.ValidationError: it is not an event.
    """
    return _LINE.validate_json(line)


def write_loss(file: IO[str], step: int, loss: float) -> None:
    """Write one JSON line: the loss as a number to read and, in ``bits``, as its exact value."""
    file.write(json.dumps({"step": step, "loss": loss, "bits": loss.hex()}) + "\n")
    file.flush()


def read_losses(path: str | os.PathLike[str]) -> dict[int, str]:
    """Read the exact losses of a run, by step.  A last line cut short by a kill is dropped."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.endswith("\n")]
    return {record["step"]: record["bits"] for record in records}
