"""Checkpoints of stock torch and safetensors in DTensors and FSDP2 modules, on other numbers of ranks than wrote them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from stager import Checkpointer, StateMismatchError, load_checkpoint
from tests.staging.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WHOLE = torch.arange(35.0).view(7, 5)


def whole_model() -> nn.Module:
    """Its rows are no multiple of the number of ranks; it has buffers, and a tensor of one row."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            tensor.copy_(torch.arange(float(tensor.numel())).view(tensor.shape) + number)
    return model


def step(model: nn.Module) -> torch.optim.Optimizer:
    """One step whose moments tell each element of each parameter from the others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


def sharded_model(fill: float | None = None) -> nn.Module:
    model = whole_model()
    if fill is not None:
        for tensor in model.state_dict().values():
            tensor.fill_(fill)
    fully_shard(model)
    return model


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_whole(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> bool:
    """Whether it is what was saved."""
    expected = whole_model()
    its = step(expected)
    good = all(torch.equal(full(model.state_dict()[name]), t) for name, t in expected.state_dict().items())
    good = good and all(isinstance(parameter, DTensor) for parameter in model.parameters())
    if optimizer is None:
        return good
    for here, there in zip(model.parameters(), expected.parameters(), strict=True):
        moments, its_moments = optimizer.state[here], its.state[there]
        good = good and all(torch.equal(full(moments[name]), its_moments[name]) for name in its_moments)
        good = good and isinstance(moments["exp_avg"], DTensor) and moments["exp_avg"].placements == here.placements
    return bool(good and optimizer.param_groups[0]["lr"] == 0.25)


def load_module(path: str, *, has_optimizer: bool = True) -> bool:
    model = sharded_model(fill=-1.0)
    into: dict[str, Any] = {"model": model}
    if has_optimizer:
        into["optimizer"] = torch.optim.AdamW(model.parameters(), lr=0.5)
    parameters = list(model.parameters())
    load_checkpoint(path, into)
    same = all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    return same and is_whole(model, into.get("optimizer"))


def equals_dcp_load(path: str) -> bool:
    """What each rank holds is what ``dcp.load`` gives it."""
    ours, stock = sharded_model(fill=-1.0), sharded_model(fill=-2.0)
    load_checkpoint(path, {"model": ours})
    dcp.load({"model": stock}, checkpoint_id=path)
    return all(
        torch.equal(one.to_local(), other.to_local()) if isinstance(one, DTensor) else torch.equal(one, other)
        for one, other in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True)
    )


def meshes() -> list[tuple[Any, list[Any]]]:
    """Every way to spread a matrix."""
    world_size = dist.get_world_size()
    line = init_device_mesh("cpu", (world_size,))
    found: list[tuple[Any, list[Any]]] = [(line, [one]) for one in (Shard(0), Shard(1), Replicate())]
    if world_size == 4:
        plane = init_device_mesh("cpu", (2, 2))
        found += [(plane, [Shard(0), Shard(1)]), (plane, [Replicate(), Shard(0)]), (plane, [Shard(0), Shard(0)])]
    return found


def load_tensors(path: str) -> list[bool]:
    good = []
    for mesh, placements in meshes():
        w, twice = (distribute_tensor(torch.zeros(7, 5), mesh, placements) for _ in range(2))
        into = {"w": w, "nested": {"w": twice}, "n": 0}
        load_checkpoint(path, into)
        good.append(into["w"] is w and into["nested"]["w"] is twice and into["n"] == 3)
        good.append(torch.equal(w.full_tensor(), WHOLE) and torch.equal(twice.full_tensor(), WHOLE * 2))
    return good


def refusals(path: str) -> list[str]:
    """What cannot be is refused before anything is changed, each with its key path."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    said = []
    for bad in (
        distribute_tensor(torch.zeros(6, 5), mesh, [Shard(0)]),
        distribute_tensor(torch.zeros(7, 5).double(), mesh, [Shard(0)]),
        DTensor.from_local(torch.zeros(7, 5), mesh, [Partial()]),
        DTensor.from_local(torch.zeros(7, 5, device="meta"), mesh, [Replicate()]),
    ):
        w = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)])
        try:
            load_checkpoint(path, {"w": w, "nested": {"w": bad}, "n": 0})
        except StateMismatchError as error:
            said.append(str(error).splitlines()[1].strip())
        if w.full_tensor().any():
            said.append("w was changed")
    return said


class Collective:
    """Its ``load_state_dict()`` runs a collective, as those of FSDP do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.met: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"name": ""}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.met = [""] * dist.get_world_size()
        dist.all_gather_object(self.met, self.name)


def load_in_another_order(path: str, rank: int) -> list[str]:
    objects = {name: Collective(name) for name in ("a", "b")}
    into = dict(objects if rank == 0 else reversed(list(objects.items())))
    load_checkpoint(path, into)
    return objects["a"].met + objects["b"].met


def load_own_file(path: str) -> list[Any]:
    """A file for each rank, with what the rank held of a DTensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.save({"w": distribute_tensor(WHOLE, mesh, [Shard(0)])}, path)
    w = distribute_tensor(torch.zeros(7, 5), mesh, [Shard(0)])
    load_checkpoint(path, {"w": w})
    said: list[Any] = [torch.equal(w.full_tensor(), WHOLE)]
    for other in (distribute_tensor(torch.zeros(7, 5), mesh, [Shard(1)]), torch.zeros(7, 5)):
        try:
            load_checkpoint(path, {"w": other})
        except StateMismatchError as error:
            said.append(str(error).splitlines()[1].strip())
    return said


