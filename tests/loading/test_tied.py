"""Restoring in place where tensors share memory, there or here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp

from stager import StateMismatchError, load_checkpoint
from stager.workers.checkpoint.formats import FORMATS
from tests.loading.restoring import refused, restore
from tests.states import bits


def test_tied_there_and_not_here(run_dir: Path) -> None:
    weight = torch.randn(4, 4)
    into = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4), "c": torch.zeros(4, 4).t(), "d": None}
    a, b = into["a"], into["b"]
    restore(run_dir, {"a": weight, "b": weight, "c": weight, "d": weight}, into)
    assert into["a"] is a and into["b"] is b and a.data_ptr() != b.data_ptr()
    assert all(bits(into[name]) == bits(weight) for name in "abcd")


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_tied_here_and_different_there_is_refused(run_dir: Path, kind: str) -> None:
    state = {"other": torch.ones(3), "a": torch.ones(3), "b": torch.full((3,), 2.0)}
    shared = torch.zeros(3)
    into = {"other": torch.zeros(3), "a": shared, "b": shared}
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match="nothing was changed:\n  a and b: share memory in the target"):
            restore(run_dir, state, into, strict, kind=kind)
    assert not shared.any() and not into["other"].any()


def test_overlapping_here_and_different_there_is_refused(run_dir: Path) -> None:
    base = torch.zeros(4)
    state = {"v": torch.arange(3.0), "w": torch.arange(3.0) + 50}
    refused(run_dir, state, {"v": base[:3], "w": base[1:]}, "v and w: share memory in the target")


def test_windows_that_overlap_here_take_values_that_agree(run_dir: Path) -> None:
    memory = torch.zeros(3)
    windows = memory.as_strided((2, 2), (1, 1))
    into = {"other": torch.zeros(3), "x": windows}
    refused(
        run_dir, {"other": torch.ones(3), "x": torch.arange(4.0).view(2, 2)}, into, "x: several of its elements share"
    )
    assert not memory.any() and not into["other"].any()
    restore(run_dir, {"other": torch.ones(3), "x": torch.arange(3.0).as_strided((2, 2), (1, 1))}, into)
    assert torch.equal(memory, torch.arange(3.0))


@pytest.mark.parametrize(
    ("shape", "stride"), [((2, 2), (2, 3)), ((3, 1, 2), (2, 0, 1)), ((0, 2), (1, 1)), ((4,), (3,)), ((2, 3), (1, 2))]
)
def test_elements_that_lie_between_others_share_no_memory(
    run_dir: Path, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    target = torch.zeros(16).as_strided(shape, stride)
    source = torch.arange(float(target.numel())).view(shape)
    restore(run_dir, {"x": source}, {"x": target})
    assert torch.equal(target, source)


def test_one_element_of_any_stride(run_dir: Path) -> None:
    """torch calls it contiguous, and does not view it as bytes."""
    base = torch.zeros(4, dtype=torch.int64)
    into = {"base": base, "one": base[::2][:1], "row": base.view(2, 2)[:1, :1]}
    values = torch.arange(4) + 7
    restore(run_dir, {"base": values, "one": values[:1].clone(), "row": values[:1].view(1, 1).clone()}, into)
    assert torch.equal(base, values)
    refused(
        run_dir, {"base": values, "one": values[1:2], "row": values[:1].view(1, 1)}, into, "one and row: share memory"
    )


def test_tied_here_and_equal_there(run_dir: Path) -> None:
    shared = torch.zeros(3)
    weight = torch.tensor([1.0, float("nan"), -0.0])
    restore(run_dir, {"a": weight, "b": weight.clone()}, {"a": shared, "b": shared})
    assert bits(shared) == bits(weight)


def test_columns_that_interleave_share_no_element(run_dir: Path) -> None:
    source, target = torch.randn(4, 2), torch.zeros(4, 2)
    restore(run_dir, {"x": source[:, 0], "y": source[:, 1]}, {"x": target[:, 0], "y": target[:, 1]})
    assert torch.equal(source, target)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp"])
def test_tied_here_and_different_in_a_foreign_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    state, path = {"a": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "foreign"
    if kind == "safetensors":
        save_file(state, path.with_suffix(".safetensors"))
        path = path.with_suffix(".safetensors")
    elif kind == "torch":
        torch.save(state, path)
    else:
        dcp.save(state, checkpoint_id=path, no_dist=True)
    shared = torch.full((3,), 7.0)
    with pytest.raises(StateMismatchError, match="a and b: share memory in the target"):
        load_checkpoint(path, into={"a": shared, "b": shared})
    assert shared.tolist() == [7, 7, 7]


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_one_container_here_and_different_values_there(run_dir: Path, kind: str) -> None:
    """The first place keeps the container, and so do those whose values are equal."""
    state = {"a": [1, 2], "b": [3], "c": [1, 2], "s": {1}, "u": {2}, "n": [[1], [2]], "m": (5, [1])}
    one, other, inner = [0], {0}, [0]
    into: dict[str, Any] = {"a": one, "b": one, "c": one, "s": other, "u": other, "n": [inner, inner], "m": (0, inner)}
    restore(run_dir, state, into, kind=kind)
    assert into == state
    assert into["a"] is one and into["c"] is one and into["s"] is other


def test_overlapping_views_of_one_base(run_dir: Path) -> None:
    source, target = torch.randn(10, 10), torch.zeros(10, 10)

    def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": base[1:5], "b": base[3:8], "t": base.t(), "c": base[:, 2], "row": base[9]}

    restore(run_dir, views(source), views(target))
    assert torch.equal(source, target)


def test_module_tied_here_and_different_there_is_refused(run_dir: Path) -> None:
    source = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    target = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    target[1].weight = target[0].weight
    refused(run_dir, {"m": source}, {"m": target}, r"m\['0.weight'\] and m\['1.weight'\]: share memory in the target")
    with torch.no_grad():
        source[1].weight.copy_(source[0].weight)
    restore(run_dir / "equal", {"m": source}, {"m": target})
    assert torch.equal(target[0].weight, source[0].weight)


def test_tied_module_weights(run_dir: Path) -> None:
    def model(tied: bool) -> nn.Module:
        result = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied:
            result[1].weight = result[0].weight
        return result

    for there, here in [(True, True), (True, False)]:
        source, target = model(there), model(here)
        parameters = [id(p) for p in target.parameters()]
        restore(run_dir, {"m": source}, {"m": target})
        assert [id(p) for p in target.parameters()] == parameters
        assert torch.equal(target[1].weight, source[1].weight)
        assert here or torch.equal(target[0].weight, source[0].weight)
