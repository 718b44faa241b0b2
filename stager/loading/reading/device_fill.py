"""Reading into tensors of devices: through page-locked buffers, so that reading and copying overlap.

    large tensors   each reading thread has two buffers: while the device takes one, the next bytes are read into the other
    others          many are read into one of two buffers, which crosses in one transfer; one kernel for each width of
                    elements then puts small ones in their places. Meanwhile the next ones are read into the other buffer

A buffer is written again only when the device has taken what was in it. The copies run on side streams, behind what the
trainer's streams hold: kernels that were queued before ``load()`` see the old values.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from stager.workers.checkpoint.layout.items import Item
from stager.workers.checkpoint.layout.layout import align
from stager.workers.checkpoint.read.blob_reader import CHUNK_BYTES, GROUP_BYTES, BlobReader
from stager.workers.device.byte_copies import copy_many, stretch_of
from stager.workers.device.host_memory import new_pinned
from stager.workers.device.streams import SideStreams
from stager.workers.memory.pages import bytes_at

_SMALL_BYTES = 64 << 10  # up to here one transfer for many, and a kernel, is faster than a transfer for each
_BATCH_BYTES = 32 << 20  # of each of the two buffers that many tensors share

Target = tuple[int, torch.Tensor]
"""An item, and the tensor on a device whose memory takes its bytes as they are."""


def fill_devices(reader: BlobReader, items: Sequence[Item], targets: Sequence[Target]) -> None:
    """Read items into tensors on devices; returns when the bytes are there.

    Raises:
        CorruptCheckpointError, StorageError: reading failed; some of the tensors may be overwritten already.
        UsageError: the current stream captures a graph; nothing is changed.
    """
    if not targets:
        return
    streams = SideStreams({tensor.device for _, tensor in targets})
    large = [target for target in targets if items[target[0]].nbytes > GROUP_BYTES]
    others = [target for target in targets if items[target[0]].nbytes <= GROUP_BYTES]
    try:
        sinks = _Lanes(streams)
        reader.read([index for index, _ in large], [_LargeTarget(sinks, tensor) for _, tensor in large])
        _fill_batches(reader, items, others, streams)
    finally:
        streams.synchronize()


class _Lane:
    """The two buffers of one reading thread, and when the device has taken what is in them."""

    def __init__(self) -> None:
        self._buffers = new_pinned(CHUNK_BYTES), new_pinned(CHUNK_BYTES)
        self._taken: list[torch.Event | None] = [None, None]
        self._current = 0

    def take(self) -> torch.Tensor:
        """Return a buffer that may be written."""
        self._current = 1 - self._current
        taken = self._taken[self._current]
        if taken is not None:
            taken.synchronize()
        return self._buffers[self._current]

    def put(self, nbytes: int, target: torch.Tensor) -> None:
        """Copy the buffer of the last :meth:`take` to its target, on the current stream of the target's device."""
        target.copy_(self._buffers[self._current][:nbytes], non_blocking=True)
        self._taken[self._current] = torch.accelerator.current_stream(target.device).record_event()


class _Lanes:
    """A lane for each thread that reads."""

    def __init__(self, streams: SideStreams) -> None:
        self.streams = streams
        self._lanes: dict[int, _Lane] = {}

    def of_this_thread(self) -> _Lane:
        """Return the calling thread's."""
        ident = threading.get_ident()
        if ident not in self._lanes:
            self._lanes[ident] = _Lane()
        return self._lanes[ident]


class _LargeTarget:
    """A large tensor, as the reader sees it: a :class:`~stager.workers.checkpoint.read.blob_reader.Sink`."""

    def __init__(self, lanes: _Lanes, tensor: torch.Tensor) -> None:
        self._lanes = lanes
        self._tensor = tensor.detach()

    def take(self, nbytes: int) -> memoryview:
        return bytes_at(self._lanes.of_this_thread().take().data_ptr(), nbytes)

    def put(self, start: int, nbytes: int) -> None:
        if nbytes:
            with torch.no_grad(), self._lanes.streams.stream():
                target = stretch_of(self._tensor, self._tensor.data_ptr() + start, nbytes)
                self._lanes.of_this_thread().put(nbytes, target)


def _fill_batches(reader: BlobReader, items: Sequence[Item], targets: Sequence[Target], streams: SideStreams) -> None:
    batches = list(_batches(items, targets))
    if not batches:
        return
    size = max(sum(align(items[index].data_nbytes) for index, _ in batch) for batch in batches)
    buffers = new_pinned(size), new_pinned(size)
    taken: list[torch.Event | None] = [None, None]
    for number, batch in enumerate(batches):
        buffer, event = buffers[number % 2], taken[number % 2]
        if event is not None:
            event.synchronize()
        places, end = [], 0
        for index, _ in batch:
            places.append(end)
            end += align(items[index].data_nbytes)
        reader.read([index for index, _ in batch], [buffer.data_ptr() + at for at in places])
        with torch.no_grad(), streams.stream():
            tensors = [tensor.detach() for _, tensor in batch]
            nbytes = [items[index].data_nbytes for index, _ in batch]
            _spread(buffer[:end], places, nbytes, tensors)
            taken[number % 2] = torch.accelerator.current_stream(tensors[0].device).record_event()


def _batches(items: Sequence[Item], targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Divide targets into batches: of one device, of small ones or of larger ones, each in the order of the files."""

    def kind(target: Target) -> tuple[str, bool]:
        return str(target[1].device), items[target[0]].data_nbytes <= _SMALL_BYTES

    batch: list[Target] = []
    nbytes = 0
    for target in sorted(targets, key=lambda one: (kind(one), one[0])):
        size = align(items[target[0]].data_nbytes)
        if batch and (kind(target) != kind(batch[0]) or nbytes + size > _BATCH_BYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(target)
        nbytes += size
    if batch:
        yield batch


def _spread(
    buffer: torch.Tensor, places: Sequence[int], nbytes: Sequence[int], tensors: Sequence[torch.Tensor]
) -> None:
    """Copy from a page-locked buffer to tensors of one device, on its current stream."""
    targets = [
        stretch_of(tensor, tensor.data_ptr(), size) for tensor, size in zip(tensors, nbytes, strict=True) if size
    ]
    stretches = [slice(at, at + size) for at, size in zip(places, nbytes, strict=True) if size]
    if len(targets) > 1 and max(nbytes) <= _SMALL_BYTES:
        with suppress(torch.OutOfMemoryError):  # the device is full: each crosses alone
            on_device = buffer.to(tensors[0].device, non_blocking=True)
            copy_many((target, on_device[stretch]) for target, stretch in zip(targets, stretches, strict=True))
            return
    for target, stretch in zip(targets, stretches, strict=True):
        target.copy_(buffer[stretch], non_blocking=True)
