"""One save from the state to the hand-over, and from the workers' answers to the Futures.

save()    flatten -> plan -> pickle objects -> lease a slab -> copy what is not guarded -> return
staging   (in the staging thread; save() waits for it unless something is guarded)
          copy what is guarded -> verify -> write plan and objects into the slab -> hand over to every worker
answers   all parts done -> release the slab -> resolve upload_completion (``settler.py``)

A snapshot that is larger than ``arena.max_host_bytes`` goes piece by piece instead (``snapshot/pieces.py``).
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch

from stager.arena.arena import Arena, Lease, SlabState
from stager.ranks.rank_group import WARM_UP
from stager.ranks.rank_group import RankGroup as RankJob
from stager.replication.replicator import NoReplication, Replicator
from stager.saving.completion import SaveCompletion
from stager.saving.options import SaverOptions
from stager.saving.save import SaveHandle, SaveState
from stager.sharing.sharer import SharingOptions, SourceSharer
from stager.snapshot.copying import Copier, wait_uninterrupted
from stager.snapshot.guard import Guard
from stager.snapshot.pieces import Piece, Pieces, blobs_of, copies_of, cut, segment_bytes_for
from stager.snapshot.slab_writer import SlabWriter, put, slab_nbytes
from stager.snapshot.taker import Snapshot, SnapshotTaker, Work
from stager.state.flatten import StateTree
from stager.state.snapshot_plan import Planner
from stager.workers._version import __version__
from stager.workers.checkpoint.commit.persist import PartResult, persist_part, prepare_worker
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.formats import Format
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import WriteTask
from stager.workers.errors import ClosedError, StorageError, UsageError
from stager.workers.faults import point
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_ANY_SIZE = (1 << 63) - 1


class Saver:
    """Takes snapshots and hands them over to the workers.

    Attributes:
        guard: which optimizers' memory may be copied while training goes on.
        settler: sees what was handed over through to its end.
    """

    def __init__(
        self,
        options: SaverOptions,
        file_format: Format,
        arena: Arena,
        copier: Copier,
        pool: WorkerPool,
        sharing: SharingOptions,
        on_done: Callable[[SaveHandle], None],
        ranks: RankJob,
        replicator: Replicator | NoReplication,
    ) -> None:
        self._options = options
        self._arena = arena
        self._copier = copier
        self._pool = pool
        self._ranks = ranks
        self._replicator = replicator
        self.settler = SaveCompletion(
            pool,
            self._ranks,
            on_done,
            incremental=options.incremental,
            keep_unfinished=replicator.is_on,
        )
        rank = self._ranks.rank
        self._planner = Planner(
            file_format, options.num_parts, options.segment_bytes, rank, incremental=options.incremental
        )
        self._piece_nbytes = arena.piece_nbytes
        piece_segments = segment_bytes_for(self._piece_nbytes, options.segment_bytes)
        self._piece_planner = Planner(
            file_format, options.num_parts, piece_segments, rank, in_order=True, incremental=options.incremental
        )
        self._jobs = SlabWriter()
        self._stager: ThreadPoolExecutor | None = None
        self._staging_thread = 0
        self._staging: set[Future[None]] = set()
        self._lock = threading.Lock()
        self.guard = Guard(self.wait_for_staging)
        self._sharer = SourceSharer(pool, options.num_parts, sharing) if sharing.location != "trainer" else None
        self._taker = SnapshotTaker(
            file_format, copier, self.guard, self._sharer, verify=options.verify, group=self._ranks
        )

    # -- the trainer's thread -----------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any]) -> SaveHandle:
        handle = SaveHandle(step, self._ranks.save_id(step))
        try:
            self._replicator.begin(handle)
            self._save(handle, state)
        except BaseException as error:
            self.settler.tell(handle, error)
            self._replicator.skip(handle, error)
            raise
        return handle

    def _save(self, handle: SaveHandle, state: Mapping[str, Any]) -> None:
        started = time.time()
        flat = self._taker.flatten(state, handle.save_id)
        snapshot = self._taker.begin(handle, flat, self._planner, may_move=not self._is_staging())
        handle._describe(snapshot.nbytes, snapshot.plan.num_tensors, len(snapshot.plan.objects))
        is_full = self.settler.base_step is None  # else nobody knows how much will be written
        if self._options.check_free_space and is_full:
            self._check_free_space(snapshot.nbytes)
        handle._event("plan", started)
        nbytes = slab_nbytes(snapshot.plan, snapshot.blobs)
        if nbytes > self._arena.max_slab_nbytes:
            self._save_in_pieces(handle, flat)
        else:
            lease = self._lease(handle, nbytes)
            if lease is not None:
                self._save_whole(snapshot, lease)
        handle._unblocked()

    def _check_free_space(self, nbytes: int) -> None:
        with storage_errors("save", self._options.directory):
            stats = os.statvfs(self._options.directory)
        free = stats.f_bavail * stats.f_frsize
        if nbytes > free:
            raise StorageError(
                errno.ENOSPC,
                f"a checkpoint of {nbytes:,} bytes does not fit the {free:,} bytes that are free; nothing was written. "
                "Free space, or set persistence.check_free_space to false if the file system reports it wrongly",
                self._options.directory,
            )

    def _lease(self, handle: SaveHandle, nbytes: int) -> Lease | None:
        """None: this save is skipped."""
        started = time.time()
        lease = self._arena.lease(nbytes)
        handle._event("wait for a buffer", started)
        if lease is None:
            logger.info("save of step %d skipped: every buffer is in flight", handle.step)
            handle._skipped()
            return None
        try:
            point("save.planned")
            handle._move(SaveState.STAGING)
            self.settler.begin(handle)
        except BaseException:
            lease.release()
            raise
        return lease

    def _save_whole(self, snapshot: Snapshot, lease: Lease) -> None:
        claim = threading.Lock()
        try:
            now, later = self._taker.split(snapshot)
            for note in self._sharer.notes(snapshot.flat.name) if self._sharer is not None else ():
                snapshot.handle._note(note)
            self._taker.copy(snapshot, now, lease.slab, cold=not lease.warm, background=False)
            staged = self._in_staging_thread(self._stage_rest, snapshot, lease, later, claim)
        except BaseException as error:
            if claim.acquire(blocking=False):
                self._fail(snapshot.handle, lease, error)
            raise
        if not later.copies:
            staged.result()

    # -- the staging thread -------------------------------------------------------------------------------------

    # NOTE [ Ctrl-C in save() ]
    # KeyboardInterrupt can be raised between any two instructions of the main thread, and the program may go on after it.
    # A slab whose save was interrupted halfway through the hand-over must not be leased again while a worker has it. So all
    # that must not stop halfway happens in the staging thread, where no signal handler runs; the trainer's thread only waits
    # for it. Who is to deal with the lease is settled by whoever takes ``claim`` first.

    def _in_staging_thread(self, stage: Callable[..., None], *args: Any) -> Future[None]:
        if self._stager is None:
            self._stager = ThreadPoolExecutor(1, thread_name_prefix="stager-stage")
        try:
            future = self._stager.submit(self._mark_staging_thread, stage, *args)
        except RuntimeError:  # the interpreter is shutting down (an atexit handler saves): no thread takes it any more
            self._mark_staging_thread(stage, *args)
            future = Future()
            future.set_result(None)
            return future
        with self._lock:
            self._staging.add(future)
        future.add_done_callback(self._forget_staging)
        return future

    def _mark_staging_thread(self, stage: Callable[..., None], *args: Any) -> None:
        self._staging_thread = threading.get_ident()
        try:
            stage(*args)
        finally:
            self._staging_thread = 0

    def _forget_staging(self, future: Future[None]) -> None:
        with self._lock:
            self._staging.discard(future)

    def _stage_rest(self, snapshot: Snapshot, lease: Lease, later: Work, claim: threading.Lock) -> None:
        if not claim.acquire(blocking=False):
            return  # the trainer's thread was interrupted and has given the save up
        try:
            if later.copies:
                point("save.overlapped")
                self._taker.copy(snapshot, later, lease.slab, cold=not lease.warm, background=True)
            self._finish_staging(snapshot, lease)
        except BaseException as error:
            self._fail(snapshot.handle, lease, error)
            if not later.copies:  # save() is waiting for it
                raise

    def _finish_staging(self, snapshot: Snapshot, lease: Lease) -> None:
        """The tensors are in the slab: add plan and objects, hand everything over."""
        started = time.time()
        handle = snapshot.handle
        lease.move(SlabState.STAGED)
        handle._move(SaveState.STAGED)
        point("save.copied")
        spec = self._spec(handle, self._options.num_parts, _ANY_SIZE if self._options.incremental else 0)
        job = self._jobs.write(spec, snapshot.plan, snapshot.blobs, lease.slab, self._arena.live_slabs())
        futures, failure = self._hand_over(job)
        lease.move(SlabState.PERSISTING)
        handle._move(SaveState.PERSISTING)
        handle._event("hand over", started)
        point("save.handed-over")
        if failure is None:
            handle._staged()
            self._arena.prepare_in_background(lease.nbytes)
        self._replicator.offer(handle, job, lease.hold())
        self.settler.await_parts(futures, spec, handle, lease, failure)

    def _hand_over(self, job: WriteTask) -> tuple[list[Future[PartResult]], BaseException | None]:
        """The parts that are out, and why not all are. One that is out uses the slab until it is done."""
        job = replace(job, writing=self._options.writing)
        futures: list[Future[PartResult]] = []
        try:
            for part in range(job.spec.num_parts):
                futures.append(self._pool.hand_over(persist_part, job, part))
        except Exception as error:
            if not futures:
                raise
            return futures, error
        return futures, None

    def _spec(self, handle: SaveHandle, num_parts: int, whole_bytes: int) -> SaveSpec:
        return SaveSpec(
            directory=self._options.directory,
            step=handle.step,
            save_id=handle.save_id,
            kind=self._options.kind,
            num_parts=num_parts,
            fsync=self._options.fsync,
            created=time.time(),
            stager=__version__,
            torch=str(torch.__version__),  # it is of a class of torch's, which a worker would have to import
            whole_bytes=whole_bytes,
            base_step=self.settler.base_step,
            full_every=self._options.full_every,
            rank=self._ranks.rank,
            num_ranks=self._ranks.num_ranks,
        )

    def _fail(self, handle: SaveHandle, lease: Lease, error: BaseException) -> None:
        """Before anything was handed over."""
        lease.release()
        self.settler.fail(handle, error)
        self._replicator.skip(handle, error)

    # -- in pieces ----------------------------------------------------------------------------------------------

    def _save_in_pieces(self, handle: SaveHandle, flat: StateTree) -> None:
        in_pieces = UsageError("the snapshot is larger than arena.max_host_bytes, and is staged in pieces")
        self._replicator.skip(handle, in_pieces)
        snapshot = self._taker.begin(handle, flat, self._piece_planner)
        pieces = cut(snapshot.plan, snapshot.blobs, self._piece_nbytes, incremental=self._options.incremental)
        lease = self._lease(handle, pieces.slab_nbytes)
        if lease is None:
            return
        handle._note(
            f"staged in {len(pieces.pieces)} pieces: the snapshot is larger than arena.max_host_bytes "
            f"({self._arena.max_slab_nbytes:,} bytes), so save() returned when its last piece was copied"
            + (", and it is not replicated" if self._replicator.is_on else "")
        )
        claim, given_up = threading.Lock(), threading.Event()
        staged: Future[None] | None = None
        try:
            staged = self._in_staging_thread(self._stage_pieces, snapshot, pieces, lease, claim, given_up)
            staged.result()
        except BaseException as error:  # see NOTE [ Ctrl-C in save() ]
            given_up.set()
            if claim.acquire(blocking=False):
                self._fail(handle, lease, error)
            elif staged is not None:
                wait_uninterrupted([staged])  # from here on the state may change
            raise

    def _stage_pieces(
        self, snapshot: Snapshot, pieces: Pieces, first: Lease, claim: threading.Lock, given_up: threading.Event
    ) -> None:
        if not claim.acquire(blocking=False):
            return
        handle = snapshot.handle
        spec = self._spec(handle, len(pieces.pieces), pieces.whole_bytes)
        futures: list[Future[PartResult]] = []
        lease: Lease | None = first
        try:
            for piece in pieces.pieces:
                if given_up.is_set() or _has_failed(futures):  # the rest would be for nothing
                    break
                lease = lease or self._arena.lease(pieces.slab_nbytes, when_full="wait")
                assert lease is not None  # it waits
                futures.append(self._stage_piece(spec, snapshot, pieces, piece, lease))
                lease = None
        except BaseException as error:
            self._finish_pieces(spec, handle, futures, error, whole=False)
            raise
        finally:
            if lease is not None:
                lease.release()
        interrupted = KeyboardInterrupt("save() was interrupted") if given_up.is_set() else None
        self._finish_pieces(spec, handle, futures, interrupted, whole=len(futures) == len(pieces.pieces))

    def _stage_piece(
        self, spec: SaveSpec, snapshot: Snapshot, pieces: Pieces, piece: Piece, lease: Lease
    ) -> Future[PartResult]:
        slab = lease.slab
        copies, kept = copies_of(piece, snapshot.plan, snapshot.flat.leaves)
        self._taker.copy_all(snapshot, copies, slab, cold=not lease.warm)
        kept.clear()
        for offset, data in blobs_of(piece, pieces.items, snapshot.blobs):
            put(slab, offset, data)
        lease.move(SlabState.STAGED)
        job = self._jobs.write_piece(
            spec, snapshot.plan, pieces.items, slab, self._arena.live_slabs(), piece.start, piece.nbytes
        )
        future = self._pool.hand_over(persist_part, replace(job, writing=self._options.writing), piece.part)
        lease.move(SlabState.PERSISTING)
        future.add_done_callback(lambda _: lease.release())
        return future

    def _finish_pieces(
        self,
        spec: SaveSpec,
        handle: SaveHandle,
        futures: list[Future[PartResult]],
        failure: BaseException | None,
        *,
        whole: bool,
    ) -> None:
        if not futures:
            error = failure or ClosedError("no piece of the snapshot was handed over")
            self.settler.fail(handle, error)
            return
        handle._move(SaveState.STAGED)
        handle._move(SaveState.PERSISTING)
        point("save.handed-over")
        if whole:
            handle._staged()
        self.settler.await_parts(futures, spec, handle, None, failure)

    # -- lifecycle ----------------------------------------------------------------------------------------------

    def in_callback(self) -> bool:
        """Whether this thread runs a callback of a save's Future: what it waited for would wait for it."""
        return self.settler.in_callback or threading.get_ident() == self._staging_thread

    def wait_for_staging(self, timeout: float | None = None) -> None:
        with self._lock:
            staging = set(self._staging)
        if staging and wait(staging, timeout).not_done:
            raise TimeoutError(f"a snapshot was not taken within {timeout:g} s")

    def _is_staging(self) -> bool:
        with self._lock:
            return bool(self._staging)

    def warm_up(self, state: Mapping[str, Any]) -> None:
        """Do now what the first save would have to do: plan, slabs, workers."""
        handle = SaveHandle(0, self._ranks.save_id(WARM_UP))
        try:
            flat = self._taker.flatten(state, handle.save_id)
        except BaseException as error:
            self.settler.tell(handle, error)
            raise
        snapshot = self._taker.begin(handle, flat, self._planner, may_move=not self._is_staging())
        works = self._taker.split(snapshot)
        nbytes = slab_nbytes(snapshot.plan, snapshot.blobs)
        in_pieces = nbytes > self._arena.max_slab_nbytes
        if in_pieces:
            snapshot = self._taker.begin(handle, flat, self._piece_planner)
            nbytes = cut(
                snapshot.plan, snapshot.blobs, self._piece_nbytes, incremental=self._options.incremental
            ).slab_nbytes
        self._arena.prepare(nbytes)
        ready = [self._pool.hand_over(prepare_worker) for _ in range(self._options.num_parts)]
        for future in ready:
            future.result()
        if not in_pieces and any(work.by_workers for work in works):
            self._rehearse(snapshot, works, nbytes)

    def _rehearse(self, snapshot: Snapshot, works: Iterable[Work], nbytes: int) -> None:
        """Workers map sources and buffers when they first touch them, which takes several times as long as the copy."""
        leases: list[Lease] = []
        try:
            while (lease := self._arena.lease(nbytes, when_full="skip")) is not None:
                leases.append(lease)
                for work in works:
                    self._taker.copy(snapshot, work, lease.slab, cold=not lease.warm, background=False)
        finally:
            for lease in leases:
                lease.release()

    def expect(self, nbytes: int) -> None:
        """A state of about so many bytes was loaded, so it will be saved: have memory for it ready by then."""
        nbytes += nbytes // 64 + (1 << 20)  # what describes the tensors comes on top; a slab may be larger than needed
        if nbytes <= self._arena.max_slab_nbytes:
            self._arena.prepare_in_background(nbytes)

    def close(self) -> None:
        """After the pool is closed: nothing is in flight any more."""
        self.settler.close()
        self.guard.close()
        if self._stager is not None:
            self._stager.shutdown()
        self._copier.close()
        self._planner.forget()
        self._piece_planner.forget()
        self._taker.forget()


def _has_failed(futures: list[Future[PartResult]]) -> bool:
    return any(future.done() and future.exception() is not None for future in futures)
