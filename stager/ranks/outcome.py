"""How a save of several ranks ends: the same way on every rank, in bounded time.

    committed   a worker of some rank saw the last receipt and committed; its rank posts that. Whoever sees no note sees the
                checkpoint
    failed      a rank posts why; the others remove what is there of the save, and fail with that rank's reason
    neither     within ``ranks.timeout_secs``: failed, and the ranks whose receipts are missing are named

What is in the directory decides: a save that is committed has not failed, whatever was posted.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from stager.ranks.agreement import meeting
from stager.ranks.board import Board
from stager.ranks.job import Job, some_ranks
from workers.commit import Committed, already_committed, commit_recorded, partial_path
from workers.directory import CheckpointInfo, checkpoint_name
from workers.errors import ClosedError, RankFailedError, StagerError, StorageError
from workers.job import SaveFacts
from workers.manifest import MANIFEST_NAME
from workers.persist import discard_partial
from workers.pool import WorkerPool
from workers.receipt import finished_ranks

logger = logging.getLogger("stager")

_FIRST_POLL_SECS = 0.005
_LAST_POLL_SECS = 0.25
_POLL_SECS_PER_RANK = 2e-5  # so that the store's server is not asked more often than it can answer
_LOOK_SECS = 1.0  # between looks at the directory, which costs more than asking the store


@dataclass(slots=True)
class _Pending:
    """A save whose parts of this rank are written."""

    facts: SaveFacts
    committed: Callable[[Committed], None]
    failed: Callable[[BaseException], None]
    deadline: float
    looks_at: float
    commit: Future[Committed | None] | None = field(default=None)
    has_every_part: bool = False


class Outcomes:
    """The saves of this rank that wait for the others'. One thread looks after them, while there are any.

    Args:
        job: with a board.
        pool: whose workers tidy up and finish commits.
    """

    def __init__(self, job: Job, pool: WorkerPool) -> None:
        assert job.board is not None
        self._job = job
        self._board: Board = job.board
        self._pool = pool
        self._pending: list[_Pending] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed: BaseException | None = None

    # -- what this rank knows -----------------------------------------------------------------------------------

    def post_committed(self, committed: Committed) -> None:
        """With all that there is to know: the checkpoint may be replaced or removed before another rank has looked."""
        info = committed.info
        with suppress(RankFailedError):  # the others see the checkpoint
            self._board.post(f"saves/{info.save_id}", json.dumps(asdict(committed)).encode())
            self._board.post("newest", str(info.step).encode())

    def post_failed(self, save_id: str, error: BaseException) -> None:
        why = f"failed on rank {self._job.rank}: {type(error).__name__}: {error}"
        self._post_failure(save_id, {"ranks": [self._job.rank], "error": why})

    def _post_failure(self, save_id: str, note: dict[str, Any]) -> None:
        """Unless another rank was first: its reason is the reason."""
        with suppress(RankFailedError):  # the others miss this rank's receipts
            self._job.call_off(meeting(save_id), f"the save {note['error']}", note["ranks"])
            if self._board.add(f"saves/{save_id}/failures") == 1:
                self._board.post(f"saves/{save_id}", json.dumps(note).encode())

    def reason(self, facts: SaveFacts, error: BaseException) -> BaseException:
        """Why this rank's part failed: because another rank had given the save up, and has removed it, perhaps."""
        if isinstance(error, StorageError) and error.errno == errno.ENOENT:
            note = self._read(facts.save_id)
            if note is not None and "error" in note:
                return _error_of(facts, note)
        return error

    @property
    def in_callback(self) -> bool:
        """Whether the caller is a callback, which must not wait for the thread that runs it."""
        return threading.current_thread() is self._thread

    def expect(
        self,
        facts: SaveFacts,
        committed: Callable[[Committed], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """This rank's parts are written; call one of the two when the save has ended."""
        now = time.monotonic()
        pending = _Pending(facts, committed, failed, now + self._job.timeout_secs, now + _LOOK_SECS)
        with self._changed:
            if self._closed is None:
                self._pending.append(pending)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._watch, name="stager-ranks", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
                return
        failed(self._closed)

    def drain(self, timeout: float | None) -> bool:
        """Wait until no save is pending; False: after ``timeout`` seconds some are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout)

    def close(self, error: BaseException) -> None:
        """Nobody waits any more: what is pending fails with ``error``."""
        with self._changed:
            self._closed = error
            left, self._pending = self._pending, []
            self._changed.notify_all()
        for pending in left:
            pending.failed(error)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # -- the thread ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        poll = _FIRST_POLL_SECS
        longest = max(_LAST_POLL_SECS, self._job.num_ranks * _POLL_SECS_PER_RANK)
        while True:
            with self._changed:
                while not self._pending:
                    if self._closed is not None:
                        return
                    self._changed.wait()
                    poll = _FIRST_POLL_SECS
                pending = list(self._pending)
            ended = False
            for one in pending:
                try:
                    end = self._end_of(one)
                except Exception as error:  # noqa: BLE001  # whatever happens, nobody waits for ever
                    end = self._failing(one, error)
                if end is not None:
                    ended = True
                    self._finish(one, end)
            with self._changed:
                if self._closed is None and not ended:
                    self._changed.wait(poll)
            poll = _FIRST_POLL_SECS if ended else min(longest, poll * 1.5)

    def _finish(self, one: _Pending, end: Callable[[], None]) -> None:
        with self._changed:
            if one not in self._pending:  # closed meanwhile
                return
        try:
            end()
        except Exception as error:
            logger.exception("the end of the save of step %d", one.facts.step)
            with suppress(Exception):  # it has ended
                one.failed(error)
        with self._changed:
            if one in self._pending:
                self._pending.remove(one)
            self._changed.notify_all()

    def _end_of(self, one: _Pending) -> Callable[[], None] | None:
        """What to call, now that the save has ended; None: it has not."""
        helped = self._helped(one)
        if helped is not None:
            return helped
        note = self._read(one.facts.save_id)
        now = time.monotonic()
        if note is None and now < one.looks_at and now < one.deadline:
            return None
        found = found_committed(one.facts) if note is None or "info" not in note else _committed_of(one.facts, note)
        if found is not None:
            return lambda: one.committed(found)
        if note is not None and "error" in note:
            return self._failing(one, _error_of(one.facts, note))
        one.looks_at = now + _LOOK_SECS
        if now >= one.deadline:
            return self._too_late(one)
        self._help(one)
        return None

    def _helped(self, one: _Pending) -> Callable[[], None] | None:
        """The end that ``_help`` has brought about."""
        if one.commit is None or not one.commit.done():
            return None
        commit, one.commit = one.commit, None
        error = commit.exception()
        if error is None and (done := commit.result()) is not None:
            self.post_committed(done)
            return lambda: one.committed(done)
        if isinstance(error, StagerError) and not isinstance(error, (StorageError, ClosedError)):
            self.post_failed(one.facts.save_id, error)
            return self._failing(one, error)
        return None

    def _read(self, save_id: str) -> dict[str, Any] | None:
        try:
            note = self._board.read(f"saves/{save_id}")
        except RankFailedError:  # the directory is still there
            return None
        return None if note is None else dict(json.loads(note))

    def _help(self, one: _Pending) -> None:
        """Every receipt is there, and no commit: its worker was killed, or locks do not reach from host to host."""
        if not self._job.leads or one.commit is not None:
            return
        with suppress(OSError, ClosedError):
            names = os.listdir(partial_path(one.facts))
            if MANIFEST_NAME in names or len(finished_ranks(names)) >= one.facts.num_ranks:
                one.commit = self._pool.submit(commit_recorded, one.facts)

    def _too_late(self, one: _Pending) -> Callable[[], None] | None:
        names: list[str] = []
        with suppress(OSError):
            names = os.listdir(partial_path(one.facts))
        missing = sorted(set(range(one.facts.num_ranks)) - finished_ranks(names))
        if not missing and not one.has_every_part:  # it only has to be committed, which is worth some patience
            one.has_every_part = True
            one.deadline += self._job.timeout_secs
            self._help(one)
            return None
        what = f"rank {some_ranks(missing)} did not finish its part" if missing else "nobody committed it"
        why = f"was not complete within {self._job.timeout_secs:g} s (ranks.timeout_secs): {what}"
        self._post_failure(one.facts.save_id, {"ranks": missing, "error": why})
        return self._failing(one, RankFailedError(f"the save of step {one.facts.step} {why}", tuple(missing)))

    def _failing(self, one: _Pending, error: BaseException) -> Callable[[], None]:
        """Remove what is there of it, and fail; unless it was committed just now."""

        def fail() -> None:
            leftovers = one.facts.directory, one.facts.step, one.facts.save_id
            try:
                self._pool.submit(discard_partial, *leftovers).result()
            except ClosedError:
                with suppress(StorageError):
                    discard_partial(*leftovers)
            except Exception as failure:  # noqa: BLE001  # the next run tries again
                logger.warning("what is left of the save of step %d was not removed: %s", one.facts.step, failure)
            found = found_committed(one.facts)
            if found is None:
                one.failed(error)
            else:
                one.committed(found)

        return fail


def found_committed(facts: SaveFacts) -> Committed | None:
    """The commit of this save, when it is to be seen in the directory."""
    try:
        return already_committed(facts)
    except StorageError:  # not now, that is
        return None


def _committed_of(facts: SaveFacts, note: dict[str, Any]) -> Committed:
    path = os.path.join(facts.directory, checkpoint_name(facts.step))  # as this host sees it
    info = CheckpointInfo(**{**note["info"], "path": path})
    return Committed(info, note["started"], note["ended"], note["pid"])


def _error_of(facts: SaveFacts, note: dict[str, Any]) -> RankFailedError:
    text = f"the save of step {facts.step} {note['error']}"
    return RankFailedError(text, tuple(note["ranks"]))
