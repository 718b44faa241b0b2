"""One save from the state to the hand-over, and from the workers' answers to the Futures.

save()    flatten -> plan -> pickle objects -> lease a slab -> copy what is not guarded -> return
staging   (in save(), or in the staging thread when something is guarded)
          copy what is guarded -> verify -> write plan and objects into the slab -> hand over to every worker
answers   (in the pool's supervisor thread) all parts done -> release the slab -> resolve upload_completion
"""

from __future__ import annotations

import io
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from stager._version import __version__
from stager.answers import Answers
from stager.arena import Arena, Lease, SlabState
from stager.copying import Copier, Ready, compare, mark_ready
from stager.flatten import Flat, flatten
from stager.guard import Guard
from stager.job import slab_nbytes, write_job
from stager.plan import Copy, Planner, SnapshotPlan
from stager.save import SaveHandle, SaveState
from workers.errors import ClosedError, StorageError, UnstageableError
from workers.faults import point
from workers.formats import Format
from workers.job import SaveFacts, SaveJob
from workers.persist import PartResult, discard_partial, persist_part, prepare_worker
from workers.pool import WorkerPool
from workers.structure import describe

logger = logging.getLogger("stager")

_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, list, tuple, set)


@dataclass(frozen=True, slots=True)
class SaverOptions:
    """What a Saver is told.

    Attributes:
        directory: of the run, absolute.
        kind: name of the on-disk format.
        num_parts: into how many parts a save is dealt.
        fsync, check_free_space, verify: see the configuration's sections persistence and staging.
    """

    directory: str
    kind: str
    num_parts: int
    fsync: bool
    check_free_space: bool
    verify: bool


@dataclass(slots=True)
class _Snapshot:
    """A save on its way to the hand-over. Holds the sources alive until they are copied."""

    handle: SaveHandle
    flat: Flat
    plan: SnapshotPlan
    blobs: list[bytes]
    lease: Lease
    ready: Ready | None


