"""Tensors, copies and items in columns are what they are one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stager import UnstageableError, load_checkpoint
from stager.state import fingerprint
from stager.state.copies import NO_COPIES, PACKED, Copies, Copy
from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.items import Item, ItemKind, Items, column
from stager.workers.checkpoint.layout.layout_check import check_layout, items_of_rows
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan
from tests.persistence.tasks import save
from tests.snapshot.staged import Bench, tensors_are_staged
from tests.states import same

HIGH = 0xFF00_0000_0000_0000  # where some accelerators have their memory


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def _items() -> list[Item]:
    return [
        Item("tensor", 0, 0, 100, 64, 24, "float32", (2, 3), (3, 1), 8),
        Item("tensor", 0, 128, 100, 192, 8, "int64", (), (), 32),
        Item("tensor", 1, 0, 100, 64, 24, "float32", (2, 3), (3, 1), 40),
        Item("object", 2, 0, 7, 0, 7, "", (), ()),
    ]


def test_items_in_columns_are_the_same_items() -> None:
    rows = _items()
    items = Items.of(rows)
    assert list(items) == rows and [items[n] for n in range(-4, 4)] == [*rows, *rows]
    assert items[1:3] == tuple(rows[1:3]) and len(items.kinds) == 3
    assert items == Items.of(rows) == tuple(rows)
    assert items != rows[:-1] and items not in ([5] * 4, "abcd")
    assert Items.of(rows[:2]).followed_by(rows[2:]) == rows
    assert list(Items.of(())) == [] == list(Items.of(()).followed_by(()))
    with pytest.raises(IndexError):
        items[4]
    document = json.loads(json.dumps(items.to_document()))
    assert Items.from_document(document) == rows


@pytest.mark.parametrize("values", [np.array([1, 2], np.int32), np.array([True]), np.array([1.0])], ids=str)
def test_array_of_another_type_cannot_be_a_column(values: Any) -> None:
    with pytest.raises(TypeError, match="integers of 8 bytes"):
        column(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["columns"].pop("offset"),
        lambda document: document["columns"].update(offset="qAAAA"),
        lambda document: document["columns"].update(offset="I" + document["columns"]["offset"][1:]),
        lambda document: document["columns"].update(offset="u" + document["columns"]["offset"][1:]),
        lambda document: document["columns"].update(offset=""),
        lambda document: document["columns"].update(kind=document["columns"]["offset"]),
        lambda document: document["columns"].update(file=7),
        lambda document: document["kinds"].append(["tensor", "float32", [1 << 62], [1]]),
        lambda document: document["kinds"].pop(),
        lambda document: document.update(kinds=3),
    ],
)
def test_columns_that_contradict_each_other_are_refused(change: Any) -> None:
    document = json.loads(json.dumps(Items.of(_items()).to_document()))
    change(document)
    with pytest.raises((KeyError, TypeError, ValueError)):
        Items.from_document(document)


_ROW = ["object", 0, 0, 10, 0, 10, "", [], [], []]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        {},
        "",
        0,
        False,
        [[*_ROW, 1]],
        [_ROW[:-1]],
        [_ROW, _ROW[:-1]],
        [[]],
        [["object", False, *_ROW[2:]]],
        [["object", 0, -1, *_ROW[3:]]],
        [["object", 0, 1 << 63, *_ROW[3:]]],
        [["object", 0, 0.0, *_ROW[3:]]],
        [["tensor", 0, 0, 4, 0, 4, "float32", [True], [1], []], ["tensor", 0, 4, 4, 4, 4, "float32", [1], [1], []]],
        [["tensor", 0, 0, 4, 0, 4, "float32", [[1]], [1], []]],
        [["tensor", 0, 0, 4, 0, 4, "float32", 1, [1], []]],
    ],
    ids=str,
)
def test_malformed_rows_are_refused(rows: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        items_of_rows(rows)


def test_copies_in_columns_are_the_same_copies() -> None:
    copies = [
        Copy(0, 1 << 40, 0, 100, (0, 3)),
        Copy(1, PACKED, 128, 5, (1,), False),
        Copy(2, HIGH + 64, 192, 7, (2,), False),
    ]
    table = Copies.of(copies)
    assert list(table) == copies == [table[0], table[1], table[2]] and table == copies and table != copies[:2]
    assert list(table[1:]) == copies[1:] and list(table.where(table.nbytes > 5)) == [copies[0], copies[2]]
    assert table.is_packed.tolist() == [False, True, False] and table.all_leaves() == [0, 3, 1, 2]
    assert table.all_in(np.array([True, True, False, False])).tolist() == [False, True, False]
    assert table.all_in(np.array([True, False, False, True])).tolist() == [True, False, False]
    assert list(NO_COPIES) == [] == NO_COPIES.all_leaves() and not NO_COPIES.all_in(np.zeros(3, bool)).any()


def test_memory_at_the_high_addresses_of_some_devices_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device(torch.Tensor):
        pass

    place = {"a": HIGH, "b": HIGH + 4096, "view": HIGH + 8}
    state = {"a": torch.zeros(4), "b": torch.zeros(100), "view": torch.zeros(2)}
    by_id = {id(tensor): place[name] for name, tensor in state.items()}
    real = fingerprint._Tensor
    methods = {name: getattr(real, name) for name in ("is_neg", "stride", "is_contiguous", "untyped_storage")}
    monkeypatch.setattr(fingerprint, "_check_storages", lambda *_: None)
    monkeypatch.setattr(fingerprint, "_Tensor", SimpleNamespace(data_ptr=lambda t: by_id[id(t)], **methods))
    plan = Planner(get_format("dcp"), 1, 1 << 20).plan(flatten(state))
    assert list(plan.addresses) == [HIGH, HIGH + 4096, HIGH + 8]
    assert [(copy.address, copy.nbytes, copy.leaves) for copy in plan.copies] == [
        (HIGH, 16, (0, 2)),
        (HIGH + 4096, 400, (1,)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_of_more_bytes_than_can_be_counted_is_refused_by_name(dtype: torch.dtype) -> None:
    state = {"a": {"b": torch.ones(1, dtype=dtype).expand(1 << 62)}}
    with pytest.raises(UnstageableError, match=r"a\['b'\]: has [\d,]+ bytes"):
        Planner(get_format("dcp"), 1, 1 << 20).plan(flatten(state))


def test_transposed_tensor_and_its_negative_view_are_two(run_dir: Path) -> None:
    """In a format that stores C order, both are copied element by element; the view has the other sign."""
    x = torch.randn(3, 4)
    state = {"a": x.t(), "b": torch._neg_view(x.t()), "c": x.t()}
    info = save(run_dir, state, kind="safetensors")
    loaded = load_checkpoint(info.path).state
    assert same(loaded["a"], x.t()) and same(loaded["b"], -x.t()) and same(loaded["c"], x.t())


def test_state_without_tensors_or_bytes_is_planned(bench: Bench) -> None:
    for state in ({}, {"a": {}}, {"a": torch.empty(0), "b": torch.empty(0)}, {"x": {1, 2}}, {"t": torch.zeros(())}):
        slab, snapshot = bench.stage(state)
        assert tensors_are_staged(state, slab, snapshot.plan)


def test_plan_of_the_first_version_is_read_with_its_places(run_dir: Path) -> None:
    """A replica that a program with the first version left in memory has rows."""
    plan = Planner(get_format("dcp"), 1, 1 << 20).plan(flatten({"a": torch.ones(3), "b": torch.zeros(2, 2)}))
    text, _, templates = plan.document.partition(b"\n")
    document = json.loads(text)
    del document["kinds"], document["columns"]
    document["rows"] = [[*item.to_row(), item.slab_offset] for item in plan.layout.tensors]
    old = LayoutPlan.from_document(json.dumps(document).encode() + b"\n" + templates)
    assert old.tensors == plan.layout.tensors and [item.slab_offset for item in old.tensors] == [0, 64]
    assert dict(old.templates or {}) == dict(plan.layout.templates or {})
    document["rows"][0][-1] = -1
    with pytest.raises(ValueError, match="is not a count"):
        LayoutPlan.from_document(json.dumps(document).encode() + b"\n" + templates)


def test_kinds_of_a_layout_are_checked_once_each() -> None:
    layout = Planner(get_format("dcp"), 1, 1 << 20).plan(flatten({"a": [torch.ones(3)] * 2})).layout.with_objects([])
    check_layout(layout)
    kinds = [ItemKind("tensor", "float32", (3,), (2,))]
    items = Items(tuple(kinds), *layout.items.columns())
    object.__setattr__(layout, "items", items)
    with pytest.raises(ValueError, match="stride"):
        check_layout(layout)
