"""The same for many things, in several threads."""

from __future__ import annotations

import threading

import pytest

from stager.workers.checkpoint.storage.in_threads import in_threads


def test_one_thread_is_the_callers() -> None:
    assert in_threads(lambda _: threading.current_thread(), range(3), 1) == [threading.main_thread()] * 3


def test_results_come_in_order_from_threads_that_work_at_once() -> None:
    together = threading.Barrier(4)  # each waits for the three others

    def square(number: int) -> int:
        together.wait(60)
        return number * number

    assert in_threads(square, range(8), 4) == [number * number for number in range(8)]


def test_the_first_error_is_that_of_one_thread_whichever_comes_first() -> None:
    """1. 1 is begun; 2. 2 fails; 3. 1 fails, too; nothing after them is begun by who knows."""
    has_failed = threading.Event()

    def fail(number: int) -> None:
        if number == 1:
            assert has_failed.wait(60)
            raise ValueError("1")
        if number == 2:
            has_failed.set()
            raise ValueError("2")

    with pytest.raises(ValueError, match="1"):
        in_threads(fail, range(100), 2)


def test_threads_that_cannot_be_started_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert in_threads(str, range(100), 32) == list(map(str, range(100)))


def test_nothing_to_do() -> None:
    assert in_threads(str, [], 32) == []
