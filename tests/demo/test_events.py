"""Events cross the pipe unchanged, and losses keep their bits."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from stager.demo.events import (
    Event,
    EventWriter,
    MeasuredSave,
    Resumed,
    SaveBegun,
    SaveCommitted,
    SaveFailed,
    SaveReturned,
    SaveStaged,
    StepDone,
    Stretch,
    decode_event,
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


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_event_is_read_as_it_was_sent(event: Event) -> None:
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb") as reader:
        EventWriter(write_fd).send(event)
        os.close(write_fd)
        (line,) = reader.readlines()
    assert decode_event(line) == event


def test_a_line_that_is_no_event_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind"):
        decode_event(b'{"kind": "surprise"}')


def test_losses_keep_every_bit_and_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    losses = [0.1 + 0.2, math.nextafter(1.0, 2.0), float("nan"), -0.0]
    with open(tmp_path / "losses.jsonl", "w", encoding="utf-8") as file:
        for step, loss in enumerate(losses, start=1):
            write_loss(file, step, loss)
        file.write('{"step": 5, "los')
    found = read_losses(tmp_path / "losses.jsonl")
    assert found == {step: loss.hex() for step, loss in enumerate(losses, start=1)}
