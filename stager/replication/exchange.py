"""Sending one parcel to a rank and receiving one from another, in bounded time, naming the rank that fails.

Messages from one rank to another, in this order:

1. two int64: the kind of what follows (a header or a failure), and its length in bytes
2. the header; or the text of the error that keeps the sender from sending, and nothing more
3. the slabs that the header lists

NOTE [ Who keeps whose replica ]
In a group of n ranks, rank r sends to (r + n//2) mod n and receives from (r - n//2) mod n (:func:`partners`). For even n
these are the same rank and the ranks form pairs, as in torch; for odd n they form a ring.
"""

# mypy: allow-untyped-calls
# (torch annotates neither its storages nor process groups)

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist

from stager.ranks import keys
from stager.ranks.messages import Arrived
from stager.ranks.rank_group import RankGroup
from stager.replication.parcel import Parcel, as_bytes, open_header, unpack
from stager.workers.errors import RankFailedError, ReplicationError

_CONNECT_SECS = 20.0  # both ranks are there by then. Less than the rendezvous waits for the store, which is in use


def partners(rank: int, num_ranks: int) -> tuple[int, int]:
    """Which rank keeps a rank's replica, and whose replica that rank keeps. See NOTE [ Who keeps whose replica ]."""
    return (rank + num_ranks // 2) % num_ranks, (rank - num_ranks // 2) % num_ranks


class _ParcelKind(IntEnum):
    HEADER = 1
    FAILURE = 2


class NothingSentError(ReplicationError):
    """The other rank has nothing to send, and said so. The connection is whole."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another rank: its number in a process group of both, through which it is reached, and its ``rank`` in the job.

    Attributes:
        group: a ``dist.ProcessGroup``, one of its backends, of which torch's annotations do not say what they can, or
            anything that has their ``send()`` and ``recv()``.
        rank: -1: it has none in this job, and ``name`` says who it is.
        name: for messages, if it is not "rank 3".
    """

    group: Any
    group_rank: int
    rank: int
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"rank {self.rank}"


class Receiver(Protocol):
    """Receives one parcel."""

    def begin(self, header: bytes) -> Iterable[torch.Tensor]:
        """The memory to receive to: for each slab that follows a uint8 tensor of its length."""

    def finish(self) -> Any:
        """Return what was received. Called when every slab is there."""


class Unpacking:
    """Receives what :func:`stager.replication.parcel.pack` made, and returns the state dict."""

    def begin(self, header: bytes) -> Iterator[torch.Tensor]:
        self._header = open_header(header)
        self._slabs = [torch.UntypedStorage(nbytes, device="cpu") for nbytes in self._header.slab_bytes]
        yield from map(as_bytes, self._slabs)

    def finish(self) -> Any:
        return unpack(self._header, self._slabs)


@dataclass
class ExchangeResult:
    """How an exchange ended: what the receiver returned, and what went wrong in either direction."""

    received: Any = None
    not_received: ReplicationError | None = None
    not_sent: ReplicationError | None = None


class Exchange:
    """One exchange: a parcel to one rank, and one from another, which may be the same.

    A process group whose exchange failed may have lost connections: make a new one before the next exchange.

    Args:
        device: where messages travel.
        timeout: for the whole exchange.
    """

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        self._device = device
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout.total_seconds()
        self._tag = 0

    def run(
        self,
        parcel: Parcel | Exception,
        destination: Peer | ReplicationError | None,
        source: Peer | ReplicationError | None,
        receiver: Receiver | None,
    ) -> ExchangeResult:
        """Send ``parcel``, and receive what ``source`` sends.

        Both directions run to their end even if one fails: a dead rank then costs a neighbour only what that one needed
        from the dead rank.

        Args:
            parcel: what to send; an exception: why there is nothing to send.
            destination, source: an error: why that rank cannot be reached. It is returned for that direction. None: nothing
                travels in that direction.
            receiver: None if ``source`` is.
        """
        result = ExchangeResult()
        pending: list[tuple[Any, Any]] = []

        def send() -> None:
            nonlocal pending
            if destination is None:
                return
            try:
                pending = self._post(parcel, _reachable(destination))
            except ReplicationError as error:
                result.not_sent = error

        def receive() -> None:
            if source is None or receiver is None:
                return
            try:
                result.received = self._receive(_reachable(source), receiver)
            except ReplicationError as error:
                result.not_received = error

        # With CPU tensors all sends can be posted first. Device backends run one queue per pair of ranks: of two ranks that
        # send to each other one must receive first, or each waits for the other.
        receives_first = (
            self._device.type != "cpu"
            and isinstance(destination, Peer)
            and destination.group.rank() > destination.group_rank
        )
        try:
            for step in (receive, send) if receives_first else (send, receive):
                step()
        finally:  # wait for the sends: the memory is the caller's again afterwards
            try:
                for work, _ in pending:
                    assert isinstance(destination, Peer)
                    self._wait(work, destination, "sending to")
            except ReplicationError as error:
                result.not_sent = error
        return result

    def _post(self, parcel: Parcel | Exception, peer: Peer) -> list[tuple[Any, Any]]:
        works = []
        try:
            for tag, tensor in enumerate(_messages(parcel)):
                wire = tensor.to(self._device)  # kept beside the work: the memory must outlive the sending
                works.append((peer.group.send([wire], peer.group_rank, tag), wire))
        except RuntimeError as error:
            raise self._peer_failed(peer, "sending to", error) from error
        return works

    def _receive(self, peer: Peer, receiver: Receiver) -> Any:
        self._tag = 0
        kind, nbytes = self._receive_tensor(torch.zeros(2, dtype=torch.int64), peer).tolist()
        data = self._receive_tensor(torch.empty(nbytes, dtype=torch.uint8), peer).numpy().tobytes()
        if kind == _ParcelKind.FAILURE:
            raise NothingSentError(f"{peer} has nothing to send: {data.decode()}", peer.rank)
        for tensor in receiver.begin(data):
            self._receive_tensor(tensor, peer)
        return receiver.finish()

    def _receive_tensor(self, tensor: torch.Tensor, peer: Peer) -> torch.Tensor:
        wire = tensor.to(self._device)
        try:
            work = peer.group.recv([wire], peer.group_rank, self._tag)
        except RuntimeError as error:
            raise self._peer_failed(peer, "receiving from", error) from error
        self._tag += 1
        self._wait(work, peer, "receiving from")
        if wire is not tensor:
            tensor.copy_(wire)
        return tensor

    def _wait(self, work: Any, peer: Peer, doing: str) -> None:
        left = max(self._deadline - time.monotonic(), 0.001)
        try:
            done = work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            raise self._peer_failed(peer, doing, error) from error
        if done is False:
            raise self._peer_failed(peer, doing, TimeoutError("the wait ended without the message"))

    def _peer_failed(self, peer: Peer, doing: str, error: Exception) -> ReplicationError:
        secs = self._timeout.total_seconds()
        return ReplicationError(
            f"{doing} {peer} failed (it died, or did not answer within {secs:g} s): {error}", peer.rank
        )


def _reachable(peer: Peer | ReplicationError) -> Peer:
    if isinstance(peer, ReplicationError):
        raise peer
    return peer


def _messages(parcel: Parcel | Exception) -> Iterator[torch.Tensor]:
    if isinstance(parcel, Parcel):
        kind, data = _ParcelKind.HEADER, parcel.header
    else:
        kind, data = _ParcelKind.FAILURE, f"{type(parcel).__name__}: {parcel}".encode()
    yield torch.tensor([kind, len(data)], dtype=torch.int64)
    yield torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if isinstance(parcel, Parcel):
        yield from parcel.slabs


class PartnerLink:
    """The connection to one other rank: a gloo group of two, made when it is first needed, and again after a failure."""

    def __init__(self, group: RankGroup, other: int) -> None:
        self._group = group
        self.ranks = min(group.rank, other), max(group.rank, other)
        self._other = other
        self._process_group: dist.ProcessGroupGloo | None = None

    def barrier(self, save_id: str) -> Peer:
        """Wait for the other rank's exchange of this save. Returns the connection.

        Raises:
            ReplicationError: the other rank does not come, in time or at all, or cannot be reached.
        """
        key = keys.exchange(self.ranks, save_id)
        own = Arrived(connects=self._process_group is None)
        try:
            self._group.barrier(key, f"the exchange of replicas with rank {self._other}", self.ranks, own)
            # Either may know of a failure that the other has not noticed, and then both connect anew.
            if own.connects or self._group.read(f"{key}/here/{self._other}") == Arrived(connects=True):
                self.drop()
                index, timeout = self.ranks.index(self._group.rank), timedelta(seconds=_CONNECT_SECS)
                store = self._group.rendezvous.store_at(key)
                self._process_group = dist.ProcessGroupGloo(store, index, 2, timeout)
            return Peer(self._process_group, self.ranks.index(self._other), self._other)
        except RankFailedError as error:
            raise ReplicationError(str(error), self._other) from error
        except RuntimeError as error:
            raise ReplicationError(f"rank {self._other} cannot be reached: {error}", self._other) from error

    def cancel_barrier(self, save_id: str, why: str) -> None:
        """Tell the other rank that this one does not come to an exchange. No effect if both have come."""
        self._group.cancel_barrier(keys.exchange(self.ranks, save_id), why, (self._group.rank,))

    def drop(self) -> None:
        """Close the connection, after a failure or at the end."""
        self._process_group = None
