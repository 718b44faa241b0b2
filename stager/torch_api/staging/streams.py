"""Order between the trainer's device streams and the copies that a staging thread issues.

NOTE [ Which stream copies what ]
``stage()`` is called on the trainer's thread, whose kernels that produce the state may still be running. For each device
with a context, the trainer's thread records an event on its current stream: the *fence*. The staging thread takes a side
stream per device, makes it wait for the event, makes it the current stream, and only then copies, so that copies see
what the trainer had enqueued before ``stage()``, and nothing waits for what it enqueues after. The streams that are
synchronised are the ones the copies were issued on.
A thread starts on device 0 whatever the trainer uses, so the fence also carries the trainer's device.

Written against torch.accelerator's documentation; not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Fence:
    """What one ``stage()`` call must wait for. ``events`` holds (device index, event, side stream)."""

    device_index: int
    events: tuple[tuple[int, torch.Event, torch.Stream], ...]


class SideStreams:
    """One copy stream per device, made on the trainer's thread when first needed, kept for the stager's life."""

    def __init__(self) -> None:
        self._streams: dict[int, torch.Stream] = {}

    def fence(self) -> Fence | None:
        """Mark, on the calling thread, what its streams hold now. None on a host without an accelerator."""
        if not torch.accelerator.is_available():
            return None
        events = []
        for index in _devices_in_use():
            stream = self._streams.get(index)
            if stream is None:
                stream = self._streams[index] = torch.Stream(_device(index))
            event = torch.Event(_device(index))
            event.record(torch.accelerator.current_stream(index))
            events.append((index, event, stream))
        return Fence(_current_index(), tuple(events))

    def close(self) -> None:
        self._streams.clear()


def enter(fence: Fence) -> None:
    """On the staging thread: issue what follows on the side streams, after what the fence marks."""
    for _, event, stream in fence.events:
        stream.wait_event(event)
        torch.accelerator.set_stream(stream)  # also makes its device the current one
    _set_index(fence.device_index)


def wait(fence: Fence) -> None:
    """Return when the copies issued since :func:`enter` are done."""
    for _, _, stream in fence.events:
        stream.synchronize()


def wait_current() -> None:
    """Return when what the calling thread has queued is done, on each device in use."""
    for index in _devices_in_use():
        torch.accelerator.current_stream(index).synchronize()


def _devices_in_use() -> list[int]:
    """Devices with a context. Asking the others for an event would create one there, hundreds of MiB each."""
    current = _current_index()
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != "cuda":
        return [current]
    has_context: Any = getattr(torch._C, "_cuda_hasPrimaryContext", lambda index: index == current)
    return [index for index in range(torch.accelerator.device_count()) if index == current or has_context(index)]


def _device(index: int) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # only called where is_available() was true
    return torch.device(accelerator.type, index)


def _current_index() -> int:
    ask: Any = getattr(torch.accelerator, "current_device_index", None) or torch.accelerator.current_device_idx
    return int(ask())


def _set_index(index: int) -> None:
    select: Any = getattr(torch.accelerator, "set_device_index", None) or torch.accelerator.set_device_idx
    select(index)
