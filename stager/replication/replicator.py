"""After each save this rank's snapshot goes to its partner, and another rank's comes from there. One thread does that.

    save()            begin(): a place in the queue
    staging thread    offer(snapshot), or whoever knows skip(why), and goes on
    this thread       meets the partner -> sends, receives -> lets go of the buffer

It is no part of the save: a snapshot whose replica did not arrive is committed all the same, and says so in the log.

NOTE [ Which save is whole in memory ]
Each rank counts what arrives, and the last one says that the save is whole, after which no rank overwrites it before a newer
one is. But a rank that is ahead may overwrite a save that others have not received yet, and which must not become whole
then. So each save's end is decided once, by whoever is first: the last to receive it, or the first to overwrite it.
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

import torch

from stager.ranks.rank_group import RankGroup
from stager.replication.exchange import Exchange, NothingSentError, Outcome, Peer
from stager.replication.keeper import Keeper, messages
from stager.replication.link import PartnerLink
from stager.replication.parcel import Parcel
from stager.replication.partners import partners
from stager.replication.replicas import Replicas
from stager.telemetry.event import Timeline
from stager.workers.checkpoint.commit.replica import ReplicaHeader
from stager.workers.checkpoint.write.write_task import WriteTask
from stager.workers.errors import ClosedError, RankFailedError, ReplicationError

logger = logging.getLogger("stager")

_LEAVE_SECS = 0.5
_WHOLE, _GIVEN_UP = b"whole", b"given up"


@dataclass(frozen=True, slots=True)
class _Offer:
    """A save's snapshot, or why there is none.

    Attributes:
        release: lets go of its slab.
    """

    snapshot: WriteTask | None
    why: BaseException | None
    release: Callable[[], None]


class Replicator:
    """
    Args:
        job: with a rendezvous.
        replicas: of this host.
        whole_id: the id of the save whose replicas are all there already.
    """

    def __init__(self, job: RankGroup, replicas: Replicas, whole_id: str) -> None:
        assert job.rendezvous is not None
        self._job = job
        self._rendezvous = job.rendezvous
        self._replicas = replicas
        self._whole_id = whole_id
        self._latest_id = ""
        destination, source = partners(job.rank, job.num_ranks)
        self._owner = source
        self._destination = PartnerLink(job, destination)
        self._source = self._destination if source == destination else PartnerLink(job, source)
        self._keeper = Keeper(replicas, source, lambda: self._whole_id, self._give_up)
        self._saves: queue.SimpleQueue[Timeline | None] = queue.SimpleQueue()
        self._offers: dict[Timeline, Future[_Offer]] = {}  # of the saves that are in the queue, or in the exchange
        self._lock = threading.Lock()
        self._current: Timeline | None = None
        self._stopping = False
        self._given_up = False
        self._thread: threading.Thread | None = None

    # -- the trainer's threads ----------------------------------------------------------------------------------

    def begin(self, handle: Timeline) -> None:
        """A save begins. Exchanges are held in this order, which is the same on all ranks, whatever becomes of the saves."""
        with self._lock:
            if self._stopping or (self._thread is None and not self._start()):
                return
            self._offers[handle] = Future()
            self._saves.put(handle)

    def offer(self, handle: Timeline, snapshot: WriteTask, release: Callable[[], None]) -> None:
        """Its snapshot, staged.

        Args:
            release: called when its memory is not needed any more.
        """
        self._resolve(handle, _Offer(snapshot, None, release))

    def skip(self, handle: Timeline, why: BaseException) -> None:
        """There will be none, and the partner is not to wait for it; nothing if there was one."""
        self._resolve(handle, _Offer(None, why, lambda: None))

    def _resolve(self, handle: Timeline, offer: _Offer) -> None:
        with self._lock:
            future = self._offers.get(handle)
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

    def holding_still(self) -> AbstractContextManager[None]:
        """While a checkpoint is restored: see :meth:`Keeper.holding_still`."""
        return self._keeper.holding_still()

    def close(self, timeout: float) -> None:
        """Finish what was offered; after ``timeout`` seconds the rest is dropped, and the partners are told."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        if thread is not None:
            self._saves.put(None)
            thread.join(timeout)
            if thread.is_alive():
                self._give_the_rest_up()
                thread.join(_LEAVE_SECS)
        self._keeper.forget()
        self._destination.drop()
        self._source.drop()

    def _give_the_rest_up(self) -> None:
        self._given_up = True
        with self._lock:
            left, current = list(self._offers), self._current
        for handle in left:  # none of them is waited for any more
            self.skip(handle, ClosedError("this rank closes its Checkpointer"))
        if current is not None:
            self._call_off(current)

    def _call_off(self, handle: Timeline) -> None:
        for link in {self._destination, self._source}:
            with suppress(RankFailedError):
                link.cancel_barrier(handle.save_id, f"rank {self._job.rank} closes its Checkpointer")

    def remove(self, up_to_step: int) -> None:
        """What this rank keeps of saves up to this one: they are committed.

        Raises:
            StorageError
        """
        self._replicas.remove_owner(self._owner, up_to_step)
        self._replicas.tidy()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (handle := self._saves.get()) is not None:
            offer = self._offers[handle].result()
            try:
                self._current = handle
                if self._given_up:
                    self._call_off(handle)
                else:
                    self._replicate(handle, offer)
            except Exception:  # it must not end: the next save has another try
                logger.exception("the snapshot of step %d was not replicated", handle.step)
            finally:
                self._current = None
                with self._lock:
                    del self._offers[handle]
                offer.release()
                del offer  # nobody else holds the slab, perhaps

    def _replicate(self, handle: Timeline, offer: _Offer) -> None:
        started = time.time()
        self._look_whether_whole()
        outcome = self._exchange(handle.save_id, _parcel_of(offer))
        if offer.snapshot is None:
            outcome.not_sent = None  # nothing was to be
        elif outcome.not_sent is None:
            handle.event("replicate", started)
        if outcome.not_sent is not None and not self._given_up:
            logger.warning("step %d is not replicated: %s", handle.step, str(outcome.not_sent))
        if outcome.not_received is not None and not self._given_up:
            logger.warning("no new replica of rank %d: %s", self._owner, str(outcome.not_received))
        if outcome.arrived:
            self._count(outcome.received.spec.save_id)

    def _exchange(self, save_id: str, parcel: Parcel | Exception) -> Outcome:
        destination, source = self._meet(save_id)
        exchange = Exchange(torch.device("cpu"), timedelta(seconds=self._job.timeout_secs))
        outcome = exchange.run(
            parcel,
            destination if isinstance(destination, Peer) else None,
            source if isinstance(source, Peer) else None,
            self._keeper,
        )
        if outcome.not_sent is not None:
            self._destination.drop()
        failure = outcome.not_received
        if failure is not None and failure.rank is not None and not isinstance(failure, NothingSentError):
            self._source.drop()
        if isinstance(destination, ReplicationError):
            outcome.not_sent = destination
        if isinstance(source, ReplicationError):
            outcome.not_received = source
        return outcome

    def _meet(self, save_id: str) -> tuple[Peer | ReplicationError, Peer | ReplicationError]:
        """In the order of the links, which is the same for all: else each rank of a ring could wait for the next."""
        met: dict[PartnerLink, Peer | ReplicationError] = {}
        for link in sorted({self._destination, self._source}, key=lambda link: link.ranks):
            try:
                met[link] = link.barrier(save_id)
            except ReplicationError as error:
                met[link] = error
        return met[self._destination], met[self._source]

    def _count(self, save_id: str) -> None:
        self._latest_id = save_id
        with suppress(RankFailedError):
            if self._rendezvous.add(f"replicas/whole/{save_id}") == self._job.num_ranks:
                self._decide(save_id, _WHOLE)

    def _look_whether_whole(self) -> None:
        if self._latest_id not in ("", self._whole_id):
            with suppress(RankFailedError):
                if self._rendezvous.read(f"replicas/whole/{self._latest_id}/end") == _WHOLE:
                    self._whole_id = self._latest_id

    def _give_up(self, save_id: str) -> bool:
        """This rank's replica of a save is in the way; False: it has to stay, as the save is whole."""
        with suppress(RankFailedError):
            return self._decide(save_id, _GIVEN_UP) != _WHOLE
        return True  # without the store nobody says any more that it is whole

    def _decide(self, save_id: str, end: bytes) -> bytes:
        """See NOTE [ Which save is whole in memory ]. Returns what was decided."""
        key = f"replicas/whole/{save_id}"
        if self._rendezvous.add(f"{key}/decided") == 1:
            self._rendezvous.post(f"{key}/end", end)
        else:
            end = self._rendezvous.wait(f"{key}/end", self._job.timeout_secs) or b""
        if end == _WHOLE:
            self._whole_id = save_id
        return end


def _parcel_of(offer: _Offer) -> Parcel | Exception:
    """The snapshot as it lies in its slab, not copied; or the news that there is none."""
    if offer.snapshot is None:
        return offer.why if isinstance(offer.why, Exception) else ReplicationError(repr(offer.why))
    try:
        header = ReplicaHeader.of(offer.snapshot)
    except Exception as error:  # noqa: BLE001  # the partner is not to wait for it
        return error
    data = torch.frombuffer(offer.snapshot.slab.view, dtype=torch.uint8)
    return Parcel(header.to_bytes(), tuple(data[start:end] for start, end in messages(header.nbytes)))
