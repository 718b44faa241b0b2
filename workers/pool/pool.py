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
    |     watches: sockets, pidfds, deadlines,     |           |   pidfd of the trainer    |
    |              heartbeats                      |           |                           |
    +----------------------------------------------+           +---------------------------+
            memory is never copied through a socket: descriptors of shared storages travel beside the message

The caller's threads
  * pickle the call, so that a mistake in it is raised where it was made;
  * never wait for a worker, except that ``hand_over`` and ``wait_delivered`` wait until the kernel has taken the message.
The supervisor thread (``supervisor.py``) is the only one that
  * reads from workers and resolves Futures, so a Future's callbacks run in it; only ``close`` and ``detach``
    also fail Futures, in their caller's thread;
  * notices deaths, missed deadlines and missing heartbeats, reaps and replaces workers, and queues their tasks again;
  * gives pending tasks to idle workers.
Both meet in the roster (``roster.py``): one lock; it knows the workers, their tasks, and the tasks that wait.
A worker (``worker_main.py`` starts it, ``worker_loop.py`` is its loop)
  * runs what it was sent in order, one task at a time, and replies once to each;
  * shares no lock, queue or semaphore with anyone: it can be killed at any instruction without stopping the others;
  * ignores SIGINT, SIGTERM, SIGHUP and SIGUSR1/2: the trainer handles them.
The memory of tensors belongs to the trainer; a worker maps it through the descriptors that came with its task.

Guarantees
  * A Future always resolves: with the result, the task's exception, or a WorkerError that names pid and cause.
  * A task runs again on another worker when its worker died, so tasks must be idempotent. It is never run again, and its
    Future never fails for that reason or because of ``close``, before the process that ran it is dead and reaped.
  * A task that was handed over runs even if the trainer is killed right after. (The worker must live: a dead one is
    replaced by the trainer only.)
  * After ``close`` no process, thread or descriptor of the pool is left.

Callbacks of a Future run between two turns of the supervisor: they may submit and hand over, but must not wait for another
of the pool's Futures. ``close`` and ``drain``, which would wait for the callback itself, raise UsageError in one.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from stager.workers.errors import ArgumentError, ClosedError
from stager.workers.pool import codec
from stager.workers.pool.handle import WorkerHealth
from stager.workers.pool.options import PoolOptions
from stager.workers.pool.supervisor import Supervisor
from stager.workers.pool.work_item import WorkItem

__all__ = ["PoolOptions", "WorkerHealth", "WorkerPool"]

logger = logging.getLogger("stager")

T = TypeVar("T")

_DELIVERY_SECS = 10.0  # a worker that died is replaced within that


