"""Write the bytes of a part of a save: take them from the slab, hash, write, sync.

Many small items are written at once: their spans are joined in one buffer, and hashed there. Written piece by piece (header,
bytes, tail), an item costs 8 microseconds of Python. Joined, it costs about 1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import xxhash

from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import Layout, Segment, partition_once
from stager.workers.checkpoint.storage.entry import Entry
from stager.workers.checkpoint.storage.posix.direct_io import BLOCK_BYTES
from stager.workers.checkpoint.storage.posix.files import storage_errors, vanished
from stager.workers.checkpoint.storage.sink import Sink, SinkOptions
from stager.workers.checkpoint.storage.writing import WRITE_BYTES, Pace
from stager.workers.checkpoint.write.write_task import WriteTask
from stager.workers.errors import InternalError
from stager.workers.faults import point
from stager.workers.memory.fill_marks import FillWatch

_SMALL_BYTES = 64 << 10  # above this, copying costs more than it saves
_RUN_BYTES = 2 << 20  # stays in the cache


class _Span(NamedTuple):
    """What the span of an item consists of, in file order: header, raw bytes, then tail and padding.

    ``slab_start`` and ``slab_end``: where the raw bytes lie in the whole snapshot's slab.
    """

    header: bytes
    slab_start: int
    slab_end: int
    tail: bytes


class Run(NamedTuple):
    """Segments that follow each other in a file: all of them small whole spans, which are written at once, or any others."""

    file: int
    is_small: bool
    segments: Sequence[Segment]
    nbytes: int


class Written(NamedTuple):
    """What was written: the hash of each segment, hex, and when the last byte was (``time.time()``)."""

    hashes: list[str]
    at: float


class PartWriter:
    """Writes segments.

    Args:
        filled: waited for before bytes of the slab are read.
        entry: the partial directory.
    """

    def __init__(self, task: WriteTask, layout: Layout, filled: FillWatch, entry: Entry) -> None:
        self._task = task
        self._view = task.slab.view
        self._filled = filled
        self._layout = layout
        self._make_header_and_tail = get_format(task.spec.kind).headers_and_tails(layout)
        self._span_ends = layout.ends()
        self._entry = entry
        self._pace = Pace(task.writing.max_bytes_per_sec)
        self._looked = time.monotonic()  # the caller has
        # Spans of small items. Made once per plan (``layout_plan.py``), for the items that are the same in each of its
        # saves: the first ``num_fixed``.
        cache, num_fixed = layout.cache, layout.cache.num_fixed
        self._kept_spans: list[_Span | None] = cache.once_per_plan("headers and tails", lambda: [None] * num_fixed)
        self._kept_tails: dict[tuple[bytes, int], bytes] = cache.once_per_plan("tails", dict)

    def hash(self, segments: Sequence[Segment]) -> Iterator[str]:
        """Iterate over the hashes of the segments, hex, without writing."""
        for run in runs_of(self._layout, segments):
            if run.is_small:
                yield from self._pack(run.segments)[1]
                continue
            for segment in run.segments:
                hasher = xxhash.xxh3_128()
                for piece in self._pieces(self._layout.items[segment.index], segment):
                    hasher.update(piece)
                yield hasher.hexdigest()

    def write(
        self, runs: Sequence[Run], own_files: Collection[int], known: Mapping[Segment, str], *, sync: bool
    ) -> Written:
        """Write runs of segments.

        Args:
            own_files: files that only this part writes.
            known: hashes that need not be computed again.
            sync: make them durable, too.
        """
        hashes: list[str] = []
        nbytes = sum(run.nbytes for run in runs)
        options = SinkOptions(nbytes, own_files, self._task.writing, sync, self._before_write)
        with closing(self._entry.sink(self._layout, options)) as sink:
            # File by file, so that an error names the file it is about.
            for file, of_file in groupby(runs, key=attrgetter("file")):
                with storage_errors("write", self._path(file)):
                    for run in of_file:
                        if run.is_small:
                            data, of_run = self._pack(run.segments)
                            sink.put(file, run.segments[0].start, data)
                            hashes += of_run
                        else:
                            hashes += [self._write_one(sink, segment, known.get(segment)) for segment in run.segments]
                    sink.flush()
            written = time.time()
            point("part.written")
            if sync:
                sink.sync()
        return Written(hashes, written)

    def _pack(self, run: Sequence[Segment]) -> tuple[bytes, list[str]]:
        """Return the bytes of a run of small whole spans, and the hash of each span, hex."""
        view, kept = self._view, self._kept_spans
        view_start, num_kept = self._task.base, len(kept)  # the slab may have a later piece of the snapshot only
        spans = [
            (kept[segment.index] if segment.index < num_kept else None) or self._span_of(segment) for segment in run
        ]
        if not self._filled.is_whole:
            places = [(span.slab_start, span.slab_end) for span in spans if span.slab_start < span.slab_end]
            if places:
                low, high = min(start for start, _ in places), max(end for _, end in places)
                self._filled.wait_for(low - view_start, high - view_start)
        pieces: list[bytes | memoryview] = []
        for head, start, end, tail in spans:
            pieces += (head, view[start - view_start : end - view_start], tail)
        data = b"".join(pieces)
        joined, position = memoryview(data), run[0].start
        return data, [xxhash.xxh3_128_hexdigest(joined[s.start - position : s.end - position]) for s in run]

    def _span_of(self, segment: Segment) -> _Span:
        """Put together the span of a small item, which is one segment. It is kept if all saves of the plan have it."""
        item = self._layout.items[segment.index]
        head, tail = self._header_and_tail(segment.index)
        padding = segment.end - item.offset - item.nbytes
        padded = self._kept_tails.setdefault((tail, padding), tail + b"\0" * padding)  # most are equal: keep one
        span = _Span(head, item.slab_offset, item.slab_offset + item.data_nbytes, padded)
        if segment.index < len(self._kept_spans):
            self._kept_spans[segment.index] = span
        return span

    def _write_one(self, sink: Sink, segment: Segment, known: str | None) -> str:
        item = self._layout.items[segment.index]
        hasher = xxhash.xxh3_128()
        offset = segment.start
        # A slab begins with a block.
        in_place = (item.slab_offset - self._task.base - item.data_offset) % BLOCK_BYTES == 0
        for piece in self._pieces(item, segment):
            if known is None:
                hasher.update(piece)
            sink.put(item.file, offset, piece, in_place=in_place and item.data_offset <= offset)
            offset += len(piece)
        return known or hasher.hexdigest()

    def _pieces(self, item: Item, segment: Segment) -> Iterator[bytes | memoryview]:
        """Iterate over the bytes of a segment, in file order.

        An item's span is header, raw bytes, tail, padding. A segment is a range of a span, so it has some of each, or none.
        Here ``start``, ``end``, ``low`` and ``high`` are offsets in the file.
        """
        head, tail = self._header_and_tail(segment.index)
        start, end = segment.start, segment.end
        data_end = item.data_offset + item.data_nbytes
        if start < item.data_offset:
            yield head[start - item.offset : end - item.offset]
        low, high = max(start, item.data_offset), min(end, data_end)
        if low < high:
            to_view = (
                item.slab_offset - item.data_offset - self._task.base
            )  # from an offset in the file to one in the view
            while low < high:  # cut at multiples of WRITE_BYTES in the file
                cut = min(high, (low // WRITE_BYTES + 1) * WRITE_BYTES)
                self._filled.wait_for(to_view + low, to_view + cut)
                yield self._view[to_view + low : to_view + cut]
                low = cut
        if end > data_end:
            tail += b"\0" * (self._span_ends[segment.index] - data_end - len(tail))
            yield tail[max(0, start - data_end) : end - data_end]

    def _header_and_tail(self, index: int) -> tuple[bytes, bytes]:
        item = self._layout.items[index]
        head, tail = self._make_header_and_tail(index)
        if item.slab_offset < 0:
            raise InternalError(f"{item} has no place in the slab")
        if (item.offset + len(head), len(head) + item.data_nbytes + len(tail)) != (item.data_offset, item.nbytes):
            raise InternalError(
                f"the worker made a header of {len(head)} bytes and a tail of {len(tail)} bytes for {item}, which do not "
                "fit the offsets that the trainer's plan gives it"
            )
        return head, tail

    def _before_write(self, nbytes: int) -> None:
        point("part.write")
        if time.monotonic() - self._looked >= self._entry.look_secs:
            self._looked = time.monotonic()
            if not self._entry.is_still():  # removed or withdrawn: the rest would be for nothing
                vanished(self._entry.path)
        self._pace.wrote(nbytes)

    def _path(self, file: int) -> str:
        return os.path.join(self._entry.path, self._layout.files[file].name)


def whole_files(layout: Layout, segments: Sequence[Segment]) -> dict[int, list[Segment]]:
    """Return the files that a part has all segments of, and these segments."""
    files = layout.files_of_items()
    groups = groupby(segments, key=lambda segment: files[segment.index])
    by_file = ((file, list(group)) for file, group in groups)
    return {file: group for file, group in by_file if (group[0].start, group[-1].end) == (0, layout.files[file].nbytes)}


def runs_once(layout: Layout, part: int, num_parts: int, whole_bytes: int) -> list[Run]:
    """Return the runs of a part, kept for the next save of the plan; do not modify them."""
    key = num_parts, whole_bytes, layout.varying
    segments = partition_once(layout, num_parts, whole_bytes)[part]
    return layout.cache.until_changed(f"runs of part {part}", key, lambda: list(runs_of(layout, segments)))


def runs_of(layout: Layout, segments: Sequence[Segment]) -> Iterator[Run]:
    """Cut segments into runs."""
    files = layout.files_of_items()
    for file, group in groupby(segments, key=lambda segment: files[segment.index]):
        of_file = list(group)
        for is_small, run in _runs_of_file(layout, of_file):
            yield Run(file, is_small, run, sum(segment.end - segment.start for segment in run))


def _runs_of_file(layout: Layout, segments: Sequence[Segment]) -> Iterator[tuple[bool, Sequence[Segment]]]:
    starts, ends = layout.starts(), layout.ends()
    first, nbytes = 0, 0
    was_small = False
    for position, segment in enumerate(segments):
        length = segment.end - segment.start
        index = segment.index
        small = length <= _SMALL_BYTES and segment.start == starts[index] and segment.end == ends[index]
        follows = small and was_small and nbytes + length <= _RUN_BYTES and segment.start != 0
        if position and not (follows or (not small and not was_small)):
            yield was_small, segments[first:position]
            first, nbytes = position, 0
        was_small = small
        nbytes += length
    if segments:
        yield was_small, segments[first:]
