"""``ReplicationStager``: each rank's state is also kept by another rank, in memory and on that rank's disk.

Which rank keeps whose replica: see NOTE [ Who keeps whose replica ] in ``stager/replication/exchange.py``. Ranks in file
names and messages are global, so that several groups may share a directory.

A ``Checkpointer`` with ``replication.partners`` set keeps its snapshots with the same partners, by the same exchange, in the
background (``stager/replication/``).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from stager.replication.exchange import Exchange, ExchangeResult, Peer, Unpacking, partners
from stager.replication.parcel import Parcel, pack
from stager.torch_api.staging.contracts import AsyncStager, StateDict
from stager.workers.errors import ClosedError, ReplicationError, StagerError, UsageError
from stager.workers.staged_copy.state_file import write_state_file


class ReplicationStager(AsyncStager, AbstractContextManager["ReplicationStager"]):
    """Exchanges state dicts between ranks. ``stage()`` is collective over the group and blocks.

    Args:
        pg: the process group, of two ranks or more; None for the default group.
        timeout: for one whole exchange. A rank that died is noticed at once, one that hangs when the time is up.
        device: where messages travel: the CPU for gloo, a device for device-only backends such as NCCL.
        storage_dir: directory of the replicas on this host; default a new temporary directory, which is never removed.
    """

    _synchronize_after_execute: bool = False

    def __init__(
        self,
        pg: dist.ProcessGroup | None,
        timeout: timedelta = timedelta(minutes=30),
        device: torch.device = torch.device("cpu"),  # noqa: B008  # torch's signature; devices are immutable
        storage_dir: str | None = None,
    ) -> None:
        self._pg = pg
        self._timeout = timeout
        self._device = device
        self._storage_dir = tempfile.mkdtemp(prefix="replication_stager_") if storage_dir is None else storage_dir
        os.makedirs(self._storage_dir, exist_ok=True)
        self._closed = False

    def stage(self, state_dict: StateDict) -> StateDict:
        """Send ``state_dict`` to one rank, receive another's, write that to disk and return it.

        Returns ``state_dict`` itself when torch.distributed is not initialised.

        Raises:
            ReplicationError: a rank died or did not answer in time (``rank`` names it), or the disk failed.
            UnstageableError: this rank's state cannot be copied; the ranks that wait for it are told.
            UsageError: the group has one rank only, or this process is not in it.
        """
        if self._closed:
            raise ClosedError("ReplicationStager.stage() was called after close(); make a new stager")
        if not dist.is_initialized():
            return state_dict
        rank, keeper, kept = self._partners()
        result = self._exchange(lambda: pack(state_dict), keeper, kept)
        if result.not_received is None:  # kept even if sending failed: its owner may need it all the more
            self._persist_state_dict(result.received, rank, kept.rank)
        received: StateDict = _received(result)
        return received

    def load_replica(self, rank: int | None = None, *, weights_only: bool = True) -> StateDict:
        """Read a replica back from ``storage_dir``.

        Args:
            rank: global rank whose state to read. Default: the rank whose replica this rank keeps.
            weights_only: as for ``torch.load``: refuse to run code from the file.

        Raises:
            ReplicationError: there is no such replica, or it cannot be read.
        """
        if rank is None:
            current, _, kept = self._partners()
            path = self._get_persisted_path(current, kept.rank)
        else:
            path = self._find_replica(rank)
        try:
            replica: StateDict = torch.load(path, map_location="cpu", weights_only=weights_only)
        except FileNotFoundError as error:
            raise ReplicationError(
                f"{path}: this rank keeps no such replica; load it after stage() has completed on all ranks of the group"
            ) from error
        except Exception as error:
            raise ReplicationError(f"{path}: the replica cannot be read: {error}") from error
        return replica

    def recover(self, *, weights_only: bool = True) -> StateDict:
        """Get this rank's own state back from the rank that keeps it. Collective over the group, as :meth:`stage`.

        Raises:
            ReplicationError: the keeper died, or has no replica; its rank is named.
        """
        _, keeper, kept = self._partners()
        # This rank sends the replica that it keeps to its owner, and receives its own from the rank that keeps it.
        result = self._exchange(lambda: pack(self.load_replica(weights_only=weights_only)), kept, keeper)
        own: StateDict = _received(result)
        return own

    def synchronize_staging(self) -> None:
        """Do nothing: ``stage()`` blocks."""

    def close(self) -> None:
        """Refuse more work. Replicas stay on disk for :meth:`load_replica`."""
        self._closed = True

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _exchange(self, make_parcel: Callable[[], Parcel], destination: Peer, source: Peer) -> ExchangeResult:
        exchange = Exchange(self._device, self._timeout)
        try:
            parcel = make_parcel()
        except StagerError as error:
            exchange.run(error, destination, source, Unpacking())  # tells the partners; this rank raises its error
            raise
        return exchange.run(parcel, destination, source, Unpacking())

    def _partners(self) -> tuple[int, Peer, Peer]:
        """This rank's global number, the rank that keeps its replica, and the rank whose replica it keeps."""
        group: Any = dist.group.WORLD if self._pg is None else self._pg
        if not isinstance(group, dist.ProcessGroup):  # torch gives non-members a number
            raise UsageError(
                "this process is not in the process group that the stager was given; make it on the ranks of that group only"
            )
        rank, size = group.rank(), group.size()
        if size < 2:
            raise UsageError("replication needs a process group of at least 2 ranks; this one has 1")
        keeper, kept = (Peer(group, other, dist.get_global_rank(group, other)) for other in partners(rank, size))
        return dist.get_global_rank(group, rank), keeper, kept

    def _persist_state_dict(self, state_dict: StateDict, current_rank: int, partner_rank: int) -> None:
        """Write the replica of ``partner_rank``: whole or not at all, on disk when this returns, replacing the last."""
        path = self._get_persisted_path(current_rank, partner_rank)
        try:
            write_state_file(state_dict, path)
        except Exception as error:
            raise ReplicationError(f"{path}: could not write the replica of rank {partner_rank}: {error}") from error

    def _get_persisted_path(self, current_rank: int, partner_rank: int) -> str:
        """Where ``current_rank`` keeps the replica of ``partner_rank``."""
        return os.path.join(self._storage_dir, f"rank_{current_rank}_replica_partner_{partner_rank}.pt")

    def _find_replica(self, rank: int) -> str:
        ending = f"_replica_partner_{rank}.pt"
        with os.scandir(self._storage_dir) as entries:
            paths = [e.path for e in entries if e.name.startswith("rank_") and e.name.endswith(ending)]
        if not paths:
            raise ReplicationError(f"{self._storage_dir}: holds no replica of rank {rank}", rank)
        return max(paths, key=os.path.getmtime)


_ReplicationStager = ReplicationStager


def _received(result: ExchangeResult) -> Any:
    failure = result.not_received or result.not_sent
    if failure is not None:
        raise failure
    return result.received
