"""A worker can die, or stop, at any point; its tasks are done all the same, or fail with an error that says why."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from stager.workers import PoolOptions, TaskTimeoutError, WorkerDiedError, WorkerPool, WorkerStartError
from stager.workers.pool import process as process_module
from tests.faults import Faults
from tests.pool import tasks


def test_worker_dies_at_any_point_and_the_task_is_done_by_another(faults: Faults) -> None:
    """The exit codes and the ways to die are mixed; each death costs a start of a worker, so they share a pool."""
    deaths = [
        ("worker.import", "exit"),
        ("worker.start", "raise"),
        ("worker.ready", "kill"),
        ("task.receive", "segv"),
        ("task.run", "kill"),
        ("task.reply", "exit"),
    ]
    with WorkerPool(count=1, options=PoolOptions(max_restarts=2)) as pool:
        pid = pool.submit(os.getpid).result()
        for point, action in deaths:
            faults.arm(point, action)
            if point.startswith("worker."):  # for that, the one that is there must go first: it dies idle
                os.kill(pid, signal.SIGKILL)
            survivor = pool.submit(os.getpid).result()
            assert faults.fired(point), point
            assert survivor != pid, point
            pid = survivor
        assert pool.pids == (pid,)
        faults.arm("worker.shutdown", "kill")
    assert faults.fired("worker.shutdown")


WAYS = ("kill", "term", "segv", "exit", "raise")
STARTING = ("worker.import", "worker.start", "worker.ready")
AT_WORK = ("task.receive", "task.run", "task.reply")


def die_at(pool: WorkerPool, faults: Faults, point: str, way: str) -> None:
    """SIGTERM ends nobody; an exception in a task, or in making its reply, is an answer. Anything else costs the worker."""
    (pid,) = pool.pids
    faults.arm(point, way)
    if point in STARTING:  # the one that is there must go first
        os.kill(pid, signal.SIGKILL)
    future = pool.submit(os.getpid)
    if point in AT_WORK and way == "raise":
        with pytest.raises(RuntimeError, match="raised by a test"):
            future.result()
        assert pool.pids == (pid,)
    else:
        survives = point in AT_WORK and way == "term"
        assert (future.result() == pid) == survives
    assert faults.fired(point)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
def test_worker_dies_in_every_way_at_any_point(faults: Faults, way: str) -> None:
    with WorkerPool(count=1) as pool:
        pool.submit(int).result()
        for point in STARTING + AT_WORK:
            try:
                die_at(pool, faults, point, way)
            except BaseException as error:
                raise AssertionError(f"{way} at {point}") from error
        faults.arm("worker.shutdown", way)
    assert faults.fired("worker.shutdown")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_worker_that_dies_idle_is_replaced_before_anybody_needs_it(number: signal.Signals) -> None:
    with WorkerPool(count=1) as pool:
        pid = pool.submit(os.getpid).result()
        os.kill(pid, number)
        tasks.wait_gone(pid)
        while pid in pool.pids or not pool.pids:
            os.sched_yield()
        assert pool.submit(os.getpid).result() in pool.pids


def test_worker_killed_while_it_receives(tmp_path: Path) -> None:
    """It is stopped, so that the message cannot be through when it is killed."""
    with WorkerPool(count=1) as pool:
        pid = pool.submit(os.getpid).result()
        os.kill(pid, signal.SIGSTOP)
        payload = os.urandom(1 << 20) * 8
        future = pool.submit(tasks.identity, payload)
        while not pool._roster.workers[0].process.outbox:
            os.sched_yield()
        os.kill(pid, signal.SIGKILL)
        assert future.result() == payload
        assert pid not in pool.pids


def test_stopped_worker_is_killed_at_the_deadline_and_what_waited_behind_is_done(tmp_path: Path) -> None:
    """SIGSTOP before the tasks come: it takes none. The timeout is for the first only; the others run once."""
    log = str(tmp_path / "log")
    with WorkerPool(count=1) as pool:
        pid = pool.submit(os.getpid).result()
        os.kill(pid, signal.SIGSTOP)
        with tasks.task_timeout(pool, 1.0):
            first = pool.hand_over(os.getpid)
        others = [pool.hand_over(tasks.append_line, log, str(n)) for n in range(3)]
        assert first.result() != pid
        assert [future.result() for future in others] == [None] * 3
    assert Path(log).read_text().split() == ["0", "1", "2"]


def test_task_that_kills_its_workers_fails_after_max_restarts_and_takes_nobody_along(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def poison() -> None:
        tasks.append_line(str(log), "tried")
        tasks.dies_of(signal.SIGKILL)

    with WorkerPool(count=1, options=PoolOptions(max_restarts=1)) as pool:
        bad = pool.hand_over(poison)
        good = [pool.hand_over(tasks.identity, n) for n in range(3)]  # in the socket of the worker that will die
        with pytest.raises(WorkerDiedError, match=r"SIGKILL.*poison.*attempt 2.*out-of-memory"):
            bad.result()
        assert [future.result() for future in good] == [0, 1, 2]
        assert log.read_text().split() == ["tried"] * 2

        with tasks.task_timeout(pool, 0.05):
            late = pool.submit(tasks.hangs)
        with pytest.raises(TaskTimeoutError, match=r"attempt 2.*task_timeout_secs"):
            late.result()


def test_task_is_not_tried_again_before_the_worker_that_had_it_is_reaped(tmp_path: Path) -> None:
    """Two processes writing to one place would be worse than none: the task looks for whoever had it before."""
    log = tmp_path / "log"

    def look_for_predecessor() -> bool:
        if log.exists():
            return os.path.exists(f"/proc/{log.read_text()}")
        log.write_text(str(os.getpid()))
        tasks.dies_of(signal.SIGKILL)
        return True

    with WorkerPool(count=2) as pool:
        assert pool.submit(look_for_predecessor).result() is False


def test_worker_that_closes_its_socket_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is alive, but nothing can be asked of it, nor heard from it, any more."""
    monkeypatch.setattr("stager.workers.pool.handle._HANG_UP_SECS", 0.0)

    def close_and_hang() -> None:
        if not os.environ.get("SECOND"):
            os.closerange(3, 1000)
            tasks.hangs()

    with WorkerPool(count=1) as pool:
        pid = pool.submit(os.getpid).result()
        future = pool.submit(close_and_hang)
        tasks.wait_gone(pid)
        os.environ["SECOND"] = "1"
        try:
            assert future.result() is None
        finally:
            del os.environ["SECOND"]


