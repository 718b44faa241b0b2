"""After each save this rank's snapshot goes to its partner, and another rank's comes from there. One thread does that.

1. ``save()`` takes a place in the queue (``begin``). Exchanges are held in this order, which is the same on all ranks.
2. The staging thread offers the snapshot (``offer``), or whoever gives it up says why there is none (``skip``).
3. The replicator's thread meets the partners of the next save in the queue, and waits for them.
4. It sends this rank's snapshot from its slab, and receives the other rank's into the memory of a replica (``Keeper``).
5. It releases the slab, and counts the replica that arrived: see the note below.

Replication is no part of the save: a snapshot whose replica did not arrive is committed all the same, and a warning is
logged.

NOTE [ Which save is whole in memory ]
A save is *whole* when every rank has received its replica of it. No rank overwrites a replica of the newest whole save. The
last rank to receive decides that the save is whole. But a rank that is ahead may need the memory of a save that others have
not received yet, and that save must not become whole afterwards. So the fate of each save is decided once, by the first
rank that posts it: the last one to receive a replica, or the first one to overwrite one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from typing import Any

import torch

from stager.ranks import keys
from stager.ranks.messages import ReplicaFate
from stager.ranks.rank_group import RankGroup
from stager.replication.exchange import Exchange, ExchangeResult, NothingSentError, PartnerLink, Peer, partners
from stager.replication.keeper import Keeper, messages
from stager.replication.parcel import Parcel
from stager.replication.replicas import Replicas
from stager.telemetry.timeline import Timeline
from stager.workers.checkpoint.commit.replica import ReplicaHeader
from stager.workers.checkpoint.write.write_task import WriteTask
from stager.workers.errors import ClosedError, RankFailedError, ReplicationError, StorageError

logger = logging.getLogger("stager")

_CANCEL_SECS = 0.5


@dataclass(frozen=True, slots=True)
class _Offer:
    """A save's snapshot, or why there is none; and what lets go of its slab."""

    snapshot: WriteTask | BaseException
    release: Callable[[], None]

    def parcel(self) -> Parcel | Exception:
        """What travels to the partner: the snapshot as it lies in its slab, not copied; or why there is none."""
        snapshot = self.snapshot
        if isinstance(snapshot, BaseException):
            return snapshot if isinstance(snapshot, Exception) else ReplicationError(repr(snapshot))
        try:
            header = ReplicaHeader.of(snapshot)
        except Exception as error:  # noqa: BLE001  # the partner must not wait for it
            return error
        data = torch.frombuffer(snapshot.slab.view, dtype=torch.uint8)
        return Parcel(header.to_bytes(), tuple(data[start:end] for start, end in messages(header.nbytes)))


class _State(Enum):
    OPEN = auto()
    FINISHING = auto()  # no save may begin; the thread finishes those that did
    CANCELLED = auto()  # the thread exchanges nothing any more


class NoReplication:
    """Replicates nothing: the methods of :class:`Replicator` for a rank without partners."""

    is_on = False

    def begin(self, save: Timeline) -> None:
        """Do nothing."""

    def offer(self, save: Timeline, snapshot: WriteTask, release: Callable[[], None]) -> None:
        """Release the slab at once."""
        release()

    def skip(self, save: Timeline, why: BaseException) -> None:
        """Do nothing."""

    def close(self, timeout: float) -> None:
        """Do nothing."""

    def forget(self, step: int) -> None:
        """Do nothing."""

    def remove(self, up_to_step: int) -> None:
        """Do nothing."""


