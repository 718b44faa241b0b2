"""Many small items, read as one stretch of a file, go to their places in memory.

A call of ``memmove`` through ctypes takes half a microsecond, whatever it copies: 10 ms for 20,000 tensors. numpy copies
items of one size in one call, 2 ms for these: it sees the addresses as an array whose elements, of that size, overlap.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

_STEP_BYTES = 64 << 10  # what numpy copies in between: more would be new pages from the system each time
_FEW = 8  # of one size: for these, the calls of numpy take longer than one for each item


def scatter(memory: Any, offsets: Any, nbytes: Any, targets: Sequence[Any]) -> None:
    """Copy items to their targets, which do not overlap.

    Args:
        memory: an array of bytes.
        offsets, nbytes: where in ``memory`` each item is, as arrays of numbers.
        targets: of each item: an address, or a memoryview of as many bytes.
    """
    import numpy as np  # here: the workers, which only write, start without it

    if set(map(type, targets)) != {int}:
        buffer = memory.data
        for offset, size, target in zip(offsets.tolist(), nbytes.tolist(), targets, strict=True):
            if isinstance(target, int):
                ctypes.memmove(target, memory.ctypes.data + offset, size)
            else:
                target[:] = buffer[offset : offset + size]
        return
    addresses = np.array(targets, np.uint64)
    for size, chosen in _by_size(nbytes):
        if len(chosen) < _FEW:
            for offset, target in zip(offsets[chosen].tolist(), addresses[chosen].tolist(), strict=True):
                ctypes.memmove(target, memory.ctypes.data + offset, size)
        elif size:
            lowest = addresses[chosen].min()
            places = (addresses[chosen] - lowest).astype(np.int64)
            there = _elements_at(int(lowest), int(places.max()) + 1, size)
            here = _elements_at(memory.ctypes.data, len(memory) - size + 1, size)
            step = max(1, _STEP_BYTES // size)
            for first in range(0, len(chosen), step):
                some = slice(first, first + step)
                there[places[some]] = here[offsets[chosen[some]]]


def _by_size(nbytes: Any) -> Iterator[tuple[int, Any]]:
    """Iterate over the different sizes, and the numbers of the items that have each."""
    import numpy as np  # here: as above

    order = np.argsort(nbytes, kind="stable")
    ends = np.flatnonzero(np.diff(nbytes[order])) + 1
    for chosen in np.split(order, ends):
        yield int(nbytes[chosen[0]]), chosen


def _elements_at(address: int, count: int, nbytes: int) -> Any:
    """View memory as an array of elements of ``nbytes`` bytes, one of which begins at each byte from ``address`` on.

    Only the elements that somebody asks for need to be there.
    """
    import numpy as np  # here: as above

    interface = {"version": 3, "data": (address, False), "shape": (count,), "strides": (1,), "typestr": f"|V{nbytes}"}
    return np.asarray(SimpleNamespace(__array_interface__=interface))
