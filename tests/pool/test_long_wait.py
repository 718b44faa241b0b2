"""A wait that becomes long says so: once, what for, and how long at most."""

from __future__ import annotations

import logging

import pytest

from stager.workers.long_wait import LongWait


class Clock:
    def __init__(self) -> None:
        self.secs = 100.0

    def __call__(self) -> float:
        return self.secs


@pytest.fixture
def clock() -> Clock:
    return Clock()


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_short_wait_says_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    waiting = LongWait("rain", 60, clock=clock)
    for clock.secs in (100.0, 101.0, 101.9):
        waiting.tick()
    assert told(caplog) == []


def test_long_wait_says_so_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    waiting = LongWait("rain", 60, clock=clock)
    for clock.secs in (101.0, 102.0, 103.0, 130.0, 500.0):
        waiting.tick()
    assert told(caplog) == [(logging.WARNING, "waiting for rain, for 60 s at most")]


def test_wait_without_a_limit(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    waiting = LongWait("rain", clock=clock)
    clock.secs += 3
    waiting.tick()
    assert told(caplog) == [(logging.WARNING, "waiting for rain, without a time limit")]


def test_reason_is_told_after_the_limit(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    waiting = LongWait("rain", 60, "it is summer", clock=clock)
    clock.secs += 3
    waiting.tick()
    assert told(caplog) == [(logging.WARNING, "waiting for rain, for 60 s at most: it is summer")]


def test_advice_comes_later_and_is_made_only_then(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    made: list[float] = []

    def advice() -> str:
        made.append(clock.secs)
        return "dance"

    waiting = LongWait("rain", 60, advice=advice, clock=clock)
    with caplog.at_level(logging.INFO, "stager"):
        for clock.secs in (101.0, 102.5, 109.0, 110.0, 111.0, 150.0):
            waiting.tick()
    assert told(caplog) == [
        (logging.INFO, "waiting for rain, for 60 s at most"),
        (logging.WARNING, "waiting for rain since 10 s, for 60 s at most: dance"),
    ]
    assert made == [110.0]


@pytest.mark.parametrize("timeout", [None, 60.0, 1.5])
def test_blocking_wait_is_cut_in_two(timeout: float | None, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    blocked: list[float | None] = []

    def wait(secs: float | None) -> bool:
        blocked.append(secs)
        clock.secs += 1e6 if secs is None else secs
        return secs is None

    came = LongWait("rain", timeout, clock=clock).until(wait, timeout)
    expected = {None: [2.0, None], 60.0: [2.0, 58.0], 1.5: [1.5]}[timeout]
    assert blocked == expected and came == (timeout is None) and len(told(caplog)) == len(expected) - 1


def test_blocking_wait_that_is_over_soon(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert LongWait("rain", clock=clock).until(lambda secs: True) and told(caplog) == []
