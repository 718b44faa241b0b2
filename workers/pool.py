"""A pool of long-lived worker processes.

      trainer process                                            worker process 1..n
    +----------------------------------------------+           +---------------------------+
    |  submit(fn, *args) -> Future                 |           |                           |
    |     |  pickle, dup descriptors               |           |   Inbox -> decode         |
    |     v                                        |           |     |                     |
    |  pending ----(a worker is idle)----+         |           |     v                     |
    |                                    v         |  socket   |   run the task            |
    |  hand_over(fn, *args) -------> Outbox 1..n ==|===========|     |                     |
    |     (sent before it returns)                 |   pair    |     v                     |
    |  supervisor thread                           |           |   reply: Done | Failed    |
    |     <------------------------- Inbox 1..n  <=|===========|                           |
    |     watches: sockets, pidfds, deadlines      |           |   pidfd of the trainer    |
    +----------------------------------------------+           +---------------------------+
            memory is never copied through a socket: descriptors of shared storages travel beside the message

The caller's threads
  * pickle the call, so that a mistake in it is raised where it was made;
  * never wait for a worker, except that ``hand_over`` waits until the kernel has taken the message.
The supervisor thread (``supervisor.py``) is the only one that
  * reads from workers and resolves Futures;
  * notices deaths and missed deadlines, replaces workers and moves their tasks;
  * gives pending tasks to idle workers.
A worker (``main.py``)
  * runs what it was sent in order, one task at a time, and replies once to each;
  * shares no lock, queue or semaphore with anyone: it can be killed at any instruction without stopping the others.

Guarantees
  * A Future always resolves: with the result, the task's exception, or a WorkerError that names pid and cause.
  * A task runs again on another worker when its worker died, so tasks must be idempotent. It is never run again before
    the process that ran it is dead and reaped.
  * A task that was handed over runs even if the trainer is killed right after.
"""

from __future__ import annotations

import atexit
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from workers import codec
from workers.errors import ClosedError
from workers.main import WorkerSettings
from workers.supervisor import Supervisor, WorkerHealth
from workers.work import WorkItem

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How a pool runs its workers.

    Attributes:
        nice: added to each worker's niceness, 0..19.
        ionice: "none", "low" or "idle".
        start_timeout_secs: a worker that is not ready by then is killed and replaced.
        max_restarts: how often one task may lose its worker before its Future fails, and how often in a row a worker
            may fail to start before what waits for it fails.
        task_timeout_secs: a task that runs longer has its worker killed; ``None``: no limit.
        orphan_timeout_secs: how long workers may finish what was handed over when the trainer is gone.
        shutdown_timeout_secs: each rung of the shutdown ladder (ask, terminate, kill).
        env: environment variables for the workers, on top of this process's.
    """

    nice: int = 0
    ionice: str = "none"
    start_timeout_secs: float = 120.0
    max_restarts: int = 8
    task_timeout_secs: float | None = None
    orphan_timeout_secs: float = 600.0
    shutdown_timeout_secs: float = 10.0
    env: Mapping[str, str] | None = None


class WorkerPool:
    """Runs callables in long-lived worker processes.

    ``fn`` may be a lambda, a closure, or a function of the main module (cloudpickle). Arguments and results that hold
    CPU tensors share their storages (torch.multiprocessing), they are not copied. Worker start-up does not import the
    main module, so no ``if __name__ == "__main__"`` is needed.

    Args:
        count: number of worker processes.
        options: see :class:`PoolOptions`.
        inherit_fds: descriptors that the workers keep open as long as they live (a lock on a directory, say).

    Raises:
        WorkerStartError: the operating system refused to start a process.
    """

    def __init__(
        self, count: int = 2, options: PoolOptions | None = None, *, inherit_fds: tuple[int, ...] = ()
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        options = options or PoolOptions()
        settings = WorkerSettings(
            nonce=secrets.token_hex(8),
            parent_pid=os.getpid(),
            nice=options.nice,
            ionice=options.ionice,
            orphan_timeout_secs=options.orphan_timeout_secs,
        )
        self._owner = os.getpid()
        self._options = options
        self._supervisor = Supervisor(count, settings, options, inherit_fds)
        self._close_lock = threading.Lock()
        _live_pools.add(self)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` in the next idle worker.

        The Future raises what ``fn`` raised, with the worker's traceback as ``__cause__``, or a
        :class:`~workers.errors.WorkerError`. Cancelling works until a worker has the task.

        Raises:
            ClosedError: the pool is closed.
            TypeError, pickle.PicklingError: the call cannot be pickled.
        """
        item = self._make_item(fn, args, kwargs)
        self._supervisor.enqueue(item)
        return item.future

    def hand_over(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As :meth:`submit`, but returns only when a worker's socket holds the task.

        From then on the task runs even if this process is killed. The message must be small (descriptors, not data).
        """
        item = self._make_item(fn, args, kwargs)
        self._supervisor.send_now(item)
        return item.future

    def _make_item(self, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> WorkItem:
        self._check_owner()
        payload, fds = codec.dumps((fn, args, kwargs))
        label = getattr(fn, "__qualname__", None) or type(fn).__name__
        return WorkItem(payload, fds, label, self._options.task_timeout_secs)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes alive now."""
        return tuple(worker.pid for worker in self.health())

    def health(self) -> tuple[WorkerHealth, ...]:
        """One row per live worker: pid, state, tasks it holds."""
        return self._supervisor.health()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until no task is pending or running; False when that took longer than ``timeout`` seconds."""
        self._check_owner()
        return self._supervisor.drain(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Finish what was submitted, then stop the workers. Idempotent.

        Args:
            timeout: seconds to wait for running and pending tasks; ``None`` waits as long as they take. The Futures of
                tasks that are not done by then fail with :class:`~workers.errors.ClosedError`.
        """
        if self._owner != os.getpid():
            return
        with self._close_lock:
            self._supervisor.stop_accepting()
            self._supervisor.drain(timeout)
            self._supervisor.shut_down(self._options.shutdown_timeout_secs)
        _live_pools.discard(self)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()

    def _check_owner(self) -> None:
        if self._owner != os.getpid():
            raise ClosedError(
                f"this WorkerPool belongs to process {self._owner}; a forked child cannot use it: make a new one there"
            )

    def _after_fork_in_child(self) -> None:
        self._supervisor.abandon()


_live_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _abandon_all() -> None:
    for pool in list(_live_pools):
        with suppress(OSError):
            pool._after_fork_in_child()
    _live_pools.clear()


def _close_all() -> None:
    for pool in list(_live_pools):
        pool.close()


os.register_at_fork(after_in_child=_abandon_all)
atexit.register(_close_all)  # daemon threads still run here, so what was submitted is finished, not lost
