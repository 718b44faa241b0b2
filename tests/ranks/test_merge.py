"""Structures of ranks, laid over each other."""

from __future__ import annotations

import pytest

from stager.workers.checkpoint.commit.merge import overlay
from stager.workers.checkpoint.layout.structure import ABSENT, Node, absent
from stager.workers.errors import InconsistentRanksError


def test_what_one_rank_has() -> None:
    nodes: list[Node] = [["dict", ["a", "b"], [0, ABSENT]], ["dict", ["a", "b"], [ABSENT, 1]]]
    assert overlay(nodes) == ["dict", ["a", "b"], [0, 1]]


def test_keys_of_each_rank_and_lists_of_other_lengths() -> None:
    nodes: list[Node] = [["dict", ["l", "r0"], [["list", [0]], 1]], ["dict", ["l", "r1"], [["list", [ABSENT, 2]], 3]]]
    assert overlay(nodes) == ["dict", ["l", "r0", "r1"], [["list", [0, 2]], 1, 3]]


def test_chunks_of_all_ranks() -> None:
    nodes: list[Node] = [["chunks", [4], [[[0], 0]]], ABSENT, ["chunks", [4], [[[2], 1]]]]
    assert overlay(nodes) == ["chunks", [4], [[[0], 0], [[2], 1]]]


def test_metadata_of_the_first_that_has_some() -> None:
    nodes: list[Node] = [["odict", ["a"], [ABSENT], None], ["odict", ["a"], [0], {"": {"version": 1}}]]
    assert overlay(nodes) == ["odict", ["a"], [0], {"": {"version": 1}}]


def test_what_no_rank_has_stays_absent() -> None:
    merged = overlay([["dict", ["a", "b"], [ABSENT, 0]], ["dict", ["a", "b"], [ABSENT, ABSENT]]])
    assert list(absent(merged)) == [("a",)]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (0, 1, "value on rank 0; value on rank 1"),
        (0, ["dict", [], []], "a mapping"),
        (["chunks", [4], [[[0], 0]]], 1, "a tensor in chunks on rank 0; value on rank 1"),
        (["chunks", [4], [[[0], 0]]], ["chunks", [5], [[[4], 1]]], "has different shapes on the ranks"),
        (["list", []], ["dict", [], []], "a list on rank 0"),
    ],
)
def test_two_things_in_one_place(first: Node, second: Node, message: str) -> None:
    with pytest.raises(InconsistentRanksError, match=message) as caught:
        overlay([["dict", ["x"], [first]], ["dict", ["x"], [second]]])
    assert str(caught.value).startswith("state['x']" if "state[" in str(caught.value) else "x")


def test_the_ranks_that_do_not_agree_are_named() -> None:
    nodes: list[Node] = [["dict", [], []], ["dict", ["l"], [["list", [0]]]], ["dict", ["l"], [["list", [1]]]]]
    with pytest.raises(InconsistentRanksError, match="value on rank 1; value on rank 2"):
        overlay(nodes)
