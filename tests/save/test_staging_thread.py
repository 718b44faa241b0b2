"""The staging thread: each call runs once, one at a time, in the order in which they came."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from stager.saving.staging_thread import StagingThread


def test_thread_lives_before_the_first_call() -> None:
    thread = StagingThread()
    before = threading.active_count()
    idents: list[int] = []
    thread.run(lambda: idents.append(threading.get_ident())).result()
    assert threading.active_count() == before and idents != [threading.get_ident()]
    thread.close()


def test_calls_run_here_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ThreadPoolExecutor) -> None:
        raise RuntimeError("can't start new thread")

    ran: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "_adjust_thread_count", refuse)
        thread = StagingThread()
        thread.run(lambda: ran.append(1))
    thread.run(lambda: ran.append(2))  # now a thread could be started: what was refused must not run again
    assert ran == [1, 2]
    thread.close()
    assert ran == [1, 2]


def test_call_that_no_thread_takes_any_more_waits_for_those_before_it() -> None:
    thread = StagingThread()
    go, ran = threading.Event(), list[int]()
    thread.run(lambda: (go.wait(), ran.append(1)))
    closing = threading.Thread(target=thread.close)  # from now on the executor refuses
    closing.start()
    while not thread._executor._shutdown:
        pass
    late = threading.Thread(target=lambda: thread.run(lambda: ran.append(2)))
    late.start()
    go.set()
    late.join()
    closing.join()
    assert ran == [1, 2]
