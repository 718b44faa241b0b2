"""Many values without a tensor are one object; what has to be apart is, wherever among them it is."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import Checkpointer, PerRank, UnstageableError, load_checkpoint
from stager.loading.nodes import tensors_of
from stager.state.flatten import flatten
from tests.persistence.tasks import save
from tests.states import same


class Schedule:
    def __init__(self) -> None:
        self.step = 3

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def log(count: int) -> list[dict[str, Any]]:
    return [{"loss": 1 / (number + 1), "step": number} for number in range(count)]


@pytest.mark.parametrize(
    "value",
    [
        log(1000),
        {str(number): number for number in range(1000)},
        {number: {"a": [number]} for number in range(100)},
        {(number, number): number for number in range(100)},
        UserDict((str(number), number) for number in range(1000)),
        [[[number] for number in range(100)] for _ in range(100)],
    ],
    ids=["dicts in a list", "dict", "dicts in a dict", "tuples as keys", "a class of its own", "lists"],
)
def test_many_plain_values_are_one_leaf_which_is_pickled_once(run_dir: Path, value: Any) -> None:
    tree = flatten({"before": 1, "x": value, "after": [torch.ones(1)]})
    assert tree.leaves[:2] == [1, value] and len(tree.leaves) == 3
    loaded = load_checkpoint(save(run_dir, {"x": value}).path, allow_pickle=True).state["x"]
    assert type(loaded) is type(value) and loaded == value


@pytest.mark.parametrize("last", [torch.ones(2), Schedule(), PerRank(5)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_has_to_be_apart_comes_last(run_dir: Path, last: Any, depth: int) -> None:
    inner: Any = {"value": last}
    for _ in range(depth):
        inner = {"log": log(200), "one": 1, "inner": inner}
    many = {"log": [*log(200), inner], **{str(number): number for number in range(200)}, "also": last}
    tree = flatten({"x": many})
    kept = {torch.Tensor: last, Schedule: 3, PerRank: 5}[type(last)]
    assert len([leaf for leaf in tree.leaves if leaf is kept]) >= 2
    assert not [leaf for leaf in tree.leaves if isinstance(leaf, (Schedule, PerRank))]
    assert not tree.pickled.keys() - set(map(id, tree.leaves))


def test_param_groups_stay_apart_however_many_there_are() -> None:
    groups = [{"params": [number], "lr": 0.1} for number in range(100)]
    tree = flatten({"optimizer": {**{str(number): number for number in range(100)}, "param_groups": groups}})
    assert len(tree.leaves) == 300


def test_a_value_that_cannot_be_pickled_is_named(run_dir: Path) -> None:
    with Checkpointer(run_dir) as ckpt, pytest.raises(UnstageableError, match=r"^x: a list cannot be pickled"):
        ckpt.save(1, {"x": [*log(100), {"f": lambda: 1}]})


def test_a_leaf_that_holds_a_tensor_is_kept(run_dir: Path) -> None:
    """A tuple is a leaf, tensors and all."""
    value = [*log(100), {"pair": (torch.ones(2), 1)}]
    loaded = load_checkpoint(save(run_dir, {"x": value}).path).state["x"]
    assert loaded[:100] == value[:100] and same(loaded[100]["pair"][0], torch.ones(2))


def test_lists_that_share_lists_are_looked_at_once(run_dir: Path) -> None:
    """A graph as lists of neighbours: there are more paths through it than anybody can walk."""
    nodes: list[list[Any]] = [[] for _ in range(40)]
    for number, node in enumerate(nodes):
        node += [nodes[(number + 1) % 40], nodes[(number + 2) % 40]]
    with Checkpointer(run_dir) as ckpt:
        ckpt.save(1, {"graph": nodes[0], "x": torch.ones(2)})
        loaded = ckpt.load(1)
    assert loaded is not None
    graph = loaded.state["graph"]
    assert graph[0][0] is graph[1]


def test_a_target_that_holds_itself_is_searched_for_tensors_once() -> None:
    target: dict[str, Any] = {"x": torch.ones(2), "list": []}
    target["list"] += [target, torch.zeros(1)]
    assert set(tensors_of(target)) == {("x",), ("list", 1)}
