"""Plain values: numbers, texts, lists, dicts, tuples and sets of these, which Python's own fast unpickler may load.

torch's ``weights_only`` unpickler and :mod:`pickle_check` are written in Python: 10 microseconds for each number. A regular
expression tells in a hundredth of that whether a pickle has nothing but the opcodes of plain values. What they could do:

    name a class or function     GLOBAL is accepted for set and frozenset only; nothing else can be called
    ask for a huge memo          an index may be no larger than about the length of the pickle
    take for ever to hash        the elements of a tuple are numbers and texts, few of them; those of a set, such tuples, too
    be nested a million deep     only lists and dicts can be, which nothing hashes; the depth of the value is looked at
                                 before it is returned

Any other pickle takes the slow way. A malformed one is refused there, too.

Opcodes: pickletools, in Python's standard library.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import Any

NOT_PLAIN: Any = object()
"""Stands for the value of a pickle that takes the slow way."""

_MAX_TUPLE = 16
_MAX_DEPTH = 1000
_HEADER = struct.Struct("<4s5H3I2H")
_NAME = b"archive/data.pkl"
_STORED, _MAX_32 = 0, 0xFFFFFFFF
_START, _STOP = b"\x80\x02", b"."
_SETS = {("__builtin__", "set"), ("__builtin__", "frozenset"), ("builtins", "set"), ("builtins", "frozenset")}
_HAS_POSSESSIVE: bool = sys.version_info >= (3, 11)  # without, a match takes memory for each opcode
_NESTS = {list, dict}
_READ_AHEAD = 1 << 17  # as much as the unpickler peeks at
_SHORT_TEXT = 64  # a longer one interrupts the match


def plain_value(blob: bytes) -> Any:
    """Load an archive of ``torch.save`` if its value is plain; else return NOT_PLAIN."""
    data = _pickle_in(blob)
    if data is None or not _is_plain(data):
        return NOT_PLAIN
    try:
        # A stream that can be peeked at: without, the unpickler calls read() for each number.
        value = _Unpickler(io.BufferedReader(io.BytesIO(data), _READ_AHEAD)).load()
    except Exception:  # noqa: BLE001  # malformed; the slow way says how
        return NOT_PLAIN
    return value if _is_shallow(value, len(data)) else NOT_PLAIN


def _pickle_in(blob: bytes) -> bytes | None:
    """Return the first record of an archive, if that is its pickle."""
    if len(blob) < _HEADER.size:
        return None
    magic, _, flags, method, _, _, _, _, nbytes, name_nbytes, extra_nbytes = _HEADER.unpack_from(blob)
    name = blob[_HEADER.size : _HEADER.size + name_nbytes]
    start = _HEADER.size + name_nbytes + extra_nbytes
    if magic != b"PK\3\4" or flags & ~0x800 or method != _STORED or name != _NAME or nbytes == _MAX_32:
        return None
    return blob[start : start + nbytes] if start + nbytes <= len(blob) else None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SETS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def _is_plain(data: bytes) -> bool:
    if data[:2] != _START or not _HAS_POSSESSIVE:
        return False
    magnitude = max(8, len(data).bit_length())
    return any(_runs_to_end(data, _opcodes(magnitude, with_tuples=with_tuples)) for with_tuples in (False, True))


def _runs_to_end(data: bytes, opcodes: re.Pattern[bytes]) -> bool:
    position, end = len(_START), len(data) - len(_STOP)
    while True:
        found = opcodes.match(data, position)
        assert found is not None  # it matches nothing, too
        position = found.end()
        if position >= end or data[position : position + 1] != b"X" or position + 5 > end:
            return position == end and data[end:] == _STOP
        (nbytes,) = struct.unpack_from("<I", data, position + 1)  # BINUNICODE, a long text
        position += 5 + nbytes


@lru_cache(maxsize=64)
def _opcodes(magnitude: int, *, with_tuples: bool) -> re.Pattern[bytes]:
    """Match as many opcodes of plain values as there are.

    Args:
        magnitude: memo indices have at most so many bits.
        with_tuples: tuples and sets, too. That takes three times as long.
    """
    index = _index(magnitude)
    put, get = rb"(?:q.|r" + index + rb")", rb"h.|j" + index
    long_numbers = b"|".join(re.escape(bytes([count])) + b".{%d}" % count for count in range(1, 10))
    texts = b"|".join(re.escape(bytes([count])) + rb"\0\0\0.{%d}" % count for count in range(_SHORT_TEXT))
    numbers = rb"K.|M..|J....|G.{8}|[N\x88\x89]|\x8a(?:" + long_numbers + b")"
    atom = b"(?:" + numbers + b"|X(?:" + texts + b")" + put + b"?+)"
    choices = [atom, rb"[\]}(euas]", put, get]
    if with_tuples:
        few = atom + b"{0,%d}+t" % _MAX_TUPLE
        flat = b"(?:%b%b?+)" % (b"(?:%b\x85|%b{2}\x86|%b{3}\x87|\\(%b|\\))" % (atom, atom, atom, few), put)
        element = b"(?:%b|%b)" % (flat, atom)
        elements = b"(?:\\(%b*+e|%ba|\\(%b*+e)*+" % (atom, element, element)
        made = rb"(?:c__builtin__\n(?:frozen)?set\n" + put + b"?+|" + get + b")"
        choices = [made + rb"\]" + put + b"?+" + elements + rb"\x85" + put + b"?+R", flat, *choices]
    return re.compile(b"(?:" + b"|".join(choices) + b")*+", re.DOTALL)


def _index(magnitude: int) -> bytes:
    """Match four bytes, lowest first: a number of at most so many bits."""
    full, bits = divmod(min(magnitude, 32), 8)
    partial = [b"[\\0-\\x%02x]" % ((1 << bits) - 1)] if full < 4 else []
    return b"".join([b"."] * full + partial + [rb"\0"] * (3 - full))


def _is_shallow(value: Any, most: int) -> bool:
    """Whether a value is not nested too deep for what goes through it by recursion.

    Args:
        most: elements to look at. A value has fewer than its pickle has bytes, unless parts of it are used many times.
    """
    level = [value] if type(value) in _NESTS else []
    for _ in range(_MAX_DEPTH):
        most -= sum(map(len, level))
        if not level or most < 0:
            break
        below = list(chain.from_iterable(map(_elements, level)))
        # Most containers hold none. Their types are looked at without a step of Python code for each.
        level = [] if _NESTS.isdisjoint(map(type, below)) else [child for child in below if type(child) in _NESTS]
    return not level


def _elements(container: Any) -> Iterable[Any]:
    return container.values() if type(container) is dict else container
