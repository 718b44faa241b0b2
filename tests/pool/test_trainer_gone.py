"""The trainer is killed: what was handed over is done, and every worker ends. Whoever forks from it cannot use the pool."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests import scripts
from tests.pool import tasks

_TRAINER = """
import os, signal, sys, torch
from tests.pool import tasks
from stager.workers import PoolOptions, WorkerPool
from stager.workers.pool import pool as pool_module
log, fifo = sys.argv[1:]
"""


def run_trainer(script: str, tmp_path: Path) -> tuple[int, list[int]]:
    """Runs until it is dead; its exit code and the pids that it printed. Its stdout is read to the end, which is when
    nobody has it any more: no worker holds it."""
    os.mkfifo(tmp_path / "fifo")
    done = scripts.run(_TRAINER + script, tmp_path / "log", tmp_path / "fifo")
    return done.returncode, [int(pid) for pid in done.stdout.split()]


def test_what_was_handed_over_is_done_after_the_trainer_was_killed(tmp_path: Path) -> None:
    """The tasks behind the first are in the socket only; their tensor is nowhere but in flight. The first reply is larger
    than the socket, and nobody is there to read it."""
    returncode, pids = run_trainer(
        "pool = WorkerPool(count=1, options=PoolOptions(orphan_timeout_secs=1000))\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "pool.hand_over(lambda: tasks.block_on(fifo) and bytes(8 << 20))\n"
        "for n in range(3):\n"
        "    pool.hand_over(lambda t: tasks.append_line(log, str(t.sum().item())), torch.full((1000,), float(n)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        tmp_path,
    )
    assert returncode == -signal.SIGKILL
    (pid,) = pids
    with open(tmp_path / "fifo", "w"):  # only now may the first task go on
        pass
    tasks.wait_gone(pid)
    assert (tmp_path / "log").read_text().split() == ["0.0", "1000.0", "2000.0"]


def test_forked_child_that_holds_the_sockets_delays_nobody(tmp_path: Path) -> None:
    """As when a library forks without Python's hooks: the other end of the socket stays open, and is never read."""
    returncode, pids = run_trainer(
        "pool = WorkerPool(count=1, options=PoolOptions(orphan_timeout_secs=1000))\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "pool_module._live_pools.clear()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.close(1)\n"
        "    signal.pause()\n"
        "print(child, flush=True)\n"
        "pool.hand_over(lambda: tasks.block_on(fifo) and bytes(8 << 20))\n"
        "pool.hand_over(tasks.append_line, log, 'done')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        tmp_path,
    )
    assert returncode == -signal.SIGKILL
    worker, child = pids
    try:
        with open(tmp_path / "fifo", "w"):
            pass
        tasks.wait_gone(worker)
        assert (tmp_path / "log").read_text() == "done\n"
    finally:
        os.kill(child, signal.SIGKILL)
    tasks.wait_gone(child)


def test_no_worker_outlives_the_orphan_timeout(tmp_path: Path) -> None:
    """One hangs in a task, the other is killed together with the trainer while it starts."""
    returncode, pids = run_trainer(
        "pool = WorkerPool(count=1, options=PoolOptions(orphan_timeout_secs=0.2))\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "pool.hand_over(tasks.append_line_then_hang, log, 'began')\n"
        "print(*WorkerPool(count=1, options=PoolOptions(orphan_timeout_secs=0.2)).pids, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        tmp_path,
    )
    assert returncode == -signal.SIGKILL
    assert len(pids) == 2
    for pid in pids:
        tasks.wait_gone(pid)
    assert (tmp_path / "log").read_text() == "began\n"


def test_worker_that_is_stopped_when_the_trainer_is_killed_goes_on(tmp_path: Path) -> None:
    """Or it would stay for ever, its watch over the orphan timeout stopped as well."""
    returncode, pids = run_trainer(
        "pool = WorkerPool(count=1, options=PoolOptions(orphan_timeout_secs=1000))\n"
        "pid = pool.submit(os.getpid).result()\n"
        "print(pid, flush=True)\n"
        "os.kill(pid, signal.SIGSTOP)\n"
        "pool.hand_over(tasks.append_line, log, 'done')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        tmp_path,
    )
    assert returncode == -signal.SIGKILL
    tasks.wait_gone(*pids)
    assert (tmp_path / "log").read_text() == "done\n"


def test_forked_child_cannot_use_the_pool_and_holds_nothing_of_it(tmp_path: Path) -> None:
    returncode, _ = run_trainer(
        "from stager.workers import ClosedError\n"
        "from concurrent.futures import Future\n"
        "def held():\n"
        "    links = [f'/proc/self/fd/{name}' for name in os.listdir('/proc/self/fd')]\n"
        "    targets = [os.readlink(link) for link in links if os.path.exists(link) or os.path.islink(link)]\n"
        "    return [t for t in targets if 'socket' in t or 'pidfd' in t or 'pipe' in t]\n"
        "before = len(held())\n"
        "with WorkerPool(count=1) as pool:\n"
        "    running = pool.submit(tasks.block_on, fifo)\n"
        "    pending = pool.submit(torch.sum, torch.ones(10))\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        assert len(held()) == before, held()\n"
        "        for use in (lambda: pool.submit(int), lambda: pool.hand_over(int), pool.drain, pool.health):\n"
        "            try:\n"
        "                use()\n"
        "            except ClosedError as error:\n"
        "                assert 'forked child' in str(error)\n"
        "            else:\n"
        "                raise AssertionError(use)\n"
        "        pool.close()\n"
        "        with WorkerPool(count=1) as own:\n"
        "            assert own.submit(int, '5').result() == 5\n"
        "        sys.exit(7)\n"  # through __exit__ and the atexit handlers
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "    with open(fifo, 'w'):\n"
        "        pass\n"
        "    assert pending.result() == 10 and running.result() in pool.pids\n",
        tmp_path,
    )
    assert returncode == 0
