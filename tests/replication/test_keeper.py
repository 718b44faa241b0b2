"""Which replicas a host keeps, and where."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch

from stager import ConfigError, ReplicationError
from stager.replication import keeper as keeper_module
from stager.replication.keeper import MESSAGE_BYTES, Keeper, messages
from stager.replication.replicas import Replicas
from stager.workers.checkpoint.commit.replica import ReplicaHeader, check_replica, digest_of, read_header
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import Extent
from stager.workers.errors import CorruptCheckpointError


def header_of(data: bytes, step: int, *, owner: int = 3) -> ReplicaHeader:
    spec = SaveSpec("", step, f"save {step}", "dcp", 1, True, float(step), "1", "2", rank=owner, num_ranks=8)
    return ReplicaHeader(spec, Extent(0, 1), "plan", Extent(1, 1), len(data), digest_of(memoryview(data), len(data)))


@pytest.fixture
def replicas(tmp_path: Path) -> Replicas:
    found = Replicas(str(tmp_path), "/somewhere/run")
    found.create()
    return found


class Source:
    """Sends to a keeper what a rank would, a message at a time."""

    def __init__(self, replicas: Replicas) -> None:
        self.whole = ""
        self.whole_by_now = ""
        self.keeper = Keeper(replicas, 3, lambda: self.whole, self.give_up)

    def give_up(self, save_id: str) -> bool:
        return save_id != self.whole_by_now

    def send(self, data: bytes, step: int) -> ReplicaHeader:
        return self.send_some(data, step, None)

    def send_some(self, data: bytes, step: int, num_messages: int | None) -> ReplicaHeader:
        """None: all of them; else the sender dies after so many."""
        targets = self.keeper.begin(header_of(data, step).to_bytes())
        for number, (target, (start, end)) in enumerate(zip(targets, messages(len(data)), strict=True)):
            if number == num_messages:
                raise InterruptedError
            target.copy_(torch.frombuffer(bytearray(data[start:end]), dtype=torch.uint8))
        return self.keeper.finish()


def kept(replicas: Replicas) -> list[int]:
    for replica in replicas.whole():
        check_replica(replica.path)
    return sorted(replica.header.spec.step for replica in replicas.whole())


def test_messages_cover_everything_once() -> None:
    assert list(messages(0)) == []
    for nbytes in (1, MESSAGE_BYTES - 1, MESSAGE_BYTES, MESSAGE_BYTES + 1, 3 * MESSAGE_BYTES + 5):
        found = list(messages(nbytes))
        assert found[0][0] == 0
        assert found[-1][1] == nbytes
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(found))
        assert all(0 < end - start <= MESSAGE_BYTES for start, end in found)


def test_the_newest_snapshot_that_all_ranks_have_is_not_overwritten(replicas: Replicas) -> None:
    source = Source(replicas)
    source.send(b"1" * 1000, 1)
    source.send(b"2" * 1000, 2)
    assert kept(replicas) == [1, 2]
    source.whole = "save 1"  # of step 2 another rank's has not arrived
    source.send(b"3" * 1000, 3)
    assert kept(replicas) == [1, 3]
    source.whole = "save 3"
    source.send(b"4" * 1100, 4)
    assert kept(replicas) == [3, 4]
    source.whole = "never heard of"
    source.send(b"5" * 1100, 5)
    assert kept(replicas) == [4, 5]


def test_a_snapshot_that_all_ranks_have_by_now_is_not_overwritten(replicas: Replicas) -> None:
    source = Source(replicas)
    source.send(b"1" * 1000, 1)
    source.whole = "save 1"
    source.send(b"2" * 1000, 2)
    source.whole_by_now = "save 2"  # which is not known here yet
    source.send(b"3" * 1000, 3)
    assert kept(replicas) == [2, 3]


def test_while_replicas_are_read_none_is_overwritten(replicas: Replicas) -> None:
    source = Source(replicas)
    for step in (1, 2):
        source.send(b"1" * 1000, step)
    with source.keeper.holding_still(), pytest.raises(ReplicationError, match="a checkpoint is being restored"):
        source.send(b"3" * 1000, 3)
    assert kept(replicas) == [1, 2]
    source.send(b"4" * 1000, 4)
    assert kept(replicas) == [2, 4]


def test_a_sender_that_dies_halfway_costs_no_whole_replica(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "MESSAGE_BYTES", 100)
    source = Source(replicas)
    source.send(b"1" * 1000, 1)
    source.send(b"2" * 1000, 2)
    source.whole = "save 2"
    for num_messages in (0, 1, 9):
        with pytest.raises(InterruptedError):
            source.send_some(b"3" * 1000, 3, num_messages)
        assert kept(replicas) == [2]
    source.send(b"4" * 1000, 4)
    assert kept(replicas) == [2, 4]


def test_files_are_used_again(replicas: Replicas) -> None:
    source = Source(replicas)
    for step in range(1, 9):
        source.send(bytes([step]) * (5000 + step), step)
    assert len(source.keeper._maps) == 2
    inodes = {path: os.stat(path).st_ino for path in replicas.slots(3)}
    source.send(b"x" * 5000, 9)
    source.send(b"y" * (4 << 20), 10)  # far larger
    assert {path: os.stat(path).st_ino for path in replicas.slots(3)} == inodes
    assert kept(replicas) == [9, 10]


def test_too_little_memory_is_found_out_before_it_is_taken(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = Source(replicas)
    monkeypatch.setattr(keeper_module, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(ReplicationError, match=r"no memory for the replica of rank 3: .*1,048,576"):
        source.send(b"1" * (2 << 20), 1)
    assert kept(replicas) == []
    assert sum(path.stat().st_blocks for path in tmp_path.rglob("rank-*")) == 0
    monkeypatch.undo()
    source.send(b"2" * (2 << 20), 2)
    assert kept(replicas) == [2]


def test_what_is_no_header_is_refused(replicas: Replicas) -> None:
    source = Source(replicas)
    good = header_of(b"1" * 10, 1).to_bytes()
    for bad in (b"", good[:-1], good.replace(b"dcp", b"dcq"), good + b" "):
        with pytest.raises(ReplicationError, match="the header that rank 3 sent"):
            next(iter(source.keeper.begin(bad)))


def test_a_header_that_promises_too_much_is_refused(replicas: Replicas) -> None:
    header = header_of(b"1" * 10, 1)
    lie = ReplicaHeader(header.spec, Extent(5, 6), "plan", Extent(0, 1), 10, header.digest).to_bytes()
    with pytest.raises(CorruptCheckpointError, match="refers to bytes up to"):
        ReplicaHeader.from_bytes(lie, "somewhere")
    Source(replicas).send(b"1" * 10, 1)
    path = replicas.slots(3)[0]
    os.truncate(path, 5)
    with pytest.raises(CorruptCheckpointError, match="is shorter than the 10 bytes"):
        check_replica(path)


def test_a_place_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    replicas = Replicas(str(tmp_path), "/somewhere/run")
    replicas.create()
    replicas.create()  # the next run
    of_user = Path(replicas.path).parent
    of_user.chmod(0o777)
    with pytest.raises(ConfigError, match="not a directory that only this user can use"):
        replicas.create()
    shutil.rmtree(of_user)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    of_user.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="not a directory that only this user can use"):
        replicas.create()
    with pytest.raises(ConfigError, match="is not a directory"):
        Replicas(str(tmp_path / "nothing"), "/somewhere/run").create()


def test_runs_of_one_name_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    assert Replicas(str(tmp_path), "/a/run").path != Replicas(str(tmp_path), "/b/run").path


def test_removing_keeps_what_is_newer(replicas: Replicas) -> None:
    source = Source(replicas)
    for step in (1, 2):
        source.send(b"1" * 1000, step)
    replicas.remove_owner(3, up_to_step=1)
    replicas.tidy()
    assert kept(replicas) == [2]
    assert read_header(replicas.slots(3)[0]) is None
    replicas.remove_owner(3, up_to_step=2)
    replicas.tidy()
    assert not os.path.exists(os.path.dirname(replicas.path))
