"""``data.pkl`` of a ``torch.save`` archive, joined from values that are pickled apart.

A *fragment* is a pickle without its first two bytes (the protocol) and its last one (the end): code that leaves one value on
the stack. A fragment refers only to memo entries of its own, so fragments can follow each other. A tensor's fragment is
``torch.save``'s own output for its dtype, shape and stride, with another storage key.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from stager.workers.checkpoint.formats.object_pickle import PROTOCOL
from stager.workers.checkpoint.formats.torch_save import header_and_tail
from stager.workers.checkpoint.layout.structure import Node
from stager.workers.errors import InternalError

_PUTS = ("BINPUT", "LONG_BINPUT")
START = b"\x80\x02"
END = b"."

Piece = bytes | int
"""Bytes of ``data.pkl``, or the index of the object whose fragment goes there."""


def fragment(value: object) -> bytes:
    """Return the fragment of a value without tensors."""
    return pickle.dumps(value, PROTOCOL)[len(START) : -len(END)]


def tensor_fragment(key: str, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Return the fragment of a tensor whose values are all of the storage ``key``."""
    before, after = _around_key(dtype, shape, stride)
    return b"".join((before, b"X", struct.pack("<I", len(key)), key.encode(), after))


@lru_cache(maxsize=65536)
def _around_key(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[bytes, bytes]:
    head, _ = header_and_tail(dtype, shape, stride)
    name_nbytes, extra_nbytes = struct.unpack_from("<2H", head, 26)  # of the archive's first record, data.pkl
    data = head[30 + name_nbytes + extra_nbytes :]
    ops = [(op.name, arg, position or 0) for op, arg, position in pickletools.genops(data)]
    key = _storage_key(ops)
    end = ops[-1][2]
    return data[len(START) : ops[key][2]], data[ops[key + 1][2] : end]


def _storage_key(ops: list[tuple[str, Any, int]]) -> int:
    """Return the index of the operation that pushes ``key`` of ``("storage", type, key, location, size)``."""
    try:
        last = next(i for i, op in enumerate(ops) if op[0] == "BINPERSID")
        first = max(i for i in range(last) if ops[i][0] == "MARK")
        elements = [i for i in range(first + 1, last) if ops[i][0] not in _PUTS]
        if ops[elements[2]][:2] == ("BINUNICODE", "0"):
            return elements[2]
    except (StopIteration, ValueError, IndexError):
        pass
    raise InternalError("this torch pickles tensors in an unknown way; upgrade stager, or use another format")


def pieces(structure: Node, leaf: Callable[[int], Piece]) -> list[Piece]:
    """Return the whole of ``data.pkl`` as few pieces: neighbouring bytes are joined."""
    joined: list[Piece] = []
    run: list[bytes] = []
    for piece in (START, *_visit(structure, leaf), END):
        if isinstance(piece, bytes):
            run.append(piece)
        else:
            joined += [b"".join(run), piece]
            run = []
    return [*joined, b"".join(run)]


def _visit(node: Node, leaf: Callable[[int], Piece]) -> Iterator[Piece]:
    if type(node) is int:
        yield leaf(node)
        return
    if node[0] == "list":
        yield b"]("
        for child in node[1]:
            yield from _visit(child, leaf)
        yield b"e"
        return
    yield b"}(" if node[0] == "dict" else b"ccollections\nOrderedDict\n)R("
    for key, child in zip(node[1], node[2], strict=True):
        yield fragment(key)
        yield from _visit(child, leaf)
    yield b"u"
    if node[0] == "odict" and node[3] is not None:  # nn.Module.state_dict() sets it on its result
        yield fragment({"_metadata": OrderedDict(node[3])}) + b"b"
