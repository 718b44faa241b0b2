"""The connection to one other rank: a gloo group of two, made when it is first needed, and again after a failure."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from stager.ranks import keys
from stager.ranks.messages import Arrived
from stager.ranks.rank_group import RankGroup
from stager.replication.exchange import Peer
from stager.workers.errors import RankFailedError, ReplicationError

_CONNECT_SECS = 20.0  # both ranks are there by then. Less than the rendezvous waits for the store, which is in use


class PartnerLink:
    """Connects this rank to one partner.

    Args:
        group: of several ranks.
        other: the other rank.
    """

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
