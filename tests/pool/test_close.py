"""The end of a pool: what was submitted is done, or fails with an error; nobody waits for ever; nothing is left."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from stager.workers import ClosedError, PoolOptions, WorkerPool
from tests.pool import tasks
from tests.waiting import wait_until_blocked


def test_close_finishes_what_was_submitted_and_refuses_what_comes_later(tmp_path: Path) -> None:
    pool = WorkerPool(count=1)
    refused: list[ClosedError] = []
    closers = [threading.Thread(target=pool.close) for _ in range(2)]
    with tasks.blocked_worker(pool, tmp_path) as running:
        waiting = [pool.submit(tasks.identity, 1), pool.hand_over(tasks.identity, 2)]
        closers[0].start()
        wait_until_blocked(closers[0], WorkerPool.close)
        closers[1].start()
        for call in (pool.submit, pool.hand_over):
            with pytest.raises(ClosedError, match=r"this WorkerPool is closed; identity was not submitted"):
                call(tasks.identity, 3)
        assert not running.done()

        def submit_again(_: Future[Any]) -> None:
            try:
                pool.submit(tasks.identity, 4)
            except ClosedError as error:
                refused.append(error)

        waiting[0].add_done_callback(submit_again)
    for closer in closers:
        closer.join()
    assert [future.result(timeout=0) for future in waiting] == [1, 2]
    assert len(refused) == 1
    pool.close()
    assert pool.pids == () and pool.drain(timeout=0)


def test_close_with_a_timeout_fails_the_rest_when_nothing_runs_it_any_more(tmp_path: Path) -> None:
    """Who reads the Future's error may use the memory of the arguments again: no worker may still write to it."""
    alive_at_end: list[bool] = []
    pool = WorkerPool(count=1, options=PoolOptions(shutdown_timeout_secs=60))
    with tasks.blocked_worker(pool, tmp_path) as running:
        pid = tasks.running_pid(pool)
        running.add_done_callback(lambda _: alive_at_end.append(os.path.exists(f"/proc/{pid}")))
        pending, handed_over, cancelled = (
            pool.submit(os.getpid),
            pool.hand_over(os.getpid),
            pool.submit(os.getpid),
        )
        cancelled.cancel()
        # One that does not fit the socket: its thread waits in hand_over.
        stuck: list[Future[Any]] = []
        thread = threading.Thread(target=lambda: stuck.append(pool.hand_over(tasks.identity, bytes(8 << 20))))
        thread.start()
        while len(pool.health()[0].tasks) < 3:
            os.sched_yield()
        pool.close(timeout=0)
        thread.join()
        for future in (running, pending, handed_over, *stuck):
            with pytest.raises(ClosedError, match="was closed before"):
                future.result(timeout=0)
        assert cancelled.cancelled()
    assert alive_at_end == [False]


def test_close_does_not_wait_for_workers_to_start() -> None:
    pool = WorkerPool(count=2, options=PoolOptions(shutdown_timeout_secs=1000))
    processes = [worker.process for worker in pool._roster.workers]
    pool.close()
    assert [process.exitcode for process in processes] == [-9, -9]


def test_interrupted_close_can_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WorkerPool(count=1)
    for place in (
        "stager.workers.pool.roster.Roster.drain",
        "stager.workers.pool.supervisor.Supervisor._stop_workers",
        "stager.workers.pool.roster.Roster.clear",
    ):
        with monkeypatch.context() as interrupted:

            def interrupt(*_: object) -> None:
                raise KeyboardInterrupt

            interrupted.setattr(place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                pool.close()
    pool.close()


def test_broken_supervisor_fails_every_future_and_closes_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug of ours must not become a hang of the user's."""
    from stager.workers.errors import InternalError

    with WorkerPool(count=1) as pool:
        with tasks.blocked_worker(pool, tmp_path) as running:
            monkeypatch.setattr(pool._supervisor, "_replace_missing", lambda: {}["a bug"])
            pending = pool.submit(os.getpid)
            for future in (running, pending):
                with pytest.raises(InternalError, match="a bug"):
                    future.result()
            with pytest.raises(ClosedError, match="a bug"):
                pool.submit(os.getpid)


def test_options_out_of_range_are_refused() -> None:
    for options in ({"nice": 20}, {"ionice": "best"}, {"max_restarts": -1}, {"task_timeout_secs": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PoolOptions(**options)
    with pytest.raises(ValueError, match="count"):
        WorkerPool(count=0)
