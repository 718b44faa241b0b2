"""DTensors in ``into``: each rank gets its part, whatever number of ranks wrote the checkpoint, and however they had it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stager import Checkpointer, CorruptCheckpointError, StateMismatchError
from stager.torch_api.storage import StagerStorageWriter
from stager.workers.checkpoint.directory.manifest_file import read_manifest
from tests.persistence.tasks import save
from tests.staging.ranks import run_ranks

WHOLE = torch.arange(35.0).view(7, 5)
LAYOUTS = {"rows": Shard(0), "columns": Shard(1), "everywhere": Replicate()}


def spread(tensor: torch.Tensor, placement: Any) -> DTensor:
    return distribute_tensor(tensor.clone(), init_device_mesh("cpu", (dist.get_world_size(),)), [placement])


def spread_model(placement: Any) -> nn.Linear:
    model = nn.Linear(5, 7)
    model.weight = nn.Parameter(spread(torch.zeros(7, 5), placement))
    model.bias = nn.Parameter(spread(torch.zeros(7), Shard(0)))
    return model


def whole_model() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(5, 7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


class AppState:
    """As torch's tutorials have it: it gives DTensors, and takes them."""

    def __init__(self) -> None:
        self.weight = spread(torch.zeros(7, 5), Shard(0))
        self.taken = False

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "epoch": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["weight"] is self.weight and state["epoch"] == 3


def fill_each_layout(directory: str, step: int) -> list[bool]:
    """Every layout of the checkpoint into every layout here."""
    good = []
    for placement in LAYOUTS.values():
        into: dict[str, Any] = {name: spread(torch.zeros(7, 5), placement) for name in LAYOUTS}
        into |= {"plain": torch.zeros(7, 5), "epoch": None}
        before = dict(into)
        with Checkpointer(directory, read_only=True) as ckpt:
            ckpt.load(step, into=into, strict=False)
        good += [into[name] is before[name] and torch.equal(into[name].full_tensor(), WHOLE) for name in LAYOUTS]
        good += [torch.equal(into["plain"], WHOLE), into["epoch"] == 3]
    return good


def on_rank(rank: int, directory: str) -> dict[str, Any]:
    state: dict[str, Any] = {name: spread(WHOLE, placement) for name, placement in LAYOUTS.items()}
    run = f"{directory}/run"
    dcp.save({**state, "plain": WHOLE, "epoch": 3}, storage_writer=StagerStorageWriter(f"{run}/step-00000002"))
    dist.barrier()
    return {
        "of two ranks": fill_each_layout(run, 2),
        "of one process": fill_each_layout(run, 1),
        "modules": [load_module(run, placement) for placement in LAYOUTS.values()],
        "app": load_app(run),
        "shape": refused(run, {"rows": spread(torch.zeros(6, 5), Shard(0))}),
        "dtype": refused(run, {"rows": spread(torch.zeros(7, 5).double(), Shard(0))}),
        "damage": damaged(run),
    }


def load_module(run: str, placement: Any) -> bool:
    """Its optimizer has no state yet, and gets one that is spread as the parameters are."""
    model = spread_model(placement)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    with Checkpointer(run, read_only=True) as ckpt:
        ckpt.load(1, into={"model": model, "optimizer": optimizer})
    expected, its_optimizer = whole_model()
    good = optimizer.param_groups[0]["lr"] == 0.25
    for here, there in zip(model.parameters(), expected.parameters(), strict=True):
        moments, its_moments = optimizer.state[here], its_optimizer.state[there]
        good = good and torch.equal(here.full_tensor(), there) and moments["step"] == its_moments["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            good = good and torch.equal(moments[name].full_tensor(), its_moments[name])
            good = good and moments[name].placements == here.placements
    return good


def load_app(run: str) -> bool:
    app = AppState()
    with Checkpointer(run, read_only=True) as ckpt:
        ckpt.load(1, into={"app": app})
    return app.taken and torch.equal(app.weight.full_tensor(), WHOLE)


def refused(run: str, into: dict[str, Any]) -> str:
    with Checkpointer(run, read_only=True) as ckpt:
        try:
            ckpt.load(2, into=into)
        except StateMismatchError as error:
            return str(error).splitlines()[1]
    return "loaded"


def damaged(run: str) -> str:
    """Each rank notices what it reads; ``rows`` is read by both into this layout."""
    with Checkpointer(run, read_only=True) as ckpt:
        try:
            ckpt.load(3, into={"rows": spread(torch.zeros(7, 5), Shard(1))})
        except CorruptCheckpointError as error:
            return error.problem
    return "loaded"


def make_whole(run: Path) -> None:
    model, optimizer = whole_model()
    state = {
        **dict.fromkeys(LAYOUTS, WHOLE),
        "plain": WHOLE,
        "epoch": 3,
        "model": model,
        "optimizer": optimizer,
        "app": {"weight": WHOLE, "epoch": 3},
    }
    save(run, state, step=1)
    path = Path(save(run, {"rows": WHOLE}, step=3).path)
    item = read_manifest(path).layout.items[0]
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[item.data_offset] ^= 1
    (path / "__0_0.distcp").write_bytes(data)


def check(results: list[Any]) -> None:
    for result in results:
        assert result["of two ranks"] == result["of one process"] == [True] * 15
        assert result["modules"] == [True] * 3 and result["app"]
        assert result["shape"] == "  rows: has shape [6, 5] in the target and [7, 5] in the checkpoint"
        assert result["dtype"] == "  rows: is float64 in the target and float32 in the checkpoint"
        assert "damaged (rows)" in result["damage"] and "partly overwritten" in result["damage"]


def of_another_number(rank: int, directory: str) -> list[bool]:
    return fill_each_layout(f"{directory}/run", 2)


def test_each_rank_gets_its_part_however_many_ranks_wrote_it(tmp_path: Path) -> None:
    make_whole(tmp_path / "run")
    check(run_ranks("tests.loading.test_sharded:on_rank", 2, tmp_path))
    for world_size in (3, 1):
        (tmp_path / "store").unlink(missing_ok=True)
        for good in run_ranks("tests.loading.test_sharded:of_another_number", world_size, tmp_path):
            assert all(good)
