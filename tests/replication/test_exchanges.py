"""Snapshots that go to and fro between the ranks of one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from stager import ReplicationError
from stager.ranks.rank_group import RankGroup
from stager.ranks.rendezvous import Rendezvous
from stager.replication.exchange import Exchange
from stager.replication.replicas import Replicas
from stager.replication.replicator import Replicator
from stager.telemetry.timeline import Timeline
from stager.workers.checkpoint.write.write_task import Extent, WriteTask
from tests.replication.opinion import receive, whole_id
from tests.replication.test_keeper import header_of

_dist: Any = dist  # not all of it is annotated


class Four:
    """Ranks whose snapshots come without a network."""

    def __init__(self, directory: Path) -> None:
        store = _dist.HashStore()
        self.jobs = [RankGroup(rank, 4, Rendezvous(store, "test", 4)) for rank in range(4)]
        self.replicators = []
        for job in self.jobs:
            replicas = Replicas(str(directory), f"/host-{job.rank}/run")
            replicas.create()
            self.replicators.append(Replicator(job, replicas, ""))

    def receive(self, ranks: list[int], step: int) -> None:
        for rank in ranks:
            one, data = self.replicators[rank], bytes([step]) * 1000
            whole_id(one)
            for target in one._keeper.begin(header_of(data, step, owner=one._owner).to_bytes()):
                target.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            receive(one, one._keeper.finish().spec.save_id)

    def steps(self) -> list[set[int]]:
        return [{replica.header.spec.step for replica in one._replicas.whole()} for one in self.replicators]

    def close(self) -> None:
        for one in self.replicators:
            one.close(0)
        for job in self.jobs:
            job.close()


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Four]:
    made = Four(tmp_path)
    yield made
    made.close()


def test_a_save_that_one_rank_has_overwritten_does_not_become_whole_later(four: Four) -> None:
    four.receive([0, 1, 2, 3], 1)
    four.receive([0, 2], 2)
    four.receive([0, 2], 3)  # ahead: of 1, which all have, and 2, which goes
    four.receive([1, 3], 2)  # now each has received 2
    four.receive([1, 3], 3)
    assert four.steps() == [{1, 3}] * 4
    four.receive([0, 1, 2, 3], 4)
    assert four.steps() == [{3, 4}] * 4


def test_a_save_has_one_place_in_the_queue_whatever_is_said_of_it(four: Four, monkeypatch: pytest.MonkeyPatch) -> None:
    one, why, released = four.replicators[0], RuntimeError("a failure"), threading.Event()
    monkeypatch.setattr(one, "_start", lambda: True)
    first, second, unknown = (Timeline(step, f"save {step}") for step in range(3))
    one.begin(first)
    one.begin(second)
    for handle in (second, first, second, unknown):
        one.skip(handle, why)
    one.offer(second, cast(Any, None), released.set)  # too late
    assert released.is_set()
    assert [one._saves.get_nowait() for _ in range(2)] == [first, second]
    assert one._saves.empty()
    assert all(offer.result().snapshot is why for offer in one._offers.values())


def test_no_thread_can_be_started(
    four: Four, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    one, released = four.replicators[0], threading.Event()
    handle = Timeline(1, "one")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        one.begin(handle)
    assert "snapshots are not replicated: can't start new thread" in caplog.text
    one.offer(handle, cast(Any, None), released.set)
    assert released.is_set()
    one.close(0)


class Memory:
    """A slab, as far as replicas need one."""

    def __init__(self, data: bytes) -> None:
        self.view = memoryview(bytearray(data))


class Pair:
    """Two ranks of this process, with a network between them."""

    def __init__(self, directory: Path) -> None:
        store = _dist.HashStore()
        self.jobs = [RankGroup(rank, 2, Rendezvous(store, "test", 2), timeout_secs=5.0) for rank in range(2)]
        self.replicas = [Replicas(str(directory), f"/host-{rank}/run") for rank in range(2)]
        for replicas in self.replicas:
            replicas.create()
        self.ranks = [Replicator(job, replicas, "") for job, replicas in zip(self.jobs, self.replicas, strict=True)]

    def save(self, step: int) -> None:
        """Until both have let go of their slabs."""
        released = [threading.Event() for _ in self.ranks]
        for one, job, event in zip(self.ranks, self.jobs, released, strict=True):
            header = header_of(bytes([step]) * 1000, step, owner=job.rank)
            snapshot = WriteTask(
                header.spec, cast(Any, Memory(bytes([step]) * 1000)), Extent(0, 1), "plan", Extent(999, 1), frozenset()
            )
            handle = Timeline(step, header.spec.save_id)
            one.begin(handle)
            one.offer(handle, snapshot, event.set)
        assert all(event.wait(60) for event in released)

    def steps(self) -> list[set[int]]:
        return [{replica.header.spec.step for replica in replicas.whole()} for replicas in self.replicas]

    def close(self) -> None:
        for one in self.ranks:
            one.close(10)
        for job in self.jobs:
            job.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_receiver_that_fails_halfway_costs_one_replica(
    who: int, pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the other has sent and nobody has taken is not taken for what comes next."""
    pair.save(1)

    def fail(header: bytes) -> Iterator[torch.Tensor]:
        raise ReplicationError("no header", 1 - who)

    with monkeypatch.context() as patched:
        patched.setattr(pair.ranks[who]._keeper, "begin", fail)
        pair.save(2)
    pair.save(3)
    assert pair.steps()[who] == {1, 3}
    assert 3 in pair.steps()[1 - who]
    for one in pair.ranks:
        assert whole_id(one) == "save 3"
    assert f"no new replica of rank {1 - who}: no header" in caplog.text


def test_a_slab_is_held_until_its_snapshot_is_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    run = Exchange.run

    def watched(*arguments: Any) -> Any:
        outcome = run(*arguments)
        sent.append("sent")
        return outcome

    monkeypatch.setattr(Exchange, "run", watched)
    one, other = pair.ranks
    header = header_of(b"1" * 1000, 1, owner=0)
    for replicator in (one, other):
        handle = Timeline(1, header.spec.save_id)
        replicator.begin(handle)
        snapshot = WriteTask(
            header.spec, cast(Any, Memory(b"1" * 1000)), Extent(0, 1), "plan", Extent(999, 1), frozenset()
        )
        replicator.offer(handle, snapshot, lambda: sent.append("released"))
    one.close(30)
    other.close(30)
    assert sorted(sent) == ["released", "released", "sent", "sent"]
    assert sent[0] == "sent"
    assert sent[-1] == "released"


def test_a_rank_that_closes_is_not_waited_for(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """The other one saves once more."""
    pair.save(1)
    header = header_of(b"2" * 1000, 2, owner=0)
    snapshot = WriteTask(header.spec, cast(Any, Memory(b"2" * 1000)), Extent(0, 1), "plan", Extent(999, 1), frozenset())
    for one, secs in zip(pair.ranks, (0.0, 60.0), strict=True):  # the first closes while it waits for the second
        handle, released = Timeline(2, header.spec.save_id), threading.Event()
        one.begin(handle)
        one.offer(handle, snapshot, released.set)
        one.close(secs)
        assert released.wait(60)
    assert (
        "step 2 is not replicated: the exchange of replicas with rank 0: rank 0 closes its Checkpointer" in caplog.text
    )
    assert pair.steps() == [{1}, {1}]