# -- starting -------------------------------------------------------------------------------------------------------


def executable(monkeypatch: pytest.MonkeyPatch, path: object) -> None:
    monkeypatch.setattr(process_module.spawn, "get_executable", lambda: str(path).encode())


def test_workers_that_cannot_start_fail_what_waits_and_work_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        executable(broken, "/bin/false")
        pool = WorkerPool(count=2, options=PoolOptions(max_restarts=1))
        futures = [pool.submit(os.getpid), pool.hand_over(os.getpid)]
        for future in futures:
            with pytest.raises(WorkerStartError, match=r"exited with code 1 before it was ready.*stager doctor"):
                future.result()
        executable(broken, "/nonexistent")
        with pytest.raises(WorkerStartError, match=r"cannot start a worker process.*nonexistent"):
            pool.submit(os.getpid).result()
    with pool:
        assert pool.submit(os.getpid).result() in pool.pids


def test_worker_that_is_not_ready_in_time_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "sleepy"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o700)
    executable(monkeypatch, script)
    with WorkerPool(count=1, options=PoolOptions(max_restarts=0, start_timeout_secs=0.05)) as pool:
        with pytest.raises(WorkerStartError, match=r"was not ready within 0\.05 s and was killed"):
            pool.submit(os.getpid).result()


def test_refused_process_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two."""
    starts = []

    def refuse_second(*args: object) -> object:
        starts.append(args)
        if len(starts) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start(*args)

    start = process_module._start
    monkeypatch.setattr(process_module, "_start", refuse_second)
    with pytest.raises(WorkerStartError, match="Resource temporarily unavailable"):
        WorkerPool(count=2)
