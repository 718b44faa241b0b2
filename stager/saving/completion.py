"""How a save that was handed over ends, on this rank and on the others.

    1. All parts of this rank are done, or have failed.
    2. Release the slabs: no worker reads them any more. It comes first, because the next ``save()`` may be waiting.
    3. A part has committed the checkpoint: tell the other ranks, and resolve ``upload_completion``.
    4. Or every part is written, but other ranks are not ready: the commit watch (``ranks/commit_watch.py``) waits for them.
    5. Or a part has failed: tell the other ranks, remove the partial directory, and fail ``upload_completion``. The removal
       comes before the failure is seen, so that who sees it finds a clean directory.

Runs in the pool's supervisor thread and, where the save had to wait for other ranks, in the commit watch's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from stager.arena.arena import Lease
from stager.ranks.commit_watch import CommitWatch
from stager.ranks.rank_group import RankGroup
from stager.saving.save import Save
from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.commit.persist import PartResult, discard_partial, withdraw
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import ClosedError, InternalError, LeftRunningError, StorageError, WithdrawnError
from stager.workers.pool.pool import WorkerPool

_WITHDRAWN = "its checkpoint was deleted while the save was in flight"


class SaveCompletion:
    """Ends saves, and knows which are in flight.

    Args:
        on_done: called with every save that has ended.
        keep_unfinished: see :class:`CommitWatch`.
    """

    def __init__(
        self,
        pool: WorkerPool,
        group: RankGroup,
        on_done: Callable[[Save], None],
        *,
        incremental: bool,
        keep_unfinished: bool,
    ) -> None:
        self._pool = pool
        self._on_done = on_done
        self._incremental = incremental
        self._commit_watch = CommitWatch(group, pool, keep_unfinished=keep_unfinished)
        self._in_flight: set[Save] = set()
        self._lock = threading.Lock()
        self._bases: dict[str, str] = {}  # by directory: the name of the hard-link base of the next save

    def begin(self, save: Save) -> None:
        """Count a save as in flight until it ends."""
        with self._lock:
            self._in_flight.add(save)

    def in_flight(self) -> list[Save]:
        """Return the saves that have not ended."""
        with self._lock:
            return list(self._in_flight)

    def await_parts(
        self,
        futures: Sequence[Future[PartResult]],
        spec: SaveSpec,
        save: Save,
        leases: Sequence[Lease],
        failure: BaseException | None,
    ) -> None:
        """Have the save end when its parts are done, by steps 1 to 5 at the head of this file. Returns at once.

        It does not end here if the workers were left to finish alone: their slabs and their partial directory must stay.

        Args:
            futures: of the parts that were handed over, at least one.
            leases: of the slabs that hold them; released then, if they are not yet.
            failure: why not every part was handed over; None: every part was, or one of ``futures`` has failed.
        """

        # close() has detached from the workers while this save was still being staged, and has passed it by.
        was_passed_by = any(future.done() and isinstance(future.exception(), LeftRunningError) for future in futures)

        def end() -> None:
            # 1. All parts are done.
            errors = [error for future in futures if (error := future.exception()) is not None]
            left = next((error for error in errors if isinstance(error, LeftRunningError)), None)
            if left is not None:
                if was_passed_by:
                    save.upload_completion.was_read = failure is None  # most likely it is no error
                    with suppress(InternalError):  # it has ended
                        save.fail(failure or left)
                return
            # 2. Release the slabs.
            for lease in leases:
                lease.release()
            results = [future.result() for future in futures if future.exception() is None]
            self._finish(spec, save, results, failure or next(iter(errors), None))

        when_all_done(futures, end)

    def tell(self, save: Save, error: BaseException) -> None:
        """Tell the other ranks that this rank's part of the save will not arrive."""
        self._commit_watch.messages.post_failed(save.save_id, error)

    def fail(self, save: Save, error: BaseException) -> None:
        """End a save of which nothing was handed over."""
        self.tell(save, error)
        self._give_up(save, error)

    def _finish(self, spec: SaveSpec, save: Save, results: list[PartResult], error: BaseException | None) -> None:
        committed = next((result.committed for result in results if result.committed), None)
        if results and (error is None or committed is not None):
            save.written(results)
        if committed is not None:  # 3. whatever happened to another part afterwards
            self._commit_watch.messages.post_committed(committed)
            self._commit(save, committed)
            return
        if error is None:  # 4. every part is written, but other ranks are not ready
            self._commit_watch.expect(spec, partial(self._commit, save), partial(self._give_up, save))
            return
        # 5. Tell first: the other ranks need not wait for the removal.
        error = self._commit_watch.messages.first_failure(spec, error)
        if save.is_withdrawn:
            error = WithdrawnError(_WITHDRAWN)
        self.tell(save, error)
        self._discard(spec, partial(self._end_failed, spec, save, error))

    def _discard(self, spec: SaveSpec, then: Callable[[], None]) -> None:
        leftovers = spec.directory, spec.final_name, spec.save_id
        try:
            cleaned = self._pool.submit(discard_partial, *leftovers)
        except ClosedError:
            with suppress(StorageError):  # the next run tries again
                discard_partial(*leftovers)
            then()
        else:
            cleaned.add_done_callback(lambda _: then())

    def _end_failed(self, spec: SaveSpec, save: Save, error: BaseException) -> None:
        # Another rank may have committed after this rank's receipts, and before what failed here. The look comes after
        # the removal: from then on nobody can commit this save any more.
        committed = self._commit_watch.found_by_others(spec)
        if committed is None:
            self._give_up(save, error)
        else:
            self._commit(save, committed)

    def _commit(self, save: Save, committed: Committed) -> None:
        # Before the Future is done: who waits for it may save at once, and link this checkpoint.
        self.set_base(save.destination.directory, save.destination.name)
        self._commit_watch.remove_unfinished(committed.info.created)
        self._settle(save, lambda: save.commit(committed))

    def _give_up(self, save: Save, error: BaseException) -> None:
        is_withdrawn = save.is_withdrawn or isinstance(error, WithdrawnError)
        self._settle(save, save.cancel if is_withdrawn else lambda: save.fail(error))

    def withdraw(self, save: Save) -> None:
        """Have a save in flight end without a checkpoint, on all ranks, unless it is committed just now.

        Raises:
            StorageError: the partial directory cannot be renamed; the save goes on.
        """
        # 1. Before the directory is renamed: workers that notice fail their parts, on any rank.
        save.is_withdrawn = True
        self._commit_watch.messages.post_withdrawn(save.save_id, _WITHDRAWN)
        try:
            withdraw(save.destination.directory, save.destination.name, save.save_id)
        except StorageError:
            save.is_withdrawn = False
            raise

    def _settle(self, save: Save, resolve: Callable[[], None]) -> None:
        if save.upload_completion.done():
            return  # close() has detached from it while it waited for other ranks
        resolve()
        self._on_done(save)
        with self._lock:  # last: the save is in flight until its callbacks have run
            self._in_flight.discard(save)

    # -- the hard-link base (workers/checkpoint/write/hard_link_base.py) ----------------------------------------

    def base_in(self, directory: str) -> str | None:
        """Return the name of the checkpoint that the next save in a directory may link; None: there is none."""
        return self._bases.get(directory)

    def set_base(self, directory: str, name: str) -> None:
        """Let the next incremental save link this checkpoint: it is whole, because it was just committed or verified."""
        if self._incremental:
            self._bases[directory] = name

    def forget_base(self, directory: str, names: Collection[str]) -> None:
        """Link none of these checkpoints: they are damaged or removed."""
        if self._bases.get(directory) in names:
            del self._bases[directory]

    # -- lifecycle ----------------------------------------------------------------------------------------------

    @property
    def in_callback(self) -> bool:
        """Whether this thread runs a callback of a save's Future."""
        return self._pool.in_callback or self._commit_watch.in_callback

    def wait_for_ranks(self, timeout: float | None = None) -> bool:
        """Wait until the saves that this rank has written have ended on all ranks; False after ``timeout`` seconds."""
        return self._commit_watch.drain(timeout)

    def close(self) -> None:
        """End what still waits for other ranks."""
        self._commit_watch.close(ClosedError("closed before the other ranks had finished their parts of the save"))


def when_all_done(futures: Sequence[Future[PartResult]], then: Callable[[], None]) -> None:
    """Call ``then`` once, in the thread of the Future that is done last."""
    missing = len(futures)
    lock = threading.Lock()

    def one_done(_: Future[PartResult]) -> None:
        nonlocal missing
        with lock:  # the parts end in several threads; only the last one goes on
            missing -= 1
            if missing:
                return
        then()  # without the lock: it takes others

    for future in futures:
        future.add_done_callback(one_done)
