"""What was done during a save and when: timings and notes, recorded from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """One timed step of a save.

    Attributes:
        name: what was done, e.g. "stage" or "write".
        process: who did it: "trainer" or "worker <pid>".
        start, end: seconds since the epoch (``time.time()``).
    """

    name: str
    process: str
    start: float
    end: float


class Timeline:
    """Collects the timings and notes of one save, from any thread. ``started`` is when ``save()`` was called."""

    def __init__(self, step: int, save_id: str) -> None:
        self.step = step
        self.save_id = save_id
        self.started = time.time()
        self._timings: list[Timing] = []
        self._notes: list[str] = []
        self._lock = threading.Lock()

    def timing(self, name: str, start: float, end: float | None = None, process: str = "trainer") -> None:
        """Record a step that took from ``start`` to ``end`` (seconds since the epoch; None: now)."""
        with self._lock:
            self._timings.append(Timing(name, process, start, time.time() if end is None else end))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record the trainer's step ``name`` when the block ends without an exception."""
        start = time.time()
        yield
        self.timing(name, start)

    def note(self, text: str) -> None:
        """Record something that the user may want to know about how this save was done."""
        with self._lock:
            self._notes.append(text)

    @property
    def timings(self) -> tuple[Timing, ...]:
        """The timings so far, in the order in which they were recorded."""
        with self._lock:
            return tuple(self._timings)

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes so far, in the order in which they were recorded."""
        with self._lock:
            return tuple(self._notes)
