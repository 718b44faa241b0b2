"""The connection to one other rank: a gloo group of two, made when it is first needed, and again after a failure."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from stager.ranks.rank_group import RankGroup
from stager.replication.exchange import Peer
from stager.workers.errors import RankFailedError, ReplicationError

_CONNECT_SECS = 20.0  # both are there by then. Less than the rendezvous waits for the store, which is in use meanwhile


class Link:
    """
    Args:
        group: with a rendezvous.
        other: the other rank.
    """

    def __init__(self, group: RankGroup, other: int) -> None:
        self._group = group
        self.ranks = min(group.rank, other), max(group.rank, other)
        self._other = other
        self._group: dist.ProcessGroupGloo | None = None

    def barrier(self, save_id: str) -> Peer:
        """Wait for the other rank's exchange of this save.

        Raises:
            ReplicationError: it does not come, in time or at all, or cannot be reached.
        """
        rendezvous = self._group.rendezvous
        assert rendezvous is not None
        key = self._key(save_id)
        try:
            self._group.barrier(
                key,
                f"the exchange of replicas with rank {self._other}",
                self.ranks,
                b"new" if self._group is None else b"",
            )
            # One of the two may know of a failure that the other has not noticed.
            if self._group is None or rendezvous.read(f"{key}/here/{self._other}") == b"new":
                self.drop()
                own, timeout = self.ranks.index(self._group.rank), timedelta(seconds=_CONNECT_SECS)
                self._group = dist.ProcessGroupGloo(PrefixStore(key, rendezvous.store), own, 2, timeout)
            return Peer(self._group, self.ranks.index(self._other), self._other)
        except RankFailedError as error:
            raise ReplicationError(str(error), self._other) from error
        except RuntimeError as error:
            raise ReplicationError(f"rank {self._other} cannot be reached: {error}", self._other) from error

    def cancel_barrier(self, save_id: str, why: str) -> None:
        """This rank does not come; nothing if both have."""
        self._group.cancel_barrier(self._key(save_id), why, [self._group.rank])

    def drop(self) -> None:
        """Close the connection, after a failure or at the end."""
        self._group = None

    def _key(self, save_id: str) -> str:
        return f"replicas/{self.ranks[0]}-{self.ranks[1]}/{save_id}"
