"""The connection to one other rank: a gloo group of two, made when it is first needed, and again after a failure."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from stager.ranks.job import Job
from stager.staging.exchange import Peer
from workers.errors import RankFailedError, ReplicationError

_CONNECT_SECS = 20.0  # both are there by then. Less than the board waits for the store, which is in use meanwhile


class Link:
    """
    Args:
        job: with a board.
        other: the other rank.
    """

    def __init__(self, job: Job, other: int) -> None:
        self._job = job
        self.ranks = min(job.rank, other), max(job.rank, other)
        self._other = other
        self._group: dist.ProcessGroupGloo | None = None

    def meet(self, save_id: str) -> Peer:
        """Wait for the other rank's exchange of this save.

        Raises:
            ReplicationError: it does not come, in time or at all, or cannot be reached.
        """
        board = self._job.board
        assert board is not None
        key = self._key(save_id)
        try:
            self._job.meet(
                key,
                f"the exchange of replicas with rank {self._other}",
                self.ranks,
                b"new" if self._group is None else b"",
            )
            # One of the two may know of a failure that the other has not noticed.
            if self._group is None or board.read(f"{key}/here/{self._other}") == b"new":
                self.drop()
                own, timeout = self.ranks.index(self._job.rank), timedelta(seconds=_CONNECT_SECS)
                self._group = dist.ProcessGroupGloo(PrefixStore(key, board.store), own, 2, timeout)
            return Peer(self._group, self.ranks.index(self._other), self._other)
        except RankFailedError as error:
            raise ReplicationError(str(error), self._other) from error
        except RuntimeError as error:
            raise ReplicationError(f"rank {self._other} cannot be reached: {error}", self._other) from error

    def call_off(self, save_id: str, why: str) -> None:
        """This rank does not come; nothing if both have."""
        self._job.call_off(self._key(save_id), why, [self._job.rank])

    def drop(self) -> None:
        """Close the connection, after a failure or at the end."""
        self._group = None

    def _key(self, save_id: str) -> str:
        return f"replicas/{self.ranks[0]}-{self.ranks[1]}/{save_id}"
