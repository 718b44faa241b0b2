"""Who takes part in a checkpoint: this rank, how many there are, and their notice rendezvous."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from stager.ranks.launch import local_world_size
from stager.ranks.rendezvous import Rendezvous
from stager.workers.errors import ConfigError, RankFailedError

WARM_UP = -1
"""In place of a step, see :meth:`RankGroup.save_id`."""

_SHOWN_RANKS = 8
_instances = itertools.count()


@dataclass
class RankGroup:
    """Attributes:
    rank, num_ranks: of those that make a checkpoint together; 0 of 1 for one that saves for itself.
    rendezvous: None when there is one rank only.
    nonce: the same on all ranks, and different in every run; "" until it is agreed (``opening.py``).
    timeout_secs: how long a rank waits for another.
    local_size: ranks on this host.
    own_rank: in the process group, whether they save together or not: whose values those of ``PerRank`` are.
    """

    rank: int = 0
    num_ranks: int = 1
    rendezvous: Rendezvous | None = None
    timeout_secs: float = 600.0
    nonce: str = ""
    local_size: int = 1
    own_rank: int = 0
    _saves: Counter[int] = field(default_factory=Counter)

    @property
    def is_coordinator(self) -> bool:
        """Whether it does what one rank does for all."""
        return self.rank == 0

    def close(self) -> None:
        if self.rendezvous is not None:
            self.rendezvous.close()

    def save_id(self, step: int) -> str:
        """Of the next save of a step: the same on all ranks."""
        if self.rendezvous is None:
            return secrets.token_hex(8)
        self._saves[step] += 1
        return hashlib.blake2b(f"{self.nonce} {step} {self._saves[step]}".encode(), digest_size=8).hexdigest()

    def barrier(self, key: str, why: str, ranks: Sequence[int] | None = None, note: bytes = b"") -> None:
        """Until every rank has come here. It ends the same way for all that come, however late: the first to see that all
        are here, or to give up, decides.

        Args:
            key: of the meeting; each is held once.
            ranks: those that come; None: all.
            note: left for the others, at ``<key>/here/<rank>``.

        Raises:
            RankFailedError: some did not come within ``timeout_secs`` of another; they are named, and ``why`` they were
                waited for. Or the meeting was called off.
        """
        rendezvous = self.rendezvous
        if rendezvous is None:
            return
        expected = tuple(range(self.num_ranks)) if ranks is None else tuple(ranks)
        rendezvous.post(f"{key}/here/{self.rank}", note)
        if rendezvous.add(f"{key}/arrived") == len(expected):
            self._decide(key, None)
        end = rendezvous.wait(f"{key}/end", self.timeout_secs)
        if end is None:
            missing = tuple(rank for rank in expected if rendezvous.read(f"{key}/here/{rank}") is None)
            error = f"rank {some_ranks(missing)} did not come within {self.timeout_secs:g} s (ranks.timeout_secs)"
            self._decide(key, {"ranks": missing, "error": error})
            end = rendezvous.wait(f"{key}/end", self.timeout_secs)
        failure: dict[str, Any] | None = {"ranks": (), "error": "a rank died there"} if end is None else json.loads(end)
        if failure is not None:
            raise RankFailedError(f"{why}: {failure['error']}", tuple(failure["ranks"]))

    def smallest(self, name: str, own: int) -> int:
        """Of what the ranks have under a name. Every rank calls it, once.

        Raises:
            RankFailedError: see :meth:`meet`.
        """
        rendezvous = self.rendezvous
        if rendezvous is None:
            return own
        if rendezvous.add(f"{name}/of/{own}") == 1:  # most often all have the same
            rendezvous.post(f"{name}/{rendezvous.add(f'{name}/different')}", str(own).encode())
        self.barrier(name, f"agreeing on {name}")
        notes = [
            rendezvous.wait(f"{name}/{n}", self.timeout_secs)
            for n in range(1, rendezvous.add(f"{name}/different", 0) + 1)
        ]
        return min(int(note) for note in notes if note is not None)

    def cancel_barrier(self, key: str, error: str, ranks: Sequence[int]) -> None:
        """This rank does not come, and nobody is to wait for it; nothing if the meeting has ended."""
        if self.rendezvous is not None:
            self._decide(key, {"ranks": ranks, "error": error})

    def _decide(self, key: str, note: dict[str, Any] | None) -> None:
        assert self.rendezvous is not None
        if self.rendezvous.add(f"{key}/decided") == 1:
            self.rendezvous.post(f"{key}/end", json.dumps(note).encode())


def some_ranks(ranks: Sequence[int]) -> str:
    """The first few, for a message."""
    return ", ".join(map(str, ranks[:_SHOWN_RANKS])) + (", ..." if len(ranks) > _SHOWN_RANKS else "")


def find_rank_group(together: bool | str, timeout_secs: float) -> RankGroup:
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
        return RankGroup(timeout_secs=timeout_secs, local_size=local_world_size(os.environ), own_rank=own)
    store = dist.distributed_c10d._get_default_store()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    rendezvous = Rendezvous(store, f"stager/{next(_instances)}", num_ranks)
    return RankGroup(rank, num_ranks, rendezvous, timeout_secs, own_rank=rank)
