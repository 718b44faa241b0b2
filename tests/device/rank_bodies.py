"""What ranks of the tests do with tensors of a device. Each rank is a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stager import Checkpointer, InconsistentRanksError, ReplicationStager
from stager.ranks import keys
from stager.ranks.messages import ReplicaFate, decode
from tests.device.conftest import use_accelerator
from tests.ranks.bodies import CONFIG, board_of


def _state(device: torch.device, fill: float) -> dict[str, Any]:
    return {"large": torch.full((50_000,), fill, device=device), "small": [torch.full((9,), fill, device=device)] * 3}


def save_what_is_replicated(rank: int, directory: str, differs: bool) -> str:
    """Every rank has the same tensors on its device, or one value is another's on rank 1. Returns the error's text."""
    device = use_accelerator(rank)
    state = _state(device, 1.0)
    state["large"].mul_(3)
    if differs and rank == 1:
        state["large"].add_(1)
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        try:
            handle = ckpt.save(0, state)
            state["large"].zero_()
            handle.upload_completion.result(60)
        except InconsistentRanksError as error:
            return str(error)
        ckpt.load(into=state)
    assert torch.all(state["large"] == 3)
    return ""


def keep_replicas(rank: int, directory: str) -> bool:
    """Snapshots of device tensors are kept by the partner."""
    device = use_accelerator(rank)
    memory = Path(directory, "memory")
    memory.mkdir(exist_ok=True)
    config = {**CONFIG, "replication": {"partners": 1, "directory": str(memory)}}
    state = _state(device, 2.0)
    with Checkpointer(Path(directory, "run"), config) as ckpt:
        handle = ckpt.save(0, state)
        state["large"].zero_()
        handle.upload_completion.result(60)
        fate = board_of(ckpt).wait(keys.replica_fate(handle.save_id), 60.0)
        ckpt.load(into=state)
    assert torch.all(state["large"] == 2)
    return fate is not None and decode(fate) == ReplicaFate(is_whole=True)


def exchange_by_stager(rank: int, directory: str) -> list[float]:
    """``ReplicationStager``: the state that is still being computed goes to the other rank."""
    device = use_accelerator(rank)
    values = torch.full((50_000,), float(rank), device=device)
    for _ in range(5):
        values.add_(10)
    with ReplicationStager(None, storage_dir=str(Path(directory, "replicas"))) as stager:
        received = stager.stage({"x": values})
    values.zero_()
    assert received["x"].device.type == "cpu"
    return [float(received["x"].min()), float(received["x"].max())]


def save_and_load_shards(rank: int, directory: str) -> bool:
    """A DTensor, of which each rank has a part on its device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    device = use_accelerator(rank)
    mesh = init_device_mesh(device.type, (2,))
    local = torch.arange(6000.0, device=device).reshape(1000, 6) + 10_000 * rank
    state = {"x": DTensor.from_local(local, mesh, [Shard(0)])}
    expected = local.clone()
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        handle = ckpt.save(0, state)
        local.zero_()
        handle.upload_completion.result(60)
        dist.barrier()
        ckpt.load(into=state)
    return torch.equal(local.cpu(), expected.cpu())


def train_with_fsdp2(rank: int, directory: str) -> list[str]:
    """One rank: gloo moves no tensors of the simulated devices. Returns the names of what came back wrong."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = use_accelerator(rank)
    model: Any = torch.nn.Sequential(torch.nn.Linear(16, 300), torch.nn.Linear(300, 4)).to(device)
    fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 16, device=device)).sum().backward()
        optimizer.step()

    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.guard(optimizer)
        step()
        weights = {key: value.to_local().clone() for key, value in model.state_dict().items()}
        handle = ckpt.save(0, {"model": model, "optimizer": optimizer})
        step()
        handle.upload_completion.result(60)
        ckpt.load(into={"model": model, "optimizer": optimizer})
    loaded = {key: value.to_local() for key, value in model.state_dict().items()}
    return [key for key, value in weights.items() if not torch.equal(value.cpu(), loaded[key].cpu())]
