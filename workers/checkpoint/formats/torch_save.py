"""What ``torch.save`` writes for a tensor or an object, and its parts. Needs torch, so it runs in the trainer only.

The archive around a tensor's raw bytes depends on dtype, shape and stride only. So it is taken once from ``torch.save``
itself, which ``torch.serialization.skip_data`` makes leave out the bytes. The checksum in the storage's record is then
that of no bytes: torch's reader does not check it (torch/csrc/.../inline_container: MZ_ZIP_FLAG_DO_NOT_COMPUTE_CRC32 and its
reader built without CRC checks), and stager's own hashes cover every byte.

The ``torch`` format joins the archive's ``data.pkl`` from values that are pickled apart. A *fragment* is a pickle without
its protocol header and its end: operations that leave one value on the stack. A fragment refers only to memo entries of its
own, so fragments can follow each other. A tensor's fragment is ``torch.save``'s own, with another storage key.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import IO, Any, cast

import torch

from stager.workers.checkpoint.formats.contract import TensorSpecs
from stager.workers.checkpoint.formats.pickle_template import (
    DICT_END,
    DICT_START,
    END,
    HEADER,
    LIST_END,
    LIST_START,
    PROTOCOL,
    plain_string,
)
from stager.workers.checkpoint.formats.torch_settings import torch_defaults
from stager.workers.checkpoint.layout.dtypes import dtype_of, new_storage, tensor_over
from stager.workers.checkpoint.layout.structure import Node, container_of
from stager.workers.checkpoint.layout.tensor_node import is_tensor_node, open_tensor
from stager.workers.errors import InternalError, UnstageableError
from stager.workers.memory.slab import Slab

_SPARSE_FROM_BYTES = 64 << 20
_UNKNOWN_PICKLE = (
    "this version of torch pickles tensors in a way that stager does not know; upgrade stager, or set persistence.format to "
    "dcp. With the newest stager"
)

# A record of a zip archive begins with its local header: at 26 the lengths of the name and the extra field, which follow at
# 30 and stand before the data (APPNOTE.TXT, 4.3.7).
_ZIP_LENGTHS_OFFSET = 26
_ZIP_HEADER_BYTES = 30

Piece = bytes | int
"""Bytes of ``data.pkl``, or the index of the object whose fragment goes there."""


class _Sink(io.RawIOBase):
    """A stream that keeps what is written. Skipped bytes take no memory."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            raise OSError("this stream has no known size; cannot seek from its end")
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def write(self, data: Any) -> int:
        self.pieces.append((self._position, bytes(data)))
        self._position += len(data)
        return len(data)


