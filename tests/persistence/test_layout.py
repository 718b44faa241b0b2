"""Layout, segments and how they are dealt: every byte once, evenly, always the same way."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stager.state.flatten import flatten
from stager.state.snapshot_plan import Planner
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import FileSpec, Layout, align, num_segments, partition, segments
from stager.workers.checkpoint.layout.layout_check import check_layout
from stager.workers.checkpoint.layout.layout_plan import LayoutPlan

_SIZES = st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=12), max_size=5)


def layout_of(files: list[list[int]], segment_bytes: int) -> Layout:
    """Objects of these sizes, in these files."""
    items, specs = [], []
    for file, sizes in enumerate(files):
        offset = 0
        for nbytes in sizes:
            items.append(Item("object", file, offset, nbytes, offset, nbytes, "", (), ()))
            offset = align(offset + nbytes)
        specs.append(FileSpec(f"f{file}", offset))
    return Layout(
        tuple(specs),
        Items.of(items),
        ["dict", [str(i) for i in range(len(items))], [*range(len(items))]],
        segment_bytes,
    )


@settings(deadline=None)
@given(files=_SIZES, segment_bytes=st.integers(1, 6000))
def test_segments_tile_every_file_exactly(files: list[list[int]], segment_bytes: int) -> None:
    layout = layout_of(files, segment_bytes)
    check_layout(layout)
    reached = [0] * len(layout.files)
    counts = [0] * len(layout.items)
    for segment in segments(layout):
        file = layout.items[segment.index].file
        assert segment.start == reached[file] and 0 < segment.end - segment.start <= segment_bytes
        reached[file] = segment.end
        counts[segment.index] += 1
    assert reached == [spec.nbytes for spec in layout.files]
    assert counts == [num_segments(end - item.offset, segment_bytes) for _, item, end in layout.spans()]


@settings(deadline=None)
@given(files=_SIZES, segment_bytes=st.integers(1, 6000), num_parts=st.integers(1, 9))
def test_parts_hold_every_segment_once_in_order_and_are_balanced(
    files: list[list[int]], segment_bytes: int, num_parts: int
) -> None:
    layout = layout_of(files, segment_bytes)
    parts = partition(layout, num_parts)
    assert len(parts) == num_parts
    assert [segment for part in parts for segment in part] == list(segments(layout))
    largest = max((s.end - s.start for s in segments(layout)), default=0)
    total = sum(spec.nbytes for spec in layout.files)
    for part in parts:
        assert sum(s.end - s.start for s in part) <= total / num_parts + largest
    assert partition(layout, num_parts) == parts


@settings(deadline=None)
@given(
    files=_SIZES, segment_bytes=st.integers(1, 6000), num_parts=st.integers(1, 9), whole_bytes=st.integers(0, 20_000)
)
def test_files_that_are_dealt_whole_are_in_one_part(
    files: list[list[int]], segment_bytes: int, num_parts: int, whole_bytes: int
) -> None:
    layout = layout_of(files, segment_bytes)
    parts = partition(layout, num_parts, whole_bytes)
    assert [segment for part in parts for segment in part] == list(segments(layout))
    unit = segment_bytes
    for number, spec in enumerate(layout.files):
        holders = [part for part in parts if any(layout.items[s.index].file == number for s in part)]
        if spec.nbytes <= whole_bytes:
            assert len(holders) <= 1
            unit = max(unit, spec.nbytes)
    total = sum(spec.nbytes for spec in layout.files)
    assert all(sum(s.end - s.start for s in part) <= total / num_parts + unit for part in parts)


_SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple)
_DTYPES = st.sampled_from([torch.float32, torch.bool, torch.complex64, torch.bfloat16, torch.int64])


@settings(deadline=None)
@given(
    tensors=st.lists(st.tuples(_SHAPES, _DTYPES), max_size=12),
    num_files=st.integers(1, 4),
    objects=st.lists(st.integers(1, 300), max_size=3),
)
def test_planned_layouts_are_what_a_reader_accepts(
    tensors: list[tuple[tuple[int, ...], torch.dtype]], num_files: int, objects: list[int]
) -> None:
    """The planner's own idea of dense, of spans and of sizes is the one that a manifest is checked by."""
    state: dict[str, object] = {f"t{i}": torch.zeros(shape, dtype=dtype) for i, (shape, dtype) in enumerate(tensors)}
    state |= {
        f"v{i}": torch.zeros(shape, dtype=dtype).t() for i, (shape, dtype) in enumerate(tensors) if len(shape) == 2
    }
    state |= {f"o{i}": nbytes for i, nbytes in enumerate(objects)}
    planned = Planner(get_format("dcp"), num_files, 1 << 16).plan(flatten(state))
    plan = LayoutPlan.from_document(planned.document)
    rows, offset = [], 0
    for nbytes in objects:
        rows.append(Item("object", len(plan.files), offset, nbytes, offset, nbytes, "", (), ()))
        offset = align(offset + nbytes)
    layout = plan.with_objects(rows)
    check_layout(layout)
    assert sum(item.data_nbytes for item in plan.tensors) <= sum(spec.nbytes for spec in plan.files)
    for item in plan.tensors:
        assert item.data_offset % 64 == 0 or not item.data_nbytes  # mappable, and aligned for any dtype
        assert math.prod(item.shape) * getattr(torch, item.dtype).itemsize == item.data_nbytes
