"""DTensor over gloo: the local shard is staged, the spec is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stager.torch_api.staging import DefaultStager, StagingOptions, WorkerStager
from stager.torch_api.staging.state_dict_stager import StateDictStager
from tests.staging.compare import assert_private_copy
from tests.staging.ranks import run_ranks


def on_rank(rank: int, directory: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(10.0).view(5, 2)  # 5 rows over 2 ranks: uneven
    source = {
        "sharded": distribute_tensor(whole, mesh, [Shard(0)]),
        "replicated": distribute_tensor(whole, mesh, [Replicate()]),
        "parameter": torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])),
        "plain": whole,
    }
    source["alias"] = source["sharded"]
    source["sharded"].note = ["n"]
    result = {}
    for share_memory in (False, True):
        staged = StateDictStager(share_memory=share_memory).stage(source)
        result[f"checked-{share_memory}"] = check(source, staged, share_memory)
    with WorkerStager({"workers": {"count": 1}}) as workers:
        result["checked-workers"] = check(source, workers.stage(source).result(), True)
        response = dcp.async_save(source, checkpoint_id=f"{directory}/saved", async_stager=workers)
        assert isinstance(response, AsyncSaveResponse)
        response.upload_completion.result()
        loaded = {"sharded": distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)]), "plain": torch.zeros(5, 2)}
        dcp.load(loaded, checkpoint_id=f"{directory}/saved")
        assert torch.equal(loaded["sharded"].full_tensor(), whole)
        assert torch.equal(loaded["plain"], whole)
    with DefaultStager(StagingOptions(False, True, True, False)) as stager:
        staged = stager.stage(source).result()
        before = source["sharded"].full_tensor().clone()
        with torch.no_grad():
            source["sharded"].mul_(-1)
            source["parameter"].zero_()
        assert torch.equal(staged["sharded"].full_tensor(), before)  # a collective over staged shards
        assert torch.equal(staged["parameter"].full_tensor(), whole)
        result["local"] = staged["sharded"].to_local().flatten().tolist()
    return result


def check(source: dict[str, Any], staged: dict[str, Any], share_memory: bool) -> bool:
    assert staged["alias"] is staged["sharded"]
    assert staged["sharded"].note == ["n"]
    assert staged["sharded"].note is not source["sharded"].note
    assert isinstance(staged["parameter"], torch.nn.Parameter)
    assert staged["parameter"].requires_grad
    for key in ("sharded", "replicated", "parameter"):
        assert type(staged[key]) is type(source[key])
        assert isinstance(staged[key], DTensor)
        assert staged[key].placements == source[key].placements
        assert (staged[key].shape, staged[key].stride()) == (source[key].shape, source[key].stride())
        assert staged[key].device_mesh is source[key].device_mesh
        assert staged[key].to_local().is_shared() is share_memory
        assert_private_copy(source[key].to_local().detach(), staged[key].to_local().detach())
    return True


def test_two_ranks(tmp_path: Path) -> None:
    results = run_ranks("tests.staging.test_dtensor:on_rank", 2, tmp_path)
    assert all(result["checked-False"] and result["checked-True"] and result["checked-workers"] for result in results)
    assert [result["local"] for result in results] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
