"""The ranks that make checkpoints together, as one of them sees them: ``RankGroup``.

A process that saves for itself is a group of one: every method answers at once.

    barrier             all ranks come, or all learn who did not
    broadcast           the coordinator (rank 0) posts a message, the others wait for it
    contribute, gather  ranks add messages to a list; after a barrier, any rank reads the list
    post_first, first   the first rank's message stands for all
    smallest            of one number per rank

Messages are the dataclasses of ``messages.py``; keys come from ``keys.py``. No method is a collective of torch's.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch.distributed as dist

from stager.ranks.launch import local_world_size
from stager.ranks.messages import Arrived, BarrierEnd, BroadcastFailed, Message, Number, decode, encode
from stager.ranks.rendezvous import LocalRendezvous, Rendezvous
from stager.workers.errors import ConfigError, InternalError, RankFailedError
from stager.workers.long_wait import LongWait

_COORDINATOR = 0  # the rank that does what one rank does for all

M = TypeVar("M", bound=Message)

WARM_UP = -1  # in place of a step, see RankGroup.save_id
_SHOWN_RANKS = 8
_NOTHING_MORE = Arrived()
_ASKED_RANKS = 256  # more would take as many requests to the store, on each rank that waits
_instances = itertools.count()

logger = logging.getLogger("stager")


@dataclass
class RankGroup:
    """One rank, and how it reaches the others.

    Every method raises RankFailedError when the rendezvous cannot be reached.
    """

    rank: int = 0  # of those that make a checkpoint together
    num_ranks: int = 1
    rendezvous: Rendezvous = field(default_factory=LocalRendezvous)
    timeout_secs: float = 600.0  # how long a rank waits for another
    nonce: str = field(
        default_factory=lambda: secrets.token_hex(8)
    )  # of the run: rank 0 broadcasts its own (opening.py)
    local_size: int = 1  # ranks on this host, whether they save together or not
    own_rank: int = 0  # in the process group, whether they save together or not: whose values those of PerRank are
    look_secs: float = 1.0  # between two looks at the directory (commit_watch.py)
    turn_secs: float = 5.0  # for a rank to look, and to post what it found, before the next ones do
    discard_secs: float = 10.0  # how long the remover of a failed save waits for ranks that still write to it
    _saves: Counter[int] = field(default_factory=Counter)

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank decides for all: rank 0 does."""
        return self.rank == _COORDINATOR

    @property
    def is_alone(self) -> bool:
        """Whether this is a group of one."""
        return self.num_ranks == 1

    def close(self) -> None:
        """Let go of the rendezvous."""
        self.rendezvous.close()

    def save_id(self, step: int) -> str:
        """The id of the next save of a step (``WARM_UP``: of no save): the same on all ranks, without a message."""
        self._saves[step] += 1
        return hashlib.blake2b(f"{self.nonce} {step} {self._saves[step]}".encode(), digest_size=8).hexdigest()

    # -- single messages

    def post(self, key: str, message: Message) -> None:
        """Post a message, in the place of any that was there."""
        self.rendezvous.post(key, encode(message))

    def read(self, key: str) -> Message | None:
        """Return the message at a key; None if there is none yet."""
        data = self.rendezvous.read(key)
        return None if data is None else decode(data)

    def receive(self, key: str, kind: type[M], missing: str) -> M:
        """Wait for the message at a key. Rank 0 posts it.

        Args:
            missing: the error's first words, which say what rank 0 did not do: "rank 0 did not say who writes what".

        Raises:
            RankFailedError: nobody posts it within ``timeout_secs``.
        """
        data = self.rendezvous.wait(key, self.timeout_secs)
        if data is None:
            raise RankFailedError(
                f"{missing} within {self.timeout_secs:g} s (ranks.timeout_secs)", ranks=(_COORDINATOR,)
            )
        return _expect(kind, decode(data))

    def count(self, key: str, amount: int = 1) -> int:
        """Add to a counter that all ranks share. Returns the new count."""
        return self.rendezvous.add(key, amount)

    # -- messages of one rank for all

    def broadcast(self, key: str, kind: type[M], make: Callable[[], M], task: str, more_secs: float = 0.0) -> M:
        """The message that the coordinator makes. Every rank calls it.

        Args:
            make: called on the coordinator only.
            task: what the coordinator does here, for error messages: "open the directory".
            more_secs: to wait for it, beside ``timeout_secs``.

        Raises:
            RankFailedError: ``make`` raised on the coordinator, which raises that error itself; or the message did not
                come in time.
        """
        if self.is_coordinator:
            try:
                message = make()
            except BaseException as error:
                with suppress(RankFailedError):  # the others must not wait for what does not come
                    self.post(key, BroadcastFailed(f"{type(error).__name__}: {error}"))
                raise
            self.post(key, message)
            return message
        secs = self.timeout_secs + more_secs
        data = self.rendezvous.wait(key, secs, self._waiting(f"rank 0 to {task}", secs).tick)
        if data is None:
            raise RankFailedError(f"rank 0 did not {task} within {secs:g} s; every rank has to take part", (0,))
        if isinstance(answer := decode(data), BroadcastFailed):
            raise RankFailedError(f"rank 0 could not {task}: {answer.error}", (0,))
        return _expect(kind, answer)

    def post_first(self, key: str, message: Message) -> bool:
        """Post a message unless another rank was first. Returns whether this rank was."""
        is_first = self.count(f"{key}/count") == 1  # the store counts one rank after the other: only one sees 1
        if is_first:
            self.post(key, message)
        return is_first

    def first(self, key: str, kind: type[M]) -> M | None:
        """What a rank has posted by :meth:`post_first`; None if no rank has."""
        if self.count(f"{key}/count", 0) == 0:
            return None
        return self.receive(key, kind, f"a rank that began to post {key} did not finish")

    # -- messages of many ranks

    def contribute(self, key: str, message: Message, at_most: int | None = None) -> None:
        """Add a message to the list at a key; not if ``at_most`` are there, unless this rank is the coordinator."""
        number = self.count(f"{key}/count")
        if at_most is None or number <= at_most or self.is_coordinator:
            self.post(f"{key}/{number}", message)

    def num_contributed(self, key: str) -> int:
        """How many messages the list at a key has."""
        return self.count(f"{key}/count", 0)

    def gather(self, key: str, kind: type[M], at_most: int | None = None) -> list[M]:
        """The list at a key, or its first ``at_most``. Call it after a barrier to which the ranks came with it."""
        num = self.num_contributed(key)
        return [
            self.receive(f"{key}/{number}", kind, f"a rank did not post number {number} of {key}")
            for number in range(1, min(num, at_most or num) + 1)
        ]

    def smallest(self, name: str, own: int) -> int:
        """The smallest of one number per rank. Every rank calls it, once for each name. Raises as :meth:`barrier`."""
        if self.count(f"{name}/of/{own}") == 1:  # most often all have the same, and one contributes
            self.contribute(name, Number(own))
        self.barrier(name, f"agreeing on {name}")
        return min(number.value for number in self.gather(name, Number))

    # -- the barrier

    def barrier(self, key: str, why: str, ranks: Sequence[int] | None = None, arrived: Arrived = _NOTHING_MORE) -> None:
        """Wait until every rank has come. It ends the same way for all, however late they come:

        1. each rank posts that it is here, and counts itself
        2. the rank that completes the count decides: all came
        3. a rank whose time is up decides instead: it names those that are not here
        4. the first decision stands, and every rank reads it

        Args:
            why: what the ranks do here, for error messages.
            ranks: those that come; None: all.
            arrived: what the others read of this rank at ``<key>/here/<rank>``.

        Raises:
            RankFailedError: ranks that did not come within ``timeout_secs`` of another, and are named; or the barrier was
                cancelled.
        """
        expected = range(self.num_ranks) if ranks is None else ranks
        # 1. "Here" before the count: who reads the full count, or is told that all came, finds what each rank posted.
        self.post(f"{key}/here/{self.rank}", arrived)
        # 2. The store counts one rank after the other, so exactly one rank sees the full count.
        if self.count(f"{key}/arrived") == len(expected):
            self.post_first(f"{key}/end", BarrierEnd())

        def not_here() -> list[int]:
            return [rank for rank in expected if self.rendezvous.read(f"{key}/here/{rank}") is None]

        waiting = self._waiting(f"all ranks to come ({why})", self.timeout_secs, not_here)
        data = self.rendezvous.wait(f"{key}/end", self.timeout_secs, waiting.tick)
        if data is None:  # 3.
            missing = not_here()
            late = f"rank {some_ranks(missing)} did not come within {self.timeout_secs:g} s (ranks.timeout_secs)"
            self.cancel_barrier(key, late, missing)
            # 4. Not this rank's own decision counts, but the first: a late rank may have completed the barrier meanwhile.
            data = self.rendezvous.wait(f"{key}/end", self.timeout_secs)
        end = BarrierEnd("a rank died there") if data is None else _expect(BarrierEnd, decode(data))
        if end.error:
            raise RankFailedError(f"{why}: {end.error}", end.ranks)

    def _waiting(self, what: str, secs: float, not_here: Callable[[], Sequence[int]] = tuple) -> LongWait:
        """What says so when a wait for other ranks gets long.

        Args:
            not_here: tells which ranks have not come; asked once, after a while, in a small group.
        """

        def advice() -> str:
            late = not_here() if self.num_ranks <= _ASKED_RANKS else ()
            who = f"rank {some_ranks(late)} did not come yet; " if late else ""
            return (
                f"{who}every rank has to make its Checkpointer, and to call save(), load() and close() as the others do. If "
                "only one rank does so on purpose, set ranks.together to false there"
            )

        return LongWait(what, secs, advice=advice)

    def cancel_barrier(self, key: str, error: str, ranks: Sequence[int]) -> None:
        """End a barrier with an error, for all that come. No effect if the barrier has ended."""
        self.post_first(f"{key}/end", BarrierEnd(error, tuple(ranks)))

    def leave_barrier(self, key: str, error: BaseException) -> None:
        """Tell the other ranks that this rank does not come to a barrier, because of an error."""
        self.cancel_barrier(key, f"failed on rank {self.rank}: {type(error).__name__}: {error}", (self.rank,))


