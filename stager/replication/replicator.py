"""After each save this rank's snapshot goes to its partner, and another rank's comes from there. One thread does that.

    staging thread    offer(snapshot) or skip(why), once for each save, and goes on
    this thread       meets the partner -> sends, receives -> lets go of the buffer

It is no part of the save: a snapshot whose replica did not arrive is committed all the same, and says so in the log.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch

from stager.ranks.job import Job
from stager.replication.keeper import Keeper, messages
from stager.replication.link import Link
from stager.replication.replicas import Replicas
from stager.saving.save import SaveHandle
from stager.staging.exchange import Exchange, NothingSentError, Outcome, Peer
from stager.staging.parcel import Parcel
from stager.staging.replication import partners
from workers.errors import RankFailedError, ReplicationError
from workers.job import SaveJob
from workers.replica import ReplicaHeader

logger = logging.getLogger("stager")

_LEAVE_SECS = 5.0
_DECISION_SECS = 10.0  # another rank has made it, and posts it next
_WHOLE, _BROKEN = b"whole", b"broken"


@dataclass(frozen=True, slots=True)
class _Offer:
    """A save's snapshot, or why there is none.

    Attributes:
        release: lets go of its slab.
    """

    handle: SaveHandle
    snapshot: SaveJob | None
    why: BaseException | None
    release: Callable[[], None]


class Replicator:
    """
    Args:
        job: with a board. Every rank has one, and offers or skips as often.
        replicas: of this host.
        whole_id: the id of the save that is whole already: see NOTE [ What is whole ].
    """

    def __init__(self, job: Job, replicas: Replicas, whole_id: str) -> None:
        assert job.board is not None
        self._job = job
        self._board = job.board
        self._replicas = replicas
        self._whole_id = whole_id
        self._latest_id = ""
        destination, source = partners(job.rank, job.num_ranks)
        self._owner = source
        self._destination = Link(job, destination)
        self._source = self._destination if source == destination else Link(job, source)
        self._keeper = Keeper(replicas, source, lambda: self._whole_id)
        self._offers: queue.SimpleQueue[_Offer | None] = queue.SimpleQueue()
        self._said: set[SaveHandle] = set()
        self._lock = threading.Lock()
        self._number = 0  # of the exchange that is next, or going on
        self._stopping = False
        self._given_up = False
        self._thread: threading.Thread | None = None

    # -- the trainer's threads ----------------------------------------------------------------------------------

    def offer(self, handle: SaveHandle, snapshot: SaveJob, release: Callable[[], None]) -> None:
        """A whole snapshot, staged.

        Args:
            release: called when its memory is not needed any more.
        """
        self._put(_Offer(handle, snapshot, None, release))

    def skip(self, handle: SaveHandle, why: BaseException) -> None:
        """There is none for this save, and the partner is not to wait for it; nothing if it was said before."""
        self._put(_Offer(handle, None, why, lambda: None))

    def _put(self, offer: _Offer) -> None:
        with self._lock:
            if offer.handle not in self._said and not self._stopping:
                self._said = {handle for handle in self._said if not handle.upload_completion.done()} | {offer.handle}
                self._offers.put(offer)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="stager-replicate", daemon=True)
                    self._thread.start()
                return
        offer.release()

    def close(self, timeout: float) -> None:
        """Finish what was offered; after ``timeout`` seconds the rest is dropped, and the partners are told."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        if thread is not None:
            self._offers.put(None)
            thread.join(timeout)
            if thread.is_alive():
                self._given_up = True
                for link in (self._destination, self._source):
                    with suppress(RankFailedError):
                        link.call_off(self._number, "this rank closes its Checkpointer")
                thread.join(_LEAVE_SECS)
        self._keeper.forget()
        self._destination.drop()
        self._source.drop()

    def remove(self, up_to_step: int) -> None:
        """What this rank keeps of saves up to this one: they are committed.

        Raises:
            StorageError
        """
        self._replicas.remove_owner(self._owner, up_to_step)
        self._replicas.tidy()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (offer := self._offers.get()) is not None:
            try:
                if not self._given_up:
                    self._replicate(offer)
            except Exception:  # it must not end: the next save has another try
                logger.exception("the snapshot of step %d was not replicated", offer.handle.step)
            finally:
                offer.release()
                del offer  # nobody else holds the slab, perhaps

    def _replicate(self, offer: _Offer) -> None:
        started = time.time()
        self._look_whether_whole()
        try:
            outcome = self._exchange(_parcel_of(offer, self._job.nonce))
        finally:
            self._number += 1
        if offer.snapshot is None:
            outcome.not_sent = None  # nothing was to be
        elif outcome.not_sent is None:
            offer.handle._event("replicate", started)
        if outcome.not_sent is not None and not self._given_up:
            logger.warning("step %d is not replicated: %s", offer.handle.step, outcome.not_sent)
        if outcome.not_received is not None and not self._given_up:
            logger.warning("no new replica of rank %d: %s", self._owner, outcome.not_received)
        if outcome.arrived:
            self._count(outcome.received.facts.save_id)

    def _exchange(self, parcel: Parcel | Exception) -> Outcome:
        destination, source = self._meet()
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

    def _meet(self) -> tuple[Peer | ReplicationError, Peer | ReplicationError]:
        """In the order of the links, which is the same for all: else each rank of a ring could wait for the next."""
        met: dict[Link, Peer | ReplicationError] = {}
        for link in sorted({self._destination, self._source}, key=lambda link: link.ranks):
            try:
                met[link] = link.meet(self._number)
            except ReplicationError as error:
                met[link] = error
        return met[self._destination], met[self._source]

    # NOTE [ What is whole ]
    # A save is whole in memory when every rank's partner has it; from then on the one before it may be overwritten. The
    # partners do not go at the same pace: one may be about to overwrite its part of a save while another is still receiving
    # its part. So whether a save is whole is decided once, by the first who knows: the last partner to receive it ("whole"),
    # or one who has to make room before that ("broken"). All of them overwrite what the decision lets them.

    def _count(self, save_id: str) -> None:
        self._latest_id = save_id
        with suppress(RankFailedError):
            if self._board.add(f"{_key(save_id)}/arrived") == self._job.num_ranks:
                self._decide(save_id, _WHOLE)

    def _look_whether_whole(self) -> None:
        """Before the next one is received: of the two that are kept, one has to make room."""
        if self._latest_id not in ("", self._whole_id):
            with suppress(RankFailedError):
                self._decide(self._latest_id, _BROKEN)

    def _decide(self, save_id: str, what: bytes) -> None:
        if self._board.add(f"{_key(save_id)}/decided") == 1:
            self._board.post(f"{_key(save_id)}/end", what)
        if self._board.wait(f"{_key(save_id)}/end", _DECISION_SECS) == _WHOLE:
            self._whole_id = save_id


def _key(save_id: str) -> str:
    return f"replicas/save/{save_id}"


def _parcel_of(offer: _Offer, run: str) -> Parcel | Exception:
    """The snapshot as it lies in its slab, not copied; or the news that there is none."""
    if offer.snapshot is None:
        return offer.why if isinstance(offer.why, Exception) else ReplicationError(repr(offer.why))
    try:
        header = ReplicaHeader.of(offer.snapshot, run)
    except Exception as error:  # noqa: BLE001  # the partner is not to wait for it
        return error
    data = torch.frombuffer(offer.snapshot.slab.view, dtype=torch.uint8)
    return Parcel(header.to_bytes(), tuple(data[start:end] for start, end in messages(header.nbytes)))
