"""What a run does with replicas while it goes on, and when it ends."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from stager import SaveHandle
from stager.ranks.board import Board
from stager.ranks.job import Job
from stager.replication.replicas import Replicas
from stager.replication.replicator import Replicator
from tests.replication.test_keeper import header_of
from tests.replication.test_restoring import memory_of, ranks

_dist: Any = dist  # not all of it is annotated


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_a_run_that_is_closed_leaves_nothing_in_memory(num_ranks: int, tmp_path: Path) -> None:
    """Pairs, and a ring. No collective is called in the training thread, and nothing is warned about."""
    for result in ranks("close_run", num_ranks, tmp_path):
        assert result["said"] == []
        assert "replicate" in result["events"]
    assert memory_of(tmp_path) == []


def test_a_run_that_fails_leaves_its_replicas(tmp_path: Path) -> None:
    assert [result["said"] for result in ranks("fail_run", 2, tmp_path)] == [[], []]
    assert len(memory_of(tmp_path)) == 8
    shutil.rmtree(tmp_path / "run")
    assert [result["step"] for result in ranks("resume", 2, tmp_path, 3)] == [3, 3]


def test_a_rank_whose_save_fails_holds_up_nobody(tmp_path: Path) -> None:
    results = ranks("one_cannot_save", 3, tmp_path, 1)
    # Rank 2 keeps what rank 1 has, and hears that it has nothing; nobody's connection is lost.
    said = [[text for text in result["said"] if "replica" in text] for result in results]
    assert [len(texts) for texts in said] == [0, 0, 1]
    assert said[2][0].startswith("no new replica of rank 1: rank 1 has nothing to send: OSError: ")


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """64 KiB."""
    mount = tmp_path / "memory"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "stager-test", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small file system")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_there_is_no_memory_for_replicas(small_memory: Path, tmp_path: Path) -> None:
    for rank, result in enumerate(ranks("no_memory", 2, tmp_path)):
        assert result["steps"] == [1, 2]
        for text in result["said"]:
            assert text.startswith(f"no new replica of rank {1 - rank}: this host has no memory for ")
            assert "No space left" in text


@pytest.mark.parametrize("point", ["save.planned", "save.copied", "save.handed-over"])
def test_a_partner_that_dies_holds_up_nobody(point: str, tmp_path: Path) -> None:
    survivor, dead = ranks("partner_dies", 2, tmp_path, point)
    assert dead is None
    assert survivor["errors"][1] == "RankFailedError"
    assert survivor["secs"] < 3 + 40  # the deadline, and patience for a machine that is busy
    assert any("is not replicated" in text and "rank 1" in text for text in survivor["said"])


def test_load_after_close_restores_nothing(tmp_path: Path) -> None:
    assert ranks("load_after_close", 2, tmp_path) == [1, 1]


@pytest.mark.remains  # what the workers go on with
def test_an_interrupted_close_waits_for_no_replica(tmp_path: Path) -> None:
    assert ranks("interrupt_closing", 2, tmp_path) == [False, False]


def test_a_run_that_waits_for_the_lock_finds_its_place_in_memory(tmp_path: Path) -> None:
    assert ranks("next_run_waits_for_the_lock", 2, tmp_path) == [[1], [1]]


class Four:
    """Ranks whose snapshots come without a network."""

    def __init__(self, directory: Path) -> None:
        store = _dist.HashStore()
        self.jobs = [Job(rank, 4, Board(store, "test", 4)) for rank in range(4)]
        self.replicators = []
        for job in self.jobs:
            replicas = Replicas(str(directory), f"/host-{job.rank}/run")
            replicas.create()
            self.replicators.append(Replicator(job, replicas, ""))

    def receive(self, ranks: list[int], step: int) -> None:
        for rank in ranks:
            one, data = self.replicators[rank], bytes([step]) * 1000
            one._look_whether_whole()
            for target in one._keeper.begin(header_of(data, step, owner=one._owner).to_bytes()):
                target.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            one._count(one._keeper.finish().facts.save_id)

    def steps(self) -> list[set[int]]:
        return [{replica.header.facts.step for replica in one._replicas.whole()} for one in self.replicators]

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
    first, second, unknown = (SaveHandle(step, f"save {step}") for step in range(3))
    one.begin(first)
    one.begin(second)
    for handle in (second, first, second, unknown):
        one.skip(handle, why)
    one.offer(second, cast(Any, None), released.set)  # too late
    assert released.is_set()
    assert [one._saves.get_nowait() for _ in range(2)] == [first, second]
    assert one._saves.empty()
    assert all(offer.result().why is why for offer in one._offers.values())


def test_no_thread_can_be_started(
    four: Four, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    one, released = four.replicators[0], threading.Event()
    handle = SaveHandle(1, "one")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        one.begin(handle)
    assert "snapshots are not replicated: can't start new thread" in caplog.text
    one.offer(handle, cast(Any, None), released.set)
    assert released.is_set()
    one.close(0)


def test_a_call_that_one_rank_refuses_shifts_nothing(tmp_path: Path) -> None:
    """It never gets as far as a save on that rank. The next ones find their partners."""
    first, second = ranks("refuse_once", 2, tmp_path)
    assert first["error"] == "RankFailedError"
    assert first["whole"] == second["whole"] == [True, True]
