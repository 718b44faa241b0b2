"""Write many small items at once: join their spans in one buffer, and hash each span in it.

Piece by piece (header, bytes, tail; hasher, vector of buffers) an item costs 8 microseconds of Python; here about 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import xxhash

from stager.workers.checkpoint.layout.layout import Layout, Segment

_SMALL_BYTES = 64 << 10  # above this, copying costs more than it saves
_RUN_BYTES = 2 << 20  # stays in the cache

_Around = tuple[bytes, int, int, bytes]  # header, the raw bytes' start and end in the slab, tail and padding


def runs(layout: Layout, segments: Sequence[Segment]) -> Iterator[tuple[bool, Sequence[Segment]]]:
    """Cut ``segments`` into runs: (True, small whole spans that follow each other in a file) or (False, any others)."""
    items, ends = layout.items, layout.ends()
    first, nbytes = 0, 0
    was_small = False
    for position, segment in enumerate(segments):
        length = segment.end - segment.start
        item = items[segment.index]
        small = length <= _SMALL_BYTES and segment.start == item.offset and segment.end == ends[segment.index]
        follows = small and was_small and nbytes + length <= _RUN_BYTES and segment.start != 0
        if position and not (follows or (not small and not was_small)):
            yield was_small, segments[first:position]
            first, nbytes = position, 0
        was_small = small
        nbytes += length
    if segments:
        yield was_small, segments[first:]


class SmallItems:
    """Joins small items. Their headers and tails are made once per plan (``layout_plan.py``).

    Args:
        layout: of the save.
        view: the slab.
        base: the offset in the whole snapshot of the slab's first byte.
        header_and_tail: from an item's index to its header and tail.
    """

    def __init__(
        self, layout: Layout, view: memoryview, base: int, header_and_tail: Callable[[int], tuple[bytes, bytes]]
    ) -> None:
        self._layout = layout
        self._view = view
        self._base = base
        self._header_and_tail = header_and_tail
        num_fixed = layout.cache.num_fixed
        self._kept: list[_Around | None] = layout.cache.once_per_plan("headers and tails", lambda: [None] * num_fixed)
        self._tails: dict[tuple[bytes, int], bytes] = layout.cache.once_per_plan("tails", dict)

    def pack(self, run: Sequence[Segment]) -> tuple[bytes, list[str]]:
        """Return the bytes of a run of whole spans, and the hash of each span, hex."""
        view, base, kept = self._view, self._base, self._kept
        num_kept = len(kept)
        pieces: list[bytes | memoryview] = []
        for segment in run:
            index = segment.index
            around = (kept[index] if index < num_kept else None) or self._make(segment)
            head, start, end, tail = around
            pieces += (head, view[start - base : end - base], tail)
        data = b"".join(pieces)
        spans, position = memoryview(data), run[0].start
        return data, [xxhash.xxh3_128_hexdigest(spans[s.start - position : s.end - position]) for s in run]

    def _make(self, segment: Segment) -> _Around:
        index = segment.index
        item = self._layout.items[index]
        head, tail = self._header_and_tail(index)
        padding = segment.end - item.offset - item.nbytes
        padded = self._tails.setdefault((tail, padding), tail + b"\0" * padding)  # most are the same: kept once
        around = head, item.slab_offset, item.slab_offset + item.data_nbytes, padded
        if index < len(self._kept):
            self._kept[index] = around
        return around
