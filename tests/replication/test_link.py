"""The connection to one other rank."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stager import ReplicationError
from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous
from stager.replication.exchange import Exchange, ExchangeResult, PartnerLink, Unpacking
from stager.replication.parcel import pack

_dist: Any = dist  # not all of it is annotated


class Two:
    """Two ranks, as threads of this process."""

    def __init__(self, timeout_secs: float = 20.0) -> None:
        store = _dist.HashStore()
        self.jobs = [RankGroup(rank, 2, Rendezvous(store, "test", 2), timeout_secs) for rank in range(2)]
        self.links = [PartnerLink(group, 1 - group.rank) for group in self.jobs]
        self.groups: list[Any] = [None, None]
        """The connection that each of the two used last."""

    def both(self, do: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(do, range(2)))

    def exchange(self, save_id: str) -> list[ExchangeResult]:
        def one(rank: int) -> ExchangeResult:
            peer = self.links[rank].barrier(save_id)
            self.groups[rank] = peer.group
            return Exchange(torch.device("cpu"), timedelta(seconds=20)).run(
                pack({"of": rank, "x": torch.full((5,), rank)}), peer, peer, Unpacking()
            )

        return self.both(one)

    def close(self) -> None:
        self.groups.clear()
        for link in self.links:
            link.drop()
        for group in self.jobs:
            group.close()


@pytest.fixture
def two() -> Any:
    made = Two()
    yield made
    made.close()


def received(outcomes: list[ExchangeResult]) -> list[int]:
    assert all(outcome.not_sent is outcome.not_received is None for outcome in outcomes)
    return [outcome.received["of"] for outcome in outcomes]


def test_the_connection_is_made_once_and_used_again(two: Two) -> None:
    assert received(two.exchange("a")) == [1, 0]
    groups = list(two.groups)
    assert received(two.exchange("b")) == [1, 0]
    assert two.groups == groups


@pytest.mark.parametrize("who", [[0], [1], [0, 1]])
def test_after_a_failure_that_one_side_may_not_know_of_both_connect_anew(two: Two, who: list[int]) -> None:
    two.exchange("a")
    groups = list(two.groups)
    for rank in who:
        two.links[rank].drop()
    assert received(two.exchange("b")) == [1, 0]
    assert all(new is not old for new, old in zip(two.groups, groups, strict=True))


def test_a_rank_that_does_not_come_is_named_and_the_next_exchange_works() -> None:
    two = Two(timeout_secs=0.2)
    with pytest.raises(ReplicationError, match=r"replicas with rank 1: rank 1 did not come within 0\.2 s") as one:
        two.links[0].barrier("a")
    assert one.value.rank == 1
    with pytest.raises(ReplicationError, match="rank 1 did not come"):  # it comes late, and is told the same
        two.links[1].barrier("a")
    assert received(two.exchange("b")) == [1, 0]
    two.close()


def test_a_rank_that_closes_lets_nobody_wait(two: Two) -> None:
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(two.links[0].barrier, "a")
        two.links[1].cancel_barrier("a", "closing")
        with pytest.raises(ReplicationError, match="closing"):
            waiting.result(10)