class Replicator:
    """Exchanges snapshots with this rank's partners.

    Args:
        group: of several ranks.
        replicas: of this host.
        whole_id: the id of the save whose replicas are all there already.
    """

    is_on = True

    def __init__(self, group: RankGroup, replicas: Replicas, whole_id: str) -> None:
        self._group = group
        self._replicas = replicas
        self._whole_id = whole_id
        self._latest_id = ""
        destination, source = partners(group.rank, group.num_ranks)
        self._owner = source
        self._destination = PartnerLink(group, destination)
        self._source = self._destination if source == destination else PartnerLink(group, source)
        self._keeper = Keeper(replicas, source, lambda: self._whole_id, self._give_up)
        self._saves: queue.SimpleQueue[Timeline | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._offers: dict[Timeline, Future[_Offer]] = {}  # of the saves in the queue, or in the exchange
        self._forgotten: set[str] = set()  # ids of saves whose checkpoints were deleted before the replica arrived
        self._current: Timeline | None = None
        self._state = _State.OPEN
        self._thread: threading.Thread | None = None

    # -- the trainer's threads

    def begin(self, save: Timeline) -> None:
        """Take a place in the queue. Each save that begins has to be offered or skipped."""
        with self._lock:
            if self._state is _State.OPEN and (self._thread is not None or self._start()):
                self._offers[save] = Future()  # before the thread sees the save, which then waits for this
                self._saves.put(save)

    def offer(self, save: Timeline, snapshot: WriteTask, release: Callable[[], None]) -> None:
        """Offer a save's staged snapshot. ``release`` is called when its memory is not needed any more."""
        self._resolve(save, _Offer(snapshot, release))

    def skip(self, save: Timeline, why: BaseException) -> None:
        """Let the partner not wait for a save's snapshot. No effect if it was offered."""
        self._resolve(save, _Offer(why, lambda: None))

    def _resolve(self, save: Timeline, offer: _Offer) -> None:
        with self._lock:  # a snapshot may be offered and given up at the same time: the first one stands
            future = self._offers.get(save)
            if future is not None and not future.done():
                future.set_result(offer)
                return
        offer.release()

    def _start(self) -> bool:
        thread = threading.Thread(target=self._run, name="stager-replicate", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the interpreter is shutting down, or there are too many; the save goes on
            logger.warning("snapshots are not replicated: %s", error)
            return False
        self._thread = thread
        return True

    def holding_still(self) -> AbstractContextManager[Any]:
        """While a checkpoint is restored: see :meth:`Keeper.holding_still`."""
        return self._keeper.holding_still()

    def close(self, timeout: float) -> None:
        """Finish what was offered. After ``timeout`` seconds, drop the rest, and tell the partners."""
        with self._lock:
            self._state = _State.FINISHING
            thread = self._thread
        if thread is not None:
            self._saves.put(None)  # behind every save that began, because none begins any more
            thread.join(timeout)
            if thread.is_alive():
                self._cancel_rest()
                thread.join(_CANCEL_SECS)
        self._keeper.forget()
        self._destination.drop()
        self._source.drop()

    def _cancel_rest(self) -> None:
        # 1. The thread cancels, from now on, whatever it comes to.
        with self._lock:
            self._state = _State.CANCELLED
            left, current = list(self._offers), self._current
        # 2. It must not wait for the offers of what is left.
        for save in left:
            self.skip(save, ClosedError("this rank closes its Checkpointer"))
        # 3. Nor for a partner of the save that it is at.
        if current is not None:
            self._cancel(current)

    def _cancel(self, save: Timeline) -> None:
        for link in {self._destination, self._source}:
            with suppress(RankFailedError):
                link.cancel_barrier(save.save_id, f"rank {self._group.rank} closes its Checkpointer")

    def remove(self, up_to_step: int) -> None:
        """Remove the replicas that this rank keeps of saves up to this step: they are committed.

        Raises:
            StorageError
        """
        self._replicas.remove_owner(self._owner, up_to_step)
        self._replicas.tidy()

    def forget(self, step: int) -> None:
        """Let no later run restore a step, whose checkpoint was deleted, from memory.

        This rank removes the replica that it keeps. Without one rank's part a save is not restored, so one rank is enough.

        Raises:
            StorageError
        """
        with self._lock:  # the replica of a committed save may still be on its way
            self._forgotten |= {save.save_id for save in self._offers if save.step == step}
        with self._keeper.holding_still():
            self._replicas.forget(self._owner, lambda spec: spec.step == step)

    # -- the thread

    def _run(self) -> None:
        while (save := self._saves.get()) is not None:
            offer = self._offers[save].result()
            try:
                self._current = save  # before the state is read: _cancel_rest() sets the state before it reads this
                if self._state is _State.CANCELLED:
                    self._cancel(save)
                else:
                    self._replicate(save, offer)
            except Exception:  # the thread must not end: the next save has another try
                logger.exception("the snapshot of step %d was not replicated", save.step)
            finally:
                self._current = None
                with self._lock:
                    del self._offers[save]
                    is_forgotten = save.save_id in self._forgotten
                    self._forgotten.discard(save.save_id)
                if is_forgotten:
                    self._forget(save.save_id)
                offer.release()
                del offer  # it may hold the last reference to the slab, and the next save may be long in coming

    def _forget(self, save_id: str) -> None:
        """Remove a replica that arrived after its checkpoint was deleted."""
        try:
            self._replicas.forget(self._owner, lambda spec: spec.save_id == save_id)
        except StorageError as error:
            logger.warning("the replica of a deleted checkpoint stays in memory: %s", error)

    def _replicate(self, save: Timeline, offer: _Offer) -> None:
        started = time.time()
        # Before the snapshot arrives, which may overwrite the replica of a save that has become whole.
        self._update_whole_id()
        result = self._exchange(save.save_id, offer.parcel())
        has_snapshot = not isinstance(offer.snapshot, BaseException)
        if has_snapshot and result.not_sent is None:
            save.timing("replicate", started)
        if self._state is not _State.CANCELLED:
            if has_snapshot and result.not_sent is not None:
                logger.warning("step %d is not replicated: %s", save.step, str(result.not_sent))
            if result.not_received is not None:
                logger.warning("no new replica of rank %d: %s", self._owner, str(result.not_received))
        if result.not_received is None:
            self._count(result.received.spec.save_id)

    def _exchange(self, save_id: str, parcel: Parcel | Exception) -> ExchangeResult:
        # 1. Meet both partners in the order of the links, which is the same on all ranks. In another order, each rank of a
        #    ring could wait for the next one.
        links = sorted({self._destination, self._source}, key=lambda link: link.ranks)
        met = {link: _meet(link, save_id) for link in links}
        # 2. Send and receive.
        exchange = Exchange(torch.device("cpu"), timedelta(seconds=self._group.timeout_secs))
        result = exchange.run(parcel, met[self._destination], met[self._source], self._keeper)
        # 3. A connection that failed halfway may still bring bytes of this save: the next exchange needs a new one.
        for link, failure in ((self._destination, result.not_sent), (self._source, result.not_received)):
            if failure is not None and failure.rank is not None and not isinstance(failure, NothingSentError):
                link.drop()
        return result

    # -- NOTE [ Which save is whole in memory ]

    def _count(self, save_id: str) -> None:
        """Count that this rank has received its replica of a save."""
        self._latest_id = save_id
        with suppress(RankFailedError):
            if self._group.count(f"{keys.replica_fate(save_id)}/received") == self._group.num_ranks:
                self._decide(save_id, ReplicaFate(is_whole=True))

    def _update_whole_id(self) -> None:
        if self._latest_id not in ("", self._whole_id):
            with suppress(RankFailedError):
                if self._group.read(keys.replica_fate(self._latest_id)) == ReplicaFate(is_whole=True):
                    self._whole_id = self._latest_id

    def _give_up(self, save_id: str) -> bool:
        """Whether this rank's replica of a save may be overwritten: if not, every rank has received its own by now."""
        with suppress(RankFailedError):
            return not self._decide(save_id, ReplicaFate(is_whole=False)).is_whole
        return True  # without the store no rank decides any more that a save is whole

    def _decide(self, save_id: str, fate: ReplicaFate) -> ReplicaFate:
        """Decide the fate of a save, unless another rank has. Returns what was decided."""
        key = keys.replica_fate(save_id)
        if not self._group.post_first(key, fate):
            fate = self._group.receive(key, ReplicaFate, "the rank that decides which replicas stay did not do so")
        if fate.is_whole:
            self._whole_id = save_id
        return fate


def _meet(link: PartnerLink, save_id: str) -> Peer | ReplicationError:
    try:
        return link.barrier(save_id)
    except ReplicationError as error:
        return error
