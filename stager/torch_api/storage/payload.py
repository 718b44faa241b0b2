"""The bytes to write for one value: head, raw bytes in place in memory, tail."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch

from stager.workers.checkpoint.formats.dcp import object_blob
from stager.workers.checkpoint.formats.torch_save import header_and_tail
from stager.workers.checkpoint.layout.dtypes import dtype_of, name_of
from stager.workers.checkpoint.layout.layout import contiguous_stride, is_dense
from stager.workers.memory.pages import bytes_at


@dataclass(frozen=True, slots=True)
class Payload:
    """A value that is ready to be written.

    Attributes:
        kind: "tensor" or "object".
        dtype, shape, stride: of a tensor; "", (), () for an object.
        head, data, tail: the bytes, in this order. ``data`` is a view of the value's memory.
        owner: has to stay alive as long as ``data`` is used.
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
        """Size of head, data and tail."""
        return len(self.head) + len(self.data) + len(self.tail)


def payload_of(value: torch.Tensor | io.BytesIO) -> Payload:
    """Make the payload of a value that a planner resolved. A tensor on a device is copied to the CPU."""
    if isinstance(value, io.BytesIO):
        return _object(value.getbuffer(), value)
    tensor = value.detach()
    dtype = name_of(tensor.dtype)
    if not _is_raw(tensor, dtype):
        blob = object_blob(tensor if tensor.is_meta else tensor.cpu()).blob
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
    """Whether raw bytes, dtype, shape and stride are all of the tensor; others are pickled by torch.save, which is exact."""
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        return False
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        return False
    try:
        dtype_of(dtype)
    except ValueError:
        return False
    return True
