"""Side streams: copies run behind what the trainer's streams hold when they are asked for, and hold up none of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from stager.workers.device.accelerator import has_streams, is_capturing
from stager.workers.errors import UsageError


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

    Raises:
        UsageError: the trainer's stream records a graph.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams: list[torch.Stream] = []
        with_streams = [device for device in devices if has_streams(device)]
        if with_streams and is_capturing():
            raise UsageError(
                f"the current stream of {with_streams[0].type} is recording a graph: nothing runs until the graph is "
                "replayed, so there is nothing to copy yet; save, stage or load before the capture, or between replays"
            )
        for device in with_streams:
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


def _side_stream(device: torch.device) -> torch.Stream:
    """Return one stream per device and process: a new stream for every save would use up torch's pool of streams."""
    if device not in _streams:
        _streams[device] = torch.Stream(device)
    return _streams[device]
