"""What the ranks of a job tell the demo: one JSON line per event, each with the rank that sent it.

All ranks write into one FIFO, each line at once and shorter than PIPE_BUF, so lines never mix. The torchrun that looks after
the ranks has it open, too: end-of-file is the moment at which the whole job is gone.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from stager.demo.events import Event, LineWriter, Resumed, SaveFailed

MAX_TEXT_CHARS = 300  # of an error: a line stays below PIPE_BUF
MAX_TEXTS = 3


@dataclass(frozen=True)
class RankStarted:
    """From each rank, first of all: whom to kill."""

    rank: int
    pid: int
    kind: Literal["started"] = "started"


@dataclass(frozen=True)
class RankEvent:
    """What a rank would have said to its parent, were it alone."""

    rank: int
    event: Event
    kind: Literal["said"] = "said"


Line = Annotated[RankStarted | RankEvent, Field(discriminator="kind")]
_LINE: TypeAdapter[Line] = TypeAdapter(Line)


class RankWriter:
    """One rank's end of the FIFO.

    Args:
        path: of the FIFO, which somebody reads.
        rank: of this process.

    Raises:
        OSError: nobody reads.
    """

    def __init__(self, path: str, rank: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # without a reader it would block for ever
        os.set_blocking(fd, True)
        self._fd = fd
        self._lines = LineWriter(fd)
        self._rank = rank
        self._lines.write(_LINE.dump_json(RankStarted(rank, os.getpid())))

    def send(self, event: Event) -> None:
        """Write one line.

        Raises:
            BrokenPipeError: the reader is gone.
        """
        self._lines.write(_LINE.dump_json(RankEvent(self._rank, _shortened(event))))

    def close(self) -> None:
        """This rank has no more to say."""
        os.close(self._fd)


def _shortened(event: Event) -> Event:
    """Errors may be of any length; the whole is in the job's log."""
    match event:
        case SaveFailed():
            return replace(event, error=event.error[:MAX_TEXT_CHARS])
        case Resumed():
            return replace(event, skipped=tuple(text[:MAX_TEXT_CHARS] for text in event.skipped[:MAX_TEXTS]))
        case _:
            return event


def decode_line(line: bytes) -> Line:
    """One line of the FIFO.

    Raises:
        pydantic.ValidationError: it is none.
    """
    return _LINE.validate_json(line)
