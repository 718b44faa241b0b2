"""{raises, exits, is killed, segfaults, hangs, returns unpicklable} x {first, middle, last task} x {1, 2, 4 workers}.

Whatever one task does, each other task of the batch has its own result, the Future of the bad one says what happened, and
the next batch finds a pool that works.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.pool import tasks
from workers import PoolOptions, TaskTimeoutError, WorkerDiedError, WorkerPool

NUM_TASKS = 5
POSITIONS = {"first": 0, "middle": NUM_TASKS // 2, "last": NUM_TASKS - 1}


@dataclass(frozen=True)
class Crash:
    """What a task does, and what its Future then holds."""

    task: Callable[[], Any]
    error: type[BaseException]
    words: str
    exitcode: int | None = None
    timeout_secs: float = 1000.0


CRASHES = {
    "raises": Crash(partial(tasks.raises, "on purpose"), KeyError, "on purpose"),
    "exits": Crash(tasks.exits, WorkerDiedError, "exited with code 3", 3),
    "is killed": Crash(partial(tasks.dies_of, signal.SIGKILL), WorkerDiedError, "killed by SIGKILL", -signal.SIGKILL),
    "segfaults": Crash(partial(tasks.dies_of, signal.SIGSEGV), WorkerDiedError, "killed by SIGSEGV", -signal.SIGSEGV),
    "hangs": Crash(tasks.hangs, TaskTimeoutError, "ran longer than 0.05 s", timeout_secs=0.05),
    "returns unpicklable": Crash(tasks.returns_unpicklable, TypeError, "cannot pickle"),
}


def run_batch(pool: WorkerPool, crash: Crash, position: int) -> None:
    futures: list[Future[Any]] = []
    for number in range(NUM_TASKS):
        if number == position:
            with tasks.task_timeout(pool, crash.timeout_secs):
                futures.append(pool.submit(crash.task))
        else:
            futures.append(pool.submit(tasks.identity, number))
    bad = futures.pop(position)
    assert [future.result() for future in futures] == [n for n in range(NUM_TASKS) if n != position]
    with pytest.raises(crash.error, match=crash.words) as caught:
        bad.result()
    if isinstance(caught.value, WorkerDiedError):
        assert caught.value.exitcode == crash.exitcode
        assert caught.value.pid not in pool.pids
        assert caught.value.task in ("exits", "partial")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_bad_task_harms_no_other(count: int) -> None:
    cases = [(crash, place) for crash in CRASHES for place in POSITIONS]
    random.Random(count).shuffle(cases)
    with WorkerPool(count, PoolOptions(max_restarts=0)) as pool:
        for crash, place in cases:
            try:
                run_batch(pool, CRASHES[crash], POSITIONS[place])
            except BaseException as error:
                raise AssertionError(f"{place} task {crash}, {count} workers") from error
