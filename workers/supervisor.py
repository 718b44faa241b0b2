"""The thread that watches a pool's workers: replies, deaths, deadlines, replacements.

One lock guards all state here. It is held for bookkeeping and non-blocking sends only, never while waiting, while
unpickling, or while a Future's callbacks run.

    worker:  STARTING --Ready--> READY --death seen--> DEAD (reaped, then replaced unless closing)

What happens to the tasks of a dead worker: the first one was running, so it counts an attempt; the others had only been
sent. All of them go to other workers, handed-over ones at once, in their old order.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from workers import codec
from workers.errors import (
    ClosedError,
    TaskTimeoutError,
    WorkerDiedError,
    WorkerError,
    WorkerStartError,
    describe_exit,
)
from workers.main import WorkerSettings
from workers.process import WorkerProcess
from workers.protocol import Done, Failed, Message, Ready, Shutdown, Task
from workers.work import WorkItem

if TYPE_CHECKING:
    from workers.pool import PoolOptions

_MAX_BACKOFF_SECS = 10.0


class WorkerState(Enum):
    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """A worker as ``WorkerPool.health()`` shows it. ``tasks`` are labels, the running one first."""

    pid: int
    state: WorkerState
    tasks: tuple[str, ...]


class _Worker:
    """A process and the tasks it was sent, oldest first."""

    def __init__(self, process: WorkerProcess, start_deadline: float) -> None:
        self.process = process
        self.state = WorkerState.STARTING
        self.start_deadline = start_deadline
        self.items: OrderedDict[int, WorkItem] = OrderedDict()
        self.killed_for: WorkItem | None = None

    def head(self) -> WorkItem | None:
        return next(iter(self.items.values()), None)

    def deadline(self) -> float | None:
        """``time.monotonic()`` at which this worker is to be killed."""
        if self.killed_for is not None:
            return None
        if self.state is WorkerState.STARTING:
            return self.start_deadline
        head = self.head()
        return head.deadline() if head else None


class Supervisor:
    def __init__(
        self, count: int, settings: WorkerSettings, options: PoolOptions, inherit_fds: tuple[int, ...]
    ) -> None:
        self._count = count
        self._settings = settings
        self._options = options
        self._inherit_fds = inherit_fds
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # notified when work ends
        self._flushed = threading.Condition(self._lock)  # notified when an outbox drains or a worker changes
        self._workers: list[_Worker] = []
        self._pending: deque[WorkItem] = deque()
        self._failed_starts = 0  # in a row
        self._next_start = 0.0  # not before: backoff
        self._accepting = True
        self._stopping = False
        self._resolving = 0  # replies taken from a worker whose Future is not resolved yet
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for _ in range(count):
                self._start_worker()
        except WorkerStartError:
            for worker in self._workers:
                worker.process.kill()
                worker.process.join(None)
                worker.process.release()
            self._close_wakeup()
            raise
        self._thread = threading.Thread(target=self._run, name="stager-pool", daemon=True)
        self._thread.start()

    # -- called by the pool's users -----------------------------------------------------------------------------

    def enqueue(self, item: WorkItem) -> None:
        with self._lock:
            self._admit(item)
            self._pending.append(item)
        self._wake()

    def send_now(self, item: WorkItem) -> None:
        """Returns once the kernel holds the message of ``item``, or the item's Future is done."""
        item.handed_over = True
        with self._lock:
            self._admit(item)
            item.future.set_running_or_notify_cancel()
            self._assign_to_least_loaded(item)
            while not item.future.done() and any(item.task_id in w.items and w.process.outbox for w in self._workers):
                self._wake()
                self._flushed.wait()
        self._wake()

    def _admit(self, item: WorkItem) -> None:
        if not self._accepting:
            item.release()
            raise ClosedError(f"this WorkerPool is closed; {item.label} was not submitted")

    def health(self) -> tuple[WorkerHealth, ...]:
        with self._lock:
            return tuple(
                WorkerHealth(w.process.pid, w.state, tuple(i.label for i in w.items.values())) for w in self._workers
            )

    def drain(self, timeout: float | None) -> bool:
        with self._lock:
            return self._idle.wait_for(lambda: not self._busy(), timeout)

    def _busy(self) -> bool:
        return bool(self._pending or self._resolving or any(w.items for w in self._workers))

    def stop_accepting(self) -> None:
        with self._lock:
            self._accepting = False

    def shut_down(self, rung_secs: float) -> None:
        """The ladder: ask, join, terminate, join, kill, join. What is still unfinished fails with ClosedError."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            abandoned = [*self._pending, *(i for w in self._workers for i in w.items.values())]
            self._pending.clear()
            for worker in self._workers:
                worker.items.clear()
                worker.process.outbox.put(Shutdown(self._settings.nonce), [])
                with suppress(OSError):
                    worker.process.outbox.flush()
        self._wake()
        self._thread.join()
        for item in abandoned:
            item.fail(
                ClosedError(f"the WorkerPool was closed before {item.label} was done")
            ) if not item.future.cancelled() else item.release()
        # A worker that was abandoned in the middle of a task, or is not up yet, would not read the request for long.
        patience = 0.0 if abandoned else rung_secs
        processes = [worker.process for worker in self._workers]
        for ask in (lambda process: None, WorkerProcess.terminate, WorkerProcess.kill):
            deadline = time.monotonic() + patience
            for process in processes:
                if process.exitcode is None:
                    ask(process)
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            patience = rung_secs
        for process in processes:
            process.join(None)  # after SIGKILL; only a process stuck in the kernel makes this wait
            process.release()
        self._workers.clear()
        self._close_wakeup()

    def abandon(self) -> None:
        """In a forked child: close the copied descriptors. The threads and locks of the parent do not exist here."""
        for worker in self._workers:
            worker.process.abandon()
        self._close_wakeup()

    # -- the supervisor thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        """Wait for something to happen; deal with it; repeat until told to stop."""
        while True:
            readable, writable = self._wait()
            with self._lock:
                if self._stopping:
                    return
            for worker in list(self._workers):
                process = worker.process
                if process.sock.fileno() in readable:
                    self._read(worker)
                if process.sentinel in readable:
                    self._bury(worker)
                elif process.sock.fileno() in writable:
                    self._flush(worker)
            self._kill_overdue()
            with self._lock:
                self._replace_missing()
                self._feed_idle()
                self._flushed.notify_all()

    def _wait(self) -> tuple[set[int], set[int]]:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        with self._lock:
            now = time.monotonic()
            deadlines = [d for w in self._workers if (d := w.deadline()) is not None]
            if len(self._workers) < self._count:
                deadlines.append(self._next_start)
            for worker in self._workers:
                process = worker.process
                poll.register(process.sentinel, select.POLLIN)
                poll.register(process.sock, select.POLLIN | (select.POLLOUT if process.outbox else 0))
        timeout_ms = None if not deadlines else max(0.0, min(deadlines) - now) * 1000 + 1
        events = poll.poll(timeout_ms)
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        readable = {fd for fd, event in events if event & (select.POLLIN | select.POLLHUP | select.POLLERR)}
        writable = {fd for fd, event in events if event & select.POLLOUT}
        return readable, writable

    def _read(self, worker: _Worker) -> None:
        """Take what the worker's socket has. A torn stream is left to the sentinel, which says why."""
        with suppress(OSError):
            worker.process.inbox.receive()
        for message, fds in worker.process.inbox.messages():
            self._handle(worker, message, fds)

    def _handle(self, worker: _Worker, message: Message, fds: list[int]) -> None:
        if message.nonce != self._settings.nonce:
            codec.close_fds(fds)
        elif isinstance(message, Ready):
            with self._lock:
                worker.state = WorkerState.READY
                self._failed_starts = 0
                self._start_clock(worker)
        elif isinstance(message, (Done, Failed)):
            self._finish(worker, message, fds)

    def _finish(self, worker: _Worker, message: Done | Failed, fds: list[int]) -> None:
        with self._lock:
            item = worker.items.pop(message.task_id, None)
            self._start_clock(worker)
            self._resolving += 1
        try:
            if item is None:  # a reply to a task that this worker no longer has
                codec.close_fds(fds)
            elif isinstance(message, Done):
                item.succeed(message.payload, fds)
            else:
                item.fail_remotely(message.payload, message.traceback)
        finally:
            with self._lock:
                self._resolving -= 1
                self._idle.notify_all()

    @staticmethod
    def _start_clock(worker: _Worker) -> None:
        head = worker.head()
        if worker.state is WorkerState.READY and head is not None:
            head.start_clock()

    def _flush(self, worker: _Worker) -> None:
        with self._lock, suppress(OSError):
            worker.process.outbox.flush()

    def _bury(self, worker: _Worker) -> None:
        """The process has ended: take its last words, reap it, move its tasks."""
        while True:
            try:
                if not worker.process.inbox.receive():
                    break
            except OSError:
                break
        for message, fds in worker.process.inbox.messages():
            self._handle(worker, message, fds)
        worker.process.join(None)
        exitcode, pid = worker.process.exitcode, worker.process.pid
        with self._lock:
            was_starting, worker.state = worker.state is WorkerState.STARTING, WorkerState.DEAD
            self._workers.remove(worker)
            items = list(worker.items.values())
            worker.items.clear()
            worker.process.release()
            if was_starting:
                self._note_failed_start()
        failures = self._sort_out(worker, items, was_starting, pid, exitcode)
        for item, error in failures:
            item.fail(error)
        with self._lock:
            self._idle.notify_all()

    def _sort_out(
        self, worker: _Worker, items: list[WorkItem], was_starting: bool, pid: int, exitcode: int | None
    ) -> list[tuple[WorkItem, WorkerError]]:
        """Move the tasks of a dead worker; returns those that are out of attempts, each with its error."""
        failures: list[tuple[WorkItem, WorkerError]] = []
        with self._lock:
            if was_starting and self._failed_starts > self._options.max_restarts:
                lost = [*items, *self._pending]
                self._pending.clear()
                failures += [(item, self._start_error(pid, exitcode)) for item in lost]
                items = []
            elif items and not was_starting:
                items[0].attempts += 1
            keep: list[WorkItem] = []
            for item in items:
                item.started = None
                if item.attempts > self._options.max_restarts:
                    failures.append((item, self._death_error(worker, item, pid, exitcode)))
                else:
                    keep.append(item)
            self._replace_missing()
            self._pending.extendleft(item for item in reversed(keep) if not item.handed_over)
            for item in keep:
                if item.handed_over:
                    self._assign_to_least_loaded(item)
        return failures

    def _death_error(self, worker: _Worker, item: WorkItem, pid: int, exitcode: int | None) -> WorkerError:
        if worker.killed_for is item:
            return TaskTimeoutError(
                f"{item.label} ran longer than {item.timeout_secs:g} s and its worker {pid} was killed, "
                f"{item.attempts} times in a row; raise workers.task_timeout_secs or look at the storage"
            )
        hint = f"this was attempt {item.attempts}"
        if exitcode == -9:
            hint += "; SIGKILL that nobody sent on purpose is usually the kernel's out-of-memory killer (see dmesg)"
        return WorkerDiedError(pid, exitcode, item.label, hint)

    def _start_error(self, pid: int, exitcode: int | None) -> WorkerStartError:
        return WorkerStartError(
            f"worker {pid} {describe_exit(exitcode)} before it was ready, {self._failed_starts} times in a row; "
            "its standard error says why; `stager doctor` checks the machine"
        )

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        with self._lock:
            for worker in self._workers:
                deadline = worker.deadline()
                if deadline is not None and deadline <= now:
                    worker.killed_for = worker.head()
                    worker.start_deadline = float("inf")
                    worker.process.kill()  # its sentinel brings us to _bury

    # -- with the lock held -------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        process = WorkerProcess(self._settings, self._options.env or {}, self._inherit_fds)
        self._workers.append(_Worker(process, time.monotonic() + self._options.start_timeout_secs))

    def _note_failed_start(self) -> None:
        self._failed_starts += 1
        self._next_start = time.monotonic() + min(_MAX_BACKOFF_SECS, 0.1 * 2.0**self._failed_starts)

    def _replace_missing(self) -> None:
        if self._failed_starts and (
            time.monotonic() < self._next_start
            # Broken for good until somebody wants it again: do not spin.
            or (self._failed_starts > self._options.max_restarts and not self._busy())
        ):
            if self._failed_starts > self._options.max_restarts and not self._busy():
                self._next_start = time.monotonic() + _MAX_BACKOFF_SECS
            return
        while len(self._workers) < self._count:
            try:
                self._start_worker()
            except WorkerStartError:
                self._note_failed_start()
                return
        for item in [i for i in self._pending if i.handed_over]:
            self._pending.remove(item)
            self._assign_to_least_loaded(item)

    def _feed_idle(self) -> None:
        for worker in self._workers:
            if worker.state is WorkerState.READY and not worker.items:
                item = self._next_pending()
                if item is None:
                    return
                self._send(worker, item)

    def _next_pending(self) -> WorkItem | None:
        while self._pending:
            item = self._pending.popleft()
            if item.attempts or item.future.running() or item.future.set_running_or_notify_cancel():
                return item
            item.release()
            self._idle.notify_all()
        return None

    def _assign_to_least_loaded(self, item: WorkItem) -> None:
        if self._workers:
            self._send(min(self._workers, key=lambda w: (len(w.items), w.state is not WorkerState.READY)), item)
        else:  # all are dead and the operating system gives no new ones yet
            self._pending.appendleft(item)

    def _send(self, worker: _Worker, item: WorkItem) -> None:
        worker.items[item.task_id] = item
        self._start_clock(worker)
        fds = [os.dup(fd) for fd in item.fds]
        worker.process.outbox.put(Task(self._settings.nonce, item.task_id, item.label, item.payload), fds)
        with suppress(OSError):  # it has just died: its sentinel will tell
            worker.process.outbox.flush()

    # -- waking up ----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"!")

    def _close_wakeup(self) -> None:
        os.close(self._wake_read)
        os.close(self._wake_write)
