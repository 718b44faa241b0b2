"""What every Checkpointer has: a lifecycle, listeners, and a pipeline that saves.

BaseCheckpointer
|-- Checkpointer        the checkpoints of one run, by their steps (``checkpointer.py``)
`-- PathCheckpointer    checkpoints anywhere, by their paths (``path_checkpointer.py``)
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch.optim import Optimizer
from typing_extensions import Self

from stager.config import StagerConfig, arguments, load_config
from stager.config.calls import explained
from stager.ranks.rank_group import find_rank_group
from stager.saving import at_exit
from stager.saving.pipeline import Pipeline
from stager.saving.preemption import Preemption
from stager.telemetry.event import Event
from stager.telemetry.listeners import Listeners
from stager.workers.errors import ClosedError, UsageError

logger = logging.getLogger("stager")

P = TypeVar("P", bound=Pipeline)


class _Lifecycle(Enum):
    """What a Checkpointer may do.

    READ_ONLY --------------> CLOSED        a closed one still loads
    OPEN ------> CLOSING ---> CLOSED        while it is CLOSING, saves in flight end, and callbacks of their Futures run
    """

    READ_ONLY = "was opened with read_only=True"
    OPEN = "is open"
    CLOSING = "is being closed"
    CLOSED = "is closed"


_LOOK_SECS = 0.05  # so often who waits for the lock looks whether the Checkpointer is being closed


class BaseCheckpointer(Generic[P]):
    """The base of the Checkpointers.

    Args:
        shown: what it is the Checkpointer of, for messages.
        config: path of a YAML file, a mapping, a :class:`~stager.config.StagerConfig`, or None for the defaults.
        read_only: start no workers, take no lock, change nothing.
        on_event: a first listener, see :meth:`listen`; None: none.

    Raises:
        ConfigError: the configuration is wrong.
    """

    _run: P  # unless it is read_only

    def __init__(
        self,
        shown: str,
        config: str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None,
        *,
        read_only: bool,
        on_event: Callable[[Event], object] | None,
    ) -> None:
        self._shown = shown
        self._config = load_config(config)
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._lifecycle = _Lifecycle.READ_ONLY if read_only else _Lifecycle.OPEN
        self._listeners = Listeners()
        if on_event is not None:
            self._listeners.add(on_event)
        ranks = self._config.ranks
        self._group = find_rank_group(False if read_only else ranks.together, ranks.timeout_secs)

    def _belongs_here(self, run: P) -> None:
        """Use a pipeline that was opened, until it is closed."""
        self._run = run
        run.belongs_to(self)
        at_exit.watch(self, self._close, self._abandon)

    def listen(self, listener: Callable[[Event], object]) -> Callable[[], None]:
        """Call ``listener`` with every event from now on, in the order in which they happen, in a thread of its own.

        Whatever a listener does changes no save: an error in it is logged, and one that hangs holds up nothing, except that
        ``close()`` waits for it for up to ``telemetry.listen_timeout_secs``. It may look at checkpoints and load them.

        Args:
            listener: gets an object of a subclass of ``stager.Event``: ``CommittedEvent`` and so on.

        Returns:
            A function that ends it. Events that are not delivered by then are dropped.

        Raises:
            ClosedError
        """
        if self._lifecycle is _Lifecycle.CLOSED:
            raise ClosedError(f"{self._shown} {self._lifecycle.value}")
        return self._listeners.add(listener)

    def guard(self, *optimizers: Optimizer | Iterable[Optimizer]) -> None:
        """Copy the parameters and state of these optimizers while training goes on.

        ``save()`` then returns before these tensors are copied, and the optimizers' ``step()`` waits for the copy. Do not
        write to these tensors in any other way between ``save()`` and the next ``step()``, unless you call
        ``wait_for_staging()`` first. Memory for a snapshot of them is allocated in the background from here on.

        Args:
            optimizers: one or several, each by itself or in a list.

        Raises:
            ArgumentError: something else than an optimizer; none is guarded then.
            ClosedError
        """
        with self._exclusively() as run:
            run.saver.guard.add(*arguments.each_of(optimizers))
            run.saver.memory.expect_what_is_guarded()

    @explained("warmup(state)")
    def warmup(self, state: Mapping[str, Any]) -> None:
        """Do now what the first save of such a state would have to do: plan, allocate, start workers. Waits for it."""
        arguments.check_state(state, "warmup({example})")
        self._refuse_in_callback("warmup()")
        with self._lock:
            self._opened().saver.warm_up(state)

    @explained("on_preemption(signal.SIGTERM, deadline_secs=60)")
    def on_preemption(
        self, signals: Iterable[int] | int = (signal.SIGTERM, signal.SIGUSR1), deadline_secs: float | None = None
    ) -> Preemption:
        """Treat these signals as a warning that this process will be killed soon.

        ``requested`` of the returned object becomes true when a signal comes. Read it in the training loop, save once more,
        and close. ``close()`` waits for commits until ``deadline_secs`` after the signal. The workers commit what is only
        staged by then, after this process is gone. A ``save()`` that still waits for a buffer at the deadline raises
        ArenaFullError. ``close()`` restores the earlier signal handlers.

        Args:
            signals: one or several; their earlier handlers are called as well; their default actions are not taken.
            deadline_secs: seconds from the first signal until this process must be gone; None: no limit.

        Raises:
            ArgumentError: a signal that no process can handle, or a deadline below 0.
            UsageError: called twice, or not in the main thread.
            ClosedError
        """
        with self._lock:
            return self._opened().expect_preemption(signals, deadline_secs)

    def wait_for_staging(self, timeout: float | None = None) -> None:
        """Wait until every snapshot begun so far is taken. Then the state may be changed in any way.

        Raises:
            TimeoutError: a snapshot is not taken within ``timeout`` seconds (None: as long as it takes).
            ArgumentError: ``timeout`` is no number of seconds.
        """
        arguments.check_secs(timeout)
        self._refuse_in_callback("wait_for_staging()")
        self._opened().saver.wait_for_staging(timeout)

    def _refuse_in_callback(self, what: str) -> None:
        if self._listeners.is_current:
            raise UsageError(
                f"{what} was called by a listener, and close() would wait for both; set a flag in the listener, and call "
                f"{what} from the training loop when it is set"
            )
        if self._lifecycle in (_Lifecycle.OPEN, _Lifecycle.CLOSING) and self._run.in_callback:
            raise UsageError(
                f"{what} was called in a callback of a save's Future, and would wait for that callback for ever; "
                f"set a flag in the callback, and call {what} from the training loop when it is set"
                + (" (or look with latest(), or read with stager.load_checkpoint())" if what == "load()" else "")
            )

    def _opened(self) -> P:
        if self._owner != os.getpid():
            raise ClosedError(
                f"this {type(self).__name__} belongs to process {self._owner}; make a new one in the forked child"
            )
        if not self._is_open:
            advice = "make one without it to change the run" if self._is_read_only else "make a new one"
            raise ClosedError(f"{self._shown} {self._lifecycle.value}; {advice}")
        return self._run

    @contextmanager
    def _exclusively(self) -> Iterator[P]:
        """Hold the lock, for what a listener may do, too: close() holds it while it waits for the listeners.

        Raises:
            ClosedError: it is closed, or is being closed.
        """
        self._opened()
        while not self._lock.acquire(timeout=_LOOK_SECS):
            self._opened()
        try:
            yield self._opened()
        finally:
            self._lock.release()

    @property
    def _is_open(self) -> bool:
        return self._lifecycle is _Lifecycle.OPEN

    @property
    def _is_read_only(self) -> bool:
        return self._lifecycle is _Lifecycle.READ_ONLY

    # -- the end ------------------------------------------------------------------------------------------------

    @explained("close(timeout=60)")
    def close(self, timeout: float | None = None) -> None:
        """Finish every save and every export that was begun, then stop the workers and free the memory. Idempotent.

        The listeners get the events that are still queued, for which it waits ``telemetry.listen_timeout_secs`` at most.

        Args:
            timeout: seconds to wait for saves in flight; those not committed by then fail with ClosedError. So do exports
                that are not done by then; the log has the commands that make them.

        Raises:
            ArgumentError: ``timeout`` is no number of seconds; nothing was closed.
            UsageError: called by a listener, or by a callback of a save's Future.
            KeyboardInterrupt: while it waited; what is staged is committed by the workers after this process is gone.
            Exception: the oldest error of a save that nobody has looked at, unless ``persistence.on_save_error`` says
                otherwise; others follow it as its context.
        """
        arguments.check_secs(timeout)
        self._close(has_failed=False, timeout=timeout)

    def _close(self, has_failed: bool, timeout: float | None = None) -> None:
        if self._owner != os.getpid():
            return
        self._refuse_in_callback("close()")  # before the lock, which close() holds while it waits for a listener
        with self._lock:
            at_exit.forget(self)
            if not self._is_open:
                if self._lifecycle is _Lifecycle.READ_ONLY:
                    self._listeners.close(self._config.telemetry.listen_timeout_secs)
                self._lifecycle = _Lifecycle.CLOSED
                return
            self._lifecycle = _Lifecycle.CLOSING
            self._before_end()
            self._run.finish(timeout, has_failed=has_failed)

    def _before_end(self) -> None:
        """Called when it is about to be closed."""

    def _become_closed(self) -> None:
        self._lifecycle = _Lifecycle.CLOSED

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._close(has_failed=True)
        except Exception:  # the error of the with block is raised; this one is only logged
            logger.exception("closing %s failed as well, after an error in its with block", self._shown)

    def _abandon(self) -> None:
        if self._is_open:
            self._run.abandon()
