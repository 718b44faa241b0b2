"""Handing the staged pieces of a save over to the workers.

    1. A piece's tensors are in its slab: add the plan and the objects.
    2. Submit one write task for each part that the piece holds. From now on the workers read the slab.
    3. The piece's parts are done: release the slab, which the next piece may be waiting for.
    4. The last piece is out: resolve ``staging_completion``, and offer the snapshot for replication.
    5. ``completion.py`` waits for all parts and ends the save.

Step 2 follows step 1 because a worker begins to read at once. Step 4 follows step 2 because "staged" promises that the
workers commit the checkpoint even if this process is killed.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from stager.arena.arena import Arena, Lease, SlabState
from stager.replication.replicator import NoReplication, Replicator
from stager.saving.completion import SaveCompletion, when_all_done
from stager.saving.save import Save
from stager.snapshot.pieces import Piece, Pieces
from stager.snapshot.slab_writer import SlabWriter
from stager.snapshot.taker import Snapshot
from stager.telemetry.report import SaveState
from stager.workers.checkpoint.commit.persist import PartResult, persist_part
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_back import Writing
from stager.workers.checkpoint.write.write_task import WriteTask
from stager.workers.errors import LeftRunningError
from stager.workers.faults import point
from stager.workers.pool.pool import WorkerPool


@dataclass(eq=False)
class Staging:
    """One save while it is staged. The trainer's thread and the staging thread share it.

    Attributes:
        claim: see NOTE [ Ctrl-C in save() ] in ``saver.py``.
        given_up: set when ``save()`` was interrupted: no further piece is to be copied.
        copied: resolved when the sources are not read any more.
        tasks: one for each piece that was handed over.
        futures: of the parts that were handed over.
        leases: of the slabs that these parts use.
        failure: why a part could not be handed over.
    """

    save: Save
    snapshot: Snapshot
    pieces: Pieces
    claim: threading.Lock = field(default_factory=threading.Lock)
    given_up: threading.Event = field(default_factory=threading.Event)
    copied: Future[None] = field(default_factory=Future)
    tasks: list[WriteTask] = field(default_factory=list)
    futures: list[Future[PartResult]] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    failure: BaseException | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every part was handed over."""
        return len(self.futures) == self.pieces.num_parts

    @property
    def is_lost(self) -> bool:
        """Whether the save cannot be committed any more, so that a further piece would be for nothing."""
        failed = any(future.done() and future.exception() is not None for future in self.futures)
        return failed or self.failure is not None or self.given_up.is_set()


@dataclass(eq=False)
class HandOver:
    """Gives staged pieces to the workers, and the whole save to its completion.

    Attributes:
        template: what the save specs of this rank have in common.
        writing: how one worker writes.
    """

    template: SaveSpec
    writing: Writing
    arena: Arena
    pool: WorkerPool
    completion: SaveCompletion
    replicator: Replicator | NoReplication
    slab_writer: SlabWriter = field(default_factory=SlabWriter)

    def begin_copying(self, pieces: Pieces, lease: Lease) -> None:
        """Tell that tensors are about to be copied into a slab."""
        self.slab_writer.begin(pieces, lease.slab)

    def hand_over(self, staging: Staging, piece: Piece, lease: Lease) -> None:
        """Hand one piece over, whose tensors are in the slab. The slab is released when its parts are done.

        Raises:
            Exception: no part of the piece could be handed over; the caller still has the lease.
        """
        started = time.time()
        save, pieces = staging.save, staging.pieces
        is_last = piece is pieces.pieces[-1]
        lease.move(SlabState.STAGED)
        if is_last:  # every tensor is in a slab; no worker has the last piece yet, so the save is not safe yet
            save.move(SaveState.STAGED)
            point("save.copied")
        # 1. One spec for all pieces: its time and its hard-link base are those of the whole checkpoint.
        spec = staging.tasks[0].spec if staging.tasks else self._spec(save, pieces)
        task = self.slab_writer.write(spec, pieces, piece, lease.slab, self.arena.live_slabs())
        # 2. After the first part is out, a worker reads the slab: from there on the lease is the save's, whatever fails.
        futures: list[Future[PartResult]] = []
        try:
            for part in piece.parts:
                futures.append(self.pool.hand_over(persist_part, replace(task, writing=self.writing), part))
        except Exception as error:
            if not futures:
                raise
            staging.failure = error
        staging.tasks.append(task)
        staging.futures += futures
        save.watch_parts(futures)
        staging.leases.append(lease)
        lease.move(SlabState.PERSISTING)
        save.timeline.timing("hand over", started)
        # 3. The completion releases the slab of the last piece: nothing in this process waits for that one.
        if not is_last:
            when_all_done(futures, lambda: _release(staging, futures, lease))

    def finish(self, staging: Staging, error: BaseException | None) -> None:
        """Hand the save over to its completion: no further piece will come.

        Args:
            error: why not every piece was handed over; None: every piece was, or a part has failed.
        """
        save = staging.save
        error = error or staging.failure
        if not staging.tasks:  # no worker has anything of it: there is no part to wait for, and nothing to remove
            assert error is not None  # the first piece was handed over, or raised
            self.fail(save, error)
            return
        if staging.is_complete:
            # "Staged" is a promise, so the workers must have every part before the Future says so. And the state comes
            # before the Future, because who waits for the Future may look at the state.
            save.move(SaveState.PERSISTING)
            point("save.handed-over")
            save.complete_staging()
        # 4. before 5.: the completion releases the slab when the parts are done, and the replicator needs its own hold.
        if staging.pieces.is_whole:
            self.replicator.offer(save.timeline, staging.tasks[0], staging.leases[0].hold())
        nbytes = staging.leases[0].nbytes
        self.completion.await_parts(staging.futures, staging.tasks[0].spec, save, staging.leases, error)
        if staging.is_complete:
            # Only now: before, prefaulting would compete with the copy for the memory's bandwidth.
            self.arena.prepare_in_background(nbytes)

    def fail(self, save: Save, error: BaseException) -> None:
        """End a save of which nothing was handed over."""
        self.completion.fail(save, error)
        self.do_not_replicate(save, error)

    def do_not_replicate(self, save: Save, why: BaseException) -> None:
        """Tell the partner rank that it will not get this snapshot. Does nothing if the snapshot was offered."""
        self.replicator.skip(save.timeline, why)

    def _spec(self, save: Save, pieces: Pieces) -> SaveSpec:
        return replace(
            self.template,
            step=save.step,
            save_id=save.save_id,
            num_parts=pieces.num_parts,
            created=time.time(),
            whole_bytes=pieces.whole_bytes,
            base_step=self.completion.base_step,
            metrics=save.metrics,
        )


def _release(staging: Staging, futures: list[Future[PartResult]], lease: Lease) -> None:
    """Workers that finish alone still read the slab; but without all parts there is nothing that they could commit."""
    is_detached = any(isinstance(future.exception(), LeftRunningError) for future in futures)
    if not (is_detached and staging.is_complete):
        lease.release()