def _expect(kind: type[M], message: Message) -> M:
    if not isinstance(message, kind):
        raise InternalError(f"another rank posted {message} where a {kind.__name__} belongs")
    return message


def some_ranks(ranks: Sequence[int]) -> str:
    """The first few ranks, for a message."""
    return ", ".join(map(str, ranks[:_SHOWN_RANKS])) + (", ..." if len(ranks) > _SHOWN_RANKS else "")


def ranks_without_group(environ: Mapping[str, str]) -> str | None:
    """Say what is wrong if this is one of several ranks, as the launcher says, and there is no process group; else None."""
    rank, size = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    if not (rank.isdigit() and size.isdigit() and int(size) > 1):
        return None
    return (
        f"this is rank {rank} of {size} (RANK, WORLD_SIZE), and torch.distributed has no process group yet, so this "
        "Checkpointer saves for this rank alone. Call init_process_group() before the Checkpointer is made, on every rank; "
        "or set ranks.together to false, with a directory of its own for each rank that saves"
    )


def find_rank_group(together: bool | str, timeout_secs: float) -> RankGroup:
    """The group that this process belongs to, from torch's process group; a group of one if there is none.

    ``together`` and ``timeout_secs`` are those of the section ``ranks`` of the configuration.

    Raises:
        ConfigError: the ranks are to save together, and there is no process group.
    """
    initialized = dist.is_available() and dist.is_initialized()
    if together is True and not initialized:
        raise ConfigError(
            "ranks.together is true, but torch.distributed is not initialized; call init_process_group() before the "
            "Checkpointer is made"
        )
    if together == "auto" and not initialized and (problem := ranks_without_group(os.environ)) is not None:
        logger.warning(problem)
    own = dist.get_rank() if initialized else 0
    if together is False or not initialized or dist.get_world_size() == 1:
        return RankGroup(timeout_secs=timeout_secs, local_size=local_world_size(os.environ), own_rank=own)
    num_ranks = dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    rendezvous = Rendezvous(store, f"stager/{next(_instances)}", num_ranks)
    return RankGroup(own, num_ranks, rendezvous, timeout_secs, own_rank=own)
