"""The thread that watches a pool's workers: replies, deaths, deadlines, replacements.

Each turn waits until a socket, a sentinel, a deadline or a caller calls, and then
  * reads from the workers and resolves Futures;
  * reaps dead workers: their tasks are queued again (``roster.py``), or fail after too many attempts;
  * kills each worker that missed a deadline, or whose heartbeat stopped (``heartbeat.py``);
  * starts workers for those that are missing (``restart_budget.py`` says when);
  * sends waiting tasks to idle workers.

The order matters: replies are read before a death is handled, because a worker may have replied and then died.
"""

from __future__ import annotations

import logging
import math
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
from stager.workers.pool.options import PoolOptions, WorkerSettings
from stager.workers.pool.process import WorkerProcess
from stager.workers.pool.restart_budget import RestartBudget
from stager.workers.pool.roster import Roster
from stager.workers.pool.shutdown import stop_workers
from stager.workers.pool.wakeup import Wakeup
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

    def __init__(
        self, count: int, settings: WorkerSettings, options: PoolOptions, inherit_fds: tuple[int, ...]
    ) -> None:
        self._count = count
        self._settings = settings
        self._options = options
        self._inherit_fds = inherit_fds
        self._restart_budget = RestartBudget(options.max_restarts)
        self._heartbeats = HeartbeatClock(options.heartbeat_timeout_secs, time.monotonic())
        self.roster = Roster(settings.nonce)
        self._wakeup = Wakeup()
        self._thread = threading.Thread(target=self._run, name="stager-pool", daemon=True)
        try:
            for _ in range(count):
                self._spawn()
            self._thread.start()
        except BaseException:
            for worker in self.roster.workers:
                worker.kill()
            stop_workers(self.roster.workers, settings.nonce, options.shutdown_timeout_secs)
            self._wakeup.close()
            raise

    def wake(self) -> None:
        self._wakeup.set()

    def stop(self) -> None:
        """The ladder. What is still unfinished fails with ClosedError, when no worker runs it any more. Idempotent, and
        can be called again when a KeyboardInterrupt ended it."""
        self.roster.stop()
        self.wake()
        self._thread.join()
        stop_workers(self.roster.workers, self._settings.nonce, self._options.shutdown_timeout_secs)
        self._fail(
            self.roster.clear(), lambda item: ClosedError(f"the WorkerPool was closed before {item.label} was done")
        )
        self._wakeup.close()

    def detach(self) -> None:
        """Stop watching; the workers finish the tasks they have, and then end by themselves. Idempotent."""
        self.roster.stop()
        self.wake()
        self._thread.join()
        for worker in self.roster.workers:
            worker.send(Shutdown(self._settings.nonce), [])
            worker.process.detach()
        left = {item.task_id for worker in self.roster.workers for item in worker.items.values()}
        self._fail(self.roster.clear(), lambda item: _detached_error(item, item.task_id in left))
        self._wakeup.close()

    def abandon(self) -> None:
        """In a forked child, where the thread does not exist."""
        self.roster.abandon()
        self._wakeup.close_in_forked_child()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self.roster.stopped:
                self._turn()
        except BaseException as error:  # the edge of the thread: a Future must not wait for ever
            logger.exception("the thread that watches the workers failed; the pool is closed")
            self._break(error)

    def _turn(self) -> None:
        workers = list(self.roster.workers)
        ready = self._wait(workers)
        for worker in workers:
            events = ready.get(worker.process.sock.fileno(), 0)
            if events & ~select.POLLOUT:
                self._handle_all(worker, worker.receive())
            if worker.process.sentinel in ready:
                self._reap(worker)
            elif events & select.POLLOUT or worker.process.outbox.throttled:
                with self.roster.lock:
                    worker.flush()
        self._kill_overdue()
        self._kill_silent()
        self._replace_missing()
        self.roster.feed()

    def _wait(self, workers: list[WorkerHandle]) -> dict[int, int]:
        """What is ready: events by descriptor."""
        poll = select.poll()
        poll.register(self._wakeup.fd, select.POLLIN)
        until = self._next_replacement()
        with self.roster.lock:
            for worker in workers:
                process = worker.process
                until = min(until, worker.deadline())
                if worker.deadline() < math.inf or worker.holds_task:
                    until = min(until, max(self._heartbeats.next_look, time.monotonic()))
                poll.register(process.sentinel, select.POLLIN)
                if process.outbox.throttled:
                    until = min(until, time.monotonic() + _THROTTLED_SECS)
                wants_room = worker.usable and bool(process.outbox) and not process.outbox.throttled
                if worker.listening:
                    poll.register(process.sock, select.POLLIN | (select.POLLOUT if wants_room else 0))
        now = time.monotonic()
        wait_secs = min(_MAX_WAIT_SECS, max(0.0, until - now))
        self._heartbeats.begin_wait(now)
        ready = dict(poll.poll(math.ceil(wait_secs * 1000)))
        self._extend_deadlines(wait_secs)
        self._wakeup.clear()
        return ready

    def _extend_deadlines(self, wait_secs: float) -> None:
        """Move the deadlines by the time that passed beyond the wait: nobody watched the workers then."""
        now = time.monotonic()
        lost = self._heartbeats.end_wait(now, wait_secs)
        if lost > _LOST_SECS:
            with self.roster.lock:
                for worker in self.roster.workers:
                    worker.extend_deadlines(lost, now)

    def _handle_all(self, worker: WorkerHandle, frames: list[Frame]) -> None:
        for frame in frames:
            self._handle(worker, frame)

    def _handle(self, worker: WorkerHandle, frame: Frame) -> None:
        message = frame.message
        if message.nonce == self._settings.nonce:
            if isinstance(message, Ready):
                with self.roster.lock:
                    worker.move(WorkerState.READY)
                self._restart_budget.worker_ready()
                return
            if isinstance(message, (Done, Failed)):
                item = self.roster.take_finished(worker, message.task_id)
                if item is not None:
                    self._restart_budget.task_done()
                    self.roster.resolve([partial(item.finish, frame)])
                    return
        codec.close_fds(frame.fds)  # not for us

    def _reap(self, worker: WorkerHandle) -> None:
        """The process has ended: read what it sent before, reap it, queue its tasks again."""
        self._handle_all(worker, worker.receive_rest())
        worker.process.join(0)
        was_starting = worker.state is WorkerState.STARTING
        lost = self.roster.reap(worker, self._options.max_restarts, self._options.max_timeouts)
        self._fail(lost, worker.death_error)
        now = time.monotonic()
        if was_starting:
            self._restart_budget.start_failed(worker.started, now)
            self._give_up_if_broken(worker.start_error())
        else:
            self._restart_budget.worker_died(worker.started, now)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        with self.roster.lock:
            for worker in self.roster.workers:
                if worker.is_overdue(now):
                    worker.kill_overdue()  # its sentinel brings us to _reap

    def _kill_silent(self) -> None:
        elapsed, limit_secs = self._heartbeats.look(time.monotonic()), self._heartbeats.limit_secs
        if elapsed is None or limit_secs is None:
            return
        with self.roster.lock:
            for worker in self.roster.workers:
                if worker.holds_task:
                    worker.kill_if_silent(elapsed, limit_secs)

    # -- replacements -------------------------------------------------------------------------------------------

    def _next_replacement(self) -> float:
        """``time.monotonic()`` at which a worker is to be started; infinite: none is missing, or wanted."""
        if len(self.roster.workers) >= self._count:
            return math.inf
        if self._restart_budget.broken:  # one more attempt at a time, and only if there is work
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
        process = WorkerProcess(self._settings, self._options.env or {}, self._inherit_fds)
        self.roster.add(WorkerHandle(process, self._options.start_timeout_secs))

    def _give_up_if_broken(self, cause: WorkerStartError) -> None:
        if self._restart_budget.broken:
            self._fail(self.roster.give_up_waiting(), lambda _: WorkerStartError(str(cause)))

    # -- failing ------------------------------------------------------------------------------------------------

    def _fail(self, items: list[WorkItem], error_of: Callable[[WorkItem], StagerError]) -> None:
        self.roster.resolve([partial(_fail_item, item, error_of) for item in items])

    def _break(self, error: BaseException) -> None:
        """A bug: nothing is known about who runs what, so nobody may run anything."""
        self.roster.stop_accepting(f" because of an internal error ({error!r})")
        self.roster.stop()
        with suppress(Exception):
            for worker in self.roster.workers:
                worker.kill()
            stop_workers(self.roster.workers, self._settings.nonce, self._options.shutdown_timeout_secs)
        self._fail(self.roster.clear(), lambda item: _internal_error(item, error))


def _fail_item(item: WorkItem, error_of: Callable[[WorkItem], StagerError]) -> None:
    item.fail(error_of(item))


def _detached_error(item: WorkItem, has_worker: bool) -> ClosedError:
    if not has_worker:
        return ClosedError(
            f"the WorkerPool was detached before a worker had {item.label}; that task is lost, submit it again in a new pool"
        )
    return LeftRunningError(
        f"the WorkerPool was detached; its worker finishes {item.label}, but this process does not see the result"
    )


def _internal_error(item: WorkItem, cause: BaseException) -> InternalError:
    error = InternalError(
        f"{item.label} was abandoned, because the thread that watches the workers failed with {cause!r}; please report it"
    )
    error.__cause__ = cause
    return error
