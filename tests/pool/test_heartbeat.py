"""A worker that can do nothing any more is noticed; one that is only slow, busy or waiting is left alone."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stager.workers import PoolOptions, TaskTimeoutError, WorkerDiedError, WorkerPool
from stager.workers.pool.heartbeat import HeartbeatClock, Pulse
from tests.faults import Faults
from tests.pool import tasks


@contextmanager
def pulse_of(*command: str) -> Iterator[tuple[Pulse, int, int]]:
    """A process that never beats by itself; with its pid and the descriptor that beats are written to."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with subprocess.Popen(command) as process:
        try:
            yield Pulse(process.pid, fd), process.pid, fd
        finally:
            process.kill()
            os.close(fd)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


def silence_after(pulse: Pulse, num_looks: int) -> float:
    for _ in range(num_looks):
        pulse.look(1.0)
    return pulse.silent_secs


# -- the judgement --------------------------------------------------------------------------------------------------


def test_stopped_process_is_silent_from_the_second_look_on() -> None:
    """The first only takes the processor time that later ones compare with."""
    with pulse_of("sleep", "1000") as (pulse, pid, _):
        stop(pid)
        assert silence_after(pulse, 6) == 5.0


def test_beat_ends_the_silence() -> None:
    with pulse_of("sleep", "1000") as (pulse, pid, fd):
        stop(pid)
        assert silence_after(pulse, 6) == 5.0
        os.eventfd_write(fd, 1)
        assert silence_after(pulse, 1) == 0.0
        assert silence_after(pulse, 2) == 2.0


def test_process_that_only_computes_is_never_silent() -> None:
    """As a task does that holds the GIL, or any worker on a machine with too much to do."""
    with pulse_of("sh", "-c", "while :; do :; done") as (pulse, _, _):
        assert silence_after(pulse, 50) == 0.0


def test_time_when_nobody_looked_is_lost_and_not_held_against_a_worker() -> None:
    clock = HeartbeatClock(timeout_secs=8.0, now=0.0)
    assert (clock.interval, clock.limit_secs) == (1.0, 6.0)
    clock.begin_wait(0.0)
    assert clock.end_wait(1.0, wait_secs=1.0) == 0.0  # all of it was spent waiting, as intended
    clock.begin_wait(1.5)
    assert clock.end_wait(2.0, wait_secs=1.0) == 0.5  # half a second in a callback
    clock.begin_wait(2.0)
    assert clock.end_wait(3602.0, wait_secs=1.0) == 3599.0  # the process was stopped while it waited
    assert clock.look(3602.0) == 1.0  # one look, however long ago the last one was
    assert clock.look(3602.5) == 0.0


# -- the pool -------------------------------------------------------------------------------------------------------


def test_worker_stopped_in_the_middle_of_a_task_is_killed_and_the_task_moved(faults: Faults) -> None:
    with WorkerPool(count=1, options=PoolOptions(heartbeat_timeout_secs=0.8)) as pool:
        pid = pool.submit(os.getpid).result()
        faults.arm("task.run", "stop")
        assert pool.submit(os.getpid).result() != pid
        assert pid not in pool.pids


def test_worker_stuck_with_the_gil_held_is_killed_and_the_error_says_why() -> None:
    """``pause()`` called without letting go of the GIL: no thread of it can do anything."""

    def hold_gil_for_ever() -> None:
        ctypes.PyDLL(None).pause()

    with WorkerPool(count=1, options=PoolOptions(heartbeat_timeout_secs=0.8, max_restarts=0)) as pool:
        with pytest.raises(WorkerDiedError, match=r"hold_gil_for_ever.*showed no sign of life"):
            pool.submit(hold_gil_for_ever).result()


def test_busy_and_waiting_workers_are_left_alone_however_long_it_takes(tmp_path: Path) -> None:
    """One computes with the GIL held, as ``json.loads`` of something large does; one waits in a system call."""
    with WorkerPool(count=2, options=PoolOptions(heartbeat_timeout_secs=0.4)) as pool:
        with tasks.blocked_worker(pool, tmp_path) as waiting:
            computing = pool.submit(lambda: (sum(range(50_000_000)), os.getpid())[1])
            pids = pool.pids
            tasks.wait_for_looks(pool, 16)
        assert {waiting.result(), computing.result()} == set(pids) == set(pool.pids)


def test_everything_was_stopped_for_longer_than_every_deadline_and_nobody_is_killed(tmp_path: Path) -> None:
    """As when a laptop sleeps: trainer and worker stop together, in the middle of a task."""
    script = (
        "import sys\n"
        "from tests.pool import tasks\n"
        "from stager.workers import PoolOptions, WorkerPool\n"
        "with WorkerPool(1, PoolOptions(heartbeat_timeout_secs=4, task_timeout_secs=4)) as pool:\n"
        "    future = pool.submit(tasks.block_on, sys.argv[1])\n"
        "    while not pool.health()[0].tasks: pass\n"
        "    print(pool.pids[0], flush=True)\n"
        "    print(future.result(), flush=True)\n"
    )
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen([sys.executable, "-c", script, str(fifo)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        with open(fifo, "w"):
            both = (worker, trainer.pid)
            for pid in both:
                os.kill(pid, signal.SIGSTOP)
            with pytest.raises(subprocess.TimeoutExpired):  # time itself is what is tested here
                trainer.wait(timeout=5)
            for pid in both:
                os.kill(pid, signal.SIGCONT)
        assert int(trainer.stdout.readline()) == worker


def test_task_that_always_hangs_fails_after_max_timeouts() -> None:
    """And not only after max_restarts: that many long deadlines would be hours."""
    with WorkerPool(count=1, options=PoolOptions(max_timeouts=2, max_restarts=8)) as pool:
        pool.submit(int).result()
        with tasks.task_timeout(pool, 0.05):
            future = pool.submit(tasks.hangs)
        with pytest.raises(TaskTimeoutError, match=r"ran longer than 0\.05 s.*attempt 2"):
            future.result()
        assert pool.submit(tasks.identity, 1).result() == 1
