"""What ``torch.save`` writes for one tensor or object. Needs torch, so it runs in the trainer only.

The archive around a tensor's raw bytes depends on dtype, shape and stride only. So it is taken once from ``torch.save``
itself, which ``torch.serialization.skip_data`` makes leave out the bytes. The checksum in the storage's record is then
that of no bytes: torch's reader does not check it (torch/csrc/.../inline_container: MZ_ZIP_FLAG_DO_NOT_COMPUTE_CRC32 and its
reader built without CRC checks), and stager's own hashes cover every byte.
"""

from __future__ import annotations

import io
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import IO, Any, cast

import torch
from torch.serialization import skip_data

from stager.workers.checkpoint.layout.dtypes import dtype_of, tensor_over
from stager.workers.checkpoint.layout.layout import BLOB_ALIGN_BYTES
from stager.workers.errors import InternalError
from stager.workers.memory.slab import Slab

_save_config: Any
try:
    from torch.utils.serialization import config as _save_config
except ImportError:  # older than torch 2.7
    _save_config = None

_SPARSE_FROM_BYTES = 64 << 20


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
    nbytes = torch_dtype.itemsize
    for length in shape:
        nbytes *= length
    # Memory that is never touched, so it takes no pages. Not torch.empty: deterministic mode would fill it.
    small = nbytes < _SPARSE_FROM_BYTES
    storage: torch.UntypedStorage = _untyped(nbytes) if small else Slab.create(nbytes).storage
    tensor = tensor_over(storage, torch_dtype, shape, stride)
    sink = _Sink()
    with skip_data(), _standard_alignment():
        torch.save(tensor, cast(IO[bytes], sink))
    start = _data_start(sink, nbytes) if nbytes else None
    head, tail = bytearray(), bytearray()
    for position, data in sink.pieces:
        target, base = (head, 0) if start is None or position < start else (tail, start + nbytes)
        at = position - base
        target.extend(b"\0" * (at + len(data) - len(target)))
        target[at : at + len(data)] = data
    if start is not None:
        if len(head) > start:
            raise InternalError("torch.save wrote where skip_data makes it skip; this torch is not supported")
        head.extend(b"\0" * (start - len(head)))
    return bytes(head), bytes(tail)


def _standard_alignment() -> AbstractContextManager[Any]:
    """Override the alignment that users may set for ``torch.save``: trainer and workers must agree on every byte."""
    if _save_config is None or not hasattr(_save_config.save, "storage_alignment"):
        return nullcontext()
    return cast(AbstractContextManager[Any], _save_config.patch("save.storage_alignment", BLOB_ALIGN_BYTES))


def _data_start(sink: _Sink, nbytes: int) -> int:
    """Return the offset of the storage's bytes: the ``nbytes`` that torch.save skipped."""
    end = 0
    for position, data in sink.pieces:
        if position - end >= nbytes and position > end:
            # Padding before the storage (it is aligned to 64 bytes) is written, so the hole is exactly the storage.
            return position - nbytes
        end = max(end, position + len(data))
    raise InternalError(
        f"torch.save wrote the {nbytes} bytes of a storage that it was told to skip; "
        "stager does not support this version of torch"
    )


_untyped: Any = torch.UntypedStorage  # its constructor has no types
