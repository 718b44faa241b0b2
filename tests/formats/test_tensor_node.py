"""The node of a leaf that is more than its values, from a file that may say anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stager.loading.selection import Selection
from stager.ranks.naming import name_all, name_written, outline
from stager.workers.checkpoint.commit.merge import overlay
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.structure import ABSENT, absent, leaves, map_leaves
from stager.workers.checkpoint.layout.tensor_node import TensorNode, without_flags
from stager.workers.errors import InconsistentRanksError, UnloadableError

TYPED = ["tensor", 1, {"parameter": True, "requires_grad": True}, 0]
STATE = ["dict", ["w", "list"], [TYPED, ["list", [["tensor", 2, {"object": 0}], 3]]]]


@pytest.mark.parametrize(
    "node",
    [
        ["tensor"],
        ["tensor", 0],
        ["tensor", "0", {}],
        ["tensor", ["list", []], {}],
        ["tensor", ["tensor", 0, {}], {}],
        ["tensor", 0, []],
        ["tensor", 0, {"unknown": True}],
        ["tensor", 0, {"parameter": 1}],
        ["tensor", 0, {"object": True}],
        ["tensor", 0, {}, "1"],
        ["tensor", 0, {}, 1, 2],
        ["tensor", 0, {}, ["list", []]],
    ],
)
def test_malformed_node_is_refused(node: Any) -> None:
    with pytest.raises(ValueError, match="malformed"):
        list(leaves(["dict", ["a"], [node]]))


def test_key_paths_do_not_show_it() -> None:
    assert list(leaves(STATE)) == [(("w.__recipe__",), 0), (("w",), 1), (("list", 0), 2), (("list", 1), 3)]
    assert without_flags(STATE) == ["dict", ["w", "list"], [1, ["list", [2, 3]]]]
    assert map_leaves(STATE, lambda leaf: leaf) == STATE
    assert Selection("w").of(STATE, "p") == ["dict", ["w"], [TYPED]]


def test_ranks_that_write_different_halves_of_it() -> None:
    mine, others = {0: 7}, {1: 4, 2: 5, 3: 6}
    first = name_all(STATE, lambda leaf: mine.get(leaf, ABSENT))
    second = name_written(STATE, lambda leaf: others.get(leaf, ABSENT))
    assert first[2][0] == ["tensor", ABSENT, TYPED[2], 7] and first[2][1] == ["list", [ABSENT, ABSENT]]
    assert list(absent(first)) == [("w",), ("list", 0), ("list", 1)]
    whole = overlay([first, second])
    assert whole == map_leaves(STATE, lambda leaf: {**mine, **others}[leaf])  # type: ignore[index]  # as the test wants it
    frozen = ["dict", *map_leaves(STATE, lambda leaf: leaf)[1:]]
    frozen[2][0] = 1
    assert outline(frozen, set()) == outline(without_flags(STATE), set())


def test_tensor_on_one_rank_and_mapping_on_the_other() -> None:
    with pytest.raises(InconsistentRanksError, match="a is not the same on all ranks"):
        overlay([["dict", ["a"], [["tensor", 0, {"parameter": True}]]], ["dict", ["a"], [["dict", [], []]]]])


def test_flags_are_merged_and_what_is_absent_stays_absent() -> None:
    assert TensorNode(["tensor", 3, {"object": 1}], {"parameter": True}, []).to_node() == [
        "tensor",
        3,
        {"object": 1, "parameter": True},
    ]
    assert TensorNode(3, {}, []).to_node() == 3
    assert TensorNode(ABSENT, {"parameter": True}, [ABSENT]).to_node() is ABSENT


@pytest.mark.parametrize(
    ("flags", "recipes", "values"),
    [
        ({"parameter": True}, [], ["text"]),
        ({"requires_grad": True}, [], [torch.ones(2, dtype=torch.int64)]),
        ({"stride": [1 << 40, 1]}, [], [torch.ones(2, 2)]),
        ({"stride": [1]}, [], [torch.ones(2, 2)]),
        ({}, [1], [torch.ones(2), torch.ones(3)]),
        ({}, [1], [torch.ones(2), (dict, None)]),
        ({}, [1], [torch.ones(2), (None, {"shape": 3})]),
    ],
)
def test_what_cannot_be_made_is_named(flags: Any, recipes: list[int], values: list[Any]) -> None:
    with pytest.raises(UnloadableError, match=r"a\['b'\]") as caught:
        build(["dict", ["a"], [["dict", ["b"], [["tensor", 0, flags, *recipes]]]]], values.__getitem__)
    assert caught.value.__cause__ is not None
