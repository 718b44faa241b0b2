"""One worker as the pool sees it: its process, its state, and the tasks it was sent.

    STARTING --Ready--> READY --death seen--> DEAD
        '---------------death seen-------------^

Before a death is seen, the pool may know that it will come, and why:

    NONE --socket closed--> HUNG_UP --.
      '-------------------------------+--> KILLED | OVERDUE | SILENT    SIGKILL is sent; the first reason counts
"""

from __future__ import annotations

import logging
import math
import time
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


class _Ending(Enum):
    """Why the worker is about to end."""

    NONE = "nothing ends it"
    HUNG_UP = "it closed its socket"
    KILLED = "the pool killed it, for another reason than the next two"
    OVERDUE = "it missed a deadline"
    SILENT = "it showed no sign of life"


_KILLS = {_Ending.KILLED, _Ending.OVERDUE, _Ending.SILENT}
_TRANSITIONS: dict[WorkerState | _Ending, set[WorkerState] | set[_Ending]] = {
    WorkerState.STARTING: {WorkerState.READY, WorkerState.DEAD},
    WorkerState.READY: {WorkerState.DEAD},
    WorkerState.DEAD: set(),
    _Ending.NONE: {_Ending.HUNG_UP, *_KILLS},
    _Ending.HUNG_UP: _KILLS,
    **{ending: set() for ending in _KILLS},
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
        items: by task id, in the order of sending. The first one is running, once the worker is ready.
        overdue_id: id of the task that missed its deadline, for which the worker was killed; 0: none.
    """

    def __init__(self, process: WorkerProcess, start_timeout_secs: float) -> None:
        self.process = process
        self.pid = process.pid
        self.state = WorkerState.STARTING
        self.started = time.monotonic()
        self.items: dict[int, WorkItem] = {}
        self.overdue_id = 0
        self._ending = _Ending.NONE
        self._start_timeout_secs = start_timeout_secs
        self._deadline = self.started + start_timeout_secs  # to be ready; after HUNG_UP, to have ended

    def move(self, to: WorkerState) -> None:
        if to not in _TRANSITIONS[self.state]:
            raise InternalError(f"worker {self.pid} cannot go from {self.state.value} to {to.value}")
        self.state = to
        self.start_clock()

    def _end(self, why: _Ending) -> None:
        if why in _TRANSITIONS[self._ending]:
            self._ending = why

    @property
    def usable(self) -> bool:
        """Whether a task may be sent to it."""
        return self._ending is _Ending.NONE and self.state is not WorkerState.DEAD

    @property
    def idle(self) -> bool:
        return self.usable and self.state is WorkerState.READY and not self.items

    @property
    def holds_task(self) -> bool:
        """Whether it should be at work: then its signs of life count."""
        return self.usable and self.state is WorkerState.READY and bool(self.items)

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

    def send_task(self, item: WorkItem) -> None:
        self.items[item.task_id] = item
        self.start_clock()
        self.send(Task(item.task_id, item.label, item.payload), item.fds)

    def send(self, message: Message, fds: list[int]) -> None:
        self.process.outbox.put(message, fds)
        self.flush()

    def flush(self) -> None:
        try:
            if self.usable:
                self.process.outbox.flush()
        except OSError:  # nobody reads what the pool sends; what the worker has sent must still be read
            self._hang_up()

    def receive(self) -> list[Frame]:
        """Read once; return the complete messages. A message that a death tore apart is not complete."""
        inbox = self.process.inbox
        inbox.receive()
        if inbox.ended:
            self._hang_up()
        frames = []
        try:
            while (frame := inbox.take()) is not None:
                frames.append(frame)
        except Exception:  # something in the worker wrote into the socket: the pool cannot trust what comes after
            logger.exception(
                "worker %d sent bytes that are no message (something in it wrote into the pool's socket); it is killed",
                self.pid,
            )
            inbox.ended = True
            self.kill()
        return frames

    def receive_rest(self) -> list[Frame]:
        """Read everything that is left in the socket of a process that has ended."""
        frames = []
        while self._has_unread():
            frames += self.receive()
        return frames

    def _has_unread(self) -> bool:
        return not self.process.inbox.ended and self.process.has_input()

    def _hang_up(self) -> None:
        """The other end is closed, so the process should end now. Nothing can be sent any more."""
        if self._ending is _Ending.NONE:
            self._end(_Ending.HUNG_UP)
            self._deadline = time.monotonic() + _HANG_UP_SECS

    # -- deadlines and death ------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """``time.monotonic()`` at which this worker is to be killed; infinite: no such time."""
        if self._ending in _KILLS:
            return math.inf
        if self._ending is _Ending.HUNG_UP or self.state is WorkerState.STARTING:
            return self._deadline
        head = self.head()
        return head.deadline() if head else math.inf

    def extend_deadlines(self, secs: float, now: float) -> None:
        """Move every deadline by ``secs`` seconds in which the supervisor could not watch."""
        self._deadline += secs
        head = self.head()
        if head is not None:
            head.extend_deadlines(secs, now)

    def kill_if_overdue(self, now: float) -> None:
        # What has arrived and was not read yet may be the very answer that the pool waits for.
        if self.deadline() > now or self._has_unread():
            return
        head = self.head()
        if head is not None and self.state is WorkerState.READY and self._ending is _Ending.NONE:
            self.overdue_id = head.task_id
        self.kill(_Ending.OVERDUE if self._ending is _Ending.NONE else _Ending.KILLED)

    def kill_if_silent(self, elapsed: float, limit_secs: float) -> None:
        """See NOTE [ When a worker is stuck ] in ``heartbeat.py``."""
        pulse = self.process.pulse
        pulse.look(elapsed)
        if pulse.silent_secs >= limit_secs and not self._has_unread():
            logger.warning(
                "worker %d shows no sign of life (it is stopped, or stuck with the GIL held); it is killed", self.pid
            )
            self.kill(_Ending.SILENT)

    def kill(self, why: _Ending = _Ending.KILLED) -> None:
        self._end(why)
        self.process.kill()  # its sentinel will tell

    def health(self) -> WorkerHealth:
        return WorkerHealth(self.pid, self.state, tuple(item.label for item in self.items.values()))

    def death_error(self, item: WorkItem) -> WorkerError:
        """Why ``item``, which this dead worker was the last to try, failed."""
        if self.overdue_id == item.task_id:
            return TaskTimeoutError(
                f"{item.label} ran longer than {item.timeout_secs:g} s and its worker {self.pid} was killed "
                f"(attempt {item.attempts}); raise workers.task_timeout_secs or look at the storage"
            )
        exitcode = self.process.exitcode
        hint = f"this was attempt {item.attempts}"
        if self._ending is _Ending.SILENT:
            hint += "; it was killed because it showed no sign of life: it was stopped, or stuck with the GIL held"
        elif exitcode == -9:
            hint += "; if nobody sent SIGKILL on purpose, it was probably the kernel's out-of-memory killer (see dmesg)"
        return WorkerDiedError(self.pid, exitcode, item.label, hint)

    def start_error(self) -> WorkerStartError:
        """Why this worker, which never became ready, is dead."""
        what = f"{describe_exit(self.process.exitcode)} before it was ready"
        if self._ending in _KILLS:
            what = f"was not ready within {self._start_timeout_secs:g} s and was killed"
        return WorkerStartError(
            f"worker {self.pid} {what}; its standard error says why; `stager doctor` checks the machine"
        )
