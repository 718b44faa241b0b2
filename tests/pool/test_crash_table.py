"""What one task does x {first, middle, last task} x {1, 2, 4 workers}.

Whatever one task does, each other task of the batch has its own result, the Future of the bad one says what happened, and
the next batch finds a pool that works.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stager.workers import PoolOptions, TaskTimeoutError, WorkerDiedError, WorkerError, WorkerPool
from tests.pool import tasks

NUM_TASKS = 5
POSITIONS = {"first": 0, "middle": NUM_TASKS // 2, "last": NUM_TASKS - 1}
COUNTS = (1, 2, 4)


@dataclass(frozen=True)
class Crash:
    """What a task does, and what its Future then holds."""

    task: Callable[[], Any]
    error: type[BaseException] | None
    words: str = ""
    exitcode: int | None = None
    timeout_secs: float = 1000.0


SURVIVED = {
    "raises": Crash(partial(tasks.raises, "on purpose"), KeyError, "on purpose"),
    "calls sys.exit": Crash(tasks.exits_python, SystemExit, "4"),
    "gets SIGTERM": Crash(partial(tasks.dies_of, signal.SIGTERM), None),
    "is out of memory": Crash(tasks.runs_out_of_memory, MemoryError),
    "returns unpicklable": Crash(tasks.returns_unpicklable, WorkerError, "cannot be sent back"),
    "returns what fails to load": Crash(tasks.FailsToLoad, WorkerError, "cannot be unpickled"),
    "raises what fails to load": Crash(tasks.raises_what_fails_to_load, WorkerError, "cannot be unpickled here"),
}
FATAL = {
    "exits": Crash(tasks.exits, WorkerDiedError, "exited with code 3", 3),
    "is killed": Crash(partial(tasks.dies_of, signal.SIGKILL), WorkerDiedError, "killed by SIGKILL", -signal.SIGKILL),
    "segfaults": Crash(partial(tasks.dies_of, signal.SIGSEGV), WorkerDiedError, "killed by SIGSEGV", -signal.SIGSEGV),
    "hangs": Crash(tasks.hangs, TaskTimeoutError, "ran longer than 0.05 s", timeout_secs=0.05),
    "is stopped": Crash(tasks.stops, WorkerDiedError, "no sign of life", -signal.SIGKILL),
}
CRASHES = {**SURVIVED, **FATAL}


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
    if crash.error is None:
        assert bad.result() is None
        return
    with pytest.raises(crash.error, match=crash.words or None) as caught:
        bad.result()
    if isinstance(caught.value, WorkerDiedError):
        assert caught.value.exitcode == crash.exitcode
        assert caught.value.pid not in pool.pids
        assert caught.value.task in ("exits", "partial", "stops")


def run_cases(count: int, cases: list[tuple[str, str]]) -> None:
    """In one pool and in random order: what one case leaves behind, the next one finds."""
    random.Random(count).shuffle(cases)
    options = PoolOptions(max_restarts=0, heartbeat_timeout_secs=1.0)
    with WorkerPool(count, options) as pool:
        for crash, place in cases:
            try:
                run_batch(pool, CRASHES[crash], POSITIONS[place])
            except BaseException as error:
                raise AssertionError(f"{place} task {crash}, {count} workers") from error


@pytest.mark.parametrize("count", COUNTS)
def test_one_bad_task_harms_no_other(count: int) -> None:
    """The fatal ones in one place for each number of workers, since each of them costs the start of a worker."""
    places = list(POSITIONS)
    shift = COUNTS.index(count)
    run_cases(
        count,
        [(crash, place) for crash in SURVIVED for place in POSITIONS]
        + [(crash, places[(number + shift) % len(places)]) for number, crash in enumerate(FATAL)],
    )


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", COUNTS)
def test_one_bad_task_harms_no_other_anywhere(count: int) -> None:
    """The whole table."""
    run_cases(count, [(crash, place) for crash in CRASHES for place in POSITIONS])


# -- the kernel's out-of-memory killer ------------------------------------------------------------------------------


@contextmanager
def memory_cgroup(name: str, limit_bytes: int) -> Iterator[Path]:
    """Of version 1 or 2; skips where this process may not make one."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    group = root / name
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        limit = group / ("memory.limit_in_bytes" if root == version_1 else "memory.max")
        try:
            limit.write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"no memory cgroup can be limited here: {error}")
        with suppress(OSError):  # no accounting of swap, or no swap
            (group / ("memory.memsw.limit_in_bytes" if root == version_1 else "memory.swap.max")).write_text(
                str(limit_bytes if root == version_1 else 0)
            )
        yield group
    finally:
        group.rmdir()


def join_and_eat(group: str, flag: str, nbytes: int) -> int:
    """The first time only: where it is tried again there is memory."""
    if not os.path.exists(flag):
        Path(flag).touch()
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
        return len(b"x" * nbytes)
    return -1


def test_worker_killed_by_the_out_of_memory_killer_is_replaced_and_the_task_done(tmp_path: Path) -> None:
    with memory_cgroup(f"stager-test-{os.getpid()}", 64 << 20) as group:
        with WorkerPool(count=1) as pool:
            pid = pool.submit(os.getpid).result()
            assert pool.submit(join_and_eat, str(group), str(tmp_path / "flag"), 1 << 30).result() == -1
            assert pool.pids != (pid,)
