"""Who runs the calls of a copy, and at what priority; what one of them raises."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from stager.snapshot.copy_threads import CopyThreads

_SECS = 60


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.fixture(name="threads")
def threads_fixture() -> Iterator[CopyThreads]:
    with closing(CopyThreads(2, 1)) as threads:
        yield threads


@pytest.fixture(name="staging")
def staging_fixture() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


class Stuck:
    """A call that runs until it is let go, as one does whose thread gets no time."""

    def __init__(self) -> None:
        self.begun, self.let_go = threading.Event(), threading.Event()
        self.niceness: int | None = None

    def __call__(self) -> None:
        self.niceness = niceness()
        self.begun.set()
        assert self.let_go.wait(_SECS)


def test_all_calls_run_at_the_trainers_priority(threads: CopyThreads) -> None:
    seen: list[int] = []
    threads.run([lambda: seen.append(niceness())] * 50)
    assert seen == [niceness()] * 50
    threads.run([])


def test_who_waits_does_not_wait_for_a_thread_that_yields(threads: CopyThreads, staging: ThreadPoolExecutor) -> None:
    """The only thread in the background is stuck in the first call: those of hurried() run the others."""
    stuck, seen, all_seen = Stuck(), [], threading.Event()

    def call() -> None:
        seen.append(niceness())
        if len(seen) == 20:
            all_seen.set()

    job = staging.submit(threads.run_in_background, [stuck, *[call] * 20])
    assert stuck.begun.wait(_SECS)
    assert seen == []
    with threads.hurried():
        assert all_seen.wait(_SECS)
        assert not job.done()  # it writes into the slab
        stuck.let_go.set()
        job.result(_SECS)
    assert seen == [niceness()] * 20
    assert stuck.niceness == min(19, niceness() + 10)


def test_a_copy_that_begins_while_the_trainer_waits(threads: CopyThreads, staging: ThreadPoolExecutor) -> None:
    seen: list[int] = []
    stuck = Stuck()
    before = staging.submit(threads.run_in_background, [stuck])  # has the only thread that yields
    assert stuck.begun.wait(_SECS)
    with threads.hurried(), ThreadPoolExecutor(1) as other:
        other.submit(threads.run_in_background, [lambda: seen.append(niceness())] * 20).result(_SECS)
    assert seen == [niceness()] * 20
    stuck.let_go.set()
    before.result(_SECS)
    threads.run_in_background([lambda: seen.append(niceness())])
    assert seen[-1] == min(19, niceness() + 10)


@pytest.mark.parametrize("in_background", [False, True])
def test_an_error_is_raised_and_no_call_is_begun_after_it(threads: CopyThreads, in_background: bool) -> None:
    seen: list[int] = []

    def fail() -> None:
        raise ValueError("of a call")

    run = threads.run_in_background if in_background else threads.run
    with pytest.raises(ValueError, match="of a call"):
        run([fail, fail, *[lambda: seen.append(1)] * 10_000])
    assert len(seen) < 10_000


def test_an_error_in_a_thread_of_who_waits(threads: CopyThreads, staging: ThreadPoolExecutor) -> None:
    """It is an error of the copy, and not of the step that waits for it."""
    stuck, failed = Stuck(), threading.Event()

    def fail() -> None:
        failed.set()
        raise ValueError("of a call")

    job = staging.submit(threads.run_in_background, [stuck, fail])
    assert stuck.begun.wait(_SECS)
    with threads.hurried():
        assert failed.wait(_SECS)
        stuck.let_go.set()
    with pytest.raises(ValueError, match="of a call"):
        job.result(_SECS)
