from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from stager.arena.arena import Arena, Lease
from stager.workers.memory import pages
from tests.waiting import wait_until

MIB = 1 << 20
PLENTY = 1 << 40


@pytest.fixture
def make_arena() -> Iterator[Callable[..., Arena]]:
    """Makes arenas with memory in plenty; closes them at the end."""
    made: list[Arena] = []

    def make(buffers: int = 2, max_bytes: int = 64 * MIB, when_full: str = "raise", **options: Any) -> Arena:
        made.append(Arena(buffers, max_bytes, when_full, **{"available_bytes": lambda: PLENTY, **options}))
        return made[-1]

    yield make
    while made:  # the test's item keeps ``make`` alive, and slabs that were never released with it
        made.pop().close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def populate_by(monkeypatch: pytest.MonkeyPatch, by: Callable[[Callable[[], int]], int]) -> None:
    """Have ``by`` decide what allocating pages does: it is given the real call, and returns an errno or 0."""
    real = pages._madvise

    def madvise(address: int, nbytes: int, advice: int) -> int:
        if advice == pages._MADV_POPULATE_WRITE:
            return by(lambda: real(address, nbytes, advice))
        return real(address, nbytes, advice)

    monkeypatch.setattr(pages, "_madvise", madvise)


def wait_for_prefault() -> None:
    """Until the arena's background thread has ended, if there is one."""
    for thread in threading.enumerate():
        if thread.name == "stager-prefault":
            thread.join()


class Gate:
    """Holds the first thread that allocates pages until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._first = threading.Lock()
        populate_by(monkeypatch, self._call)

    def _call(self, populate: Callable[[], int]) -> int:
        if self._first.acquire(blocking=False):
            self.reached.set()
            assert self._open.wait(60)
        return populate()

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def num_waiting(arena: Arena) -> int:
    """Leases that wait: a ticket that is seen with the lock held belongs to a thread that has let go of it."""
    with arena._changed:
        return len(arena._slabs.waiting)


def wait_for_freeing(arena: Arena) -> None:
    wait_until(lambda: arena._slabs.freeing() is None)


def start_waiting(threads: ThreadPoolExecutor, arena: Arena, nbytes: int, *when_full: str) -> Future[Lease | None]:
    """A lease in another thread that cannot be granted yet."""
    before = num_waiting(arena)
    future = threads.submit(arena.lease, nbytes, *when_full)
    wait_until(lambda: num_waiting(arena) == before + 1)
    assert not future.done()
    return future


def take(arena: Arena, nbytes: int, *when_full: str) -> Lease:
    lease = arena.lease(nbytes, *when_full)
    assert lease is not None
    return lease


def sizes(arena: Arena) -> list[int]:
    with arena._changed:
        return sorted(buffer.nbytes for buffer in arena._slabs.buffers)
