"""One worker as the pool sees it: its process, its state, and the tasks it was sent.

STARTING --Ready--> READY --death seen--> DEAD
    |                                      ^
    +------------death seen----------------+
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from stager.workers.errors import (
    InternalError,
    TaskTimeoutError,
    WorkerDiedError,
    WorkerError,
    WorkerStartError,
    describe_exit,
)
from stager.workers.pool.channel import Frame
from stager.workers.pool.messages import Message, Task
from stager.workers.pool.process import WorkerProcess
from stager.workers.pool.work_item import WorkItem

logger = logging.getLogger("stager")

_HANG_UP_SECS = 5.0  # between closing its socket and its end: writing a core file, say


class WorkerState(Enum):
    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


_TRANSITIONS = {
    WorkerState.STARTING: {WorkerState.READY, WorkerState.DEAD},
    WorkerState.READY: {WorkerState.DEAD},
    WorkerState.DEAD: set(),
}


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """A worker as ``WorkerPool.health()`` shows it. ``tasks`` are labels, the running one first."""

    pid: int
    state: WorkerState
    tasks: tuple[str, ...]


class WorkerHandle:
    """A process and the tasks it was sent, oldest first. The roster's lock guards it.

    Attributes:
        started: ``time.monotonic()``.
        items: by task id. The first one is running, once the worker is ready.
        killed: we have sent SIGKILL; its sentinel will tell.
        overdue: the task that it was killed for, because that missed its deadline.
        silent: it was killed because its heartbeat stopped.
        listening: its socket may still bring something: it is worth polling.
    """

    def __init__(self, process: WorkerProcess, start_timeout_secs: float) -> None:
        self.process = process
        self.pid = process.pid
        self.state = WorkerState.STARTING
        self.started = time.monotonic()
        self.items: OrderedDict[int, WorkItem] = OrderedDict()
        self.killed = False
        self.overdue: WorkItem | None = None
        self.silent = False
        self._start_timeout_secs = start_timeout_secs
        self._start_deadline = self.started + start_timeout_secs
        self._hang_up_deadline: float | None = None
        self.listening = True

    def move(self, to: WorkerState) -> None:
        if to not in _TRANSITIONS[self.state]:
            raise InternalError(f"worker {self.pid} cannot go from {self.state.value} to {to.value}")
        self.state = to
        self.start_clock()

    @property
    def usable(self) -> bool:
        """Whether a task may be sent to it."""
        return not self.killed and self._hang_up_deadline is None and self.state is not WorkerState.DEAD

    @property
    def idle(self) -> bool:
        return self.usable and self.state is WorkerState.READY and not self.items

    @property
    def load(self) -> int:
        """How long a new task would wait, roughly: starting takes about as long as a task."""
        return len(self.items) + (self.state is WorkerState.STARTING)

    def head(self) -> WorkItem | None:
        return next(iter(self.items.values()), None)

    def start_clock(self) -> None:
        head = self.head()
        if self.state is WorkerState.READY and head is not None:
            head.start_clock()

    # -- the socket ---------------------------------------------------------------------------------------------

    def send_task(self, nonce: str, item: WorkItem) -> None:
        self.items[item.task_id] = item
        self.start_clock()
        self.send(Task(nonce, item.task_id, item.label, item.payload), item.fds)

    def send(self, message: Message, fds: list[int]) -> None:
        self.process.outbox.put(message, fds)
        self.flush()

    def flush(self) -> None:
        try:
            if self.usable:
                self.process.outbox.flush()
        except OSError:  # nobody will read what we send; what it has sent is still to be read
            self._hang_up()

    def receive(self) -> list[Frame]:
        """Read once; what is complete then. A torn message is left to the death that tore it."""
        try:
            self.listening = self.process.inbox.receive()
        except BlockingIOError:
            pass
        except OSError:
            self.listening = False
        if not self.listening:
            self._hang_up()
        frames = []
        try:
            while (frame := self.process.inbox.take()) is not None:
                frames.append(frame)
        except Exception:  # something in the worker wrote into the socket: nothing it says can be trusted now
            logger.exception(
                "worker %d sent bytes that are no message (something in it wrote into the pool's socket); it is killed",
                self.pid,
            )
            self.listening = False
            self.kill()
        return frames

    def receive_rest(self) -> list[Frame]:
        """Read everything that is left in the socket of a process that has ended."""
        frames = []
        while self.listening and self.process.has_input():
            frames += self.receive()
        return frames

    def _hang_up(self) -> None:
        """The other end is closed, so the process should end now. Nothing can be sent any more."""
        if self._hang_up_deadline is None:
            self._hang_up_deadline = time.monotonic() + _HANG_UP_SECS

    # -- deadlines and death ------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """``time.monotonic()`` at which this worker is to be killed; infinite: no such time."""
        if self.killed:
            return math.inf
        if self._hang_up_deadline is not None:
            return self._hang_up_deadline
        if self.state is WorkerState.STARTING:
            return self._start_deadline
        head = self.head()
        deadline = head.deadline() if head else None
        return math.inf if deadline is None else deadline

    @property
    def holds_task(self) -> bool:
        """Whether it should be at work: then its signs of life count."""
        return self.usable and self.state is WorkerState.READY and bool(self.items)

    def extend_deadlines(self, secs: float, now: float) -> None:
        """Move every deadline by ``secs`` seconds in which the supervisor could not watch."""
        self._start_deadline += secs
        if self._hang_up_deadline is not None:
            self._hang_up_deadline += secs
        head = self.head()
        if head is not None:
            head.extend_deadlines(secs, now)

    def is_overdue(self, now: float) -> bool:
        """Whether to kill it: what has arrived and was not read yet may be the very answer that we wait for."""
        return self.deadline() <= now and not (self.listening and self.process.has_input())

    def kill_overdue(self) -> None:
        if self.state is WorkerState.READY and self._hang_up_deadline is None:
            self.overdue = self.head()
        self.kill()

    def kill_if_silent(self, elapsed: float, limit_secs: float) -> None:
        """See NOTE [ When a worker is stuck ] in ``heartbeat.py``."""
        pulse = self.process.pulse
        pulse.look(elapsed)
        if pulse.silent_secs >= limit_secs and not (self.listening and self.process.has_input()):
            logger.warning(
                "worker %d shows no sign of life (it is stopped, or stuck with the GIL held); it is killed", self.pid
            )
            self.silent = True
            self.kill()

    def kill(self) -> None:
        self.killed = True
        self.process.kill()

    def health(self) -> WorkerHealth:
        return WorkerHealth(self.pid, self.state, tuple(item.label for item in self.items.values()))

    def death_error(self, item: WorkItem) -> WorkerError:
        """Why ``item``, which this dead worker was the last to try, failed."""
        if self.overdue is item:
            return TaskTimeoutError(
                f"{item.label} ran longer than {item.timeout_secs:g} s and its worker {self.pid} was killed "
                f"(attempt {item.attempts}); raise workers.task_timeout_secs or look at the storage"
            )
        exitcode = self.process.exitcode
        hint = f"this was attempt {item.attempts}"
        if self.silent:
            hint += "; it was killed because it showed no sign of life: it was stopped, or stuck with the GIL held"
        elif exitcode == -9:
            hint += "; SIGKILL that nobody sent on purpose is usually the kernel's out-of-memory killer (see dmesg)"
        return WorkerDiedError(self.pid, exitcode, item.label, hint)

    def start_error(self) -> WorkerStartError:
        """Why this worker, which never became ready, is dead."""
        exitcode = self.process.exitcode
        what = f"{describe_exit(exitcode)} before it was ready"
        if self.killed:
            what = f"was not ready within {self._start_timeout_secs:g} s and was killed"
        return WorkerStartError(
            f"worker {self.pid} {what}; its standard error says why; `stager doctor` checks the machine"
        )
