"""Optimizers that are loaded from formats of others: their states are fitted to their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from stager import UnloadableError, load_checkpoint
from tests.loading.foreign_files import save_dcp, small_model, step
from tests.states import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


OPTIMIZERS = [
    lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
]


@pytest.mark.parametrize("has_made_a_step", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 1])
def test_an_optimizer_gets_the_state_that_it_had_if_it_had_one(
    tmp_path: Path, make: Any, steps: int, has_made_a_step: bool
) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    for _ in range(steps):
        step(model, optimizer)
    path = save_dcp(tmp_path / "stock", {"model": model, "optimizer": optimizer})
    other = small_model()
    into = {"model": other, "optimizer": make(other.parameters())}
    into["optimizer"].param_groups[0]["lr"] = 0.5
    if has_made_a_step:
        step(other, into["optimizer"])
    assert load_checkpoint(path, into).missing == ()
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(into["optimizer"].state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("has_stepped", [False, True])
@pytest.mark.parametrize("name", ["", "block"])
def test_an_optimizer_whose_states_have_the_names_of_parameters(
    tmp_path: Path, name: str, has_stepped: bool, flat: bool
) -> None:
    """As torch's ``get_state_dict`` makes them: such names have dots, and may begin with a number."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        model = nn.ModuleDict({name: model})[name] if name else model
        whole = nn.ModuleDict({name: model}) if name else model
        return whole, torch.optim.AdamW(whole.parameters(), lr=0.1)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        (model[name] if name else model)(torch.randn(5, 4)).sum().backward()  # type: ignore[index]  # a ModuleDict if it has a name
        optimizer.step()

    model, optimizer = make()
    train(model, optimizer)
    model_state, state = get_state_dict(model, optimizer)
    if flat:
        state = {
            **{f"state.{key}.{one}": value for key, values in state["state"].items() for one, value in values.items()},
            "param_groups": state["param_groups"],
        }
    path = save_dcp(tmp_path / "dcp", {"model": model_state, "optimizer": state})
    into = make()
    if has_stepped:
        train(*into)
    loaded = load_checkpoint(path, into={"model": into[0], "optimizer": into[1]})
    assert loaded.missing == loaded.unexpected == ()
    assert same(into[0].state_dict(), model.state_dict())
    assert same(into[1].state_dict(), optimizer.state_dict())


def test_states_of_an_optimizer_that_belong_to_none_of_its_parameters_are_refused(tmp_path: Path) -> None:
    """torch takes them, and begins with states of zero."""
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    state = optimizer.state_dict()
    state["state"] = {number + 10: value for number, value in state["state"].items()}
    torch.save({"optimizer": state}, tmp_path / "a.pt")
    with pytest.raises(UnloadableError, match=r"^optimizer: .*none of them belong together"):
        load_checkpoint(tmp_path / "a.pt", into={"optimizer": optimizer})


@pytest.mark.parametrize("steps", [0, 1])
def test_one_optimizer_is_filled_from_its_entry(tmp_path: Path, steps: int) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        step(model, optimizer)
    path = save_dcp(tmp_path / "stock", {"model": model, "optimizer": optimizer})
    other = torch.optim.AdamW(small_model().parameters())
    load_checkpoint(path, other)
    assert same(other.state_dict(), optimizer.state_dict())
