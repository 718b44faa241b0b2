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
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from stager.ranks.messages import SaveFailed
from stager.ranks.rank_group import RankGroup, some_ranks
from stager.ranks.rendezvous import poll_secs
from stager.ranks.save_messages import SaveMessages, rank_failure
from stager.workers import long_wait
from stager.workers.checkpoint.commit.commit import (
    Committed,
    already_committed,
    commit_recorded,
    partial_file_names,
    partial_path,
)
from stager.workers.checkpoint.commit.persist import discard_partial, discard_unfinished, quarantine
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME
from stager.workers.checkpoint.documents.receipt import finished_ranks
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.checkpoint.write.save_spec import SaveSpec
from stager.workers.checkpoint.write.write_task import recorded_ranks
from stager.workers.errors import ClosedError, RankFailedError, StagerError, StorageError
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_FIRST_POLL_SECS = 0.005
_LAST_POLL_SECS = 0.25

_NUM_TELLING = 2  # ranks that tell who has not begun a save: one may be among those; many would all list the directory


@dataclass(frozen=True, slots=True)
class _Failed:
    """Why a save failed. ``is_unfinished``: only because parts of other ranks are missing."""

    error: BaseException
    is_unfinished: bool = False


@dataclass(slots=True, eq=False)
class _Pending:
    """A save that this rank has written its parts of."""

    spec: SaveSpec
    committed: Callable[[Committed], None]
    failed: Callable[[BaseException], None]
    deadline: float  # when to give up, and
    looks_at: float  # when to look at the directory next (time.monotonic())
    tells_at: float  # when to tell who has not begun it
    commit: Future[Committed | None] | None = None  # which this rank's worker tries
    has_every_part: bool = False  # only the commit is missing

    def wait_for_commit(self, timeout_secs: float) -> None:
        """Wait as long again, once: every part is written, and only the commit is missing."""
        self.has_every_part = True
        self.deadline += timeout_secs


