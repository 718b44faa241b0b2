"""What ranks say arrives with its sender, one line at a time."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from stager.demo.events import Event, Resumed, SaveFailed, StepDone
from stager.demo.ranks.events import Line, RankEvent, RankStarted, RankWriter, decode_line


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "events")
    return tmp_path / "events"


@pytest.fixture
def reader(fifo: Path) -> Iterator[int]:
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    yield fd
    os.close(fd)


def sent(fifo: Path, reader: int, rank: int, *events: Event) -> list[Line]:
    """Send, and read what comes."""
    writer = RankWriter(str(fifo), rank)
    for event in events:
        writer.send(event)
    writer.close()
    text = os.read(reader, 1 << 16)
    assert max(map(len, text.splitlines())) < select.PIPE_BUF
    return [decode_line(line) for line in text.splitlines()]


def test_each_rank_says_first_who_it_is(fifo: Path, reader: int) -> None:
    event = StepDone(3, 0.1 + 0.2, 1.5)
    assert sent(fifo, reader, 1, event) == [RankStarted(1, os.getpid()), RankEvent(1, event)]


@pytest.mark.parametrize("event", [SaveFailed(4, "ä" * 100_000), Resumed(4, ("ä" * 100_000,) * 1000)])
def test_long_texts_are_cut_so_that_lines_of_ranks_do_not_mix(event: Event, fifo: Path, reader: int) -> None:
    _, line = sent(fifo, reader, 0, event)
    assert isinstance(line, RankEvent)
    assert (type(line.event), line.event.step) == (type(event), 4)


def test_nobody_who_reads_is_an_error_and_no_hang(fifo: Path) -> None:
    with pytest.raises(OSError, match="No such device"):
        RankWriter(str(fifo), 0)


def test_a_line_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind"):
        decode_line(b'{"kind": "surprise"}')
