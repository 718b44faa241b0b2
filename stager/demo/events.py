"""What a child of the demo tells its parent: one JSON line per event, over a pipe of its own.

The pipe is not inherited by the child's workers, so the parent reads end-of-file at the moment the child is dead, and
what it has read by then is all that the child lived to see.  That is how the demo knows, without a clock, whether
a kill came in the middle of a save.
"""

from __future__ import annotations

import json
import os
import threading
from typing import IO, Annotated, Literal, Protocol

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class Resumed:
    """From a training child with checkpoints, before its first step: where it goes on (step 0: from the start)."""

    step: int
    skipped: tuple[str, ...] = ()
    kind: Literal["resumed"] = "resumed"


@dataclass(frozen=True)
class StepDone:
    """From a training child, after each optimizer step."""

    step: int
    loss: float
    time: float
    kind: Literal["step"] = "step"


@dataclass(frozen=True)
class SaveBegun:
    """From a training child, right before it calls ``save``."""

    step: int
    time: float
    kind: Literal["begun"] = "begun"


@dataclass(frozen=True)
class SaveReturned:
    """From a training child, when ``save`` has returned; ``staged``: its snapshot was complete by then."""

    step: int
    staged: bool
    kind: Literal["returned"] = "returned"


@dataclass(frozen=True)
class SaveStaged:
    """From a training child, when ``staging_completion`` is done: the snapshot no longer needs the trainer."""

    step: int
    time: float
    kind: Literal["staged"] = "staged"


@dataclass(frozen=True)
class SaveCommitted:
    """From a training child, when ``upload_completion`` is done: the checkpoint is durable.

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
    """From a training child, when a save's Future holds an exception."""

    step: int
    error: str
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Stretch:
    """From the measuring child: one measured stretch of training steps without a save."""

    num_steps: int
    secs: float
    kind: Literal["stretch"] = "stretch"


@dataclass(frozen=True)
class MeasuredSave:
    """From the measuring child: a stretch of training steps with one save at its start.

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


Event = Annotated[
    Resumed | StepDone | SaveBegun | SaveReturned | SaveStaged | SaveCommitted | SaveFailed | Stretch | MeasuredSave,
    Field(discriminator="kind"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class EventSink(Protocol):
    """Where a training run says how it goes."""

    def send(self, event: Event) -> None:
        """Take note of an event.  Any thread may send."""


class LineWriter:
    """The child's end of a pipe.  Any thread may write: a save's events come from its callbacks' thread."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._fd = fd
        self._lock = threading.Lock()

    def write(self, line: bytes) -> None:
        """Write one line, whose end is added.

        Raises:
            BrokenPipeError: the parent is gone.
        """
        left = memoryview(line + b"\n")
        with self._lock:
            while left:
                left = left[os.write(self._fd, left) :]


class EventWriter:
    """Sends events through a pipe of the child's own."""

    def __init__(self, fd: int) -> None:
        self._lines = LineWriter(fd)

    def send(self, event: Event) -> None:
        """Write one line.

        Raises:
            BrokenPipeError: the parent is gone.
        """
        self._lines.write(_EVENT.dump_json(event))


def decode_event(line: bytes) -> Event:
    """One line of the pipe.

    Raises:
        pydantic.ValidationError: it is not an event.
    """
    return _EVENT.validate_json(line)


def write_loss(file: IO[str], step: int, loss: float) -> None:
    """One JSON line: the loss as a number to read and, in ``bits``, as its exact value."""
    file.write(json.dumps({"step": step, "loss": loss, "bits": loss.hex()}) + "\n")
    file.flush()


def read_losses(path: str | os.PathLike[str]) -> dict[int, str]:
    """The exact losses of a run, by step.  A last line cut short by a kill is dropped."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.endswith("\n")]
    return {record["step"]: record["bits"] for record in records}
