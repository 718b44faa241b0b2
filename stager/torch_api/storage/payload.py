"""The bytes of one value: what stands before its raw bytes, the raw bytes where they lie in memory, what stands after."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch

from stager.workers.checkpoint.formats.torch_save import header_and_tail, object_blob
from stager.workers.checkpoint.layout.dtypes import dtype_of, name_of
from stager.workers.checkpoint.layout.layout import contiguous_stride, is_dense
from stager.workers.memory.pages import bytes_at


@dataclass(frozen=True, slots=True)
class Payload:
    """Attributes:
    kind: "tensor" or "object".
    dtype, shape, stride: of a tensor; "", (), () for an object.
    head, data, tail: the blob.
    owner: what has to stay alive as long as ``data`` is used.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    head: bytes
    data: memoryview
    tail: bytes
    owner: object

    @property
    def nbytes(self) -> int:
        return len(self.head) + len(self.data) + len(self.tail)


def payload_of(value: torch.Tensor | io.BytesIO) -> Payload:
    """What a planner resolved, ready to be written; a tensor on a device is copied to the CPU here."""
    if isinstance(value, io.BytesIO):
        return _object(value.getbuffer(), value)
    tensor = value.detach()
    dtype = name_of(tensor.dtype)
    if not _is_raw(tensor, dtype):
        blob = object_blob(tensor if tensor.is_meta else tensor.cpu())
        return _object(memoryview(blob), blob)
    tensor = tensor.resolve_conj().resolve_neg().cpu()
    shape = tuple(tensor.shape)
    stride = contiguous_stride(shape)
    if tensor.numel() and tensor.stride() != stride:
        if is_dense(shape, tensor.stride()):
            stride = tensor.stride()
        else:
            tensor = tensor.contiguous()
    head, tail = header_and_tail(dtype, shape, stride)
    data = bytes_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return Payload("tensor", dtype, shape, stride, head, data, tail, tensor)


def _object(data: memoryview, owner: object) -> Payload:
    return Payload("object", "", (), (), b"", data, b"", owner)


def _is_raw(tensor: torch.Tensor, dtype: str) -> bool:
    """Whether it is nothing but its raw bytes; torch.save keeps all the others exactly, as objects."""
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        return False
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        return False
    try:
        dtype_of(dtype)
    except ValueError:
        return False
    return True
