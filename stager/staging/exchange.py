"""Sending one parcel to a rank and receiving one from another, in bounded time, naming the rank that fails.

Messages from one rank to another, in order: (a) two int64: what follows and its length in bytes; (b) a header, or the
text of the error that keeps the sender from sending; (c) the slabs that the header lists.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor process groups)

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from stager.staging.parcel import Parcel, as_bytes, open_header, unpack
from workers.errors import ReplicationError


class _Kind(IntEnum):
    HEADER = 1
    FAILURE = 2


@dataclass
class Outcome:
    """``arrived``: ``received`` is whole. ``failures``: what went wrong in either direction, first things first."""

    received: Any = None
    arrived: bool = False
    failures: list[ReplicationError] = field(default_factory=list)


class Exchange:
    """One exchange over one process group. ``destination`` and ``source`` are ranks in the group.

    A group whose exchange failed may have lost connections; make a new one before the next exchange.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: timedelta) -> None:
        self._group = group
        self._device = device
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout.total_seconds()
        self._tag = 0

    def run(self, parcel: Parcel | Exception, destination: int, source: int) -> Outcome:
        """Send ``parcel`` (or the news that there is none) and receive what ``source`` sends.

        Both directions run to their end even if one fails, so that a dead rank costs its neighbours nothing that they did
        not need from it.
        """
        # With CPU tensors all sends can be posted first. Device backends run one queue per pair of ranks: of two
        # ranks that send to each other one must receive first, or each waits for the other.
        outcome = Outcome()
        send_first = self._device.type == "cpu" or self._group.rank() < destination
        pending: list[tuple[Any, Any]] = []
        for sending in (True, False) if send_first else (False, True):
            try:
                if sending:
                    pending = self._post(parcel, destination)
                else:
                    outcome.received, outcome.arrived = self._receive(source), True
            except ReplicationError as error:
                outcome.failures.append(error)
        try:
            self._finish(pending, destination)
        except ReplicationError as error:
            outcome.failures.append(error)
        return outcome

    def _post(self, parcel: Parcel | Exception, peer: int) -> list[tuple[Any, Any]]:
        works = []
        try:
            for tag, tensor in enumerate(_messages(parcel)):
                wire = tensor.to(self._device)
                works.append((self._group.send([wire], peer, tag), wire))  # the memory must outlive the sending
        except RuntimeError as error:
            raise self._peer_failed(peer, "sending to", error) from error
        return works

    def _finish(self, works: list[tuple[Any, Any]], peer: int) -> None:
        for work, _ in works:
            self._wait(work, peer, "sending to")

    def _receive(self, peer: int) -> Any:
        self._tag = 0
        kind, nbytes = self._receive_tensor(torch.zeros(2, dtype=torch.int64), peer).tolist()
        data = self._receive_tensor(torch.empty(nbytes, dtype=torch.uint8), peer).numpy().tobytes()
        if kind == _Kind.FAILURE:
            rank = self._global_rank(peer)
            raise ReplicationError(f"rank {rank} has nothing to send: {data.decode()}", rank)
        header = open_header(data)
        slabs = []
        for size in header.slab_bytes:
            slab = torch.UntypedStorage(size, device="cpu")
            self._receive_tensor(as_bytes(slab), peer)
            slabs.append(slab)
        return unpack(header, slabs)

    def _receive_tensor(self, tensor: torch.Tensor, peer: int) -> torch.Tensor:
        wire = tensor.to(self._device)
        try:
            work = self._group.recv([wire], peer, self._tag)
        except RuntimeError as error:
            raise self._peer_failed(peer, "receiving from", error) from error
        self._tag += 1
        self._wait(work, peer, "receiving from")
        if wire is not tensor:
            tensor.copy_(wire)
        return tensor

    def _wait(self, work: Any, peer: int, doing: str) -> None:
        left = max(self._deadline - time.monotonic(), 0.001)
        try:
            done = work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            raise self._peer_failed(peer, doing, error) from error
        if done is False:
            raise self._peer_failed(peer, doing, TimeoutError("the wait ended without the message"))

    def _peer_failed(self, peer: int, doing: str, error: Exception) -> ReplicationError:
        rank = self._global_rank(peer)
        secs = self._timeout.total_seconds()
        return ReplicationError(
            f"{doing} rank {rank} failed (it died, or did not answer within {secs:g} s): {error}", rank
        )

    def _global_rank(self, group_rank: int) -> int:
        return dist.get_global_rank(self._group, group_rank)


def _messages(parcel: Parcel | Exception) -> Iterator[torch.Tensor]:
    if isinstance(parcel, Parcel):
        kind, data = _Kind.HEADER, parcel.header
    else:
        kind, data = _Kind.FAILURE, f"{type(parcel).__name__}: {parcel}".encode()
    yield torch.tensor([kind, len(data)], dtype=torch.int64)
    yield torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if isinstance(parcel, Parcel):
        yield from parcel.slabs
