"""What ranks leave out of their structures makes no difference to the checkpoint, and hides nothing that is lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stager import PerRank
from stager.ranks.naming import name_all, name_written, outline
from stager.ranks.partition import Partitioner
from stager.ranks.rank_group import RankGroup
from stager.state.flatten import flatten
from stager.state.state_tree import StateTree
from stager.workers.checkpoint.commit.merge import overlay
from stager.workers.checkpoint.layout.structure import ABSENT, Node, absent, walk
from stager.workers.errors import InconsistentRanksError
from tests.ranks.layouts import LAYOUTS
from tests.ranks.test_matrix import NUM_RANKS
from tests.ranks.threads import on_ranks
from tests.staging.ranks import run_ranks

# -- structures ---------------------------------------------------------------------------------------------------


def _written(structure: Node, *leaves: int) -> Node:
    return name_written(structure, lambda leaf: leaf if leaf in leaves else ABSENT)


def test_a_mapping_leaves_out_what_is_not_written_and_keeps_its_metadata() -> None:
    assert _written(["dict", ["a", "b", "c"], [0, 1, 2]], 1) == ["dict", ["b"], [1]]
    metadata = {"": {"version": 1}}
    assert _written(["odict", ["a", "b"], [0, 1], metadata], 0) == ["odict", ["a"], [0], metadata]
    assert _written(["odict", ["a"], [0], metadata]) == ["odict", [], [], metadata]


def test_a_list_keeps_the_positions() -> None:
    assert _written(["dict", ["l"], [["list", [0, 1, ["dict", ["x"], [2]], 3]]]], 1) == [
        *("dict", ["l"]),
        [["list", [ABSENT, 1, ABSENT, ABSENT]]],
    ]


def test_a_container_is_left_out_with_all_that_is_in_it_unless_it_is_empty_anyway() -> None:
    adam: Node = ["dict", [0, 1], [["dict", ["step", "avg"], [0, 1]], ["dict", ["step", "avg"], [2, 3]]]]
    empty: Node = ["dict", ["list", "dict"], [["list", []], ["dict", [], []]]]
    state: Node = ["dict", ["adam", "empty"], [adam, empty]]
    assert _written(state, 2) == ["dict", ["adam", "empty"], [["dict", [1], [["dict", ["step"], [2]]]], empty]]
    assert _written(state) == ["dict", ["empty"], [empty]]


def _outline(state: dict[str, Any], rank: int = 0) -> str:
    flat = flatten(state, rank)
    return outline(flat.structure, flat.private)


def test_outline_is_of_what_ranks_have_in_common() -> None:
    expected = _outline({"a": 1, "b": {"c": 2, 0: 3}, "own": PerRank({"x": 4})})
    assert expected == _outline({"own": PerRank([torch.ones(1)]), "b": {0: 30, "c": 20}, "a": 10}, rank=3)
    assert expected == _outline({"a": 1, "b": {"c": 2, 0: 3}, "empty": {"e": {}}})
    module, other = torch.nn.Linear(2, 2).state_dict(), torch.nn.Linear(2, 2).state_dict()
    other._metadata[""]["version"] = 7
    states: list[dict[str, Any]] = [
        {"a": 1, "b": {"c": 2}},
        {"a": 1, "b": {"c": 2, "0": 3}},
        {"a": 1, "b": {"c": 2, True: 3}},
        {"a": 1, "b": {"c": 2, 1: 3}},
        {"l": [{"x": 1}, {"y": 2}]},
        {"l": [{"y": 2}, {"x": 1}]},
        {"l": {0: {"x": 1}, 1: {"y": 2}}},
        {"m": module},
        {"m": dict(module)},
        {"m": other},
    ]
    assert len({expected, *map(_outline, states)}) == len(states) + 1


# -- laid over each other -----------------------------------------------------------------------------------------


class _Drawn:
    """A state of several ranks, each with values of its own and the keys in an order of its own."""

    def __init__(self, seed: int, num_ranks: int) -> None:
        self._chance = random.Random(seed)
        self._num_ranks = num_ranks
        self.states = self._mapping(0)

    def _value(self, depth: int) -> list[Any]:
        """On each rank."""
        kind = self._chance.choice(["leaf"] * 4 + ["mapping", "list", "empty", "private"] * (depth < 3))
        if kind == "leaf":
            return [torch.ones(1)] * self._num_ranks
        if kind == "mapping":
            return self._mapping(depth + 1)
        if kind == "list":
            children = [self._mapping(depth + 1) for _ in range(self._chance.randint(1, 3))]
            return [list(of_rank) for of_rank in zip(*children, strict=True)]
        if kind == "empty":
            return [{} for _ in range(self._num_ranks)]
        return [PerRank({"x": 1} if self._chance.random() < 0.5 else {}) for _ in range(self._num_ranks)]

    def _mapping(self, depth: int) -> list[dict[Any, Any]]:
        keys: list[Any] = self._chance.sample(["a", "b", "c", "d", "e", 0, 1], self._chance.randint(1, 6))
        states: list[dict[Any, Any]] = [{} for _ in range(self._num_ranks)]
        for key in keys:
            for state, value in zip(states, self._value(depth), strict=True):
                state[key] = value
        for rank in range(1, self._num_ranks):
            items = list(states[rank].items())
            self._chance.shuffle(items)
            states[rank] = dict(items)
        if self._chance.random() < 0.2:
            states[-1]["only here, and empty"] = {}
        return states


@pytest.mark.parametrize("loses", [False, True])
def test_what_is_left_out_makes_no_difference_to_what_is_laid_over(loses: bool) -> None:
    """Every leaf is dealt to a rank, or to none: names, their order and what is lost are those of ranks that name all."""
    num_left_out = num_lost = 0
    for seed in range(300):
        chance = random.Random(seed)
        flats = [flatten(state, rank) for rank, state in enumerate(_Drawn(seed, 1 + seed % 4).states)]
        assert len({outline(flat.structure, flat.private) for flat in flats}) == 1
        names = sorted(
            {path for flat in flats for leaf, path in enumerate(flat.paths) if leaf not in flat.private}, key=str
        )
        dealt = {name: chance.randrange(-1 if loses else 0, len(flats)) for name in names}
        nodes = [_nodes(flat, rank, dealt) for rank, flat in enumerate(flats)]
        all_named = [name_all(flat.structure, of_rank.__getitem__) for flat, of_rank in zip(flats, nodes, strict=True)]
        named = [
            (name_written if rank else name_all)(flat.structure, of_rank.__getitem__)
            for rank, (flat, of_rank) in enumerate(zip(flats, nodes, strict=True))
        ]
        merged = overlay(named)
        assert merged == overlay(all_named)
        num_left_out += named != all_named
        lost = set(absent(merged))
        assert lost == {name for name, rank in dealt.items() if rank < 0}
        num_lost += bool(lost)
    assert num_left_out > 150
    assert (num_lost > 100) is loses


def _nodes(flat: StateTree, rank: int, dealt: dict[Any, int]) -> list[Node]:
    """Of each leaf, that of what the rank writes."""
    return [
        100 * rank + leaf if leaf in flat.private or dealt[path] == rank else ABSENT
        for leaf, path in enumerate(flat.paths)
    ]


# -- shares -------------------------------------------------------------------------------------------------------


def _structures(states: Sequence[Sequence[dict[str, Any]]]) -> list[list[Node]]:
    """Of each rank's shares of one state after the other, as it is in its records."""

    def body(group: RankGroup) -> list[Node]:
        taker = Partitioner(group)
        return [
            taker.take(flatten(state, group.rank), f"save {number}").structure
            for number, state in enumerate(states[group.rank])
        ]

    return on_ranks(len(states), body)


