"""Replicas of each rank's state on another rank, over real gloo groups of real processes."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stager import ReplicationError
from stager.replication.parcel import open_header, pack, unpack
from stager.torch_api.staging import ReplicationStager, _ReplicationStager
from stager.workers.errors import UnstageableError, UsageError
from tests.staging.compare import assert_private_copy
from tests.staging.ranks import run_ranks

HERE = "tests.staging.test_replication"


def state_of(rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    base = torch.randn(40, 10, generator=generator)
    return {
        "base": base,
        "view": base[2:, ::2],
        "tied": [base, {"step": rank, "empty": torch.zeros(0, 3)}],
        "bf16": torch.randn(7, generator=generator).to(torch.bfloat16),
        "large": torch.full((3 << 20,), float(rank)),  # 12 MiB: a slab of its own
        "small": [torch.full((5,), float(index * rank)) for index in range(200)],
    }


def expect(received: Any, rank: int) -> None:
    assert_private_copy(state_of(rank), received)
    assert received["view"].untyped_storage().data_ptr() == received["base"].untyped_storage().data_ptr()


def on_rank(rank: int, directory: str, groups: list[list[int]]) -> dict[str, Any]:
    """Replicate in the default group and in each sub-group this rank is in; say who sent."""
    sources = {}
    world = list(range(dist.get_world_size()))
    handles = [(world, None), *((ranks, dist.new_group(ranks)) for ranks in groups)]
    for index, (ranks, group) in enumerate(handles):
        if rank not in ranks:
            with pytest.raises(UsageError, match="not in the process group"):
                ReplicationStager(group, storage_dir=f"{directory}/none").stage({})
            continue
        source = ranks[(ranks.index(rank) - len(ranks) // 2) % len(ranks)]
        storage = f"{directory}/group-{index}"
        with ReplicationStager(group, timeout=timedelta(seconds=60), storage_dir=storage) as stager:
            expect(stager.stage(state_of(rank)), source)
            expect(stager.stage(state_of(rank)), source)  # again: the file is replaced
            expect(stager.load_replica(), source)
            expect(stager.load_replica(source), source)
            expect(stager.recover(), rank)
            assert os.listdir(storage).count(f"rank_{rank}_replica_partner_{source}.pt") == 1
        sources[str(index)] = source
    return {"sources": sources}


def test_world_of_four_with_subgroups_of_three_and_two(tmp_path: Path) -> None:
    results = run_ranks(f"{HERE}:on_rank", 4, tmp_path, [[0, 1, 3], [1, 2]])
    sources = [result["sources"] for result in results]
    assert [s["0"] for s in sources] == [2, 3, 0, 1]  # pairs, as in torch
    assert [s.get("1") for s in sources] == [3, 0, None, 1]  # a ring of three: 0 -> 1 -> 3 -> 0
    assert [s.get("2") for s in sources] == [None, 2, 1, None]
    assert sorted(path.name for path in tmp_path.glob("group-1/*")) == [
        "rank_0_replica_partner_3.pt",
        "rank_1_replica_partner_0.pt",
        "rank_3_replica_partner_1.pt",
    ]


def die_in_the_middle(rank: int, directory: str, victim: int) -> dict[str, Any]:
    """One good exchange; then the victim is killed after it has sent its header and before it has sent its slabs. Whoever
    waited for its slabs until the timeout would hang."""
    stager = ReplicationStager(None, timeout=timedelta(hours=1), storage_dir=directory)
    stager.stage(state_of(rank))
    if rank == victim:
        from stager.replication import exchange

        real = exchange._messages

        def killing(parcel: Any) -> Any:
            for index, message in enumerate(real(parcel)):
                if index == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield message

        exchange._messages = killing
    try:
        stager.stage({**state_of(rank), "second": True})
        outcome: Any = "ok"
    except ReplicationError as error:
        outcome = {"rank": error.rank, "text": str(error)}
    kept = stager.load_replica()
    dist.destroy_process_group = lambda: None  # the group has lost a member
    return {"outcome": outcome, "kept_second": "second" in kept}


def test_partner_killed_in_the_middle_is_named_and_the_replica_survives(tmp_path: Path) -> None:
    results = run_ranks(f"{HERE}:die_in_the_middle", 3, tmp_path, 1)
    # A ring 0 -> 1 -> 2 -> 0: rank 1 was to send to 2 and to receive from 0.
    assert results[1] is None
    assert results[2]["outcome"]["rank"] == 1
    assert "rank 1" in results[2]["outcome"]["text"]
    assert results[2]["kept_second"] is False  # the last whole replica, not a half of the new one
    assert results[0]["kept_second"] is True  # what it needed came from rank 2
    assert not list(tmp_path.glob("*.tmp"))


def hang(rank: int, directory: str) -> dict[str, Any]:
    stager = ReplicationStager(None, timeout=timedelta(seconds=1), storage_dir=directory)
    if rank == 1:
        dist.distributed_c10d._get_default_store().wait(["given-up"])
        dist.destroy_process_group = lambda: None
        return {}
    try:
        stager.stage(state_of(rank))
    except ReplicationError as error:
        return {"error_rank": error.rank, "text": str(error)}
    finally:
        dist.distributed_c10d._get_default_store().set("given-up", "")
        dist.destroy_process_group = lambda: None
    return {"error_rank": None}


def test_partner_that_does_not_answer_is_named_after_the_timeout(tmp_path: Path) -> None:
    result = run_ranks(f"{HERE}:hang", 2, tmp_path)[0]
    assert result["error_rank"] == 1
    assert "within 1 s" in result["text"]


def one_cannot_stage(rank: int, directory: str) -> str:
    stager = ReplicationStager(None, timeout=timedelta(seconds=60), storage_dir=directory)
    state = {"bad": torch} if rank == 0 else state_of(rank)
    try:
        stager.stage(state)
    except UnstageableError as error:
        first = f"mine: {error.key_path}"
    except ReplicationError as error:
        first = f"rank {error.rank}: {error}"
    expect(stager.stage(state_of(rank)), 1 - rank)  # the group is still good
    return first


def test_rank_that_cannot_stage_tells_its_partner(tmp_path: Path) -> None:
    results = run_ranks(f"{HERE}:one_cannot_stage", 2, tmp_path)
    assert results[0] == "mine: bad"
    assert results[1].startswith("rank 0: rank 0 has nothing to send: UnstageableError: bad")


def dtensors(rank: int, directory: str) -> list[float]:
    mesh = init_device_mesh("cpu", (2,))
    source = {"w": distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [Shard(0)])}
    with ReplicationStager(None, timeout=timedelta(seconds=60), storage_dir=directory) as stager:
        received = stager.stage(source)
        assert received["w"].placements == source["w"].placements
        assert torch.equal(stager.load_replica()["w"].to_local(), received["w"].to_local())
    local: list[float] = received["w"].to_local().flatten().tolist()
    return local


def test_dtensors_arrive_as_the_partners_shards(tmp_path: Path) -> None:
    assert run_ranks(f"{HERE}:dtensors", 2, tmp_path) == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_parcel_has_few_slabs_however_many_tensors() -> None:
    source = {str(index): torch.full((16,), float(index)) for index in range(5_000)}
    parcel = pack(source)
    assert len(parcel.slabs) <= 3
    assert sum(slab.nbytes for slab in parcel.slabs) <= 5_000 * 64 + (1 << 20)
    slabs = [slab.clone().untyped_storage() for slab in parcel.slabs]
    assert_private_copy(source, unpack(open_header(parcel.header), slabs))


def test_what_cannot_be_pickled_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(UnstageableError, match="cannot be sent"):
        pack({"f": lambda: None})


def test_load_replica_says_what_is_missing(tmp_path: Path) -> None:
    stager = ReplicationStager(None, storage_dir=str(tmp_path))
    with pytest.raises(ReplicationError, match="no replica of rank 3") as caught:
        stager.load_replica(3)
    assert caught.value.rank == 3
    (tmp_path / "rank_0_replica_partner_3.pt").write_bytes(b"torn")
    with pytest.raises(ReplicationError, match="cannot be read"):
        stager.load_replica(3)


def test_failed_write_leaves_the_last_replica_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stager = _ReplicationStager(None, storage_dir=str(tmp_path))
    stager._persist_state_dict({"w": torch.ones(2)}, 0, 1)

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RuntimeError, match="could not write the replica of rank 1"):
        stager._persist_state_dict({"w": torch.zeros(2)}, 0, 1)
    monkeypatch.undo()
    assert stager.load_replica(1)["w"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0_replica_partner_1.pt"]


def test_stage_after_close_names_the_call(tmp_path: Path) -> None:
    stager = ReplicationStager(None, storage_dir=str(tmp_path))
    stager.close()
    with pytest.raises(RuntimeError, match=r"ReplicationStager.stage\(\)"):
        stager.stage({})
