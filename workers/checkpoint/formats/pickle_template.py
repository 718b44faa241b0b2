"""Templates: pickles of many similar objects, joined from pieces that the pickler made once.

Pickling 20,000 dataclasses one by one takes half a second. Instead one specimen of each kind is pickled, with marks where
specimens differ, and the pickle is cut at the marks. Filling in strings and numbers is then a join of bytes. The pickler
decides how a specimen is pickled, so a field that a class gains later is no trouble.

The stream is of protocol 2, whose memo has explicit numbers:

    prelude      classes, field names and other frequent objects: put into the memo once, then dropped from the stack
    templates    refer to the prelude, and put into the memo only what they need themselves
    strings      have the memo numbers that follow: the first use has the whole string, later ones its number

Making prelude and templates needs the classes (and torch). Filling in needs only bytes, so workers can do it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from stager.workers.errors import InternalError

PROTOCOL = 2  # torch.save's, too
HEADER, END = b"\x80\x02", b"."  # PROTO 2, STOP
DICT_START, DICT_END = b"}(", b"u"  # EMPTY_DICT MARK, SETITEMS: keys and values in turn go in between
LIST_START, LIST_END = b"](", b"e"  # EMPTY_LIST MARK, APPENDS
_POP = b"0"
_TUPLES = (b")", b"\x85", b"\x86", b"\x87")  # EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3
_RESERVED = 16  # memo entries that a template may need for itself


def mark(number: int) -> str:
    """Return the placeholder for the ``number``-th value to fill in."""
    return f"\0mark {number}\0"


def number_mark(number: int) -> int:
    """Return the placeholder for a value where the class accepts only a number."""
    return 0x5EA1C000 + number


class TemplateMaker:
    """Makes the templates of one pickle.

    Args:
        prelude: objects whose parts templates refer to.

    Attributes:
        start: the first bytes of the pickle: header and prelude.
        first_string: the first memo number that is free for :class:`Strings`.
    """

    def __init__(self, prelude: list[Any]) -> None:
        self._prelude = prelude  # kept alive, because the memo knows objects by their address
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, PROTOCOL)
        pickler.dump(prelude)
        self._memo = pickler.memo.copy()
        self.start = buffer.getvalue()[: -len(END)] + _POP
        self.first_string = len(self._memo) + _RESERVED

    def template(self, specimen: Any, marks: Sequence[str | int]) -> tuple[bytes, ...]:
        """Pickle ``specimen`` and cut it at its ``marks``; each is in it once, in this order."""
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, PROTOCOL)
        pickler.memo = self._memo.copy()
        pickler.dump(specimen)
        data, largest = _without_unused_puts(buffer.getvalue())
        if largest >= self.first_string:
            raise InternalError(f"the pickle of {type(specimen).__name__} needs more than {_RESERVED} memo entries")
        rest = data[len(HEADER) : -len(END)]
        pieces = []
        for number, text in enumerate(marks):
            piece, found, rest = rest.partition(plain_string(text) if isinstance(text, str) else integer(text))
            if not found:
                raise InternalError(f"mark {number} is not in the pickle of {type(specimen).__name__}")
            pieces.append(piece)
        return (*pieces, rest)


class Strings:
    """Strings of one pickle. The pieces must be used in the order in which they were made."""

    def __init__(self, first_string: int) -> None:
        self._first = first_string
        self._strings: dict[str, bytes] = {}

    def piece(self, text: str) -> bytes:
        """Return the pickle of a string: in full at its first use, then by its memo number."""
        known = self._strings.get(text)
        if known is not None:
            return known
        number = (self._first + len(self._strings)).to_bytes(4, "little")
        self._strings[text] = b"j" + number
        return b"%br%b" % (plain_string(text), number)


def _without_unused_puts(data: bytes) -> tuple[bytes, int]:
    """Drop the memo entries that nothing refers to, so that a template can be used again.

    Returns the pickle, and the largest memo number that it still puts.
    """
    got: set[Any] = set()
    puts: list[tuple[Any, int, int]] = []
    for (operation, argument, start), (_, _, end) in pairwise(pickletools.genops(data)):
        assert start is not None and end is not None  # bytes have positions
        if "GET" in operation.name:
            got.add(argument)
        elif "PUT" in operation.name:
            puts.append((argument, start, end))
    pieces, position = [], 0
    for argument, start, end in puts:
        if argument not in got:
            pieces.append(data[position:start])
            position = end
    return b"".join((*pieces, data[position:])), max((put[0] for put in puts if put[0] in got), default=0)


def plain_string(text: str) -> bytes:
    """Pickle a string without a memo entry."""
    data = text.encode("utf-8", "surrogatepass")
    return b"X%b%b" % (len(data).to_bytes(4, "little"), data)


def integer(value: int) -> bytes:
    """Pickle an integer."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a%c%b" % (len(data), data)


def tuple_of(elements: list[bytes]) -> bytes:
    """Pickle a tuple of pickled elements."""
    if len(elements) < len(_TUPLES):
        return b"".join(elements) + _TUPLES[len(elements)]
    return b"(%bt" % b"".join(elements)


def list_of(elements: list[bytes]) -> bytes:
    """Pickle a list of pickled elements."""
    if len(elements) == 1:
        return b"]%ba" % elements[0]
    return LIST_START + b"".join(elements) + LIST_END


def fill(pieces: Sequence[bytes], values: Iterable[bytes]) -> bytes:
    """Join a template's pieces with values between them."""
    first, *others = pieces
    return first + b"".join(value + piece for value, piece in zip(values, others, strict=True))
