"""Ordering the copies of a staging thread behind the trainer's device streams.

NOTE [ Which stream copies what ]
``stage()`` is called in the trainer's thread. Kernels that compute the state may still be running then.

1. trainer   record an event on the current stream of each device that has a context: the *fence*
2. staging   make a side stream of each device wait for the event, and make it the current stream
3. staging   copy, so that the copies see all that the trainer enqueued before ``stage()``, and do not wait for what it
             enqueues later
4. staging   synchronize the side streams, which are the ones that the copies were issued on

A thread starts on device 0, whatever device the trainer uses. So the fence also carries the trainer's device.

Written against torch.accelerator's documentation; not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Fence:
    """What the copies of one ``stage()`` call wait for. Without an accelerator it has no events and does nothing.

    Attributes:
        device_index: current device of the trainer's thread.
        events: (device index, event, side stream).
    """

    device_index: int
    events: tuple[tuple[int, torch.Event, torch.Stream], ...]

    def enter(self) -> None:
        """In the staging thread: issue what follows on the side streams, behind the fence."""
        for _, event, stream in self.events:
            stream.wait_event(event)
            torch.accelerator.set_stream(stream)  # also makes its device the current one
        if self.events:
            _set_index(self.device_index)

    def wait(self) -> None:
        """Return when the copies issued since :meth:`enter` are done."""
        for _, _, stream in self.events:
            stream.synchronize()


class StagingStreams:
    """One side stream for each device, made in the trainer's thread when first needed, kept as long as the stager."""

    def __init__(self) -> None:
        self._streams: dict[int, torch.Stream] = {}

    def fence(self) -> Fence:
        """Mark what the streams of the calling thread hold now."""
        if not torch.accelerator.is_available():
            return Fence(0, ())
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
        """Drop the streams."""
        self._streams.clear()


def wait_current() -> None:
    """Return when all that the calling thread has enqueued is done, on each device in use."""
    for index in _devices_in_use():
        torch.accelerator.current_stream(index).synchronize()


def _devices_in_use() -> list[int]:
    """Devices with a context. An event on another device would create a context there, which takes hundreds of MiB."""
    current = _current_index()
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != "cuda":
        return [current]
    has_context: Any = getattr(torch._C, "_cuda_hasPrimaryContext", lambda index: index == current)
    return [index for index in range(torch.accelerator.device_count()) if index == current or has_context(index)]


def _device(index: int) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # called only if is_available() was true
    return torch.device(accelerator.type, index)


def _current_index() -> int:
    ask: Any = getattr(torch.accelerator, "current_device_index", None) or torch.accelerator.current_device_idx
    return int(ask())


def _set_index(index: int) -> None:
    select: Any = getattr(torch.accelerator, "set_device_index", None) or torch.accelerator.set_device_idx
    select(index)
