"""``.metadata`` written piece by piece is what pickling torch's dataclasses gives."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.formats.pickle_template import (
    END,
    Strings,
    TemplateMaker,
    integer,
    mark,
    plain_string,
    tuple_of,
)
from stager.workers.checkpoint.layout.dtypes import dtype_of
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.layout.structure import fqn, walk
from stager.workers.checkpoint.write.write_task import read_layout
from tests.persistence.tasks import make_task
from tests.states import everything

SHARED = torch.arange(6.0)
ODD: list[dict[str, Any]] = [
    {},
    {"a": {}, "l": []},
    {"only": 1, "objects": "x"},
    {"e": torch.empty(0), "z": torch.tensor(1.5), "m": torch.empty(3, 0, 2)},
    {"tied": {"x": SHARED, "y": SHARED, "view": SHARED[2:], "n": None}},
    {"l": [torch.ones(2), [torch.ones(3), {"deep": {"deeper": [torch.ones(1), 5]}}], "s"]},
    {"keys": {0: torch.ones(1), 1.5: torch.ones(2), True: 3, None: torch.ones(4), "": torch.ones(5), "ä.ö": 6}},
    {"\0mark 0\0": torch.ones(1), "\0mark 1\0": "x", "model": {"\0mark 2\0": torch.ones(2)}},
    {"o": OrderedDict(b=torch.ones(1), a=[1, torch.ones(2)])},
    {"optimizer": {"state": {i: {"step": torch.tensor(float(i)), "m": torch.ones(2, 3)} for i in range(300)}}},
    {"many": [torch.ones(1, dtype=d) for d in (torch.float32, torch.bool, torch.complex64, torch.float8_e4m3fn)]},
]


def as_dataclasses(layout: Layout, save_id: str, directory: str) -> dcp_metadata.Metadata:
    state: dict[str, Any] = {}
    storage: dict[dcp_metadata.MetadataIndex, _StorageInfo] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for raw, path in zip(_raw_paths(layout.structure), walk(layout.structure), strict=True):
        item, name = layout.items[path[1]], fqn(path[0])
        paths[name] = raw
        info = _StorageInfo(layout.files[item.file].name, item.offset, item.nbytes)
        if item.kind == "object":
            state[name] = dcp_metadata.BytesStorageMetadata()
            storage[dcp_metadata.MetadataIndex(name)] = info
            continue
        offsets, size = torch.Size([0] * len(item.shape)), torch.Size(item.shape)
        chunk = dcp_metadata.ChunkStorageMetadata(offsets, size)
        properties = dcp_metadata.TensorProperties(dtype=dtype_of(item.dtype))
        state[name] = dcp_metadata.TensorStorageMetadata(properties, size, [chunk])
        storage[dcp_metadata.MetadataIndex(name, offsets)] = info
    meta = dcp_metadata.StorageMeta(checkpoint_id=directory, save_id=save_id)
    return dcp_metadata.Metadata(state, paths, storage, meta)


def _raw_paths(node: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    if type(node) is int or node[0] == "tensor":
        return [path]
    keys = range(len(node[1])) if node[0] == "list" else map(str, node[1])
    children = node[1] if node[0] == "list" else node[2]
    return [found for key, child in zip(keys, children, strict=True) for found in _raw_paths(child, (*path, key))]


@pytest.mark.parametrize("state", [*ODD, everything()], ids=range(len(ODD) + 1))
def test_equal_to_the_dataclasses_also_from_what_was_kept(run_dir: Path, tmp_path: Path, state: dict[str, Any]) -> None:
    layout = read_layout(make_task(run_dir, state, num_files=3))
    for save_id, directory in (("0a", "/one"), ("b" * 16, "/two/ä\udc80/" + "x" * 300)):
        files = get_format("dcp").index_files(layout, save_id, directory)
        (tmp_path / ".metadata").write_bytes(files[".metadata"])
        read = FileSystemReader(tmp_path).read_metadata()
        assert read.storage_meta is not None
        read.storage_meta.load_id = None
        expected = as_dataclasses(layout, save_id, directory)
        assert read == expected
        assert {type(index.index) for index in read.storage_data} <= {type(None)}
        pickletools.dis(files[".metadata"], out=io.StringIO())  # the stack and the memo are in order


def test_objects_of_other_sizes_move_and_the_rest_is_kept(run_dir: Path) -> None:
    """The second layout of a plan: only what is pickled has another length."""
    state = {"a": torch.ones(3), "text": "short", "model": {"b": torch.ones(2, 2), "n": [1, 2]}, "last": "x"}
    first = read_layout(make_task(run_dir, state))
    second = read_layout(make_task(run_dir, {**state, "text": "long " * 5000}))
    assert second.cache is first.cache and second.items != first.items
    for layout in (first, second, first):
        data = get_format("dcp").index_files(layout, "0a", "/d")[".metadata"]
        assert pickle.loads(data) == as_dataclasses(layout, "0a", "/d")


def test_tensors_without_a_plan(run_dir: Path) -> None:
    """A layout that comes from a file has nothing to share, and no templates."""
    kept = read_layout(make_task(run_dir, everything()))
    alone = Layout(kept.files, kept.items, kept.structure, kept.segment_bytes)
    assert alone.cache is not kept.cache
    assert pickle.loads(get_format("dcp").index_files(alone, "0a", "/d")[".metadata"]) == as_dataclasses(
        kept, "0a", "/d"
    )


@pytest.mark.parametrize(
    "value", [0, 1, -1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63 - 1, -(2**63)]
)
def test_integers(value: int) -> None:
    assert pickle.loads(b"\x80\x02%b." % integer(value)) == value


@pytest.mark.parametrize("length", range(6))
def test_tuples_and_strings_that_come_again(length: int) -> None:
    maker = TemplateMaker([])
    strings = Strings(maker.first_string)
    texts = (["x", "", "x", "ä\udc80", "y" * 300, "x"])[:length]
    data = b"%b%b%b" % (maker.start, tuple_of([strings.piece(text) for text in texts]), END)
    assert pickle.loads(data) == tuple(texts)


def test_templates_used_in_any_order_and_more_than_once() -> None:
    specimen = dcp_metadata.MetadataIndex("", torch.Size((0,)))
    maker = TemplateMaker([specimen])
    before, after = maker.template(dcp_metadata.MetadataIndex(mark(0), torch.Size((0, 0))), [mark(0)])
    other = maker.template(dcp_metadata.MetadataIndex("other", torch.Size((7, 7, 7))), ())[0]
    named = [b"%b%b%b" % (before, plain_string(name), after) for name in ("a", "b")]
    data = b"%b%b%b" % (maker.start, tuple_of([other, *named, other, named[0]]), END)
    a, b, o = (
        dcp_metadata.MetadataIndex("a", torch.Size((0, 0))),
        dcp_metadata.MetadataIndex("b", torch.Size((0, 0))),
        dcp_metadata.MetadataIndex("other", torch.Size((7, 7, 7))),
    )
    assert pickle.loads(data) == (o, a, b, o, a)
