"""Copies from devices to the host: on a side stream, behind what the trainer's stream holds now.

Shown on a simulated accelerator (tests/accelerator); not yet run on a GPU.

Large tensors go straight into the slab. Small ones are first gathered on the device, by torch's multi-tensor kernels,
into a buffer laid out like the slab's range they belong to, which then crosses the bus in one transfer: thousands of
transfers of a few KB each would cost several microseconds of launch apiece. There is one synchronisation, at the end.

A slab that is not page-locked, because this device's backend cannot register memory or the limit on locked memory is low, is
reached through two page-locked buffers in turn: while one is filled by the device, the other is copied into the slab.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch

from stager.state.copies import SMALL_BYTES, Copy
from stager.workers.device.byte_copies import copy_many, stretch_of
from stager.workers.device.host_memory import new_pinned
from stager.workers.device.streams import SideStreams
from stager.workers.memory.slab import Slab

_PACK_BYTES = 32 << 20  # device memory that gathering takes at most at a time, per device
_MAX_GAP_BYTES = 64
_BOUNCE_BYTES = 32 << 20  # each of the two buffers; enough that a transfer takes far longer than its launch


def enqueue(copies: Sequence[Copy], leaves: Sequence[torch.Tensor], slab: Slab, streams: SideStreams) -> None:
    """Start copying from devices; ``streams.synchronize()`` waits for the end.

    Args:
        copies: from devices; one at least.
        leaves: the tensors that ``Copy.leaf`` numbers.
    """
    with torch.no_grad(), streams.stream():
        if _bytes_in(slab, copies[0].slab_offset, copies[0].nbytes).is_pinned():
            for group in _groups(copies, leaves):
                gathered = _gather(group, leaves) if len(group) > 1 else None
                if gathered is not None:
                    _bytes_in(slab, gathered[0], gathered[1].nbytes).copy_(gathered[1], non_blocking=True)
                else:
                    for copy in group:
                        copy_by_torch(copy, leaves, slab)
        else:
            start = min(copy.slab_offset for copy in copies)
            end = max(copy.slab_offset + copy.nbytes for copy in copies)
            bounce = _Bounce(slab, min(_BOUNCE_BYTES, end - start))
            for group in _groups(copies, leaves):
                gathered = _gather(group, leaves) if len(group) > 1 else None
                for part in [_as_bytes(copy, leaves) for copy in group] if gathered is None else [gathered]:
                    bounce.copy(*part)
            bounce.finish()


class _Bounce:
    """Copies bytes of devices into a slab that is not page-locked, through two buffers that are.

    Args:
        nbytes: of each buffer.
    """

    def __init__(self, slab: Slab, nbytes: int) -> None:
        self._slab = slab
        self._buffers = new_pinned(nbytes), new_pinned(nbytes)
        self._on_the_way: list[
            tuple[torch.Tensor, torch.Event, int]
        ] = []  # (part of a buffer, when it is there, offset)
        self._next = 0

    def copy(self, slab_offset: int, source: torch.Tensor) -> None:
        """Copy a tensor of bytes, on the current stream of its device."""
        stream = torch.accelerator.current_stream(source.device)
        for part in source.split(len(self._buffers[0])):  # type: ignore[no-untyped-call]  # torch does not annotate it
            if len(self._on_the_way) == len(self._buffers):  # both are in use; the older one is free again after this
                self._empty_oldest()
            target = self._buffers[self._next][: len(part)]
            self._next = 1 - self._next
            target.copy_(part, non_blocking=True)
            self._on_the_way.append((target, stream.record_event(), slab_offset))
            slab_offset += len(part)

    def finish(self) -> None:
        """Wait for what is on the way."""
        while self._on_the_way:
            self._empty_oldest()

    def _empty_oldest(self) -> None:
        part, arrived, slab_offset = self._on_the_way.pop(0)
        arrived.synchronize()
        ctypes.memmove(self._slab.address + slab_offset, part.data_ptr(), part.nbytes)


def _bytes_in(slab: Slab, offset: int, nbytes: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(slab.storage, offset, (nbytes,))  # type: ignore[call-overload,no-any-return]  # torch's stubs lack this form


def _as_bytes(copy: Copy, leaves: Sequence[torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Return (slab offset, bytes on the device) of one copy. A packed one takes as much memory of the device for a while."""
    source = leaves[copy.leaf].detach()
    if not copy.is_packed:
        return copy.slab_offset, bytes_of(source, copy)
    packed = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    return copy.slab_offset, packed.copy_(source).view(-1).view(torch.uint8)


def copy_by_torch(copy: Copy, leaves: Sequence[torch.Tensor], slab: Slab) -> None:
    """Copy one stretch of device memory, or one packed tensor, with ``Tensor.copy_``."""
    source = leaves[copy.leaf].detach()
    if not copy.is_packed:
        source = bytes_of(source, copy)
    target = torch.empty(0, dtype=source.dtype).set_(  # type: ignore[call-overload]  # torch's stubs lack this form
        slab.storage, copy.slab_offset // source.itemsize, source.shape
    )
    target.copy_(source, non_blocking=source.device.type != "cpu")


def bytes_of(source: torch.Tensor, copy: Copy) -> torch.Tensor:
    """View the stretch of memory that a copy reads as uint8, on its device."""
    return stretch_of(source, copy.address, copy.nbytes)


def _groups(copies: Sequence[Copy], leaves: Sequence[torch.Tensor]) -> Iterator[list[Copy]]:
    """Small neighbours of one device together; every other copy alone."""
    group: list[Copy] = []
    for copy in copies:
        if group and not _continues(group, copy, leaves):
            yield group
            group = []
        group.append(copy)
        if copy.nbytes > SMALL_BYTES or copy.is_packed:
            yield group
            group = []
    if group:
        yield group


def _continues(group: list[Copy], copy: Copy, leaves: Sequence[torch.Tensor]) -> bool:
    first, last = group[0], group[-1]
    return (
        not copy.is_packed
        and copy.nbytes <= SMALL_BYTES
        and 0 <= copy.slab_offset - (last.slab_offset + last.nbytes) < _MAX_GAP_BYTES
        and copy.slab_offset + copy.nbytes - first.slab_offset <= _PACK_BYTES
        and leaves[copy.leaf].device == leaves[first.leaf].device
    )


def _gather(group: list[Copy], leaves: Sequence[torch.Tensor]) -> tuple[int, torch.Tensor] | None:
    """Bring small neighbours together on their device. Returns (slab offset, bytes); None if it has no memory left."""
    start = group[0].slab_offset
    nbytes = group[-1].slab_offset + group[-1].nbytes - start
    try:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=leaves[group[0].leaf].device)
    except torch.OutOfMemoryError:
        return None
    copy_many(
        (
            buffer[copy.slab_offset - start : copy.slab_offset - start + copy.nbytes],
            bytes_of(leaves[copy.leaf].detach(), copy),
        )
        for copy in group
    )
    return start, buffer
