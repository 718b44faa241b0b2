"""The thread that watches a pool's workers: replies, deaths, deadlines, replacements.

Each turn waits until a socket, a sentinel, a deadline or a caller calls, and then
  1. reads from the workers and resolves Futures;
  2. reaps dead workers: their tasks are queued again (``roster.py``), or fail after too many attempts;
  3. kills each worker that missed a deadline, or whose heartbeat stopped (``heartbeat.py``);
  4. starts workers for those that are missing (``restart_budget.py`` says when);
  5. sends waiting tasks to idle workers.

NOTE [ The shutdown ladder ]
    drain    (pool.py)   every task done, or the caller's timeout over
    ask                  Shutdown to the workers that have nothing to do
    join                 until the timeout of a rung
    kill, join           SIGKILL to what is left: nothing can refuse it

Workers that are still starting, or whose task did not end in time, would not read the request: they are killed at once.
There is no rung for SIGTERM, because workers ignore it (``worker_main.py`` says why). SIGKILL loses nothing: the task
of a killed worker can run again, and the next run cleans up what it left.
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from stager.workers.errors import ClosedError, InternalError, LeftRunningError, StagerError, WorkerStartError
from stager.workers.pool import codec
from stager.workers.pool.channel import Frame
from stager.workers.pool.handle import WorkerHandle, WorkerState
from stager.workers.pool.heartbeat import HeartbeatClock
from stager.workers.pool.messages import Done, Failed, Ready, Shutdown
from stager.workers.pool.options import PoolOptions
from stager.workers.pool.process import WorkerProcess
from stager.workers.pool.restart_budget import RestartBudget
from stager.workers.pool.roster import Roster
from stager.workers.pool.work_item import WorkItem

logger = logging.getLogger("stager")

_MAX_WAIT_SECS = 3600.0  # poll() takes no infinite number
_THROTTLED_SECS = 0.05
_LOST_SECS = 0.05  # less is the ordinary work of a turn


class Supervisor:
    """Owns the workers of one pool.

    Raises:
        WorkerStartError: the operating system refused to start a process.
    """

    def __init__(self, count: int, options: PoolOptions) -> None:
        self._count = count
        self._options = options
        self._restart_budget = RestartBudget(options.max_restarts)
        self._heartbeats = HeartbeatClock(options.heartbeat_timeout_secs, time.monotonic())
        self.roster = Roster()
        self._thread = threading.Thread(target=self._run, name="stager-pool", daemon=True)
        try:
            for _ in range(count):
                self._spawn()
            # Last: until the thread runs, this one alone uses the roster, and can undo everything.
            self._thread.start()
        except BaseException:
            for worker in self.roster.workers:
                worker.kill()
            self._stop_workers()
            self.roster.clear()
            raise

    def stop(self) -> None:
        """Stop the workers, then fail what is unfinished with ClosedError.

        Idempotent. Can be called again when a KeyboardInterrupt ended it.
        """
        # 1. The thread first: it would replace the workers that end now.
        self.roster.stop()
        self._thread.join()
        # 2. The workers before the Futures: when a Future has failed, no worker runs its task any more.
        self._stop_workers()
        self._fail(
            self.roster.clear(), lambda item: ClosedError(f"the WorkerPool was closed before {item.label} was done")
        )

    def detach(self) -> None:
        """Stop watching; the workers finish the tasks they have, and then end by themselves. Idempotent."""
        # 1. The thread first: it would take a worker that ends for one that died, and replace it.
        self.roster.stop()
        self._thread.join()
        # 2. A worker reads Shutdown after the tasks that were sent before, so it finishes these.
        for worker in self.roster.workers:
            worker.send(Shutdown(), [])
            worker.process.detach()
        # 3. No reply is read any more: tell which tasks are in good hands, and which are lost.
        left = {item.task_id for worker in self.roster.workers for item in worker.items.values()}
        self._fail(self.roster.clear(), lambda item: _detached_error(item, item.task_id in left))

    def _stop_workers(self) -> None:
        """Climb the shutdown ladder from "ask" on. When this returns, no worker runs any task."""
        workers, rung_secs = self.roster.workers, self._options.shutdown_timeout_secs
        # Ask all before waiting for any: they end at the same time.
        for worker in workers:
            if worker.state is WorkerState.READY and not worker.items:
                worker.send(Shutdown(), [])
            else:
                worker.kill()
        for worker in _join(workers, rung_secs):
            worker.kill()
        # What is left now is stuck in the kernel, in a hung file system for example.
        for worker in _join(workers, rung_secs):
            logger.error("worker %d does not end although it was killed; it is left behind", worker.pid)
        for worker in workers:
            worker.process.release()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self.roster.stopped:
                self._turn()
        except BaseException as error:
            # The edge of the thread: without it, every Future would wait for ever.
            logger.exception("the thread that watches the workers failed; the pool is closed")
            self._break(error)

    def _turn(self) -> None:
        # A copy, because reaping removes workers. Without the lock, because only this thread adds and removes them.
        workers = list(self.roster.workers)
        ready = self._wait(workers)
        for worker in workers:
            events = ready.get(worker.process.sock.fileno(), 0)
            # Replies before the death: a worker may have replied and then died, and that task must not run again.
            if events & ~select.POLLOUT:
                self._handle_all(worker, worker.receive())
            if worker.process.sentinel in ready:
                self._reap(worker)
            elif events & select.POLLOUT or worker.process.outbox.throttled:
                with self.roster.lock:
                    worker.flush()
        # After the replies, which may show that a worker is not stuck at all.
        self._kill_stuck()
        # Last: tasks of a dead worker find its replacement, and those that waited find the workers that are idle now.
        self._replace_missing()
        self.roster.feed()

    def _wait(self, workers: list[WorkerHandle]) -> dict[int, int]:
        """What is ready: events by descriptor."""
        poll = select.poll()
        poll.register(self.roster.wakeup, select.POLLIN)
        until = self._next_replacement()
        # With the lock, so that no caller's thread queues a message for a worker while this thread asks whether it has one.
        # A message that is queued after this block ends the wait, by the wakeup.
        with self.roster.lock:
            for worker in workers:
                until = min(until, self._register(poll, worker))
        now = time.monotonic()
        wait_secs = min(_MAX_WAIT_SECS, max(0.0, until - now))
        self._heartbeats.begin_wait(now)
        ready = dict(poll.poll(math.ceil(wait_secs * 1000)))
        # Before any deadline is judged: nobody watched the workers in the time that passed beyond the wait.
        self._extend_deadlines(wait_secs)
        # Before the tasks are looked at: a wakeup that comes after this line ends the next wait.
        with suppress(BlockingIOError):
            os.eventfd_read(self.roster.wakeup)
        return ready

    def _register(self, poll: select.poll, worker: WorkerHandle) -> float:
        """Have ``poll`` wait for a worker; return the ``time.monotonic()`` at which to look after it at the latest."""
        process, now = worker.process, time.monotonic()
        throttled = process.outbox.throttled
        poll.register(process.sentinel, select.POLLIN)
        if not process.inbox.ended:  # at its end a socket is always readable
            wants_room = worker.usable and bool(process.outbox) and not throttled
            poll.register(process.sock, select.POLLIN | (select.POLLOUT if wants_room else 0))
        until = worker.deadline()
        if until < math.inf or worker.holds_task:
            until = min(until, max(self._heartbeats.next_look, now))
        return min(until, now + _THROTTLED_SECS) if throttled else until

    def _extend_deadlines(self, wait_secs: float) -> None:
        now = time.monotonic()
        lost = self._heartbeats.end_wait(now, wait_secs)
        if lost > _LOST_SECS:
            with self.roster.lock:
                for worker in self.roster.workers:
                    worker.extend_deadlines(lost, now)

    def _handle_all(self, worker: WorkerHandle, frames: list[Frame]) -> None:
        for frame in frames:
            if isinstance(frame.message, Ready):
                with self.roster.lock:
                    worker.move(WorkerState.READY)
                self._restart_budget.worker_ready()
            elif isinstance(frame.message, (Done, Failed)) and (
                item := self.roster.take_finished(worker, frame.message.task_id)
            ):
                self._restart_budget.task_done()
                self.roster.resolve([partial(item.finish, frame)])
            else:  # no task of this worker
                codec.close_fds(frame.fds)

    def _reap(self, worker: WorkerHandle) -> None:
        # 1. Read what the worker sent before it ended: a task that it replied to is done, and must not run again.
        self._handle_all(worker, worker.receive_rest())
        # 2. Collect the process before its tasks are queued again: then no two processes can run one task.
        worker.process.join(0)
        was_starting = worker.state is WorkerState.STARTING
        lost = self.roster.reap(worker, self._options.max_restarts, self._options.max_timeouts)
        self._fail(lost, worker.death_error)
        # 3. Count the death, which decides when a replacement is started.
        now = time.monotonic()
        if was_starting:
            self._restart_budget.start_failed(worker.started, now)
            self._give_up_if_broken(worker.start_error())
        else:
            self._restart_budget.worker_died(worker.started, now)

    def _kill_stuck(self) -> None:
        """Kill the workers that missed a deadline or show no sign of life; their sentinels bring the thread to _reap."""
        now = time.monotonic()
        elapsed = self._heartbeats.look(now)
        with self.roster.lock:
            for worker in self.roster.workers:
                worker.kill_if_overdue(now)
                # A worker that was just killed for its deadline holds no task in this sense, and is not judged again.
                if worker.holds_task and elapsed > 0:
                    worker.kill_if_silent(elapsed, self._heartbeats.limit_secs)

    # -- replacements -------------------------------------------------------------------------------------------

    def _next_replacement(self) -> float:
        """``time.monotonic()`` at which a worker is to be started; infinite: none is missing, or wanted."""
        if len(self.roster.workers) >= self._count:
            return math.inf
        # After too many failed starts: one attempt at a time, and only if there is work.
        if self._restart_budget.broken:
            starting = any(worker.state is WorkerState.STARTING for worker in self.roster.workers)
            if starting or not self.roster.has_waiting():
                return math.inf
        return self._restart_budget.next_start

    def _replace_missing(self) -> None:
        if self._next_replacement() > time.monotonic():
            return
        try:
            while len(self.roster.workers) < self._count:
                self._spawn()
        except WorkerStartError as error:
            now = time.monotonic()
            self._restart_budget.start_failed(now, now)
            self._give_up_if_broken(error)

    def _spawn(self) -> None:
        process = WorkerProcess(self._options)
        self.roster.add(WorkerHandle(process, self._options.start_timeout_secs))

    def _give_up_if_broken(self, cause: WorkerStartError) -> None:
        if self._restart_budget.broken:
            self._fail(self.roster.give_up_waiting(), lambda _: WorkerStartError(str(cause)))

    # -- failing ------------------------------------------------------------------------------------------------

    def _fail(self, items: list[WorkItem], error_of: Callable[[WorkItem], StagerError]) -> None:
        self.roster.resolve([partial(item.fail, error_of(item)) for item in items])

    def _break(self, cause: BaseException) -> None:
        """After a bug nobody knows which worker runs what: stop all workers, and fail all tasks."""
        self.roster.stop_accepting(f" because of an internal error ({cause!r})")
        self.roster.stop()
        with suppress(Exception):
            for worker in self.roster.workers:
                worker.kill()
            self._stop_workers()
        self._fail(self.roster.clear(), lambda item: _internal_error(item, cause))


def _join(workers: list[WorkerHandle], timeout: float) -> list[WorkerHandle]:
    """Wait for all together; return those that have not ended."""
    deadline = time.monotonic() + timeout
    return [w for w in workers if not w.process.join(max(0.0, deadline - time.monotonic()))]


def _detached_error(item: WorkItem, has_worker: bool) -> ClosedError:
    if has_worker:
        return LeftRunningError(
            f"the WorkerPool was detached; its worker finishes {item.label}, but this process does not see the result"
        )
    return ClosedError(
        f"the WorkerPool was detached before a worker had {item.label}; that task is lost, submit it again in a new pool"
    )


def _internal_error(item: WorkItem, cause: BaseException) -> InternalError:
    error = InternalError(
        f"{item.label} was abandoned, because the thread that watches the workers failed with {cause!r}"
    )
    error.__cause__ = cause
    return error