def _paths(structure: Node) -> list[Any]:
    return [path for path, _ in walk(structure)]


def test_what_is_left_to_others_is_in_the_record_of_rank_0_only() -> None:
    def state(rank: int) -> dict[str, Any]:
        optimizer = {
            "state": {n: {"step": torch.ones(1), "avg": torch.ones(40)} for n in range(6)},
            "groups": [{"lr": 1}],
        }
        return {"w": {f"w{n}": torch.ones(40) for n in range(6)}, "o": optimizer, "own": PerRank([rank]), "empty": {}}

    structures = [of_rank[0] for of_rank in _structures([[state(rank)] for rank in range(3)])]
    merged = overlay(structures)
    assert not list(absent(merged))
    expected = [path for path in flatten(state(0)).paths if path[0] != "own"]
    assert [path for path in _paths(merged) if path[0] != "own"] == expected
    assert len(list(absent(structures[0]))) + len(_paths(structures[0])) == len(expected) + 1
    for structure in structures[1:]:
        # Of a list, the length is there.
        assert [path for path in absent(structure) if path[:2] != ("o", "groups")] == []
        (empty,) = [child for key, child in zip(structure[1], structure[2], strict=True) if key == "empty"]
        assert empty == ["dict", [], []]
    assert max(Counter(path for structure in structures for path in _paths(structure)).values()) == 1