def write(rank: int, directory: str) -> dict[str, Any]:
    """On two ranks: save, and load what one process and two ranks saved."""
    model = sharded_model()
    dcp.save({"model": model, "optimizer": step(model)}, checkpoint_id=f"{directory}/of two")
    mesh = init_device_mesh("cpu", (2,))
    spread = {"w": distribute_tensor(WHOLE, mesh, [Shard(0)])}
    dcp.save({**spread, "nested": {"w": WHOLE * 2}, "n": 3}, checkpoint_id=f"{directory}/tensors of two")
    return {
        **read(rank, directory),
        "refused": refusals(f"{directory}/tensors"),
        "order": load_in_another_order(f"{directory}/order", rank),
        "own file": load_own_file(f"{directory}/{rank}.pt"),
    }


def read(rank: int, directory: str) -> dict[str, Any]:
    whole = [f"{directory}/{name}" for name in ("of one", "whole.pt", "whole, no archive.pt")]
    return {
        "modules": [load_module(path) for path in (*whole, f"{directory}/of two")],
        "safetensors": load_module(f"{directory}/whole.safetensors", has_optimizer=False),
        "as dcp.load": [equals_dcp_load(f"{directory}/{name}") for name in ("of one", "of two")],
        "tensors": [load_tensors(f"{directory}/{name}") for name in ("tensors", "tensors of two", "tensors.pt")],
    }


def make_whole(directory: Path) -> None:
    model = whole_model()
    state = {"model": model, "optimizer": step(model)}
    dcp.save(state, checkpoint_id=directory / "of one", no_dist=True)
    states = {name: copy.deepcopy(one.state_dict()) for name, one in state.items()}
    torch.save(states, directory / "whole.pt")
    torch.save(states, directory / "whole, no archive.pt", _use_new_zipfile_serialization=False)
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(named, directory / "whole.safetensors")
    tensors = {"w": WHOLE, "nested": {"w": WHOLE * 2}, "n": 3}
    dcp.save(tensors, checkpoint_id=directory / "tensors", no_dist=True)
    torch.save(tensors, directory / "tensors.pt")
    dcp.save({"a": {"name": "a"}, "b": {"name": "b"}}, checkpoint_id=directory / "order", no_dist=True)


def check(result: dict[str, Any], num_spreads: int) -> None:
    assert result["modules"] == [True] * 4 and result["safetensors"]
    assert result["as dcp.load"] == [True] * 2
    assert result["tensors"] == [[True] * 2 * num_spreads] * 3


def test_each_rank_gets_its_part_of_a_foreign_checkpoint(tmp_path: Path) -> None:
    make_whole(tmp_path)
    for result in run_ranks("tests.loading.test_foreign_sharded:write", 2, tmp_path):
        check(result, 3)
        shape, dtype, partial, meta = result["refused"]
        assert shape == "nested['w']: has shape [6, 5] in the target and [7, 5] in the checkpoint"
        assert dtype == "nested['w']: is float64 in the target and float32 in the checkpoint"
        assert partial.startswith("nested['w']: ") and "sum" in partial
        assert meta.startswith("nested['w']: is on the meta device")
        assert result["order"] == ["a", "a", "b", "b"]
        filled, other_part, whole = result["own file"]
        assert filled and other_part.startswith("w: the file has only what one rank held of a DTensor")
        assert whole.startswith("w: is a whole tensor in the target")
    for world_size, num_spreads in ((1, 3), (4, 6)):
        (tmp_path / "store").unlink(missing_ok=True)
        for result in run_ranks("tests.loading.test_foreign_sharded:read", world_size, tmp_path):
            check(result, num_spreads)


def load_named(rank: int, directory: str) -> list[bool]:
    """What ``get_state_dict()`` makes of a sharded optimizer names its states; load it into objects, and step."""
    saved = sharded_model()
    with torch.no_grad():
        optimizer = step(saved)
    states = dict(zip(("model", "optimizer"), get_state_dict(saved, optimizer), strict=True))
    dcp.save(states, checkpoint_id=f"{directory}/named")
    with Checkpointer(f"{directory}/run", {"workers": {"count": 1}}) as ckpt:
        ckpt.save(1, states).upload_completion.result()
        good = []
        for way in ("stock", "own", "own, with a state before"):
            model = sharded_model(fill=-1.0)
            into = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.5)}
            if way.endswith("before"):
                into["optimizer"] = step(model)
            if way == "stock":
                load_checkpoint(f"{directory}/named", into)
            else:
                ckpt.load(into=into)
            good.append(is_whole(model, into["optimizer"]))
            for one, other in zip(model.parameters(), saved.parameters(), strict=True):
                one.grad = other.grad
            into["optimizer"].step()
    return good


def test_named_states_of_an_optimizer_are_sharded_as_its_parameters(tmp_path: Path) -> None:
    assert run_ranks("tests.loading.test_foreign_sharded:load_named", 2, tmp_path) == [[True] * 3] * 2
