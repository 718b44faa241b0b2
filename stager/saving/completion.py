"""From the workers' answers to the Futures: how a save that was handed over ends, here and on the other ranks.

all parts done -> release the slab -> committed; or wait for other ranks (``ranks/commit_watch.py``); or remove what is there

Runs in the pool's supervisor thread and, where it had to wait for other ranks, in theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from stager.arena.arena import Lease
from stager.ranks.commit_watch import CommitWatch
from stager.ranks.rank_group import RankGroup
from stager.saving.answers import PartResults
from stager.saving.save import SaveHandle
from stager.workers.checkpoint.commit.commit import Committed
from stager.workers.checkpoint.commit.persist import PartResult, discard_partial
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import ClosedError, StorageError
from stager.workers.pool.pool import WorkerPool


class SaveCompletion:
    """Ends saves, and knows which are in flight.

    Args:
        pool: whose workers write the parts, and tidy up.
        group: whose ranks make one checkpoint together.
        on_done: called with every save that has ended.
        incremental: keep the step of the last whole checkpoint.
        keep_unfinished: see :class:`CommitWatch`.

    Attributes:
        base_step: the checkpoint whose files the next save may link (``workers/checkpoint/write``); None: there is none.
    """

    def __init__(
        self,
        pool: WorkerPool,
        group: RankGroup,
        on_done: Callable[[SaveHandle], None],
        *,
        incremental: bool,
        keep_unfinished: bool = False,
    ) -> None:
        self._pool = pool
        self._on_done = on_done
        self._incremental = incremental
        self._commit_watch = CommitWatch(group, pool, keep_unfinished=keep_unfinished)
        self._in_flight: set[SaveHandle] = set()
        self._lock = threading.Lock()
        self.base_step: int | None = None

    def begin(self, handle: SaveHandle) -> None:
        with self._lock:
            self._in_flight.add(handle)

    def in_flight(self) -> list[SaveHandle]:
        with self._lock:
            return list(self._in_flight)

    def await_parts(
        self,
        futures: list[Future[PartResult]],
        spec: SaveSpec,
        handle: SaveHandle,
        lease: Lease | None,
        failure: BaseException | None,
    ) -> None:
        """End the save when its parts are done.

        Args:
            lease: released then; None: the slabs are released already.
            failure: why not every part was handed over.
        """
        PartResults(futures, partial(self._finish, spec, handle, lease, failure))

    def tell(self, handle: SaveHandle, error: BaseException) -> None:
        """Tell the other ranks that this rank's part will not arrive."""
        self._commit_watch.messages.post_failed(handle.save_id, error)

    def fail(self, handle: SaveHandle, error: BaseException) -> None:
        """Before anything was handed over."""
        self.tell(handle, error)
        self._settle(handle, lambda: handle._fail(error))

    def _finish(
        self,
        spec: SaveSpec,
        handle: SaveHandle,
        lease: Lease | None,
        failure: BaseException | None,
        results: list[PartResult],
        error: BaseException | None,
    ) -> None:
        if lease is not None:
            lease.release()
        committed = next((result.committed for result in results if result.committed), None)
        if committed is not None:  # whatever befell another part afterwards
            self._commit_watch.messages.post_committed(committed)
            self._commit(handle, results, committed)
            return
        why = failure or error
        if why is None:
            self._commit_watch.expect(spec, partial(self._commit, handle, results), partial(self._give_up, handle))
            return
        why = self._commit_watch.messages.reason(spec, why)
        self.tell(handle, why)
        self._discard(spec, partial(self._end_failed, spec, handle, results, why))

    def _discard(self, spec: SaveSpec, then: Callable[[], None]) -> None:
        leftovers = spec.directory, spec.step, spec.save_id
        try:
            cleaned = self._pool.submit(discard_partial, *leftovers)
        except ClosedError:
            with suppress(StorageError):  # the next run tries again
                discard_partial(*leftovers)
            then()
        else:
            cleaned.add_done_callback(lambda _: then())

    def _end_failed(self, spec: SaveSpec, handle: SaveHandle, results: list[PartResult], error: BaseException) -> None:
        """Nothing is left of it, unless another rank has committed it: what failed here came after this rank's receipts."""
        committed = self._commit_watch.found_by_others(spec)
        if committed is None:
            self._give_up(handle, error)
        else:
            self._commit(handle, results, committed)

    def _commit(self, handle: SaveHandle, results: list[PartResult], committed: Committed) -> None:
        self.set_base(handle.step)
        self._commit_watch.remove_unfinished(committed.info.created)
        if not handle.upload_completion.done():  # it may have been left to the workers while it waited for other ranks
            self._settle(handle, lambda: handle._commit(results, committed))

    def _give_up(self, handle: SaveHandle, error: BaseException) -> None:
        if not handle.upload_completion.done():
            self._settle(handle, lambda: handle._fail(error))

    def _settle(self, handle: SaveHandle, resolve: Callable[[], None]) -> None:
        resolve()
        self._on_done(handle)
        with self._lock:
            self._in_flight.discard(handle)

    # -- the hard-link base (workers/checkpoint/write/hard_link_base.py) -----------------------------------------

    def set_base(self, step: int) -> None:
        """This checkpoint is whole: it was just committed, or verified."""
        if self._incremental:
            self.base_step = step

    def forget_base(self, steps: Collection[int]) -> None:
        """These checkpoints are damaged, or gone: nothing is to be linked to them."""
        if self.base_step in steps:
            self.base_step = None

    # -- lifecycle ----------------------------------------------------------------------------------------------

    @property
    def in_callback(self) -> bool:
        """Whether this thread runs a callback of a save's Future."""
        return self._pool.in_callback or self._commit_watch.in_callback

    def wait_for_ranks(self, timeout: float | None = None) -> bool:
        """Until the saves that this rank has written have ended on all ranks; False: after ``timeout`` seconds some have
        not."""
        return self._commit_watch.drain(timeout)

    def close(self) -> None:
        self._commit_watch.close(ClosedError("closed before the other ranks had finished their parts of the save"))
