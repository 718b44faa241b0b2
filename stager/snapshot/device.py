"""Copies from devices to the host: on a side stream, behind what the trainer's stream holds now.

This module has not been run on a GPU yet.

Large tensors go straight into the pinned slab. Small ones are first gathered on the device, by torch's multi-tensor kernels,
into a buffer laid out like the slab's range they belong to, which then crosses the bus in one transfer: thousands of
transfers of a few KB each would cost several microseconds of launch apiece. There is one synchronisation, at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from stager.state.placement import SMALL_BYTES, Copy
from stager.workers.memory.slab import Slab

_PACK_BYTES = 32 << 20  # device memory that gathering takes at most at a time, per device
_MAX_GAP_BYTES = 64


class SideStreams:
    """A side stream on each accelerator device involved, behind what the trainer's streams hold now. False if there is none.

    NOTE [ Which stream copies what ]
    Kernels that compute the state may still be running when the trainer hands it over.

    1. trainer   make these streams: each waits for what the trainer's current stream on its device holds
    2. copier    make them the current streams, and copy. So the copies see what the trainer enqueued before 1, and do not
                 wait for what it enqueues later
    3. copier    synchronize them: they are the streams that the copies were issued on

    Args:
        devices: all devices of the state. Only torch's current accelerator has streams.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams: list[torch.Stream] = []
        for device in devices:
            if _has_streams(device):
                stream = _side_stream(device)
                stream.wait_stream(torch.accelerator.current_stream(device))
                self._streams.append(stream)
        if self._streams:
            # The device of the last stream becomes the current one in 2. A thread starts on device 0, so that is not the
            # trainer's device unless the trainer's stream comes last.
            trainers = torch.accelerator.current_stream().device
            self._streams.sort(key=lambda stream: stream.device == trainers)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Make these the current streams of the calling thread, and the trainer's device its current device."""
        before = [torch.accelerator.current_stream(stream.device) for stream in self._streams]
        if before:
            before.append(torch.accelerator.current_stream())  # last, because it also restores the current device
        try:
            for stream in self._streams:
                torch.accelerator.set_stream(stream)  # also makes the stream's device the current one
            yield
        finally:
            for stream in before:
                torch.accelerator.set_stream(stream)

    def synchronize(self) -> None:
        """Wait for what was enqueued."""
        for stream in self._streams:
            stream.synchronize()

    def __bool__(self) -> bool:
        return bool(self._streams)


NO_STREAMS = SideStreams(())

_streams: dict[torch.device, torch.Stream] = {}


def _has_streams(device: torch.device) -> bool:
    accelerator = None if device.type == "cpu" else torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


def _side_stream(device: torch.device) -> torch.Stream:
    """Return one stream per device and process: a new stream for every save would use up torch's pool of streams."""
    if device not in _streams:
        _streams[device] = torch.Stream(device)
    return _streams[device]


def enqueue(copies: Sequence[Copy], leaves: Sequence[torch.Tensor], slab: Slab, streams: SideStreams) -> None:
    """Start copying from devices; ``streams.synchronize()`` waits for the end.

    Args:
        copies: from devices.
        leaves: the tensors that ``Copy.leaf`` numbers.
    """
    with torch.no_grad(), streams.stream():
        for group in _groups(copies, leaves):
            if len(group) == 1:
                copy_by_torch(group[0], leaves, slab)
            else:
                _gather(group, leaves, slab)


def copy_by_torch(copy: Copy, leaves: Sequence[torch.Tensor], slab: Slab) -> None:
    """Copy one stretch of device memory, or one packed tensor, with ``Tensor.copy_``."""
    source = leaves[copy.leaf].detach()
    if copy.address >= 0:
        source = bytes_of(source, copy)
    target = torch.empty(0, dtype=source.dtype).set_(  # type: ignore[call-overload]  # torch's stubs lack this form
        slab.storage, copy.slab_offset // source.itemsize, source.shape
    )
    target.copy_(source, non_blocking=source.device.type != "cpu")


def bytes_of(source: torch.Tensor, copy: Copy) -> torch.Tensor:
    """View the stretch of memory that a copy reads as uint8, on its device."""
    storage = source.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=source.device)
    return flat.set_(storage, copy.address - storage.data_ptr(), (copy.nbytes,))  # type: ignore[call-overload,no-any-return]  # torch's stubs lack it


def _groups(copies: Sequence[Copy], leaves: Sequence[torch.Tensor]) -> Iterator[list[Copy]]:
    """Small neighbours of one device together; every other copy alone."""
    group: list[Copy] = []
    for copy in copies:
        if group and not _continues(group, copy, leaves):
            yield group
            group = []
        group.append(copy)
        if copy.nbytes > SMALL_BYTES or copy.address < 0:
            yield group
            group = []
    if group:
        yield group


def _continues(group: list[Copy], copy: Copy, leaves: Sequence[torch.Tensor]) -> bool:
    first, last = group[0], group[-1]
    return (
        copy.address >= 0
        and copy.nbytes <= SMALL_BYTES
        and 0 <= copy.slab_offset - (last.slab_offset + last.nbytes) < _MAX_GAP_BYTES
        and copy.slab_offset + copy.nbytes - first.slab_offset <= _PACK_BYTES
        and leaves[copy.leaf].device == leaves[first.leaf].device
    )


def _gather(group: list[Copy], leaves: Sequence[torch.Tensor], slab: Slab) -> None:
    start = group[0].slab_offset
    nbytes = group[-1].slab_offset + group[-1].nbytes - start
    buffer = torch.empty(nbytes, dtype=torch.uint8, device=leaves[group[0].leaf].device)
    # The multi-tensor kernel wants pairs of one dtype; bytes are right for all, but wider elements are faster.
    pairs: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for copy in group:
        source = bytes_of(leaves[copy.leaf].detach(), copy)
        offset = copy.slab_offset - start
        target = buffer[offset : offset + copy.nbytes]
        if (copy.address | copy.nbytes | target.data_ptr()) % 8 == 0:
            source, target = source.view(torch.int64), target.view(torch.int64)
        targets, sources = pairs[source.dtype]
        targets.append(target)
        sources.append(source)
    for targets, sources in pairs.values():
        torch._foreach_copy_(targets, sources)
    in_slab = torch.empty(0, dtype=torch.uint8).set_(slab.storage, start, (nbytes,))  # type: ignore[call-overload]  # as above
    in_slab.copy_(buffer, non_blocking=True)
