"""Ranks that wait for others that may never come: they say what every rank has to do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from stager.ranks.messages import Number
from stager.ranks.rank_group import RankGroup, find_rank_group, ranks_without_group
from stager.workers import long_wait
from tests.ranks.threads import on_ranks

_SINCE = " since 0 s, for 60 s at most: "


class _Said(logging.Handler):
    """Sets an event when a record with these words comes."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words
        self.event = threading.Event()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if self.words in record.getMessage():
            self.event.set()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> _Said:
    monkeypatch.setattr(long_wait, "LONG_SECS", 0.0)
    monkeypatch.setattr(long_wait, "ADVICE_SECS", 0.0)
    handler = _Said("every rank has to make its Checkpointer, and to call save(), load() and close()")
    logging.getLogger("stager").addHandler(handler)
    return handler


def _come(group: RankGroup) -> object:
    return group.barrier("open", "opening /run")


def _broadcast(group: RankGroup) -> object:
    return group.broadcast("said", Number, lambda: Number(3), "choose the checkpoint to load")


@pytest.mark.parametrize(
    ("meet", "early", "words"),
    [
        (
            _come,
            0,
            "waiting for all ranks to come (opening /run) since 0 s, for 60 s at most: rank 1 did not come yet; every",
        ),
        (
            _come,
            1,
            "waiting for all ranks to come (opening /run) since 0 s, for 60 s at most: rank 0 did not come yet; every",
        ),
        (
            _broadcast,
            1,
            "waiting for rank 0 to choose the checkpoint to load since 0 s, for 60 s at most: every rank has",
        ),
    ],
    ids=["barrier without 1", "barrier without 0", "broadcast without 0"],
)
def test_rank_that_waits_says_what_every_rank_has_to_do(
    said: _Said, meet: Callable[[RankGroup], object], early: int, words: str
) -> None:
    """1. one rank comes, and waits. 2. it says so. 3. the other one comes, and both go on."""

    def body(group: RankGroup) -> None:
        group.timeout_secs = 60.0
        if group.rank != early:
            said.event.wait()
        meet(group)

    try:
        on_ranks(2, body)
    finally:
        logging.getLogger("stager").removeHandler(said)
    (message,) = [message for message in said.messages if said.words in message and words[:20] in message]
    assert message.startswith(words) and "set ranks.together to false" in message


ENVIRONMENTS: dict[str, tuple[dict[str, str], bool]] = {
    "torchrun": ({"RANK": "1", "WORLD_SIZE": "4"}, True),
    "torchrun, one": ({"RANK": "0", "WORLD_SIZE": "1"}, False),
    "nothing": ({}, False),
    "half": ({"WORLD_SIZE": "4"}, False),
    "strange": ({"RANK": "first", "WORLD_SIZE": "4"}, False),
}


@pytest.mark.parametrize(("environ", "speaks"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_launcher_that_speaks_of_ranks_and_no_process_group(environ: dict[str, str], speaks: bool) -> None:
    problem = ranks_without_group(environ)
    assert (problem is not None) == speaks
    if problem is not None:
        assert "this is rank 1 of 4" in problem and "Call init_process_group() before" in problem


@pytest.mark.parametrize(("together", "warns"), [("auto", True), (False, False)])
def test_checkpointer_before_the_process_group(
    together: bool | str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_rank_group(together, 1.0).is_alone
    assert ("no process group yet" in caplog.text) == warns