@lru_cache(maxsize=65536)
def header_and_tail(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Return the bytes that ``torch.save`` writes before and after the raw bytes of a dense tensor."""
    torch_dtype = dtype_of(dtype)
    nbytes = torch_dtype.itemsize * math.prod(shape)
    # Memory that is never touched, so it takes no pages. Not torch.empty: deterministic mode would fill it.
    storage = new_storage(nbytes) if nbytes < _SPARSE_FROM_BYTES else Slab.create(nbytes).storage
    sink = _Sink()
    with torch_defaults(skips_data=True):
        torch.save(tensor_over(storage, torch_dtype, shape, stride), cast(IO[bytes], sink))
    start = _data_start(sink, nbytes)
    head, tail = bytearray(start), bytearray()
    for position, data in sink.pieces:
        target, at = (head, position) if position < start else (tail, position - start - nbytes)
        target.extend(b"\0" * (at + len(data) - len(target)))
        target[at : at + len(data)] = data
    if len(head) > start:
        raise InternalError(
            "torch.save wrote where skip_data makes it skip; use a version of torch that stager supports. If you do"
        )
    return bytes(head), bytes(tail)


def _data_start(sink: _Sink, nbytes: int) -> int:
    """Return the offset of the storage's bytes: the ``nbytes`` that torch.save skipped, or the end if there are none."""
    end = 0
    for position, data in sink.pieces:
        if nbytes and position - end >= nbytes and position > end:
            # Padding before the storage (it is aligned to 64 bytes) is written, so the hole is exactly the storage.
            return position - nbytes
        end = max(end, position + len(data))
    if not nbytes:
        return end
    raise InternalError(
        f"torch.save wrote the {nbytes} bytes of a storage that it was told to skip; "
        "this version of torch is not supported: install one that docs/index.md names"
    )


def headers_and_tails_of(tensors: TensorSpecs) -> list[tuple[bytes, bytes]]:
    """Return :func:`header_and_tail` of each kind of tensors.

    Raises:
        UnstageableError: ``torch.save`` cannot write a tensor.
    """
    around = []
    for code, kind in enumerate(tensors.kinds):
        try:
            around.append(header_and_tail(kind.dtype, kind.shape, kind.stride))
        except Exception as error:
            first = tensors[tensors.codes.tolist().index(code)]
            raise UnstageableError(first.describe(), f"torch.save cannot write {kind.dtype}: {error}") from error
    return around


def tensor_fragment(key: str, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Return the fragment of a tensor whose values are all of the storage ``key``."""
    before, after = _around_key(dtype, shape, stride)
    return b"".join((before, plain_string(key), after))


@lru_cache(maxsize=65536)
def _around_key(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Return the bytes before and after the storage key in a tensor's fragment."""
    archive_start, _ = header_and_tail(dtype, shape, stride)  # its first record is data.pkl, the pickle of the tensor
    name_nbytes, extra_nbytes = struct.unpack_from("<2H", archive_start, _ZIP_LENGTHS_OFFSET)
    data = archive_start[_ZIP_HEADER_BYTES + name_nbytes + extra_nbytes :]
    ops = [(op.name, arg, position or 0) for op, arg, position in pickletools.genops(data)]
    key = _storage_key(ops)
    # Without the pickle's protocol header and its end, a fragment remains (see the head of this file).
    (*_, key_start), (*_, key_end), (*_, end) = ops[key], ops[key + 1], ops[-1]
    return data[len(HEADER) : key_start], data[key_end:end]


def _storage_key(ops: list[tuple[str, Any, int]]) -> int:
    """Return the index of the operation that pushes ``key`` of ``("storage", type, key, location, size)``.

    BINPERSID turns that tuple, which begins at the MARK before it, into a storage. PUTs name what is on the stack for
    later use; they push nothing.
    """
    try:
        last = next(i for i, op in enumerate(ops) if op[0] == "BINPERSID")
        first = max(i for i in range(last) if ops[i][0] == "MARK")
        key = [i for i in range(first + 1, last) if ops[i][0] not in ("BINPUT", "LONG_BINPUT")][2]
        if ops[key][:2] == ("BINUNICODE", "0"):
            return key
    except (StopIteration, ValueError, IndexError):
        pass
    raise InternalError(_UNKNOWN_PICKLE)


def data_pkl(structure: Node, leaf: Callable[[int], Piece]) -> list[Piece]:
    """Return the whole of ``data.pkl`` as few pieces: neighbouring bytes are joined."""
    pieces: list[Piece] = []
    for kind, run in groupby((HEADER, *_fragments(structure, leaf), END), key=type):
        group: list[Any] = list(run)
        pieces += [b"".join(group)] if kind is bytes else group
    return pieces


def _fragments(node: Node, leaf: Callable[[int], Piece]) -> Iterator[Piece]:
    """Iterate over what pickles ``node``: the operations that make its containers, and the fragments of its leaves."""
    if type(node) is int:
        yield leaf(node)
        return
    if is_tensor_node(node):
        yield from _tensor_fragments(node, leaf)
        return
    kind, keys, children, metadata = container_of(node)
    if kind == "list":
        yield LIST_START
        for child in children:
            yield from _fragments(child, leaf)
        yield LIST_END
        return
    # GLOBAL names the class, EMPTY_TUPLE and REDUCE call it, and MARK begins its keys and values.
    yield DICT_START if kind == "dict" else b"ccollections\nOrderedDict\n" + b")R("
    for key, child in zip(keys, children, strict=True):
        yield _fragment(key)
        yield from _fragments(child, leaf)
    yield DICT_END
    if metadata is not None:  # BUILD sets the attribute, which nn.Module.state_dict() sets on its result
        yield _fragment({"_metadata": OrderedDict(metadata)}) + b"b"


def _tensor_fragments(node: Node, leaf: Callable[[int], Piece]) -> Iterator[Piece]:
    """Iterate over what pickles a tensor with flags. A recipe is left out: stock readers cannot follow it."""
    inner, flags, _ = open_tensor(node)
    fragment, requires_grad = leaf(inner), flags.get("requires_grad", False)
    if isinstance(fragment, int):  # an object, which was pickled with all that it is
        yield fragment
    elif flags.get("parameter", False):
        # _rebuild_parameter(tensor, requires_grad, OrderedDict()): the arguments become a tuple, and REDUCE calls it.
        end = (b"\x88" if requires_grad else b"\x89") + b"ccollections\nOrderedDict\n)RtR"
        yield b"ctorch._utils\n_rebuild_parameter\n(" + fragment + end
    else:
        yield _with_grad(fragment) if requires_grad else fragment


def _with_grad(fragment: bytes) -> bytes:
    """Return a tensor's fragment with True for its argument ``requires_grad``, the only bool in it.

    Not for dtypes without a storage type of their own (float8): torch cannot load what it saves of those with grad.
    """
    if b"_rebuild_tensor_v3" in fragment:
        return fragment
    ops = [(op.name, position or 0) for op, _, position in pickletools.genops(fragment + END)]
    places = [position for name, position in ops if name == "NEWFALSE"]
    if len(places) != 1:
        raise InternalError(_UNKNOWN_PICKLE)
    return fragment[: places[0]] + b"\x88" + fragment[places[0] + 1 :]


def _fragment(value: object) -> bytes:
    """Return the fragment of a value without tensors."""
    return pickle.dumps(value, PROTOCOL)[len(HEADER) : -len(END)]
