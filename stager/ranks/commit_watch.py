"""How a save ends after this rank has written its parts: the same way on every rank, in bounded time.

1. A rank's parts are written, and none of its workers committed: the rank expects the end (``CommitWatch.expect``).
2. The worker that sees the last receipt, on any rank, commits. Its rank posts ``SaveCommitted``.
3. A rank whose part fails posts ``SaveFailed``. The others remove what is there of the save, and fail with that reason.
4. Neither comes within ``ranks.timeout_secs``: the save fails, and the ranks whose receipts are missing are named.

The directory decides, not the messages: a save that is committed has not failed, whatever was posted. So a rank looks for
the commit after it has removed the save's partial directory, and only then fails.

In a group of one, step 1 happens only if somebody removed receipts. There is no rank to wait for, so the watch looks once:
the save is committed, or fails.

NOTE [ Who looks at the directory ]
A request to the store costs nearly nothing. A look at the directory costs the file system. So while the store answers:

    rank 0             looks once a second, and posts the commit that it finds
    other ranks        take turns: each looks once in as many seconds as there are ranks, and posts what it finds. So if the
                       rank that committed dies before it posts that, and rank 0 dies, too, the end comes seconds later
    who looks          commits, if every part is written and nobody has committed: rank 0 always does, of the others a few
                       do, and whoever is first at the deadline
    at the deadline    rank 0 looks, and posts who is missing, or that every part is written: then all wait as long again,
                       once. If rank 0 posts neither, it is dead or late: rank 1 looks 5 s after its own deadline, ranks 2
                       and 3 after 10 s, ranks 4 to 7 after 15 s, and so on, each unless one before it has posted

A rank that the store does not answer (a silent server is given up after 30 s) looks once a second, and at its deadline, as
rank 0 does. So every rank knows the end within ``ranks.timeout_secs`` and 5 s for each binary digit of its number; within
twice that, if only the commit is missing.

NOTE [ Unfinished saves ]
A save whose ranks did not all finish leaves a partial directory. The watch removes it. Where partners keep replicas, the
watch quarantines it instead, under another name: the next run may complete it from the replicas. It is removed when a
later save is committed, or by that run.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from stager.ranks.messages import SaveFailed
from stager.ranks.rank_group import RankGroup, some_ranks
from stager.ranks.rendezvous import poll_secs
from stager.ranks.save_messages import SaveMessages, rank_failure
from stager.workers.checkpoint.commit.commit import Committed, already_committed, commit_recorded, partial_path
from stager.workers.checkpoint.commit.persist import discard_partial, discard_unfinished, quarantine
from stager.workers.checkpoint.directory.manifest import MANIFEST_NAME
from stager.workers.checkpoint.directory.receipt import finished_ranks
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.errors import ClosedError, RankFailedError, StagerError, StorageError
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_FIRST_POLL_SECS = 0.005
_LAST_POLL_SECS = 0.25
_LOOK_SECS = 1.0  # between two looks at the directory
_TURN_SECS = 5.0  # for a rank to look, and to post what it found, before the next ones do


@dataclass(slots=True)
class _Pending:
    """A save that this rank has written its parts of.

    Attributes:
        committed, failed: one of them is called at the end.
        deadline, looks_at: when to give up, and when to look at the directory next (``time.monotonic()``).
        commit: the commit that this rank's worker tries.
        has_every_part: only the commit is missing.
    """

    spec: SaveSpec
    committed: Callable[[Committed], None]
    failed: Callable[[BaseException], None]
    deadline: float
    looks_at: float
    commit: Future[Committed | None] | None = field(default=None)
    has_every_part: bool = False

    def wait_for_commit(self, timeout_secs: float) -> None:
        """Wait as long again, once: every part is written, and only the commit is missing."""
        self.has_every_part = True
        self.deadline += timeout_secs


class CommitWatch:
    """Waits for the ends of this rank's saves. One thread does, while there are any.

    Args:
        group: whose ranks save together.
        pool: whose workers tidy up and finish commits.
        keep_unfinished: see NOTE [ Unfinished saves ].

    Attributes:
        messages: what this rank posts of its saves.
    """

    def __init__(self, group: RankGroup, pool: WorkerPool, *, keep_unfinished: bool = False) -> None:
        self.messages = SaveMessages(group)
        self._keep_unfinished = keep_unfinished
        self._unfinished: list[SaveSpec] = []
        self._group = group
        self._pool = pool
        self._pending: list[_Pending] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed: BaseException | None = None

    @property
    def in_callback(self) -> bool:
        """Whether the calling thread is the watch's own, and must not wait for itself."""
        return threading.current_thread() is self._thread

    def expect(
        self,
        spec: SaveSpec,
        committed: Callable[[Committed], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Wait for the end of a save whose parts of this rank are written. Returns at once.

        Args:
            committed, failed: one of them is called when the save has ended, in the watch's thread.
        """
        now = time.monotonic()
        first_look_secs = 0.0 if self._group.is_alone else (1 + self._group.rank) * _LOOK_SECS
        pending = _Pending(spec, committed, failed, now + self._group.timeout_secs, now + first_look_secs)
        with self._changed:
            if self._closed is None:
                self._pending.append(pending)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._watch, name="stager-ranks", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
                return
        failed(self._closed)

    def found_by_others(self, spec: SaveSpec) -> Committed | None:
        """The commit of this save by another rank, if it is to be seen in the directory."""
        return None if self._group.is_alone else _found_committed(spec)

    def remove_unfinished(self, before: float) -> None:
        """Remove the quarantined saves from before this time (unix): a later one is committed. Does not wait."""
        with self._changed:
            left = [spec for spec in self._unfinished if spec.created < before]
            self._unfinished = [spec for spec in self._unfinished if spec.created >= before]
        if self._group.is_coordinator:
            for spec in left:
                with suppress(ClosedError):
                    self._pool.submit(discard_unfinished, spec.directory, spec.step, spec.save_id)

    def drain(self, timeout: float | None) -> bool:
        """Wait until no save is pending. False if some are after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout)

    def close(self, error: BaseException) -> None:
        """End the thread. Saves that are pending fail with ``error``."""
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
        longest = poll_secs(self._group.num_ranks, _LAST_POLL_SECS)
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
            logger.exception("a callback at the end of the save of step %d failed", one.spec.step)
            with suppress(Exception):  # it has ended
                one.failed(error)
        with self._changed:
            if one in self._pending:
                self._pending.remove(one)
            self._changed.notify_all()

    def _end_of(self, one: _Pending) -> Callable[[], None] | None:
        """What to call now that the save has ended; None if it has not ended."""
        # Its own commit first: then messages, which cost little; then the directory, which costs more.
        if (helped := self._helped(one)) is not None:
            return helped
        try:
            end, is_told = self.messages.end(one.spec), True
        except RankFailedError:  # the directory is still there
            end, is_told = None, False
        return self._look(one, is_told) if end is None else self._ending(one, end)

    def _ending(self, one: _Pending, end: Committed | SaveFailed) -> Callable[[], None]:
        """End the save as another rank has posted."""
        if isinstance(end, SaveFailed):
            return self._failing(one, rank_failure(end, one.spec), is_unfinished=end.is_unfinished)
        return lambda: one.committed(end)

    def _look(self, one: _Pending, is_told: bool) -> Callable[[], None] | None:
        """Look at the directory if it is this rank's turn: see NOTE [ Who looks at the directory ].

        Args:
            is_told: whether the store answers.
        """
        now, rank = time.monotonic(), self._group.rank
        if not is_told:
            one.looks_at = min(one.looks_at, now + _LOOK_SECS)
        is_late = now >= one.deadline + (rank.bit_length() * _TURN_SECS if is_told else 0.0)
        if not is_late and now < one.looks_at:
            return None
        if is_late and is_told and not one.has_every_part and self.messages.every_part_is_written(one.spec.save_id):
            one.wait_for_commit(self._group.timeout_secs)
            return None
        found = _found_committed(one.spec)
        if found is not None:
            self.messages.post_found(found)
            return lambda: one.committed(found)
        if self._group.is_alone:  # nobody else is going to commit it
            return self._failing(one, _receipts_lost(one.spec))
        one.looks_at = now + (1 if self._group.is_coordinator else self._group.num_ranks) * _LOOK_SECS
        if is_late:
            return self._too_late(one, is_told)
        if self._group.is_coordinator or is_told:
            self._help(one)
        return None

    def _helped(self, one: _Pending) -> Callable[[], None] | None:
        """What to call when the commit that this rank tried has ended the save; None if it has not."""
        if one.commit is None or not one.commit.done():
            return None
        commit, one.commit = one.commit, None
        error = commit.exception()
        if error is None and (done := commit.result()) is not None:
            self.messages.post_committed(done)
            return lambda: one.committed(done)
        if isinstance(error, StagerError) and not isinstance(error, (StorageError, ClosedError)):
            self.messages.post_failed(one.spec.save_id, error)
            return self._failing(one, error)
        return None

    def _help(self, one: _Pending) -> None:
        """Commit if every receipt is there: the committing worker was killed, or locks do not reach from host to host."""
        if one.commit is not None:
            return
        with suppress(OSError):
            names = os.listdir(partial_path(one.spec))
            is_written = MANIFEST_NAME in names or len(finished_ranks(names)) >= one.spec.num_ranks
            if is_written and (self._group.is_coordinator or self.messages.claims_commit(one.spec.save_id)):
                self._commit(one)

    def _commit(self, one: _Pending) -> None:
        with suppress(ClosedError):
            one.commit = one.commit or self._pool.submit(commit_recorded, one.spec)

    def _too_late(self, one: _Pending, is_told: bool) -> Callable[[], None] | None:
        """Post what is missing at the deadline, and fail; or wait once more, if that is only the commit."""
        missing: list[int] = []
        try:
            names = os.listdir(partial_path(one.spec))
            if MANIFEST_NAME not in names:  # or every receipt was there, and they may be gone by now
                missing = sorted(set(range(one.spec.num_ranks)) - finished_ranks(names))
            what = f"rank {some_ranks(missing)} did not finish its part" if missing else "nobody committed it"
        except FileNotFoundError:
            with suppress(RankFailedError):  # the rank that removed it had posted why
                if (end := self.messages.end(one.spec)) is not None:
                    return self._ending(one, end)
            what = "another rank gave the save up, and removed its directory"
        except OSError as error:
            what = f"it is not committed, and its directory cannot be read ({error.strerror})"
        else:
            if not missing and not one.has_every_part:
                one.wait_for_commit(self._group.timeout_secs)
                self.messages.post_every_part(one.spec.save_id)
                if self._group.is_coordinator or is_told:
                    self._commit(one)
                return None
        why = f"was not complete within {self._group.timeout_secs:g} s (ranks.timeout_secs): {what}"
        self.messages.post_failure(one.spec.save_id, why, missing, is_unfinished=bool(missing))
        failure = RankFailedError(f"the save of step {one.spec.step} {why}", tuple(missing))
        return self._failing(one, failure, is_unfinished=bool(missing))

    def _failing(self, one: _Pending, error: BaseException, *, is_unfinished: bool = False) -> Callable[[], None]:
        """What to call to fail a save: remove its directory, then fail, unless it was committed just now."""

        def fail() -> None:
            # In this order: once the directory has lost its name, nobody can commit it. Most often another rank has
            # removed it already.
            keeps = is_unfinished and self._keep_unfinished
            if not _is_gone(partial_path(one.spec)):
                self._remove(one.spec, quarantine if keeps else discard_partial)
            if keeps:
                with self._changed:
                    self._unfinished.append(one.spec)
            found = self.found_by_others(one.spec)
            if found is None:
                one.failed(error)
            else:
                one.committed(found)

        return fail

    def _remove(self, spec: SaveSpec, how: Callable[[str, int, str], None]) -> None:
        partial = spec.directory, spec.step, spec.save_id
        try:
            self._pool.submit(how, *partial).result()
        except ClosedError:
            with suppress(StorageError):
                how(*partial)
        except Exception as failure:  # noqa: BLE001  # the next run tries again
            logger.warning("the partial directory of step %d was not removed: %s", spec.step, failure)


def _is_gone(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:  # it cannot be told: try to remove it
        return False
    return False


def _found_committed(spec: SaveSpec) -> Committed | None:
    """The commit of this save, if it is to be seen in the directory."""
    try:
        return already_committed(spec)
    except StorageError:  # the directory cannot be read now
        return None


def _receipts_lost(spec: SaveSpec) -> StorageError:
    # The last part to be written sees every receipt, unless somebody took some away: see commit.py.
    return StorageError(
        errno.ENOENT,
        "every part was written, but not all are there: the partial checkpoint was removed while it was written",
        partial_path(spec),
    )
