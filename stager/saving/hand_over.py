"""Handing the pieces of a save over to the workers, each while its slab is still being filled.

    1. A piece has a slab: add the plan and the objects, and marks that say how far the slab is filled.
    2. Submit one write task for each part that the piece holds. From now on the workers read what is marked.
    3. The piece's tensors are copied: mark the slab whole. Only now can the workers sign what they write.
    4. The piece's parts are done: release the slab, which the next piece may be waiting for.
    5. The last piece is whole: resolve ``staging_completion``, and offer the snapshot for replication.
    6. ``completion.py`` waits for all parts and ends the save.

Step 2 may also follow the copies: if workers make them, tasks that wait for them would be in their way. Step 3 follows
step 2 because "staged" promises that the workers commit the checkpoint even if this process is killed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from stager.arena.arena import Arena, Lease, SlabState
from stager.ranks.rank_group import RankGroup
from stager.replication.replicator import NoReplication, Replicator
from stager.saving.completion import SaveCompletion, when_all_done
from stager.saving.save import Save
from stager.saving.staging import Staging
from stager.snapshot.pieces import Piece, Pieces
from stager.snapshot.slab_writer import SlabWriter
from stager.telemetry.report import SaveState
from stager.workers.checkpoint.commit.persist import PartResult, persist_part
from stager.workers.checkpoint.storage.writing import Writing
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import LeftRunningError
from stager.workers.faults import point
from stager.workers.memory.fill_marks import FillState
from stager.workers.pool.pool import WorkerPool


@dataclass(eq=False)
class HandOver:
    """Gives staged pieces to the workers, and the whole save to its completion.

    Attributes:
        template: what the save specs of this rank have in common.
        writing: how one worker writes.
    """

    template: SaveSpec
    group: RankGroup
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
        """Hand one piece over, whose slab has marks.

        If this raises, no worker has anything of the piece, and the caller still has the lease. Otherwise the lease is the
        save's, whatever fails.
        """
        started = time.time()
        save, pieces = staging.save, staging.pieces
        # 1. One spec for all pieces: its time and its hard-link base are those of the whole checkpoint.
        spec = staging.tasks[0].spec if staging.tasks else self._spec(save, pieces)
        assert staging.filling is not None  # its slab has marks
        live, marks = self.arena.live_slabs(), staging.filling.marks
        sidecars = save.sidecars.data if 0 in piece.parts else ()
        task = self.slab_writer.write(spec, pieces, piece, lease.slab, live, marks, sidecars)
        # 2. After the first part is out, a worker reads the slab.
        futures: list[Future[PartResult]] = []
        try:
            for part in piece.parts:
                futures.append(
                    self.pool.hand_over(
                        persist_part, replace(task, writing=self.writing, lock=save.destination.lock), part
                    )
                )
        except Exception as error:
            if not futures:
                raise
            staging.failure = error
        staging.tasks.append(task)
        staging.futures += futures
        staging.leases.append(lease)
        staging.handed_over = piece
        save.watch_parts(futures)
        save.timeline.timing("hand over", started)

    def mark_whole(self, staging: Staging, piece: Piece, lease: Lease) -> None:
        """Tell the workers that every tensor of a piece, which was handed over, is in its slab.

        The slab is released when the piece's parts are done.
        """
        save, is_last = staging.save, piece is staging.pieces.pieces[-1]
        futures = staging.futures[-len(piece.parts) :]
        lease.move(SlabState.STAGED)
        if is_last:  # the workers cannot sign the last piece yet, so the save is not safe yet
            save.move(SaveState.STAGED)
            point("save.copied")
        # 3. A worker that has died meanwhile had the task: the promise holds for one that lives. And it cannot be given for
        #    a save of which a part has failed already.
        self.pool.wait_delivered(futures)
        staging.num_whole += 1
        staging.failure = staging.failure or _failure_of(staging.futures)
        if staging.filling is not None and staging.failure is None:
            staging.filling.end(FillState.WHOLE)
            staging.filling = None
        lease.move(SlabState.PERSISTING)
        # 4. The completion releases the slab of the last piece: nothing in this process waits for that one.
        if not is_last:
            when_all_done(futures, lambda: _release(staging, futures, lease))

    def finish(self, staging: Staging, error: BaseException | None) -> None:
        """Hand the save over to its completion: no further piece will come.

        Args:
            error: why not every piece is whole; None: every piece is, or a part has failed.
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
        # 5. before 6.: the completion releases the slab when the parts are done, and the replicator needs its own hold.
        if staging.pieces.is_whole:
            if staging.num_whole:
                self.replicator.offer(save.timeline, staging.tasks[0], staging.leases[0].hold())
            elif error is not None:
                self.do_not_replicate(save, error)
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
            directory=save.destination.directory,
            name=save.destination.name_in_spec(save.step),
            step=save.step,
            save_id=save.save_id,
            num_parts=pieces.num_parts,
            created=time.time(),
            whole_bytes=pieces.whole_bytes,
            base=self.completion.base_in(save.destination.directory),
            metrics=save.metrics,
            run=self.group.nonce,  # not before: rank 0 tells it when the first directory is opened
            number=save.number,
            sidecars=save.sidecars.files,
        )


def _failure_of(futures: Sequence[Future[PartResult]]) -> BaseException | None:
    """Return why a part has failed; None: none has, or workers that finish alone have it."""
    errors = (future.exception() for future in futures if future.done())
    return next((e for e in errors if e is not None and not isinstance(e, LeftRunningError)), None)


def _release(staging: Staging, futures: list[Future[PartResult]], lease: Lease) -> None:
    """Workers that finish alone still read the slab; but without all parts there is nothing that they could commit."""
    is_detached = any(isinstance(future.exception(), LeftRunningError) for future in futures)
    if not (is_detached and staging.is_complete):
        lease.release()