class Saver:
    """Takes snapshots and sees them through to their commit."""

    def __init__(
        self,
        options: SaverOptions,
        file_format: Format,
        planner: Planner,
        arena: Arena,
        copier: Copier,
        pool: WorkerPool,
        on_done: Callable[[SaveHandle], None],
    ) -> None:
        self._options = options
        self._format = file_format
        self._planner = planner
        self._arena = arena
        self._copier = copier
        self._pool = pool
        self._on_done = on_done
        self._stager: ThreadPoolExecutor | None = None
        self._staging_thread = 0
        self._staging: set[Future[None]] = set()
        self._in_flight: set[SaveHandle] = set()
        self._lock = threading.Lock()
        self._pickle_checked: set[type] = set()
        self.guard = Guard(self.wait_for_staging)

    # -- the trainer's thread -----------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any]) -> SaveHandle:
        handle = SaveHandle(step, secrets.token_hex(8))
        snapshot = self._begin(handle, state)
        if snapshot is None:
            logger.info("save of step %d skipped: every buffer is in flight", step)
            handle._skipped()
            handle._unblocked()
            return handle
        point("save.planned")
        handle._move(SaveState.STAGING)
        with self._lock:
            self._in_flight.add(handle)
        try:
            later = self._copy_unguarded(snapshot)
            if later:
                self._stage_later(snapshot, later)
            else:
                self._finish_staging(snapshot)
        except BaseException as error:
            self._fail(snapshot, error)
            raise
        handle._unblocked()
        return handle

    def _begin(self, handle: SaveHandle, state: Mapping[str, Any]) -> _Snapshot | None:
        started = time.time()
        flat = flatten(state)
        plan = self._planner.plan(flat)
        blobs = [self._pickle(flat, leaf) for leaf in plan.objects]
        nbytes = plan.nbytes + sum(map(len, blobs))
        handle._describe(nbytes, plan.num_tensors, len(blobs))
        if self._options.check_free_space:
            self._check_free_space(nbytes)
        handle._event("plan", started)
        started = time.time()
        lease = self._arena.lease(slab_nbytes(plan, blobs))
        handle._event("wait for a buffer", started)
        if lease is None:
            return None
        return _Snapshot(handle, flat, plan, blobs, lease, mark_ready(flat.leaves))

    def _pickle(self, flat: Flat, leaf: int) -> bytes:
        value = flat.leaves[leaf]
        try:
            blob = self._format.object_blob(value)
        except Exception as error:
            raise UnstageableError(
                describe(flat.paths[leaf]), f"{type(value).__name__} cannot be pickled: {error}"
            ) from error
        kind = type(value)
        if kind not in _PLAIN_TYPES and kind not in self._pickle_checked:
            self._pickle_checked.add(kind)
            _warn_if_unsafe(describe(flat.paths[leaf]), kind, blob)
        return blob

    def _check_free_space(self, nbytes: int) -> None:
        stats = os.statvfs(self._options.directory)
        free = stats.f_bavail * stats.f_frsize
        if nbytes > free:
            raise StorageError(
                28,
                f"a checkpoint of {nbytes:,} bytes does not fit the {free:,} bytes that are free; nothing was written. "
                "Free space, or set persistence.check_free_space to false if the file system reports it wrongly",
                self._options.directory,
            )

    def _copy_unguarded(self, snapshot: _Snapshot) -> list[Copy]:
        """Copy what nothing protects; returns what may wait. See NOTE [ Overlap is safe by construction ]."""
        now, later = list(snapshot.plan.copies), []
        if self.guard:
            guarded = self.guard.addresses()
            leaves = snapshot.flat.leaves
            may_wait = [
                all((str(leaves[i].device), leaves[i].data_ptr()) in guarded for i in copy.leaves)
                for copy in snapshot.plan.copies
            ]
            now = [c for c, waits in zip(snapshot.plan.copies, may_wait, strict=True) if not waits]
            later = [c for c, waits in zip(snapshot.plan.copies, may_wait, strict=True) if waits]
        self._copy(snapshot, now)
        return later

    def _copy(self, snapshot: _Snapshot, copies: list[Copy]) -> None:
        started = time.time()
        leaves, slab = snapshot.flat.leaves, snapshot.lease.slab
        self._copier.copy(copies, leaves, slab, snapshot.ready)
        snapshot.handle._event("stage", started)
        if self._options.verify:
            started = time.time()
            paths = snapshot.flat.paths
            compare(copies, leaves, slab, lambda leaf: describe(paths[leaf]))
            snapshot.handle._event("verify", started)

    # -- the staging thread, or the trainer's -------------------------------------------------------------------

    def _stage_later(self, snapshot: _Snapshot, copies: list[Copy]) -> None:
        if self._stager is None:
            self._stager = ThreadPoolExecutor(1, thread_name_prefix="stager-stage")
        future = self._stager.submit(self._stage_guarded, snapshot, copies)
        with self._lock:
            self._staging.add(future)
        future.add_done_callback(self._forget_staging)

    def _forget_staging(self, future: Future[None]) -> None:
        with self._lock:
            self._staging.discard(future)

    def _stage_guarded(self, snapshot: _Snapshot, copies: list[Copy]) -> None:
        self._staging_thread = threading.get_ident()
        try:
            point("save.overlapped")
            self._copy(snapshot, copies)
            self._finish_staging(snapshot)
        except BaseException as error:  # noqa: BLE001  (the edge of the thread: it goes into the Future)
            self._fail(snapshot, error)

    def _finish_staging(self, snapshot: _Snapshot) -> None:
        """The tensors are in the slab: add plan and objects, hand everything over."""
        started = time.time()
        handle = snapshot.handle
        snapshot.lease.move(SlabState.STAGED)
        handle._move(SaveState.STAGED)
        point("save.copied")
        job = self._describe_job(snapshot)
        futures, failure = self._hand_over(job)
        snapshot.lease.move(SlabState.PERSISTING)
        handle._move(SaveState.PERSISTING)
        handle._event("hand over", started)
        point("save.handed-over")
        if failure is None:
            handle._staged()
            self._arena.prepare_in_background(snapshot.lease.slab.nbytes)
        Answers(futures, lambda results, error: self._finish(handle, snapshot.lease, results, failure or error))

    def _hand_over(self, job: SaveJob) -> tuple[list[Future[PartResult]], BaseException | None]:
        """The parts that are out, and why not all are. One that is out uses the slab until it is done."""
        futures: list[Future[PartResult]] = []
        try:
            for part in range(job.facts.num_parts):
                futures.append(self._pool.hand_over(persist_part, job, part))
        except Exception as error:
            if not futures:
                raise
            return futures, error
        return futures, None

    def _describe_job(self, snapshot: _Snapshot) -> SaveJob:
        facts = SaveFacts(
            directory=self._options.directory,
            step=snapshot.handle.step,
            save_id=snapshot.handle.save_id,
            kind=self._options.kind,
            num_parts=self._options.num_parts,
            fsync=self._options.fsync,
            created=time.time(),
            stager=__version__,
            torch=torch.__version__,
        )
        return write_job(facts, snapshot.plan, snapshot.blobs, snapshot.lease.slab, self._arena.live_slabs())

    def _fail(self, snapshot: _Snapshot, error: BaseException) -> None:
        """Before anything was handed over."""
        snapshot.lease.release()
        self._settle(snapshot.handle, lambda: snapshot.handle._fail(error))

    # -- the pool's supervisor thread ---------------------------------------------------------------------------

    def _finish(self, handle: SaveHandle, lease: Lease, results: list[PartResult], error: BaseException | None) -> None:
        lease.release()
        if any(result.committed for result in results):  # whatever befell another part afterwards
            self._settle(handle, lambda: handle._commit(results))
            return
        if error is None:
            error = StorageError(None, "every part was written, but nobody committed", self._options.directory)
        leftovers = (self._options.directory, handle.step, handle.save_id)
        try:
            cleaned = self._pool.submit(discard_partial, *leftovers)
        except ClosedError:
            with suppress(StorageError):  # the next run tries again
                discard_partial(*leftovers)
            self._settle(handle, lambda: handle._fail(error))
        else:
            cleaned.add_done_callback(lambda _: self._settle(handle, lambda: handle._fail(error)))

    def _settle(self, handle: SaveHandle, resolve: Callable[[], None]) -> None:
        resolve()
        self._on_done(handle)
        with self._lock:
            self._in_flight.discard(handle)

    # -- lifecycle ----------------------------------------------------------------------------------------------

    def in_callback(self) -> bool:
        """Whether this thread runs a callback of a save's Future: what it waited for would wait for it."""
        return self._pool.in_callback or threading.get_ident() == self._staging_thread

    def wait_for_staging(self, timeout: float | None = None) -> None:
        with self._lock:
            staging = set(self._staging)
        if staging and wait(staging, timeout).not_done:
            raise TimeoutError(f"a snapshot was not taken within {timeout:g} s")

    def in_flight(self) -> list[SaveHandle]:
        with self._lock:
            return list(self._in_flight)

    def warm_up(self, state: Mapping[str, Any]) -> None:
        """Do now what the first save would have to do: plan, slabs, workers."""
        flat = flatten(state)
        plan = self._planner.plan(flat)
        blobs = [self._pickle(flat, leaf) for leaf in plan.objects]
        nbytes = slab_nbytes(plan, blobs)
        self._arena.prepare(nbytes)
        ready = [self._pool.hand_over(prepare_worker) for _ in range(self._options.num_parts)]
        for future in ready:
            future.result()

    def close(self) -> None:
        """After the pool is closed: nothing is in flight any more."""
        self.guard.close()
        if self._stager is not None:
            self._stager.shutdown()
        self._copier.close()
        self._planner.forget()


def _warn_if_unsafe(name: str, kind: type, blob: bytes) -> None:
    """Say at save time, not weeks later, that loading this will need permission."""
    try:
        torch.load(io.BytesIO(blob), weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001  (torch raises several types; each means that it is refused)
        logger.warning(
            "%s holds a %s.%s, which is pickled; loading it will need allow_pickle=True (%s)",
            name,
            kind.__module__,
            kind.__qualname__,
            str(error).splitlines()[0],
        )
