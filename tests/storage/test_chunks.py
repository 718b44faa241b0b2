"""Tensors in chunks in a manifest: what is possible, and that nothing else is believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from stager.torch_api.storage.assembly import assemble, nest
from stager.torch_api.storage.spans import Written
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout
from stager.workers.checkpoint.layout.layout_check import check_layout
from stager.workers.checkpoint.layout.structure import Chunks, leaves, walk
from stager.workers.errors import UnstageableError, UsageError


def layout_of(structure: Any, shapes: tuple[tuple[int, ...], ...] = ((2, 3), (3, 3))) -> Layout:
    items, offset = [], 0
    for shape in shapes:
        nbytes = 4 * torch.Size(shape).numel()
        stride = (shape[1], 1)
        items.append(Item("tensor", 0, offset, nbytes, offset, nbytes, "float32", shape, stride))
        offset += 64
    return Layout((FileSpec("__0_0.distcp", offset),), Items.of(items), structure, 1 << 20)


GOOD = ["chunks", [5, 3], [[[0, 0], 0], [[2, 0], 1]]]


def test_chunks_are_walked_one_by_one() -> None:
    structure = ["dict", ["a", "b"], [GOOD, 2]]
    assert list(walk(structure)) == [(("a",), 0), (("a",), 1), (("b",), 2)]
    chunks = Chunks((5, 3), (((0, 0), 0), ((2, 0), 1)))
    assert list(leaves(structure)) == [(("a",), chunks), (("b",), 2)]
    assert chunks.to_node() == GOOD
    check_layout(layout_of(["dict", ["a"], [GOOD]]))


def test_state_is_not_built_of_chunks() -> None:
    with pytest.raises(UsageError, match=r"dcp\.load"):
        build(["dict", ["a"], [GOOD]], lambda index: index)


@pytest.mark.parametrize(
    "node",
    [
        ["chunks"],
        ["chunks", [5, 3]],
        ["chunks", 5, [[[0, 0], 0]]],
        ["chunks", [5, 3], 7],
        ["chunks", [5, 3], []],
        ["chunks", [5, 3], [[[0, 0], 0], [[2, 0], "1"]]],
        ["chunks", [5, 3], [[[0, 0], 0], [[2, 0], True]]],
        ["chunks", [5, 3], [[[0, 0], 0], [[2.0, 0], 1]]],
        ["chunks", [5, 3], [[[0, 0], 0], [[2], 1]]],
        ["chunks", [5, 3], [[[0, 0], 0], [[3, 0], 1]]],
        ["chunks", [5, 3], [[[0, 0], 0], [[-1, 0], 1]]],
        ["chunks", [5, 3], [[[0, 0], 0], [[2, 0], 2]]],
        ["chunks", [5, 3], [[[0, 0], 0], [[2, 0], -1]]],
        ["chunks", [6, 3], [[[0, 0], 0], [[2, 0], 1]]],
        ["chunks", [10**18, 3], [[[0, 0], 0], [[2, 0], 1]]],
        ["chunks", [-5, -3], [[[0, 0], 0], [[2, 0], 1]]],
        ["chunks", [5, 3, 1], [[[0, 0, 0], 0], [[2, 0, 0], 1]]],
        [GOOD],
    ],
    ids=str,
)
def test_impossible_chunks_are_refused(node: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        check_layout(layout_of(["dict", ["a"], [node]]))


def test_chunks_of_two_dtypes_or_of_objects_are_refused() -> None:
    layout = layout_of(["dict", ["a"], [GOOD]])
    first, second = layout.items
    for other in (replace(second, dtype="int32"), replace(second, kind="object", dtype="", shape=(), stride=())):
        with pytest.raises(ValueError, match="item 1"):
            check_layout(replace(layout, items=Items.of((first, other))))


def test_paths_of_a_planner_become_containers() -> None:
    paths = {"a.b": ("a", "b"), "a.l.0": ("a", "l", 0), "a.l.1.x": ("a", "l", 1, "x"), "c.d": ("c.d",)}
    nodes = {name: number for number, name in enumerate(paths)}
    inner = ["dict", ["b", "l"], [0, ["list", [1, ["dict", ["x"], [2]]]]]]
    assert nest(nodes, paths) == ["dict", ["a", "c.d"], [inner, 3]]


@pytest.mark.parametrize(
    "paths",
    [
        None,
        {},
        {"a": ("a",)},
        {"a": ("a",), "a.b": ("a", "b")},  # a value of one rank is where another has a container
        {"a": ("a",), "a.b": ("other",)},
        {"a": ("a",), "a.b": ()},
        {"a": ["a"], "a.b": ("a", "b")},
        {"a": ("a",), "a.b": ("a", ("b",))},
    ],
    ids=str,
)
def test_paths_that_do_not_fit_leave_the_names_flat(paths: Any) -> None:
    assert nest({"a": 0, "a.b": 1}, paths) == ["dict", ["a", "a.b"], [0, 1]]


def test_list_with_a_gap_is_a_mapping() -> None:
    assert nest({"l.0": 0, "l.2": 1}, {"l.0": ("l", 0), "l.2": ("l", 2)}) == [
        "dict",
        ["l"],
        [["dict", [0, 2], [0, 1]]],
    ]


def announced(name: str, shape: tuple[int, ...]) -> Metadata:
    return Metadata({name: TensorStorageMetadata(TensorProperties(), torch.Size(shape), [])}, planner_data={})


def written(offsets: tuple[int, ...], item: Item) -> tuple[MetadataIndex, Written]:
    one = replace(item, offset=64 * offsets[0], data_offset=64 * offsets[0])
    return MetadataIndex("w", offsets), Written("__0_0.distcp", one, 64 * offsets[0] + 64, ("00",))


def test_name_that_no_rank_wrote_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"^w: .*no rank wrote it"):
        assemble(announced("w", (5, 3)), [])


@pytest.mark.parametrize("kind", ["tensor", "object"])
def test_shards_that_are_no_tensor_are_named(kind: str) -> None:
    first, second = (replace(item, kind=kind) for item in layout_of(GOOD).items)
    with pytest.raises(UnstageableError) as caught:
        assemble(announced("w", (6, 3)), [written((0, 0), first), written((1, 0), second)])
    assert caught.value.key_path == "w"
