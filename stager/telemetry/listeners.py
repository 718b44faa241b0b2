"""Listeners: callables that get the events of a run, outside of the training thread.

NOTE [ A listener changes nothing ]
Whatever a listener does, the saves and the training loop do not see it.
  1. Each listener has a thread and a queue of its own. Posting an event appends it to the queues, and never waits.
  2. The thread calls the listener with one event after the other, in the order of posting. An error is logged.
  3. One that hangs holds up only itself. When its queue is full, further events are dropped, which is logged once.
  4. Closing waits until the queues are delivered, but not longer than its deadline. Then it names those that hang, and goes
     on. Their daemon threads end when the listener returns, or with the process.
A thread begins with the first event, and ends after some seconds without one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from stager.telemetry.event import Event

logger = logging.getLogger("stager")

Listener = Callable[[Event], object]

_MOST_QUEUED = 1000  # events of some 4 KiB
_IDLE_SECS = 10.0


def _nothing() -> None:
    pass


class Listeners:
    """The listeners of one Checkpointer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deliveries: tuple[_Delivery, ...] = ()  # replaced, never changed: post() reads it without the lock
        self._is_closed = False

    def add(self, listener: Listener, close: Callable[[], None] = _nothing) -> Callable[[], None]:
        """Call ``listener`` with each event from now on. Returns what ends that; events that are queued are dropped then.

        Args:
            close: called when every event is delivered, at the end of :meth:`close`.
        """
        delivery = _Delivery(listener, close)
        with self._lock:
            if not self._is_closed:
                self._deliveries = (*self._deliveries, delivery)

        def stop() -> None:
            with self._lock:
                self._deliveries = tuple(one for one in self._deliveries if one is not delivery)
            delivery.drop()

        return stop

    def post(self, make: Callable[[], Event]) -> None:
        """Queue the event that ``make`` returns, for every listener. Without a listener it is not made."""
        deliveries = self._deliveries
        if deliveries:
            event = make()
            for delivery in deliveries:
                delivery.put(event)

    def are_there(self) -> bool:
        """Whether there is a listener."""
        return bool(self._deliveries)

    @property
    def is_current(self) -> bool:
        """Whether the calling thread runs a listener, for which close() would wait."""
        current = threading.current_thread()
        return any(delivery.thread is current for delivery in self._deliveries)

    def close(self, timeout_secs: float) -> None:
        """Deliver what is queued, and end the threads. Logs the listeners that do not return within ``timeout_secs``."""
        deadline = time.monotonic() + timeout_secs
        with self._lock:
            self._is_closed = True
            deliveries = self._deliveries
        try:
            for delivery in deliveries:
                if not delivery.finish(deadline):
                    logger.warning(
                        "the listener %s did not return within %g s (telemetry.listen_timeout_secs); events that it did "
                        "not get: %d",
                        delivery.name,
                        timeout_secs,
                        delivery.drop(),
                    )
        finally:
            self._deliveries = ()
            for delivery in deliveries:  # after an interrupt, too
                delivery.drop()


class _Delivery:
    """The queue of one listener, and the thread that calls it."""

    def __init__(self, listener: Listener, close: Callable[[], None]) -> None:
        self._listener = listener
        self._close = close
        self._changed = threading.Condition()  # guards what follows
        self._queue: deque[Event] = deque()
        self._is_open = True
        self._num_dropped = 0
        self.thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """The listener, for messages."""
        return str(getattr(self._listener, "__qualname__", None) or type(self._listener).__qualname__)

    def put(self, event: Event) -> None:
        """Queue an event."""
        with self._changed:
            if not self._is_open:
                return
            if len(self._queue) >= _MOST_QUEUED:
                self._num_dropped += 1
                if self._num_dropped == 1:
                    logger.warning(
                        "the listener %s is %d events behind, and does not get the next", self.name, _MOST_QUEUED
                    )
                return
            self._queue.append(event)
            if self.thread is None:
                self.thread = threading.Thread(target=self._deliver, name="stager-listener", daemon=True)
                try:
                    self.thread.start()
                except RuntimeError:  # the interpreter is shutting down, and starts no threads any more
                    self.thread = None
                    self._queue.clear()
            self._changed.notify_all()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._queue or not self._is_open, _IDLE_SECS) or not self._queue:
                    self.thread = None
                    self._changed.notify_all()
                    return
                event = self._queue[0]  # it stays there until the listener has returned: finish() waits for that
            try:
                self._listener(event)
            except BaseException:  # a listener changes nothing
                logger.exception("the listener %s failed with %s", self.name, event.name)
            with self._changed:
                if self._queue and self._queue[0] is event:
                    self._queue.popleft()
                self._changed.notify_all()

    def finish(self, deadline: float) -> bool:
        """Wait until every queued event is delivered, then end the thread; False if that takes longer."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._queue, max(0.0, deadline - time.monotonic())):
                return False
            self._is_open = False
            self._changed.notify_all()
            thread = self.thread
        if thread is not None:
            thread.join()
        try:
            self._close()
        except Exception:
            logger.exception("the listener %s could not be closed", self.name)
        return True

    def drop(self) -> int:
        """Deliver nothing more. Returns how many events were not delivered."""
        with self._changed:
            num_dropped = len(self._queue) + self._num_dropped
            self._is_open = False
            self._queue.clear()
            self._changed.notify_all()
        return num_dropped
