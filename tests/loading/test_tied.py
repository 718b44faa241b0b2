"""Restoring in place where tensors share memory, there or here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.loading.restoring import restore
from tests.states import bits


def test_tied_there_and_not_here(run_dir: Path) -> None:
    weight = torch.randn(4, 4)
    into = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4), "c": torch.zeros(4, 4).t(), "d": None}
    a, b = into["a"], into["b"]
    restore(run_dir, {"a": weight, "b": weight, "c": weight, "d": weight}, into)
    assert into["a"] is a and into["b"] is b and a.data_ptr() != b.data_ptr()
    assert all(bits(into[name]) == bits(weight) for name in "abcd")


def test_tied_here_and_not_there_the_last_one_wins(run_dir: Path) -> None:
    """As when load_state_dict() is given different values for one tensor; never a mixture of the two."""
    state = {f"t{i}": torch.full((300_000,), float(i)) for i in range(8)}
    shared = torch.zeros(300_000)
    restore(run_dir, state, dict.fromkeys(state, shared))
    assert torch.equal(shared, state["t7"])
    reverse = dict.fromkeys(reversed(state), shared)
    restore(run_dir, state, reverse)
    assert torch.equal(shared, state["t0"])


def test_overlapping_views_of_one_base(run_dir: Path) -> None:
    source, target = torch.randn(10, 10), torch.zeros(10, 10)

    def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": base[1:5], "b": base[3:8], "t": base.t(), "c": base[:, 2], "row": base[9]}

    restore(run_dir, views(source), views(target))
    assert torch.equal(source, target)


def test_value_that_is_tied_there_is_not_taken_from_memory_that_something_else_overwrote(run_dir: Path) -> None:
    first, second = torch.full((50,), 1.0), torch.full((50,), 2.0)
    shared = torch.zeros(50)
    into = {"a": shared, "copy": None, "b": shared}
    restore(run_dir, {"a": first, "copy": first, "b": second}, into)
    assert torch.equal(into["copy"], first) and torch.equal(shared, second)


def test_tied_module_weights(run_dir: Path) -> None:
    def model(tied: bool) -> nn.Module:
        result = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied:
            result[1].weight = result[0].weight
        return result

    for there, here in [(True, True), (True, False), (False, True)]:
        source, target = model(there), model(here)
        parameters = [id(p) for p in target.parameters()]
        restore(run_dir, {"m": source}, {"m": target})
        assert [id(p) for p in target.parameters()] == parameters
        assert torch.equal(target[1].weight, source[1].weight)
        assert here or torch.equal(target[0].weight, source[0].weight)
