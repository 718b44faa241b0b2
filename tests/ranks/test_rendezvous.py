"""A store whose server does not answer is given up, and used again when it does."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import pytest
import torch.distributed as dist

from stager.ranks import rendezvous as module
from stager.ranks.rendezvous import Rendezvous
from stager.workers.errors import RankFailedError
from tests.waiting import wait_until


class Frozen(dist.Store):
    """Answers when it is told to. (PrefixStore calls the C++ store behind it, so this one takes its place.)"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dist.HashStore()
        self.answers = threading.Event()
        self.num_asked = 0

    def add(self, key: str, amount: int) -> int:
        self.num_asked += 1
        self.answers.wait()
        return int(self.inner.add(key, amount))


def frozen_rendezvous() -> tuple[Rendezvous, Frozen]:
    rendezvous: Any = Rendezvous(dist.HashStore(), "x", 2, answer_secs=0.1)
    rendezvous._store = Frozen()
    return rendezvous, rendezvous._store


def test_a_server_that_does_not_answer_is_given_up() -> None:
    rendezvous, store = frozen_rendezvous()
    with pytest.raises(RankFailedError, match=r"has not answered for 0\.1 s"):
        rendezvous.add("a")
    with pytest.raises(RankFailedError, match="has not answered"):
        rendezvous.add("a")
    assert store.num_asked == 1  # while nobody knows better, it is not asked again
    store.answers.set()
    counts: list[int] = []

    def is_answered() -> bool:
        with suppress(RankFailedError):
            counts.append(rendezvous.add("a"))
        return bool(counts)

    wait_until(is_answered)
    assert counts == [2]  # the request that was given up was answered, too
    rendezvous.close()


def test_the_thread_ends_with_close() -> None:
    rendezvous = Rendezvous(dist.HashStore(), "x", 2)
    assert rendezvous.add("a") == 1
    (thread,) = [t for t in threading.enumerate() if t.name == "stager-rendezvous"]
    rendezvous.close()
    assert not thread.is_alive()
    assert rendezvous.add("a") == 2  # and comes back
    rendezvous.close()


def test_errors_of_the_store_arrive() -> None:
    rendezvous: Any = Rendezvous(dist.HashStore(), "x", 2)

    def gone(key: str, amount: int) -> int:
        raise RuntimeError("Connection reset by peer")

    rendezvous._store = type("Gone", (), {"add": staticmethod(gone)})()
    with pytest.raises(RankFailedError, match="Connection reset"):
        rendezvous.add("a")
    rendezvous.close()


@pytest.mark.parametrize(("num_ranks", "longest"), [(2, 0.05), (2500, 0.05), (10_000, 0.2)])
def test_who_waits_asks_the_less_often_the_more_ranks_may_be_waiting(
    num_ranks: int, longest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    rendezvous = Rendezvous(dist.HashStore(), "x", num_ranks)
    assert rendezvous.wait("a", 10.0) is None
    rendezvous.close()
    assert (min(clock.slept), max(clock.slept)) == (0.001, longest)
    assert 10.0 <= clock.now < 10.0 + longest


class Clock:
    """In place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.now += secs
        self.slept.append(secs)