class CommitWatch:
    """Waits for the ends of this rank's saves. One thread does, while there are any.

    Args:
        pool: whose workers tidy up and finish commits.
        keep_unfinished: see NOTE [ Unfinished saves ].

    Attributes:
        messages: what this rank posts of its saves.
    """

    def __init__(self, group: RankGroup, pool: WorkerPool, *, keep_unfinished: bool = False) -> None:
        self.messages = SaveMessages(group)
        self._keep_unfinished = keep_unfinished
        self._group = group
        self._pool = pool
        self._changed = threading.Condition()  # guards what follows
        self._unfinished: list[SaveSpec] = []
        self._pending: list[_Pending] = []
        self._thread: threading.Thread | None = None
        self._closed: BaseException | None = None

    @property
    def in_callback(self) -> bool:
        """Whether the calling thread is the watch's own, and must not wait for itself."""
        return threading.current_thread() is self._thread

    def expect(
        self, spec: SaveSpec, committed: Callable[[Committed], None], failed: Callable[[BaseException], None]
    ) -> None:
        """Wait for the end of a save whose parts of this rank are written. Returns at once.

        Args:
            committed, failed: one of them is called when the save has ended, in the watch's thread.
        """
        now = time.monotonic()
        first_look_secs = 0.0 if self._group.is_alone else (1 + self._group.rank) * self._group.look_secs
        pending = _Pending(
            spec,
            committed,
            failed,
            deadline=now + self._group.timeout_secs,
            looks_at=now + first_look_secs,
            tells_at=now + long_wait.ADVICE_SECS,
        )
        with self._changed:
            if self._closed is None:
                self._pending.append(pending)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._watch, name="stager-ranks", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
                return
        failed(self._closed)  # without the lock, which the callback may need

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
                    self._pool.submit(discard_unfinished, spec.directory, spec.final_name, spec.save_id)

    def drain(self, timeout: float | None) -> bool:
        """Wait until no save is pending. False if some are after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout)

    def close(self, error: BaseException) -> None:
        """End the thread. Saves that are pending fail with ``error``."""
        with self._changed:
            self._closed = error
            left, self._pending = self._pending, []  # the thread ends no save that is not in the list any more
            self._changed.notify_all()
        for pending in left:
            pending.failed(error)
        if self._thread is not None and not self.in_callback:
            self._thread.join()

    # -- the thread

    def _watch(self) -> None:
        """While there are saves, ask for their ends; at first often, then ever more seldom."""
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
            # Without the lock: the store, the directory and the callbacks may take long, and expect() must not wait.
            ends = [(one, end) for one in pending if (end := self._end_of(one)) is not None]
            for one, end in ends:
                self._finish(one, end)
            with self._changed:
                if self._closed is None and not ends:
                    self._changed.wait(poll)
            poll = _FIRST_POLL_SECS if ends else min(longest, poll * 1.5)

    def _finish(self, one: _Pending, end: Committed | _Failed) -> None:
        """Call what waits for the end of a save."""
        with self._changed:
            if one not in self._pending:  # closed meanwhile
                return
        try:
            committed = end if isinstance(end, Committed) else self._remove(one.spec, end)
            if committed is not None:
                one.committed(committed)
            elif isinstance(end, _Failed):
                one.failed(end.error)
        except Exception as error:
            logger.exception("a callback at the end of the save of step %d failed", one.spec.step)
            with suppress(Exception):  # it has ended
                one.failed(error)
        with self._changed:  # after the callbacks: drain() promises that they have returned
            if one in self._pending:
                self._pending.remove(one)
            self._changed.notify_all()

    def _end_of(self, one: _Pending) -> Committed | _Failed | None:
        """How a save ended; None if it has not. Asks what costs least first."""
        try:
            # 1. The commit that this rank's own worker tried: it costs nothing.
            end: Committed | _Failed | None = self._end_of_own_commit(one)
            if end is not None:
                return end
            # 2. The messages: a request to the store. Without the store the directory is still there.
            try:
                end, is_told = self._posted_end(one.spec), True
            except RankFailedError:
                is_told = False
            # 3. The directory, which costs the file system.
            return self._look(one, is_told) if end is None else end
        except Exception as error:  # noqa: BLE001  # whatever happens, nobody waits for ever
            return _Failed(error)

    def _end_of_own_commit(self, one: _Pending) -> Committed | _Failed | None:
        """How the commit that this rank tried ended the save; None if it has not."""
        if one.commit is None or not one.commit.done():
            return None
        commit, one.commit = one.commit, None
        error = commit.exception()
        if error is None and (done := commit.result()) is not None:
            self.messages.post_committed(done)
            return done
        # A file system that fails here may not fail another rank's commit. Any other error would fail it, too.
        if isinstance(error, StagerError) and not isinstance(error, (StorageError, ClosedError)):
            self.messages.post_failed(one.spec.save_id, error)
            return _Failed(error)
        return None

    def _posted_end(self, spec: SaveSpec) -> Committed | _Failed | None:
        """How a save ended, as another rank has posted. Raises RankFailedError if the store cannot be reached."""
        end = self.messages.end(spec)
        return _Failed(rank_failure(end, spec), end.is_unfinished) if isinstance(end, SaveFailed) else end

    def _look(self, one: _Pending, is_told: bool) -> Committed | _Failed | None:
        """Look at the directory if it is this rank's turn: see NOTE [ Who looks at the directory ].

        Args:
            is_told: whether the store answers.
        """
        now, group = time.monotonic(), self._group
        if now >= one.tells_at and group.rank < _NUM_TELLING:
            one.tells_at = math.inf
            self._tell_who_has_not_begun(one.spec)
        if not is_told:
            one.looks_at = min(one.looks_at, now + group.look_secs)
        is_late = now >= one.deadline + (group.rank.bit_length() * group.turn_secs if is_told else 0.0)
        if not is_late and now < one.looks_at:
            return None
        if is_late and is_told and not one.has_every_part and self.messages.every_part_is_written(one.spec.save_id):
            one.wait_for_commit(group.timeout_secs)
            return None
        # The commit before anything else: a save that is committed has not failed.
        found = _found_committed(one.spec)
        if found is not None:
            self.messages.post_found(found)
            return found
        if group.is_alone:
            # The last part to be written sees every receipt (commit.py). So somebody took some away, and nobody commits.
            lost = (
                "every part was written, but not all are there: the partial checkpoint was removed while it was written"
            )
            return _Failed(StorageError(errno.ENOENT, lost, partial_path(one.spec)))
        one.looks_at = now + (1 if group.is_coordinator else group.num_ranks) * group.look_secs
        if is_late:
            return self._too_late(one, is_told)
        # Every receipt is there: the committing worker was killed, or locks do not reach from host to host.
        if one.commit is None and (group.is_coordinator or is_told):
            with suppress(OSError):
                if not _missing_ranks(one.spec):
                    if group.is_coordinator or self.messages.claims_commit(one.spec.save_id):
                        self._commit(one)
        return None

    def _tell_who_has_not_begun(self, spec: SaveSpec) -> None:
        """Warn of ranks without a save record: most often only one rank calls save(). The first rank that has one warns."""
        try:
            begun = recorded_ranks(partial_file_names(spec))
        except OSError:  # it ends just now, or _look() says so
            return
        late = sorted(set(range(spec.num_ranks)).difference(begun))
        if late and begun[:1] == [self._group.rank]:
            logger.warning(
                "the save of step %d waits for its part of rank %s, which did not begin it within %.0f s, for %g s at most "
                "(ranks.timeout_secs): every rank has to call save(), as the others do. If only one rank does so on "
                "purpose, set ranks.together to false there",
                spec.step,
                some_ranks(late),
                long_wait.ADVICE_SECS,
                self._group.timeout_secs,
            )

    def _commit(self, one: _Pending) -> None:
        with suppress(ClosedError):
            one.commit = one.commit or self._pool.submit(commit_recorded, one.spec)

    def _too_late(self, one: _Pending, is_told: bool) -> Committed | _Failed | None:
        """Post what is missing at the deadline, and fail; or wait once more, if that is only the commit."""
        missing: list[int] = []
        try:
            missing = _missing_ranks(one.spec)
            what = f"rank {some_ranks(missing)} did not finish its part" if missing else "nobody committed it"
        except FileNotFoundError:
            with suppress(RankFailedError):  # the rank that removed it had posted why
                if (end := self._posted_end(one.spec)) is not None:
                    return end
            what = "another rank gave the save up, and removed its directory"
        except OSError as error:
            what = f"it is not committed, and its directory cannot be read ({error.strerror})"
        else:
            if not missing and not one.has_every_part:
                one.wait_for_commit(self._group.timeout_secs)
                # Post before the commit begins: it may take long, and the deadlines of the others come next.
                self.messages.post_every_part(one.spec.save_id)
                if self._group.is_coordinator or is_told:
                    self._commit(one)
                return None
        why = f"was not complete within {self._group.timeout_secs:g} s (ranks.timeout_secs): {what}"
        self.messages.post_failure(one.spec.save_id, why, missing, is_unfinished=bool(missing))
        return _Failed(RankFailedError(f"the save of step {one.spec.step} {why}", tuple(missing)), bool(missing))

    def _remove(self, spec: SaveSpec, failure: _Failed) -> Committed | None:
        """Remove or quarantine the directory of a save that failed. Returns the commit if it was committed just now."""
        keeps = failure.is_unfinished and self._keep_unfinished
        # 1. Once the directory has lost its name, nobody can commit it. Most often another rank has removed it already.
        if storage_of(spec.directory).exists(partial_path(spec)):
            try:
                self._rename_away(spec, keeps)
            except Exception as error:  # noqa: BLE001  # the next run tries again
                logger.warning("the partial directory of step %d was not removed: %s", spec.step, error)
        if keeps:
            with self._changed:
                self._unfinished.append(spec)
        # 2. Only now look for the commit: before the rename, another rank could still have committed after the look.
        return self.found_by_others(spec)

    def _rename_away(self, spec: SaveSpec, keeps: bool) -> None:
        partial = spec.directory, spec.final_name, spec.save_id
        task = (quarantine, *partial) if keeps else (discard_partial, *partial, self._group.discard_secs)
        try:
            self._pool.submit(*task).result()
        except ClosedError:  # the workers are gone
            with suppress(StorageError):
                task[0](*task[1:])


def _missing_ranks(spec: SaveSpec) -> list[int]:
    """The ranks whose receipts are not in the partial directory. Raises OSError if it cannot be listed."""
    names = partial_file_names(spec)
    if MANIFEST_NAME in names:  # every receipt was there; the committer may have removed some by now
        return []
    return sorted(set(range(spec.num_ranks)) - finished_ranks(names))


def _found_committed(spec: SaveSpec) -> Committed | None:
    """The commit of this save, if it is to be seen in the directory."""
    try:
        return already_committed(spec)
    except StorageError:  # the directory cannot be read now
        return None
