"""What the pool's tests run in workers; and what those tests need to look at processes from outside."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from stager.workers import WorkerPool

_TOO_LONG_SECS = 60.0  # not a threshold: what has not happened by then will never happen


def identity(value: Any) -> Any:
    return value


def imported() -> set[str]:
    """Here, and not beside the test: a worker that is sent a function imports its module."""
    return set(sys.modules)


def raises(message: str) -> NoReturn:
    raise KeyError(message)


def exits() -> NoReturn:
    os._exit(3)


def dies_of(number: int) -> None:
    os.kill(os.getpid(), number)


def hangs() -> None:
    signal.pause()


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def exits_python() -> NoReturn:
    sys.exit(4)


def runs_out_of_memory() -> bytes:
    """Because of a limit on the address space. It must be lifted again: the worker lives on."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (64 << 20), before[1]))
    try:
        return bytes(1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class FailsToLoad:
    """Only in the process that did not make it."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["pid"] != os.getpid():
            raise ValueError("made elsewhere")


class FailsToLoadError(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return _only_in, (os.getpid(),)


def _only_in(pid: int) -> Exception:
    if pid != os.getpid():
        raise ValueError("made elsewhere")
    return FailsToLoadError()


def raises_what_fails_to_load() -> NoReturn:
    raise FailsToLoadError


def returns_unpicklable() -> Any:
    return threading.Lock()


def append_line(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(f"{text}\n")


def append_line_then_hang(path: str, text: str) -> None:
    append_line(path, text)
    hangs()


def block_on(fifo: str) -> int:
    """Until somebody writes to the FIFO; who waits for the reader to come knows that this task runs."""
    with open(fifo) as file:
        file.read()
    return os.getpid()


@contextmanager
def blocked_worker(pool: WorkerPool, directory: Path, *, call: str = "submit") -> Iterator[Any]:
    """One worker runs a task that ends with the block. Yields the task's Future."""
    fifo = directory / f"block-{len(list(directory.iterdir()))}"
    os.mkfifo(fifo)
    future = getattr(pool, call)(block_on, str(fifo))
    with open(fifo, "w"):  # opens when the task has opened it
        yield future


@contextmanager
def task_timeout(pool: WorkerPool, secs: float) -> Iterator[None]:
    """For what is submitted inside the block only: a slow machine must not time out the innocent."""
    before = pool._options
    pool._options = replace(before, task_timeout_secs=secs)
    yield
    pool._options = before


def wait_for_looks(pool: WorkerPool, count: int) -> None:
    """Until the supervisor has looked after its busy workers so often."""
    clock = pool._supervisor._heartbeats
    for _ in range(count):
        before = clock.next_look
        while clock.next_look == before:
            os.sched_yield()


def wait_gone(pid: int) -> None:
    """Until a process that need not be our child has ended."""
    with suppress(ProcessLookupError):
        sentinel = os.pidfd_open(pid)
        try:
            assert select.select([sentinel], [], [], _TOO_LONG_SECS)[0], f"process {pid} does not end"
        finally:
            os.close(sentinel)


def running_pid(pool: WorkerPool) -> int:
    """The one worker that has a task."""
    (pid,) = [worker.pid for worker in pool.health() if worker.tasks]
    return pid


def environment() -> str:
    return json.dumps(dict(os.environ))
