"""The layout of a checkpoint: where every byte comes from and goes to. The trainer fixes it before the first write.

Three sides agree on it: ``stager.state.snapshot_plan`` makes it, ``persist`` writes by it, ``manifest`` records it.

    item      one tensor, one pickled object, or one *trailer*: bytes that a format puts at the end of a file
    blob      the item in its file. A tensor's blob is a header, the raw bytes, and a tail; in the ``dcp`` format it is a
              complete ``torch.save`` file. An object's or a trailer's blob is only its bytes
    span      from the start of a blob to the start of the next one, padding included; the spans of a file tile it
    segment   a run of a span, of at most ``segment_bytes``. One worker writes it, and it has one hash

Hence exactly one hash covers each byte of each file. In the manifest, items are rows (``ROW_COLUMNS``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress, groupby
from operator import ne
from typing import Any, TypeVar

from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.structure import Node

BLOB_ALIGN_BYTES = 64  # what torch.save aligns a storage to within its file

Templates = Mapping[str, tuple[bytes, ...]]
"""Pieces of bytes by name. The format says what each is for (``formats/dcp.py``)."""

T = TypeVar("T")

# The dtypes that every supported torch has, by bytes: workers start without torch. For any other name, torch decides.
_BY_SIZE = {
    1: "bool uint8 int8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz",
    2: "uint16 int16 float16 bfloat16",
    4: "uint32 int32 float32 complex32",
    8: "uint64 int64 float64 complex64",
    16: "complex128",
}
SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class FileSpec:
    """A data file of the checkpoint: its name inside the directory, and its exact size in bytes."""

    name: str
    nbytes: int


@dataclass(slots=True, eq=False, repr=False)
class PlanCache:
    """Values that were worked out for a plan, by name; see NOTE [ Once per plan ] in ``layout_plan.py``.

    Attributes:
        num_fixed: the first so many items are the same in every layout that shares this cache: the tensors.
        templates: what the trainer made; None in a process that got the layout from elsewhere (a save record, a manifest).
        is_of_plan: whether the layouts of one plan share the cache. Otherwise it belongs to one layout, which never changes.
    """

    num_fixed: int = 0
    templates: Templates | None = None
    is_of_plan: bool = False
    _fixed: dict[str, Any] = field(default_factory=dict, init=False)
    _changing: dict[str, tuple[Any, Any]] = field(default_factory=dict, init=False)

    def once_per_plan(self, name: str, make: Callable[[], T]) -> T:
        """Return the value ``name``; ``make`` it at the first call. It may depend on fixed items and the structure only."""
        if name not in self._fixed:
            self._fixed[name] = make()
        value: T = self._fixed[name]
        return value

    def until_changed(self, name: str, key: Any, make: Callable[[], T]) -> T:
        """Return the value ``name``; ``make`` it again whenever ``key`` is another than at the last call."""
        if name not in self._changing or self._changing[name][0] != key:
            self._changing[name] = (key, make())
        value: T = self._changing[name][1]
        return value


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a whole checkpoint, or of what one rank contributes to it.

    Attributes:
        files: data files, in order; each item's ``file`` points here.
        items: in file order, then by offset.
        structure: see ``structure.py``; its leaves are indices into ``items``.
        segment_bytes: the most bytes that one hash covers.
        cache: what was worked out for the plan of this layout; the layouts of one plan share it.
    """

    files: tuple[FileSpec, ...]
    items: Items
    structure: Node
    segment_bytes: int
    cache: PlanCache = field(default_factory=PlanCache, init=False, compare=False, repr=False)

    def with_cache(self, cache: PlanCache) -> Layout:
        """Attach the cache of this new layout's plan, and return the layout."""
        object.__setattr__(self, "cache", cache)
        return self

    def files_of_items(self) -> list[int]:
        """Return the file of each item."""
        return self._places()[0]

    def starts(self) -> list[int]:
        """Return where each item's span starts in its file."""
        return self._places()[1]

    def ends(self) -> list[int]:
        """Return where each item's span ends in its file."""
        return self.cache.until_changed("ends", self.varying, self._ends)

    def _ends(self) -> list[int]:
        files, offsets = self._places()
        ends = [*offsets[1:], 0]
        for number in compress(range(len(files)), map(ne, files, [*files[1:], None])):  # the last items of files
            ends[number] = self.files[files[number]].nbytes
        return ends[: len(files)]

    def _places(self) -> tuple[list[int], list[int]]:
        return self.cache.until_changed(
            "places", self.varying, lambda: (self.items.file.tolist(), self.items.offset.tolist())
        )

    @property
    def varying(self) -> tuple[Any, ...]:
        """What differs between two layouts of one plan: file sizes, objects, trailer."""
        return self.files, self.items[self.cache.num_fixed :] if self.cache.is_of_plan else ()

    def num_segments(self) -> int:
        """Return how many segments the whole layout has."""

        def count() -> int:
            spans = zip(self.starts(), self.ends(), strict=True)
            return sum(num_segments(end - start, self.segment_bytes) for start, end in spans)

        return self.cache.until_changed("number of segments", self.varying, count)

    def spans(self) -> Iterator[tuple[int, Item, int]]:
        """Iterate over (index, item, end of the item's span in its file)."""
        for index, (item, end) in enumerate(zip(self.items, self.ends(), strict=True)):
            yield index, item, end


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes ``start`` to ``end`` of a file, within the span of item ``index``."""

    index: int
    start: int
    end: int


def segments(layout: Layout) -> Iterator[Segment]:
    """Iterate over every segment, in file order; :func:`num_segments` says how many an item has."""
    step = layout.segment_bytes
    for index, (offset, end) in enumerate(zip(layout.starts(), layout.ends(), strict=True)):
        if end - offset <= step:  # most
            yield Segment(index, offset, end)
        else:
            for start in range(offset, end, step):
                yield Segment(index, start, min(start + step, end))


def num_segments(span_nbytes: int, segment_bytes: int) -> int:
    """Return into how many segments a span is cut; an empty span is one segment."""
    return max(1, -(-span_nbytes // segment_bytes))


def partition(layout: Layout, num_parts: int, whole_bytes: int = 0) -> list[list[Segment]]:
    """Partition the segments into ``num_parts`` parts of about the same number of bytes.

    A part is contiguous, so it mostly has files of its own: two writers of one file would wait for its inode's lock.

    Args:
        whole_bytes: files up to this size are not cut. Only the writer of a whole file can link it to an older one.
    """
    total = sum(file.nbytes for file in layout.files)
    parts: list[list[Segment]] = [[] for _ in range(num_parts)]
    part, done = 0, 0
    for unit in _units(layout, whole_bytes):
        nbytes = unit[-1].end - unit[0].start
        middle = done + nbytes / 2
        while part < num_parts - 1 and middle * num_parts >= total * (part + 1):
            part += 1
        parts[part] += unit
        done += nbytes
    return parts


def _units(layout: Layout, whole_bytes: int) -> Iterator[list[Segment]]:
    """Iterate over what must stay in one part: a segment, or all segments of a small file."""
    files = layout.files_of_items()
    for file, group in groupby(segments(layout), key=lambda segment: files[segment.index]):
        if layout.files[file].nbytes <= whole_bytes:
            yield list(group)
        else:
            yield from ([segment] for segment in group)


def partition_once(layout: Layout, num_parts: int, whole_bytes: int = 0) -> list[list[Segment]]:
    """Return the result of :func:`partition`, kept for the next save of the plan; do not modify it."""
    key = num_parts, whole_bytes, layout.varying
    return layout.cache.until_changed("partition", key, lambda: partition(layout, num_parts, whole_bytes))


@lru_cache(maxsize=4096)  # models have many tensors and few shapes
def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a C-ordered tensor (last dimension fastest), in elements."""
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))


@lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether the elements fill one stretch of memory: each has a place of its own, and none is unused."""
    if 0 in shape or stride == contiguous_stride(shape):
        return True
    expected = 1
    for step, length in sorted((s, n) for n, s in zip(shape, stride, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= length
    return True


def align(offset: int, to: int = BLOB_ALIGN_BYTES) -> int:
    """Round ``offset`` up to a multiple of ``to`` bytes."""
    return -(-offset // to) * to


def itemsize_of(name: str) -> int:
    """Return the bytes of one element of the dtype called ``name`` ("float32").

    Raises:
        ValueError: this torch has no dtype of that name, or its tensors are more than raw bytes.
    """
    if isinstance(name, str) and (size := SIZES.get(name)):
        return size
    from stager.workers.checkpoint.layout.dtypes import dtype_of

    return dtype_of(name).itemsize
