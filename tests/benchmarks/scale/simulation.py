"""A discrete-event simulation: what happens when, with nobody waiting for real.

A process is a generator. It yields the moment at which it reaches something shared (a server, a lock) and goes on when the
simulation has come there; between two of these its own clock (``Actor.now``) runs ahead. So a request is one event.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[float, None, T]
"""Moments, seconds; and what comes out in the end."""

PARKED = math.inf
"""Yielded by who has arranged to be started again by another process."""


class Simulation:
    """Attributes:
    now: the moment of the event that is going on, seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._agenda: list[tuple[float, int, Steps[None]]] = []
        self._numbers = itertools.count()
        self._current: Steps[None] | None = None

    def start(self, process: Steps[None], at: float) -> None:
        heapq.heappush(self._agenda, (at, next(self._numbers), process))

    def current(self) -> Steps[None]:
        """The process whose event this is: for who parks it."""
        assert self._current is not None
        return self._current

    def run(self) -> None:
        """Until nothing is left to happen."""
        agenda = self._agenda
        while agenda:
            self.now, _, self._current = heapq.heappop(agenda)
            moment = next(self._current, None)
            if moment is not None and moment != PARKED:
                heapq.heappush(agenda, (moment, next(self._numbers), self._current))


@dataclass(slots=True)
class Actor:
    """A thread or process of a rank.

    Attributes:
        now: its clock, seconds.
        num_requests: to the store.
        num_calls: to the file system's metadata server.
    """

    now: float
    num_requests: int = 0
    num_calls: int = 0


class Server:
    """PartResults one request after the other, in the order in which they come.

    Attributes:
        busy_secs: how long it has worked.
    """

    def __init__(self) -> None:
        self._free_at = 0.0
        self.busy_secs = 0.0

    def take(self, at: float, secs: float) -> float:
        """A request that comes at ``at`` and takes ``secs``: when it is done."""
        self._free_at = max(at, self._free_at) + secs
        self.busy_secs += secs
        return self._free_at


def in_threads(
    simulation: Simulation, actor: Actor, jobs: Sequence[Callable[[Actor], Steps[None]]], num_threads: int
) -> Steps[None]:
    """All of ``jobs``, by so many threads of one process: ``stager.workers.checkpoint.storage.in_threads``."""
    workers = [Actor(actor.now) for _ in range(min(num_threads, len(jobs)))]
    num_working = len(workers)
    left = iter(jobs)
    waiting = simulation.current()

    def work(worker: Actor) -> Steps[None]:
        nonlocal num_working
        for job in left:
            yield from job(worker)
            yield worker.now  # who is done first takes the next
        num_working -= 1
        if not num_working:
            simulation.start(waiting, simulation.now)

    for worker in workers:
        simulation.start(work(worker), worker.now)
    if workers:
        yield PARKED
    actor.now = max([actor.now, *(worker.now for worker in workers)])
    actor.num_calls += sum(worker.num_calls for worker in workers)
