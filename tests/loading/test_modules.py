"""Restoring in place into modules, optimizers, and objects that take their state in their own way."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.loading.restoring import refused, restore
from tests.states import same


def trained(seed: int, steps: int = 2, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "used"])
def test_module_and_optimizer(run_dir: Path, steps: int) -> None:
    model, optimizer = trained(1)
    target, target_optimizer = trained(2, steps, lr=0.5)
    tensors = [*target.parameters(), *target.buffers()]
    moments = [state["exp_avg"] for state in target_optimizer.state.values()]
    restore(run_dir, {"m": model, "o": optimizer}, {"m": target, "o": target_optimizer})
    assert same(dict(target.state_dict()), dict(model.state_dict()))
    assert same(target_optimizer.state_dict(), optimizer.state_dict())
    assert all(a is b for a, b in zip(tensors, [*target.parameters(), *target.buffers()], strict=True))
    if steps:
        assert all(a is b["exp_avg"] for a, b in zip(moments, target_optimizer.state.values(), strict=True))
    data = torch.randn(5, 4)
    for each, its_optimizer in ((model, optimizer), (target, target_optimizer)):  # and goes on the same
        its_optimizer.zero_grad()
        each(data).sum().backward()
        its_optimizer.step()
    assert same(dict(target.state_dict()), dict(model.state_dict()))


def modules_that_do_not_fit() -> Iterator[Any]:
    model, _ = trained(1)
    yield pytest.param(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), r"m\['2.weight'\]: has shape", id="shape"
    )
    yield pytest.param(
        nn.Sequential(*model, nn.Linear(2, 2)),
        r"m\['3.bias'\]: is in the target but not in the checkpoint",
        id="missing",
    )
    yield pytest.param(
        copy.deepcopy(model[:2]), r"m\['2.bias'\]: is in the checkpoint but not in the target", id="unexpected"
    )
    yield pytest.param(copy.deepcopy(model).to("meta"), r"m\['0.weight'\]: is on the meta device", id="meta")


@pytest.mark.parametrize("target, message", [*modules_that_do_not_fit()])
def test_module_that_does_not_fit(run_dir: Path, target: nn.Module, message: str) -> None:
    refused(run_dir, {"a": torch.ones(1), "m": trained(1)[0]}, {"a": torch.zeros(1), "m": target}, message)


def test_module_for_something_else(run_dir: Path) -> None:
    refused(
        run_dir, {"m": 5}, {"m": nn.Linear(1, 1)}, "m: is a Linear in the target and a single value in the checkpoint"
    )
    refused(
        run_dir,
        {"m": [torch.ones(1)]},
        {"m": nn.Linear(1, 1)},
        "m: is a Linear in the target and a list",
    )


def test_not_strict_module(run_dir: Path) -> None:
    source, target = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    restore(run_dir, {"m": source}, {"m": target}, strict=False)
    assert same(dict(target[0].state_dict()), dict(source[0].state_dict()))
    refused(run_dir, {"m": nn.Linear(2, 2)}, {"m": nn.Linear(2, 3)}, "has shape", strict=False)


def test_module_of_another_dtype_is_converted_as_torch_does(run_dir: Path) -> None:
    source, target = nn.Linear(3, 3), nn.Linear(3, 3).to(torch.bfloat16)
    restore(run_dir, {"m": source}, {"m": target})
    assert torch.equal(target.weight, source.weight.to(torch.bfloat16))


class WithExtraState(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    "extra", [None, {}, 3, {"a": {"b": torch.arange(3)}, "c": 1}, [torch.ones(1)], "text"], ids=str
)
def test_module_with_extra_state(run_dir: Path, extra: Any) -> None:
    target = WithExtraState({"a": {"b": torch.zeros(3, dtype=torch.int64)}, "c": 0})
    restore(run_dir, {"m": WithExtraState(extra)}, {"m": target})
    assert same(target.extra, extra)


def test_lazy_module(run_dir: Path) -> None:
    source, target = nn.Linear(3, 2), nn.LazyLinear(2)
    restore(run_dir, {"m": source}, {"m": target})
    assert torch.equal(target.weight, source.weight)


def optimizers_that_do_not_fit() -> Iterator[Any]:
    model, _ = trained(1)
    halves = [{"params": list(model[0].parameters())}, {"params": [*model[1].parameters(), *model[2].parameters()]}]
    yield pytest.param(torch.optim.AdamW(halves), "o: has 2 parameter groups in the target and 1", id="groups")
    few = torch.optim.AdamW(model[0].parameters())
    yield pytest.param(few, r"o\['param_groups'\]\[0\]: has 2 parameters in the target and 6", id="parameters")


@pytest.mark.parametrize("target, message", [*optimizers_that_do_not_fit()])
def test_optimizer_that_does_not_fit(run_dir: Path, target: torch.optim.Optimizer, message: str) -> None:
    model, optimizer = trained(1)
    into = {"m": copy.deepcopy(model), "x": torch.zeros(1), "o": target}
    refused(run_dir, {"m": model, "o": optimizer, "x": torch.ones(1)}, into, message)


def test_optimizer_for_something_else(run_dir: Path) -> None:
    _, optimizer = trained(1)
    others: list[Any] = [5, {"state": {}}, {"state": {}, "param_groups": 3}, {"param_groups": [torch.ones(1)]}]
    for other in others:
        refused(
            run_dir, {"o": other}, {"o": optimizer}, "o: is a AdamW in the target and no optimizer in the checkpoint"
        )


class Clearing:
    """Takes its state by clearing first, as some objects do: it must not be handed its own tensors."""

    def __init__(self, value: float) -> None:
        self.buffer = torch.full((4,), value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"buffer": self.buffer}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.buffer.zero_()
        self.buffer += state["buffer"]


def test_object_that_clears_itself_before_it_takes_its_state(run_dir: Path) -> None:
    target = Clearing(2.0)
    buffer = target.buffer
    restore(run_dir, {"c": Clearing(7.0)}, {"c": target})
    assert target.buffer is buffer and torch.equal(buffer, torch.full((4,), 7.0))


class ModuleOfItsOwn(nn.Linear):
    """Renames a key and takes no ``strict``."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(OrderedDict(weight=state["w"], bias=state["bias"]))


@pytest.mark.parametrize("strict", [True, False])
def test_module_that_loads_in_its_own_way_is_left_to_it(run_dir: Path, strict: bool) -> None:
    target = ModuleOfItsOwn(2, 2)
    restore(run_dir, {"m": {"w": torch.ones(2, 2), "bias": torch.zeros(2)}}, {"m": target}, strict=strict)
    assert torch.equal(target.weight, torch.ones(2, 2))


def test_module_metadata_reaches_the_module(run_dir: Path) -> None:
    """The versions that nn.Module hangs on its state: without them BatchNorm would invent num_batches_tracked."""
    seen: list[Any] = []
    target = nn.BatchNorm1d(2)
    target._register_load_state_dict_pre_hook(lambda state, prefix, metadata, *_: seen.append(metadata))
    restore(run_dir, {"m": nn.BatchNorm1d(2)}, {"m": target})
    assert seen[0]["version"] == 2