def test_ranks_that_have_other_names_name_all_of_them() -> None:
    states = [
        {"all": torch.ones(3), f"stage {rank // 2}": {"a": torch.ones(9), "b": torch.ones(9)}} for rank in range(4)
    ]
    structures = [of_rank[0] for of_rank in _structures([[state] for state in states])]
    for state, structure in zip(states, structures, strict=True):
        assert set(_paths(structure)) | set(absent(structure)) == set(flatten(state).paths)
    merged = overlay(structures)
    assert not list(absent(merged))
    assert merged[1] == ["all", "stage 0", "stage 1"]


def test_one_rank_alone_changes_a_container() -> None:
    """No names are new, so that nobody is asked; what the rank has in another container is noticed all the same."""
    state = {"a": {str(n): {"x": torch.ones(4)} for n in range(4)}}
    changed = {"a": [state["a"][str(n)] for n in range(4)]}
    for one in (0, 1):
        before, after = zip(
            *_structures([[state, changed if rank == one else state] for rank in range(2)]), strict=True
        )
        assert not list(absent(overlay(before)))
        with pytest.raises(InconsistentRanksError, match="a is not the same on all ranks"):
            overlay(after)


def test_keys_in_another_order_are_in_that_of_rank_0() -> None:
    names = [str(number) for number in range(8)]
    states = [[{name: torch.ones(4) for name in names[:: 1 - 2 * (rank % 2)]}] for rank in range(3)]
    assert overlay([of_rank[0] for of_rank in _structures(states)])[1] == names


# -- ranks that are processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [name if name in ("hsdp", "fsdp+tp") else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS],
)
def test_records_of_every_layout_make_the_whole_state_in_the_order_of_rank_0(layout: str, tmp_path: Path) -> None:
    results = run_ranks("tests.ranks.bodies:structure_of_share", NUM_RANKS[layout], tmp_path, layout)
    merged = overlay([result["structure"] for result in results])
    assert not list(absent(merged))
    paths = dict.fromkeys(path for path in _paths(merged) if path[0] != "own")
    assert list(map(list, paths)) == [path for path in results[0]["paths"] if path[0] != "own"]
    assert all(not list(absent(result["structure"])) for result in results[1:])


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "DTensor"])
def test_what_every_rank_took_to_be_written_by_another_is_missed(sharded: bool, tmp_path: Path) -> None:
    for text in run_ranks("tests.ranks.hard_bodies:tied_on_one_rank", 2, tmp_path, sharded):
        assert "InconsistentRanksError: b: no rank wrote it" in text
