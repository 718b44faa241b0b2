"""One save while it is staged: which of its pieces are where."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from stager.arena.arena import Lease
from stager.saving.save import Save
from stager.snapshot.filling import Filling, Ranges
from stager.snapshot.pieces import Piece, Pieces
from stager.snapshot.taker import Snapshot
from stager.workers.checkpoint.commit.persist import PartResult
from stager.workers.checkpoint.write.write_task import WriteTask
from stager.workers.memory.fill_marks import FillState


@dataclass(eq=False)
class Staging:
    """One save while it is staged. The trainer's thread and the staging thread share it.

    Attributes:
        given_up: set when ``save()`` was interrupted: no further piece is to be copied.
        copied: resolved when the sources are not read any more.
        has_ended: the save was given to its completion; see NOTE [ Ctrl-C in save() ] in ``snapshot_stager.py``.
        filling: the marks of the piece that is copied now; None: workers copy it.
        handed_over: the piece that was handed over last; None: no piece was.
        num_whole: how many pieces are whole.
        tasks: one for each piece that was handed over.
        futures: of the parts that were handed over.
        leases: of the slabs that these parts use.
        failure: why a part could not be handed over.
    """

    save: Save
    snapshot: Snapshot
    pieces: Pieces
    given_up: threading.Event = field(default_factory=threading.Event)
    copied: Future[None] = field(default_factory=Future)
    has_ended: bool = False
    filling: Filling | None = None
    handed_over: Piece | None = None
    num_whole: int = 0
    tasks: list[WriteTask] = field(default_factory=list)
    futures: list[Future[PartResult]] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    failure: BaseException | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the workers have every part, and all of it is in slabs."""
        return self.num_whole == len(self.pieces.pieces) and self.failure is None

    @property
    def is_lost(self) -> bool:
        """Whether the save cannot be committed any more, so that a further piece would be for nothing."""
        failed = any(future.done() and future.exception() is not None for future in self.futures)
        return failed or self.failure is not None or self.given_up.is_set()

    def begin_filling(self, piece: Piece, lease: Lease, to_come: Ranges) -> None:
        """Put marks into a piece's slab.

        Args:
            to_come: where the trainer will copy tensors to; all else is there.
        """
        self.filling = Filling(lease.slab, self.pieces.marks_offset, piece.nbytes, to_come)

    def abandon(self) -> None:
        """Tell the workers that the piece they wait for will not be whole; nothing if it is."""
        if self.filling is not None:
            self.filling.end(FillState.ABANDONED)
            self.filling = None

    def wrote(self, offset: int, nbytes: int) -> None:
        """Mark a range of the slab that the trainer has copied."""
        filling = self.filling  # read once: the staging thread may give it up meanwhile
        if filling is not None:
            filling.wrote(offset, nbytes)
