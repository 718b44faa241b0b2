"""Copying a snapshot into slabs, while its pieces are handed over to the workers.

NOTE [ Ctrl-C in save() ]
KeyboardInterrupt can be raised between any two instructions of the main thread, and the program may go on after it. A slab
whose save was interrupted halfway through the hand-over must not be leased again while a worker has it. So all that must not
stop halfway happens in the staging thread, where no signal handler runs; the trainer's thread only copies, and waits.
  1. The staging thread alone hands over, and deals with the lease. An interrupted ``save()`` has it end the save, unless the
     call that ends it was begun before (``has_ended``): then that one goes on.
  2. An interrupted save whose pieces are not all copied stops before its next piece (``given_up``), and fails as a whole.
  3. ``save()`` raises only when the sources are not read any more (``copied``), because the program may change them then.
"""

from __future__ import annotations

from concurrent.futures import wait
from functools import partial

from stager.arena.arena import Arena, Lease
from stager.saving.hand_over import HandOver
from stager.saving.staging import Staging
from stager.saving.staging_thread import StagingThread, wait_uninterrupted
from stager.snapshot.pieces import Piece
from stager.snapshot.taker import Assignment, SnapshotTaker
from stager.workers.faults import point

_TURN_SECS = 0.2


class SnapshotStager:
    """Stages one snapshot at a time: copies its pieces, has them handed over, and ends its staging whatever happens.

    Attributes:
        thread: what must not stop halfway runs there.
    """

    def __init__(self, taker: SnapshotTaker, hand_over: HandOver, arena: Arena) -> None:
        self.thread = StagingThread()
        self._taker = taker
        self._hand_over = hand_over
        self._arena = arena

    # -- the trainer's thread -----------------------------------------------------------------------------------

    def stage(self, staging: Staging, lease: Lease) -> None:
        """Copy a snapshot into slabs, the first of which is leased, and hand its pieces over.

        Returns when every piece is copied, or before that if all that is left to copy is guarded.
        """
        first = staging.pieces.pieces[0]
        try:
            now, later = self._taker.split(staging.snapshot, staging.pieces, first)
            for note in self._taker.notes(staging.snapshot):
                staging.save.timeline.note(note)
            if not (now.by_workers or later.by_workers):  # they would wait for their own copies, which come behind
                self._hand_over.begin_copying(staging.pieces, lease)  # also for the marks
                staging.begin_filling(first, lease, [*now.ranges, *later.ranges])
                self.thread.run(lambda: self._begin_hand_over(staging, first, lease))
            self.copy(staging, now, lease)
            self._taker.arm(staging.snapshot, later)  # last: what is written from here on trips a wire
            waits = not later.copies
            if waits and len(staging.pieces.pieces) == 1:
                staging.copied.set_result(None)  # an interrupt from here on need not wait for the staging thread
            staged = self.thread.run(lambda: self._stage_rest(staging, lease, later))
            if waits:
                while not staged.done():  # in turns: a Ctrl-C that comes right before a wait does not end that wait
                    wait([staged], _TURN_SECS)
                staged.result()
        except BaseException as error:  # see NOTE [ Ctrl-C in save() ]
            self._give_up(staging, lease, error)
            raise

    def _give_up(self, staging: Staging, lease: Lease, error: BaseException) -> None:
        """Have the staging thread end the save, whatever else is raised here: without it, workers would wait for bytes."""
        interrupted: BaseException | None = None
        while True:
            try:
                staging.given_up.set()  # 2. before 1.: the staging thread must not begin another piece
                self.thread.run(partial(self._end, staging, lease, error))
                wait_uninterrupted([staging.copied])  # 3.
                break
            except BaseException as another:  # noqa: BLE001  # Ctrl-C again; raised when all is done
                interrupted = another
        if interrupted is not None:
            raise interrupted

    def copy(self, staging: Staging, copies: Assignment, lease: Lease, *, background: bool = False) -> None:
        """Copy what is assigned to this process, or have workers copy it, into a slab."""
        self._hand_over.begin_copying(staging.pieces, lease)
        self._taker.copy(
            staging.snapshot, copies, lease.slab, staging.wrote, cold=not lease.warm, background=background
        )

    # -- the staging thread -------------------------------------------------------------------------------------

    def _begin_hand_over(self, staging: Staging, piece: Piece, lease: Lease) -> None:
        """Hand the first piece over while the trainer's thread copies it."""
        if staging.has_ended:
            return
        try:
            self._hand_over.hand_over(staging, piece, lease)
        except BaseException as error:  # noqa: BLE001  # the call that comes behind this one ends the save
            staging.failure = error

    def _stage_rest(self, staging: Staging, lease: Lease, later: Assignment) -> None:
        """Copy what is left of the first piece, and the other pieces; hand all of them over.

        Raises:
            Exception: of the staging, if ``save()`` waits for it. It ends the save in any case.
        """
        if staging.has_ended:  # the trainer's thread was interrupted
            return
        # 1. of the NOTE. From here on this call ends the save, whatever happens to the trainer's thread.
        error: BaseException | None = None
        try:
            self._stage_pieces(staging, lease, later)
            if staging.given_up.is_set() and not staging.is_complete:
                # 2. of the NOTE. A save whose every part is out goes on: the workers commit it anyway.
                error = KeyboardInterrupt("save() was interrupted")
        except BaseException as raised:
            error = raised
            if not later.copies:  # save() waits
                raise
        finally:
            self._end(staging, lease, error)

    def _end(self, staging: Staging, lease: Lease, error: BaseException | None) -> None:
        """End the staging of a save, once.

        Args:
            lease: of the first piece's slab.
            error: why the save cannot be committed; None: it can, or a part of it has failed.
        """
        if staging.has_ended:
            return
        staging.has_ended = True
        # Before the hand-over to the completion, which may fail: an interrupted save() waits for it.
        if not staging.copied.done():
            staging.copied.set_result(None)
        staging.abandon()  # while the slab is this save's
        if not staging.tasks:  # no worker has anything of it
            lease.release()
        self._hand_over.finish(staging, error)

    def _stage_pieces(self, staging: Staging, lease: Lease, later: Assignment) -> None:
        first, *others = staging.pieces.pieces
        if staging.handed_over is None and staging.failure is not None:
            raise staging.failure  # no worker has anything of it
        if later.copies:
            point("save.overlapped")
            self.copy(staging, later, lease, background=True)
        if staging.handed_over is None:  # workers have copied it
            staging.begin_filling(first, lease, [])
            self._hand_over.hand_over(staging, first, lease)
        self._hand_over.mark_whole(staging, first, lease)
        for piece in others:
            if staging.is_lost:
                break
            # This waits for a slab of an earlier piece: the workers are done with them one by one.
            next_lease = self._arena.lease(staging.pieces.slab_nbytes, when_full="wait")
            assert next_lease is not None  # it waits
            self._stage_piece(staging, piece, next_lease)

    def _stage_piece(self, staging: Staging, piece: Piece, lease: Lease) -> None:
        """Hand over a piece that is not the first, and copy it."""
        try:
            copies, _ = self._taker.split(staging.snapshot, staging.pieces, piece)
            self._hand_over.begin_copying(staging.pieces, lease)
            staging.begin_filling(piece, lease, copies.ranges)
            self._hand_over.hand_over(staging, piece, lease)
        except BaseException:  # nothing of this piece is out: no worker reads the slab
            staging.abandon()
            lease.release()
            raise
        self.copy(staging, copies, lease)
        self._hand_over.mark_whole(staging, piece, lease)
