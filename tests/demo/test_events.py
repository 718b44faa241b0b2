"""Events arrive with their sender, unchanged and one line at a time; losses keep their bits."""

from __future__ import annotations

import math
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from stager.demo.events import (
    Event,
    EventWriter,
    MeasuredSave,
    RankEvent,
    Resumed,
    SaveBegun,
    SaveCommitted,
    SaveFailed,
    SaveReturned,
    SaveStaged,
    Started,
    StepDone,
    Stretch,
    decode_line,
    read_losses,
    write_loss,
)

EVENTS: list[Event] = [
    Resumed(30, ("step-00000040.partial-ab: never committed",)),
    StepDone(31, 0.1 + 0.2, 1.5),
    SaveBegun(40, 2.5),
    SaveReturned(40, False),
    SaveStaged(40, 2.75),
    SaveCommitted(40, 123, 0.01, 0.02, 0.03, 0.04, None),
    SaveFailed(50, "StorageError('no space')"),
    Stretch(6, 1.25),
    MeasuredSave("stager", 0.01, -0.02, 0.3, 6, 0.2, 99),
]


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "events")
    return tmp_path / "events"


@pytest.fixture
def reader(fifo: Path) -> Iterator[int]:
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    yield fd
    os.close(fd)


def sent(fifo: Path, reader: int, rank: int, event: Event) -> list[RankEvent]:
    """Send, and read what comes."""
    writer = EventWriter(str(fifo), rank)
    writer.send(event)
    writer.close()
    text = os.read(reader, 1 << 16)
    assert max(map(len, text.splitlines())) < select.PIPE_BUF
    return [decode_line(line) for line in text.splitlines()]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_event_is_read_as_it_was_sent_after_who_sent_it(event: Event, fifo: Path, reader: int) -> None:
    assert sent(fifo, reader, 1, event) == [RankEvent(1, Started(os.getpid())), RankEvent(1, event)]


@pytest.mark.parametrize("event", [SaveFailed(4, "ä" * 100_000), Resumed(4, ("ä" * 100_000,) * 1000)])
def test_long_texts_are_cut_so_that_lines_of_ranks_do_not_mix(event: Event, fifo: Path, reader: int) -> None:
    _, said = sent(fifo, reader, 0, event)
    assert isinstance(said.event, (SaveFailed, Resumed))
    assert (type(said.event), said.event.step) == (type(event), 4)


def test_fifo_that_nobody_reads_is_an_error_and_no_hang(fifo: Path) -> None:
    with pytest.raises(OSError, match="No such device"):
        EventWriter(str(fifo), 0)


def test_a_line_that_is_no_event_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind"):
        decode_line(b'{"rank": 0, "event": {"kind": "surprise"}}')


def test_losses_keep_every_bit_and_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    losses = [0.1 + 0.2, math.nextafter(1.0, 2.0), float("nan"), -0.0]
    with open(tmp_path / "losses.jsonl", "w", encoding="utf-8") as file:
        for step, loss in enumerate(losses, start=1):
            write_loss(file, step, loss)
        file.write('{"step": 5, "los')
    found = read_losses(tmp_path / "losses.jsonl")
    assert found == {step: loss.hex() for step, loss in enumerate(losses, start=1)}
