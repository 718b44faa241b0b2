"""Who takes part in a checkpoint: this rank, how many there are, and their notice board."""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from stager.ranks.board import Board
from stager.ranks.launch import local_world_size
from workers.errors import ConfigError, RankFailedError

_SHOWN_RANKS = 8
_instances = itertools.count()


@dataclass
class Job:
    """Attributes:
    rank, num_ranks: of those that make a checkpoint together; 0 of 1 for one that saves for itself.
    board: None when there is one rank only.
    nonce: the same on all ranks, and different in every run; "" until it is agreed (``opening.py``).
    timeout_secs: how long a rank waits for another.
    local_size: ranks on this host.
    own_rank: in the process group, whether they save together or not: whose values those of ``PerRank`` are.
    """

    rank: int = 0
    num_ranks: int = 1
    board: Board | None = None
    timeout_secs: float = 600.0
    nonce: str = ""
    local_size: int = 1
    own_rank: int = 0
    _saves: Counter[int] = field(default_factory=Counter)

    @property
    def leads(self) -> bool:
        """Whether it does what one rank does for all."""
        return self.rank == 0

    def save_id(self, step: int) -> str:
        """Of the next save of a step: the same on all ranks."""
        if self.board is None:
            return secrets.token_hex(8)
        self._saves[step] += 1
        return hashlib.blake2b(f"{self.nonce} {step} {self._saves[step]}".encode(), digest_size=8).hexdigest()

    def meet(self, key: str, why: str) -> None:
        """Until every rank has come here.

        Raises:
            RankFailedError: some did not within ``timeout_secs``; they are named, and ``why`` they were waited for.
        """
        board = self.board
        if board is None:
            return
        board.post(f"{key}/here/{self.rank}", b"")
        if board.add(f"{key}/arrived") == self.num_ranks:
            board.post(f"{key}/all", b"")
        if board.wait(f"{key}/all", self.timeout_secs) is None:
            missing = tuple(rank for rank in range(self.num_ranks) if board.read(f"{key}/here/{rank}") is None)
            raise RankFailedError(
                f"{why}: rank {some_ranks(missing)} did not come within {self.timeout_secs:g} s (ranks.timeout_secs)",
                missing,
            )


def some_ranks(ranks: Sequence[int]) -> str:
    """The first few, for a message."""
    return ", ".join(map(str, ranks[:_SHOWN_RANKS])) + (", ..." if len(ranks) > _SHOWN_RANKS else "")


def find_job(together: bool | str, timeout_secs: float) -> Job:
    """From the process group, if there is one.

    Args:
        together: see ``ranks.together`` in the configuration.

    Raises:
        ConfigError: the ranks are to save together, and there is no process group.
    """
    initialized = dist.is_available() and dist.is_initialized()
    if together is True and not initialized:
        raise ConfigError(
            "ranks.together is true, but torch.distributed is not initialized; call init_process_group() before the "
            "Checkpointer is made"
        )
    if together is False or not initialized or dist.get_world_size() == 1:
        own = dist.get_rank() if initialized else 0
        return Job(timeout_secs=timeout_secs, local_size=local_world_size(os.environ), own_rank=own)
    store = dist.distributed_c10d._get_default_store()
    board = Board(store, f"stager/{next(_instances)}")
    rank = dist.get_rank()
    return Job(rank, dist.get_world_size(), board, timeout_secs, own_rank=rank)
