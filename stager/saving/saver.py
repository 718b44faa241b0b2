"""One save, from the state to the hand-over.

    trainer's thread   flatten -> plan -> pickle objects -> lease a slab -> copy what is not guarded of the first piece
    staging thread     hand the first piece over -> copy the rest of it -> the same for other pieces, if there are any
    workers            hash and write what is in the slab, while it is filled
    pool's thread      all parts are done -> resolve upload_completion (``completion.py``)

A snapshot is one piece, or several if it is larger than ``arena.max_host_bytes`` (``snapshot/pieces.py``). ``save()``
returns when the staging thread has ended, or before that if all that is left to copy is guarded.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from contextlib import suppress
from functools import partial
from typing import Any

from torch.profiler import record_function

from stager.arena.arena import Arena, Lease
from stager.config import StagerConfig
from stager.ranks.rank_group import WARM_UP, RankGroup
from stager.replication.replicator import NoReplication, Replicator
from stager.saving.completion import SaveCompletion
from stager.saving.destination import Destination
from stager.saving.expected_memory import ExpectedMemory
from stager.saving.hand_over import HandOver
from stager.saving.progress import SaveProgress
from stager.saving.rehearsal import Rehearsal
from stager.saving.save import Save
from stager.saving.setup import save_template, writing
from stager.saving.sidecars import Sidecars
from stager.saving.snapshot_stager import SnapshotStager
from stager.saving.staging import Staging
from stager.sharing.sharer import SharingOptions, SourceSharer
from stager.snapshot.copying import Copier
from stager.snapshot.guard import Guard
from stager.snapshot.pieces import Pieces, cut, segment_bytes_for, whole
from stager.snapshot.taker import Assignment, Snapshot, SnapshotTaker
from stager.state.snapshot_plan import Planner
from stager.state.state_tree import StateTree
from stager.telemetry.event import Event
from stager.telemetry.report import SaveState
from stager.workers.checkpoint.commit.persist import prepare_worker
from stager.workers.checkpoint.documents.names import not_a_checkpoint_name
from stager.workers.checkpoint.formats import get_format
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.errors import StorageError, UsageError
from stager.workers.faults import point
from stager.workers.long_wait import LongWait
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_ANY_SIZE = (1 << 63) - 1


class Saver:
    """Takes snapshots and hands them over to the workers.

    Args:
        newest_nbytes: returns about how many bytes the newest checkpoint has; 0: nobody knows.
        segment_bytes: the same on all ranks.
        on_done: called with every save that has ended, in the pool's or the commit watch's thread, or in that of ``save()``.
        post: gets what makes each event of a save (``Listeners.post``).

    Attributes:
        guard: which optimizers' memory may be copied while training goes on.
        memory: prepares slabs for the saves to come.
        completion: ends the saves that were handed over.
        progress: shows the saves in flight to whoever waits for them.
    """

    def __init__(
        self,
        config: StagerConfig,
        newest_nbytes: Callable[[], int],
        segment_bytes: int,
        arena: Arena,
        pool: WorkerPool,
        group: RankGroup,
        replicator: Replicator | NoReplication,
        on_done: Callable[[Save], None],
        post: Callable[[Callable[[], Event]], None],
    ) -> None:
        staging, persistence = config.staging, config.persistence
        self._checks_free_space = persistence.check_free_space
        self._incremental = persistence.incremental
        self._num_parts = config.workers.resolve_count(group.local_size)  # of a save in one piece: one for each worker
        self._arena = arena
        self._pool = pool
        self._group = group
        self._post = post
        self._replicator = replicator
        self._numbers = itertools.count(1)
        self.completion = SaveCompletion(
            pool, group, on_done, incremental=self._incremental, keep_unfinished=replicator.is_on
        )
        self._waiting: set[Save] = set()  # for a buffer
        self.progress = SaveProgress(
            config.telemetry.progress, lambda: [*self.completion.in_flight(), *tuple(self._waiting)]
        )
        template, how = save_template(persistence, group), writing(persistence, self._num_parts)
        self._hand_over = HandOver(template, group, how, arena, pool, self.completion, replicator)
        file_format = get_format(persistence.format)
        planner = partial(Planner, file_format, self._num_parts, rank=group.rank, incremental=self._incremental)
        self._planner = planner(segment_bytes)
        self._piece_planner = planner(segment_bytes_for(arena.piece_nbytes, segment_bytes), in_order=True)
        self.guard = Guard(self._wait_before_step)
        self.memory = ExpectedMemory(arena, newest_nbytes, self.guard, group)
        self._copier = Copier(staging.resolve_copy_threads(), staging.resolve_background_threads())
        sharer = SourceSharer(pool, self._num_parts, SharingOptions(staging.location, staging.share_min_bytes))
        self._taker = SnapshotTaker(
            file_format,
            self._copier,
            self.guard,
            sharer,
            group,
            self._num_parts,
            verify=staging.verify,
            safe_globals=None if config.loading.allow_pickle else config.loading.safe_globals,
            differing=config.ranks.differing,
        )
        self._stager = SnapshotStager(self._taker, self._hand_over, arena)
        self._rehearsal = Rehearsal(planner(segment_bytes), self.memory.expect_the_last_runs)

    # -- the trainer's thread -----------------------------------------------------------------------------------

    def new_save(self, step: int, destination: Destination, metrics: Mapping[str, float], sidecars: Sidecars) -> Save:
        """Make the record of a save, for :meth:`save`."""
        return Save(step, self._group.save_id(step), next(self._numbers), self._post, destination, metrics, sidecars)

    def save(self, save: Save, state: Mapping[str, Any]) -> None:
        """Take a snapshot, and have it written. Errors: :meth:`stager.Checkpointer.save`. The save has failed with them."""
        try:
            self._replicator.begin(save.timeline)
            self._save(save, state)
        except BaseException as error:
            if save.state is SaveState.PLANNED:  # no other thread has it
                self.completion.fail(save, error)
            else:
                self.completion.tell(save, error)
            self._hand_over.do_not_replicate(save, error)
            raise

    def refuse(self, save: Save, error: BaseException) -> None:
        """End a save before its first step, on all ranks."""
        self._replicator.begin(save.timeline)
        self.completion.fail(save, error)
        self._hand_over.do_not_replicate(save, error)

    def _save(self, save: Save, state: Mapping[str, Any]) -> None:
        self.memory.know_size()
        snapshot, pieces = self._plan(save, self._taker.flatten(state, save.save_id))
        # Before a slab is leased: a save that cannot be written must not hold one.
        directory = save.destination.directory
        if (
            self._checks_free_space and self.completion.base_in(directory) is None
        ):  # with one, less is written than that
            _check_free_space(directory, snapshot.nbytes + save.sidecars.nbytes)
        self._tell_of_a_file_in_its_place(save.destination.path)
        if not pieces.is_whole:
            self._hand_over.do_not_replicate(
                save, UsageError("the snapshot is larger than arena.max_host_bytes, and is staged in pieces")
            )
        lease = self._lease(save, pieces.slab_nbytes)
        if lease is not None:
            self._stager.stage(Staging(save, snapshot, pieces), lease)
        save.record(blocked_secs=save.elapsed_secs())

    def _plan(self, save: Save, tree: StateTree) -> tuple[Snapshot, Pieces]:
        timeline = save.timeline
        snapshot = self._taker.begin(timeline, tree, self._planner, may_move=not self._stager.thread.is_busy)
        plan = snapshot.plan
        save.planned(nbytes=snapshot.nbytes, num_tensors=plan.num_tensors, num_objects=len(plan.objects))
        timeline.timing("plan", timeline.started)
        # In one piece if it fits a slab. Only the plan of the whole snapshot says how large it is.
        extra, whole_bytes = save.sidecars.nbytes, _ANY_SIZE if self._incremental else 0
        pieces = whole(snapshot.plan, snapshot.blobs, self._num_parts, whole_bytes, extra)
        if pieces.slab_nbytes > self._arena.max_slab_nbytes:
            snapshot = self._taker.begin(timeline, tree, self._piece_planner)
            room, num_buffers = self._arena.piece_nbytes, self._arena.num_buffers
            incremental = self._incremental
            pieces = cut(
                snapshot.plan, snapshot.blobs, room, num_buffers, incremental=incremental, sidecars_nbytes=extra
            )
            timeline.note(
                f"staged in {len(pieces.pieces)} pieces: the snapshot is larger than arena.max_host_bytes "
                f"({self._arena.max_slab_nbytes:,} bytes), so save() returned when its last piece was copied"
                + (", and it is not replicated" if self._replicator.is_on else "")
            )
        return snapshot, pieces

    def _tell_of_a_file_in_its_place(self, path: str) -> None:
        with suppress(OSError):
            if self._group.is_coordinator and not stat.S_ISDIR(os.lstat(path).st_mode):
                logger.warning(
                    "%s is no directory, and the checkpoint needs the name: what is there is kept, and renamed to %s",
                    path,
                    not_a_checkpoint_name(os.path.basename(path), "..."),
                )

    def _lease(self, save: Save, nbytes: int) -> Lease | None:
        """None: this save is skipped."""
        self._waiting.add(save)
        lease: Lease | None = None
        try:
            with save.timeline.timed("wait for a buffer"), self.progress.shown("waiting for a buffer"):
                lease = self._arena.lease(nbytes)
        except BaseException:  # Ctrl-C, while the progress bar ends
            if lease is not None:
                lease.release()
            raise
        finally:
            self._waiting.discard(save)
        if lease is None:
            logger.info("save of step %d skipped: every buffer is in flight", save.step)
            save.skip()
            return None
        try:  # the save counts as in flight from here to its end: close() waits for it
            point("save.planned")
            save.move(SaveState.STAGING)
            self.completion.begin(save)
        except BaseException as error:
            lease.release()
            self.completion.fail(save, error)
            raise
        return lease

    # -- lifecycle ----------------------------------------------------------------------------------------------

    @property
    def in_callback(self) -> bool:
        """Whether this thread runs a callback of a save's Future: what it waited for would wait for it."""
        return self.completion.in_callback or self._stager.thread.is_current

    def wait_for_staging(self, timeout: float | None = None) -> None:
        """Wait until every snapshot that was begun is taken; TimeoutError after ``timeout`` seconds."""
        with self._copier.hurried():
            self._stager.thread.wait(timeout)

    def wait_for_saves(self, saves: Sequence[Save] | None = None) -> None:
        """Wait until saves have ended, committed or not. Errors stay unread in their Futures.

        Args:
            saves: those that are waited for; None: all that are in flight.
        """
        saves = self.completion.in_flight() if saves is None else saves

        def ended(timeout: float | None) -> bool:
            return not wait([save.upload_completion for save in saves], timeout).not_done

        steps = ", ".join(str(save.step) for save in saves)
        LongWait(f"the save of step {steps} to be committed").until(ended)

    def _wait_before_step(self) -> None:
        if self._stager.thread.is_busy:  # else no range: a profile shows the steps that have waited
            with record_function("stager: wait before a guarded step"):
                self.wait_for_staging()

    def warm_up(self, state: Mapping[str, Any]) -> None:
        """Do now what the first save would have to do: plan, create slabs, start workers. Waits for all of it."""
        self.memory.know_size()
        # Nobody hears of it, and it goes nowhere: it is no save.
        save = Save(0, self._group.save_id(WARM_UP), 0, lambda make: None, Destination("", "", None), {})
        try:
            tree = self._taker.flatten(state, save.save_id)
        except BaseException as error:
            self.completion.tell(save, error)
            raise
        snapshot, pieces = self._plan(save, tree)
        works = self._taker.split(snapshot, pieces, pieces.pieces[0])
        self._arena.prepare(pieces.slab_nbytes)
        for future in [self._pool.hand_over(prepare_worker) for _ in range(self._num_parts)]:
            future.result()
        if any(work.by_workers for work in works):
            self._rehearse(Staging(save, snapshot, pieces), works)

    def _rehearse(self, staging: Staging, works: Iterable[Assignment]) -> None:
        """Workers map sources and slabs when they first touch them, which takes several times as long as the copy."""
        leases: list[Lease] = []
        try:
            while (lease := self._arena.lease(staging.pieces.slab_nbytes, when_full="skip")) is not None:
                leases.append(lease)
                for work in works:
                    self._stager.copy(staging, work, lease)
        finally:
            for lease in leases:
                lease.release()

    def close(self) -> None:
        """Free what staging uses. Call it after the pool is closed: then nothing is in flight any more."""
        self.completion.close()  # first: it ends saves, whose callbacks may still ask the rest
        self._rehearsal.close()
        self.guard.close()
        self._stager.thread.close()
        self._copier.close()
        self._planner.forget()
        self._piece_planner.forget()
        self._taker.forget()


def _check_free_space(directory: str, nbytes: int) -> None:
    with storage_errors("save", directory):
        free = storage_of(directory).free_bytes(directory)
    if nbytes > free:
        raise StorageError(
            errno.ENOSPC,
            f"a checkpoint of {nbytes:,} bytes does not fit the {free:,} bytes that are free; nothing was written. "
            "Free space, or set persistence.check_free_space to false if the file system reports it wrongly",
            directory,
        )
