"""The workers, their tasks, and the tasks that wait: all state that the callers' threads and the supervisor share.

One lock guards it. It is held for bookkeeping and non-blocking sends only, never while waiting, starting a process,
unpickling, or running a Future's callbacks.

    OPEN --stop_accepting--> CLOSING --stop--> STOPPED        (OPEN --stop--> STOPPED: the supervisor broke)

Where a task is: in ``_pending`` (for an idle worker), in ``_unplaced`` (handed over, but no worker is there), in the
``items`` of one worker, or *ending*: taken out of all of them, its Future about to be resolved. Each step is one critical
section, so ``drain`` misses none.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from enum import Enum
from typing import Any

from stager.workers.errors import ClosedError, UsageError
from stager.workers.pool import codec
from stager.workers.pool.handle import WorkerHandle, WorkerHealth, WorkerState
from stager.workers.pool.work_item import WorkItem

logger = logging.getLogger("stager")


class PoolState(Enum):
    OPEN = "open"
    CLOSING = "closing"
    STOPPED = "stopped"


class Roster:
    """The workers of a pool and every task that is not done.

    Attributes:
        lock: guards everything here, and the workers' handles.
        workers: alive, or dead and not yet reaped; only the supervisor adds and removes.
        wakeup: an eventfd that ends the supervisor's wait; -1 once it is closed.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self.workers: list[WorkerHandle] = []
        self._pending: deque[WorkItem] = deque()
        self._unplaced: deque[WorkItem] = deque()
        self._num_ending = 0  # tasks whose Futures are about to be resolved
        self._state = PoolState.OPEN
        self._reason = ""
        self.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.local()

    # -- called by the pool's users -----------------------------------------------------------------------------

    def enqueue(self, item: WorkItem) -> None:
        with self.lock:
            self._admit(item)
            self._pending.append(item)
            # With the lock, here and below: afterwards the pool may be closed, and with it the eventfd.
            self._wake()

    def place(self, item: WorkItem) -> None:
        """Send the task now, to the worker that is likely to be free first."""
        with self.lock:
            self._admit(item)
            # 1. Before a worker has it: from then on nobody can cancel it.
            item.claim()
            # 2. At the end of the queue: what was handed over before and found no worker goes first.
            self._unplaced.append(item)
            self._place_all()
            # 3. The supervisor watches the deadline of the task, and the socket if it is full.
            self._wake()

    def wait_delivered(self, futures: frozenset[Future[Any]]) -> None:
        """Wait until the kernel holds the message of each task for a worker that is alive, or its Future is done."""
        if not self.in_callback:
            with self.lock:
                self._changed.wait_for(lambda: self._are_delivered(futures))

    def _are_delivered(self, futures: frozenset[Future[Any]]) -> bool:
        if self._state is PoolState.STOPPED:  # no thread delivers anything any more
            return True
        if any(item.future in futures for item in self._unplaced):
            return False
        # A worker that is no longer usable does not read: its task is sent again when it has been reaped.
        holders = [w for w in self.workers if any(item.future in futures for item in w.items.values())]
        return all(worker.usable and not worker.process.outbox for worker in holders)

    def _admit(self, item: WorkItem) -> None:
        if self._state is not PoolState.OPEN:
            item.release()
            raise ClosedError(f"this WorkerPool is closed{self._reason}; {item.label} was not submitted")

    def drain(self, timeout: float | None) -> bool:
        self.refuse_in_callback("drain()")
        with self.lock:
            return self._changed.wait_for(lambda: not self._is_busy(), timeout)

    def health(self) -> tuple[WorkerHealth, ...]:
        with self.lock:
            return tuple(worker.health() for worker in self.workers)

    @property
    def in_callback(self) -> bool:
        """Whether this thread is resolving one of the pool's Futures: it runs a callback."""
        return getattr(self._thread, "resolving", False)

    def refuse_in_callback(self, what: str) -> None:
        if self.in_callback:
            raise UsageError(
                f"{what} was called by a callback of one of this WorkerPool's Futures; it would wait for that very "
                "callback. Call it from another thread"
            )

    # -- called by the supervisor -------------------------------------------------------------------------------

    def add(self, worker: WorkerHandle) -> None:
        with self.lock:
            self.workers.append(worker)

    def feed(self) -> None:
        """Send waiting tasks to the workers that can take them."""
        with self.lock:
            # What was handed over goes first: its caller waits, and the trainer may end at any moment.
            self._place_all()
            for worker in self.workers:
                item = self._next_pending() if worker.idle else None
                if item is not None:
                    worker.send_task(item)
            self._changed.notify_all()

    def take_finished(self, worker: WorkerHandle, task_id: int) -> WorkItem | None:
        """Take from a worker the task that it has replied to; the caller resolves it. None if it has it not."""
        with self.lock:
            # Out of the items and into the ending ones in one critical section: drain() must find it in one of them.
            item = worker.items.pop(task_id, None)
            if item is not None:
                self._num_ending += 1
            # The worker begins its next task now, and its reply was a sign of life.
            worker.start_clock()
            worker.process.pulse.silent_secs = 0.0
            return item

    def reap(self, worker: WorkerHandle, max_restarts: int, max_timeouts: int) -> list[WorkItem]:
        """Remove a worker whose process has ended; return its tasks that have no attempt left, ending."""
        with self.lock:
            # The process has ended and was collected, so that nothing it did overlaps with another attempt.
            was_ready = worker.state is WorkerState.READY
            self.workers.remove(worker)
            items = list(worker.items.values())
            worker.items.clear()
            worker.move(WorkerState.DEAD)
            worker.process.release()
            # 1. The first task was running: that costs it an attempt. The others had only been sent.
            if items and was_ready:
                items[0].attempts += 1
                items[0].timeouts += worker.overdue_id == items[0].task_id
            for item in items:
                item.started = math.inf
            # 2. What has attempts left is queued again: before all tasks that wait, and in the old order.
            lost = [item for item in items if item.attempts > max_restarts or item.timeouts >= max_timeouts]
            kept = [item for item in reversed(items) if item not in lost]
            self._unplaced.extendleft(item for item in kept if item.handed_over)
            self._pending.extendleft(item for item in kept if not item.handed_over)
            # 3. In the same critical section, or drain() would find the lost tasks nowhere before their Futures resolve.
            self._num_ending += len(lost)
            return lost

    def give_up_waiting(self) -> list[WorkItem]:
        """Return all tasks that wait, ending, because no worker can be started; none if a usable worker is left."""
        with self.lock:
            if any(worker.usable for worker in self.workers):
                return []
            return self._take_waiting()

    def has_waiting(self) -> bool:
        with self.lock:
            return bool(self._unplaced or self._pending)

    def resolve(self, resolutions: Iterable[Callable[[], None]]) -> None:
        """Resolve ending tasks' Futures without the lock: that runs their callbacks, which may submit."""
        for resolution in resolutions:
            self._thread.resolving = True
            try:
                resolution()
            except BaseException:
                # A callback's SystemExit must not end this thread, which watches all workers.
                logger.exception("a callback of a Future raised; the pool goes on")
            finally:
                self._thread.resolving = False
                # After the callbacks: when drain() returns, they have run.
                with self.lock:
                    self._num_ending -= 1
                    self._changed.notify_all()

    # -- the end ------------------------------------------------------------------------------------------------

    def wait_all_delivered(self, timeout: float) -> bool:
        """Wait until the kernel holds all that was handed over; False when that took longer than ``timeout`` seconds."""
        with self.lock:
            return self._changed.wait_for(self._is_all_delivered, timeout)

    def _is_all_delivered(self) -> bool:
        # After the stop, no thread delivers anything: do not wait for it.
        if self._state is PoolState.STOPPED:
            return True
        return not self._unplaced and all(w.usable and not w.process.outbox for w in self.workers if w.items)

    def stop_accepting(self, reason: str = "") -> None:
        with self.lock:
            if self._state is PoolState.OPEN:
                self._state = PoolState.CLOSING
                self._reason = reason

    def stop(self) -> None:
        """Tell the supervisor to return."""
        with self.lock:
            self._state = PoolState.STOPPED
            self._wake()
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        with self.lock:
            return self._state is PoolState.STOPPED

    def clear(self) -> list[WorkItem]:
        """Return every task that is not done, ending; forget the workers. Legal when no worker is watched any more."""
        with self.lock:
            items = self._take_waiting()
            for worker in self.workers:
                items += worker.items.values()
                self._num_ending += len(worker.items)
                worker.items.clear()
            self.workers.clear()
            self._close_wakeup()
            self._changed.notify_all()
            return items

    def abandon(self) -> None:
        """In a forked child: close the copied descriptors."""
        # Without the lock: a thread of the parent, which does not exist here, may have held it at the fork.
        self._close_wakeup()
        for worker in self.workers:
            worker.process.abandon()
        for item in [*self._pending, *self._unplaced, *(i for w in self.workers for i in w.items.values())]:
            codec.close_fds(item.fds)

    # -- with the lock held -------------------------------------------------------------------------------------

    def _wake(self) -> None:
        # After the close the number may be that of another file: never write to it then.
        if self.wakeup >= 0:
            os.eventfd_write(self.wakeup, 1)

    def _close_wakeup(self) -> None:
        codec.close_fds([self.wakeup])
        self.wakeup = -1

    def _is_busy(self) -> bool:
        return bool(self._pending or self._unplaced or self._num_ending or any(w.items for w in self.workers))

    def _place_all(self) -> None:
        while self._unplaced:
            usable = [worker for worker in self.workers if worker.usable]
            if not usable:
                return
            # The worker that is likely to be free first.
            worker = min(usable, key=lambda w: (w.load, w.state is not WorkerState.READY))
            worker.send_task(self._unplaced.popleft())

    def _next_pending(self) -> WorkItem | None:
        while self._pending:
            item = self._pending.popleft()
            if item.claim():
                return item
            item.release()  # cancelled
        return None

    def _take_waiting(self) -> list[WorkItem]:
        items = [*self._unplaced, *self._pending]
        self._unplaced.clear()
        self._pending.clear()
        self._num_ending += len(items)
        return items