class WorkerPool:
    """Runs callables in ``count`` long-lived worker processes.

    ``fn`` may be a lambda, a closure, or a function of the main module (cloudpickle). Arguments and results that hold
    CPU tensors share their storages (torch.multiprocessing), they are not copied. Workers do not import the main module, so
    no ``if __name__ == "__main__"`` is needed.

    Raises:
        WorkerStartError: the operating system refused to start a process.
    """

    def __init__(self, count: int = 2, options: PoolOptions | None = None) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self._owner = os.getpid()
        self._options = options or PoolOptions()
        self._supervisor = Supervisor(count, self._options)
        self._roster = self._supervisor.roster
        self._close_lock = threading.Lock()
        # When all is there, so that a pool that could not be made is not closed at exit.
        _live_pools.add(self)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` in the next idle worker.

        The Future raises what ``fn`` raised, with the worker's traceback as ``__cause__``, or a
        :class:`~stager.WorkerError`. Cancelling works until a worker has the task.

        Raises:
            ClosedError: the pool is closed, or belongs to the process that forked this one.
            ArgumentError: ``fn`` is no function, or the call cannot be pickled; names the argument.
        """
        future: Future[T] = Future()
        self.submit_to(future, fn, *args, **kwargs)
        return future

    def submit_to(self, future: Future[T], fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> None:
        """Submit with a new Future that the caller made, and so knows before any worker has the task.

        Ctrl-C can interrupt :meth:`submit` after it has sent the task: the caller would then never get its Future.
        """
        self._roster.enqueue(self._make_item((fn, args, kwargs), future, handed_over=False))

    def hand_over(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Send the call to a worker now, busy or not; return when the kernel holds the message.

        From then on the task runs even if this process is killed. Keep the message below some 200 KB (descriptors, not
        data): that fits the socket, and a busy worker reads the rest only when it is done. In a Future's callback this does
        not wait, so that only a small message is sure to be sent.
        """
        future: Future[T] = Future()
        item = self._make_item((fn, args, kwargs), future, handed_over=True)
        # 1. Send what the socket takes at once. If that is not all, the supervisor sends the rest.
        self._roster.place(item)
        # 2. Without the lock, which the supervisor needs to send.
        self._roster.wait_delivered(frozenset([future]))
        return future

    def wait_delivered(self, futures: Iterable[Future[Any]]) -> None:
        """Wait until each call of these Futures is done, or the kernel holds it for a worker that is alive.

        ``hand_over`` has waited for that; but a worker may have died since, and its calls wait for another one.
        """
        self._roster.wait_delivered(frozenset(futures))

    def _make_item(self, call: tuple[Any, ...], future: Future[Any], *, handed_over: bool) -> WorkItem:
        self._check_owner()
        function = call[0]
        label = getattr(function, "__qualname__", None) or type(function).__name__
        if not callable(function):
            raise ArgumentError(
                f"{'hand_over' if handed_over else 'submit'}() takes a function, and after it the function's arguments: "
                f"write submit(sum, [1, 2]), not submit(sum([1, 2])); got {function!r:.40} ({label})"
            )
        # In the caller's thread, so that a mistake in the call is raised where it was made.
        # The descriptors are duplicates: the caller may close its own as soon as this returns.
        payload, fds = codec.dump_call(call, label)
        return WorkItem(payload, fds, label, self._options.task_timeout_secs, future, handed_over)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the live workers."""
        return tuple(worker.pid for worker in self.health())

    def health(self) -> tuple[WorkerHealth, ...]:
        """Return a row for each live worker: pid, state, tasks."""
        self._check_owner()
        return self._roster.health()

    @property
    def in_callback(self) -> bool:
        """Whether the caller is a callback of one of this pool's Futures, which must not wait for the pool."""
        return self._roster.in_callback

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until no task is pending or running; False when that took longer than ``timeout`` seconds.

        Raises:
            UsageError: called by a callback of one of the pool's Futures.
        """
        self._check_owner()
        return self._roster.drain(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Finish what was submitted, then stop the workers. Idempotent, from any thread; does nothing in a forked child.

        See NOTE [ The shutdown ladder ] in ``supervisor.py``. A pool that is still open at interpreter exit is closed then.

        Args:
            timeout: seconds to wait for tasks; ``None``: as long as they take. The Futures of tasks that are not done by
                then fail with :class:`~stager.ClosedError`, when their worker is dead.

        Raises:
            UsageError: called by a callback of one of the pool's Futures.
        """
        if self._owner != os.getpid():
            return
        # Before the lock: another thread may hold it and wait for this very callback.
        self._roster.refuse_in_callback("close()")
        with self._close_lock:
            # First no new tasks: otherwise a caller that goes on submitting would keep drain() waiting.
            self._roster.stop_accepting()
            # Then the tasks, while the supervisor still resolves their Futures and replaces workers that die.
            self._roster.drain(timeout)
            # Then the workers; what is not done by now fails.
            self._supervisor.stop()
        _live_pools.discard(self)

    def detach(self) -> None:
        """Stop now, without waiting for tasks: the workers finish the tasks they have, and end by themselves.

        The Future of a task that a worker has fails with :class:`~stager.LeftRunningError`. A task that no worker has is
        lost, and its Future fails with ClosedError. Waits at most ten seconds for the delivery of what was handed over.

        Raises:
            UsageError: called by a callback of one of the pool's Futures.
        """
        if self._owner != os.getpid():
            return
        self._roster.refuse_in_callback("detach()")
        with self._close_lock:
            # First no new tasks: a task that is handed over later would find no supervisor to deliver it.
            self._roster.stop_accepting()
            # While the supervisor still lives: only it replaces a worker that died before it had its message.
            if not self._roster.wait_all_delivered(_DELIVERY_SECS):
                logger.error("a task that was handed over reached no worker within %g s; it is lost", _DELIVERY_SECS)
            self._supervisor.detach()
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


# Strong references: a pool that was dropped without close() still has work, threads and processes.
_live_pools: set[WorkerPool] = set()


def _abandon_all() -> None:
    # In a forked child: its copies would keep the sockets, and the memory of tasks, open when the trainer is gone.
    for pool in list(_live_pools):
        with suppress(OSError):
            pool._roster.abandon()
    _live_pools.clear()


def _close_all() -> None:
    for pool in list(_live_pools):
        try:
            pool.close()
        except Exception:
            logger.exception("a WorkerPool could not be closed at exit")


os.register_at_fork(after_in_child=_abandon_all)
# Daemon threads still run when these handlers are called, so that what was submitted is finished, not lost.
atexit.register(_close_all)
