"""Two ranks over gloo: sharded, replicated and rank-private values, failures of one rank, and other layouts at loading."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from stager import Checkpointer
from stager.torch_api.storage import StagerStorageReader, StagerStorageWriter
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from stager.workers.checkpoint.layout.structure import Chunks, fqn, leaves
from stager.workers.checkpoint.read.verify import verify_checkpoint
from tests.staging.ranks import run_ranks
from tests.storage.states import load

WHOLE = torch.arange(35.0).view(7, 5)
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "everywhere": Replicate(), "scarce": Shard(0)}


def state_of(rank: int, value: float, placements: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    whole = {name: (WHOLE[:1] if name == "scarce" else WHOLE) + value for name in placements}  # one row for two ranks
    return {
        "model": {name: distribute_tensor(whole[name].clone(), mesh, [at]) for name, at in placements.items()},
        "plain": torch.full((3,), value),
        "epoch": value,
        f"rank{rank}": {"mine": torch.full((2,), value + rank), "seed": rank + value},
    }


def on_rank(rank: int, directory: str) -> dict[str, Any]:
    run = f"{directory}/run"
    source = state_of(rank, 1.0, PLACEMENTS)
    dcp.save(source, storage_writer=StagerStorageWriter(f"{run}/step-00000001"))
    results = {}
    swapped = {**PLACEMENTS, "rows": Shard(1), "columns": Replicate(), "everywhere": Shard(0)}
    for name, reader in {"ours": StagerStorageReader, "stock": dcp.FileSystemReader}.items():
        for layout, placements in {"same": PLACEMENTS, "other": swapped}.items():
            target = state_of(rank, 0.0, placements)
            dcp.load(target, storage_reader=reader(f"{run}/step-00000001"))
            results[f"{name}-{layout}"] = matches(target, rank, 1.0)
    results["cached plans"] = save_with_cached_plans(rank, directory)
    results["failures"] = [save_that_fails(rank, directory, bad) for bad in (0, 1)]
    dist.barrier()
    return results


def matches(state: dict[str, Any], rank: int, value: float) -> bool:
    whole = {name: tensor.full_tensor() for name, tensor in state["model"].items()}
    scarce = whole.pop("scarce")
    return (
        all(torch.equal(tensor, WHOLE + value) for tensor in whole.values())
        and torch.equal(scarce, WHOLE[:1] + value)
        and torch.equal(state["plain"], torch.full((3,), value))
        and state["epoch"] == value
        and torch.equal(state[f"rank{rank}"]["mine"], torch.full((2,), value + rank))
        and state[f"rank{rank}"]["seed"] == rank + value
    )


def save_with_cached_plans(rank: int, directory: str) -> bool:
    """From the second save on a rank gets no plan from the coordinator, and uses its old one."""
    good = True
    for value in (1.0, 2.0, 3.0):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        path = f"{directory}/cached/{value}"
        dcp.save(state_of(rank, value, PLACEMENTS), storage_writer=StagerStorageWriter(path), planner=planner)
        target = state_of(rank, 0.0, PLACEMENTS)
        dcp.load(target, storage_reader=StagerStorageReader(path))
        good = good and matches(target, rank, value) and verify_checkpoint(path).ok
        dist.barrier()
    return good


class FailingPlanner(dcp.DefaultSavePlanner):
    def __init__(self, fails: bool) -> None:
        super().__init__()
        self._fails = fails

    def resolve_data(self, write_item: Any) -> Any:
        if self._fails:
            raise ValueError("no such value")
        return super().resolve_data(write_item)


def save_that_fails(rank: int, directory: str, bad: int) -> list[Any]:
    """Which ranks every rank hears of, and what is left."""
    path = Path(directory, "failed", "c")
    try:
        writer = StagerStorageWriter(path)
        dcp.save(state_of(rank, 1.0, PLACEMENTS), storage_writer=writer, planner=FailingPlanner(rank == bad))
    except dcp.api.CheckpointException as error:
        dist.barrier()
        return [bad in error.failures, os.listdir(path.parent)]
    return ["saved", []]


def test_two_ranks(tmp_path: Path) -> None:
    for result in run_ranks("tests.storage.test_ranks:on_rank", 2, tmp_path):
        assert result == {
            "ours-same": True,
            "ours-other": True,
            "stock-same": True,
            "stock-other": True,
            "cached plans": True,
            "failures": [[True, []], [True, []]],
        }
    path = tmp_path / "run" / "step-00000001"
    assert verify_checkpoint(path).problems == ()
    manifest = read_manifest(path)
    chunked = {fqn(at): len(leaf.parts) for at, leaf in leaves(manifest.layout.structure) if isinstance(leaf, Chunks)}
    assert chunked == {"model.rows": 2, "model.columns": 2, "model.scarce": 2}
    for reader in (dcp.FileSystemReader(path), StagerStorageReader(path), StagerStorageReader(path, verify=False)):
        model = {name: torch.zeros(1 if name == "scarce" else 7, 5) for name in PLACEMENTS}
        loaded = load({"model": model, "rank1": {"seed": None}}, reader)
        assert all(torch.equal(model[name], WHOLE + 1) for name in ("rows", "columns", "everywhere"))
        assert torch.equal(model["scarce"], WHOLE[:1] + 1)
        assert loaded["rank1"]["seed"] == 2.0
    with Checkpointer(tmp_path / "run", read_only=True) as checkpointer:
        loaded = checkpointer.load()
        assert loaded is not None and torch.equal(loaded.state["plain"], torch.ones(3))
        for name, tensor in loaded.state["model"].items():
            assert torch.equal(tensor, WHOLE[: len(tensor)] + 1), name
        target = {"model": {name: torch.zeros_like(tensor) for name, tensor in loaded.state["model"].items()}}
        target["model"]["columns"] = torch.zeros(5, 7).t()
        checkpointer.load(into=target)
        assert all(torch.equal(target["model"][name], loaded.state["model"][name]) for name in target["model"])
