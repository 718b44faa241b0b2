"""How a save of several ranks ends: the same way on every rank, in bounded time.

    committed   a worker of some rank saw the last receipt and committed; its rank posts that. Whoever sees no note sees the
                checkpoint
    failed      a rank posts why; the others remove what is there of the save, and fail with that rank's reason
    neither     within ``ranks.timeout_secs``: failed, and the ranks whose receipts are missing are named

What is in the directory decides: a save that is committed has not failed, whatever was posted.

NOTE [ Who looks at the directory ]
Asking the store costs nearly nothing, looking at the directory costs the file system. So while the store answers,

    rank 0             looks once a second, and posts the commit that it finds
    the others         take turns: each looks once in as many seconds as there are ranks, and posts what it finds. So if the
                       rank that committed dies before it says so, and rank 0, too, the end comes seconds later
    who looks          commits, if every part is written and nobody does: always, if it is rank 0; of the others a few, and
                       whoever is first at the deadline
    at the deadline    rank 0 looks, and posts who is missing, or that every part is written: then all wait as long again,
                       once. Where it does not, it is dead, or late itself: rank 1 does so 5 s after its own deadline,
                       ranks 2 and 3 after 10 s, 4 to 7 after 15 s, and so on, each unless one before it has

A rank that the store does not answer (a silent server is given up after 30 s) looks once a second and at its deadline, as
rank 0 does. So every rank knows the end within ``ranks.timeout_secs`` and 5 s for each binary digit of its number; within
twice that, if only the commit is missing.

NOTE [ Unfinished saves ]
Of a save whose ranks did not all finish, what is there is removed. Where partners keep replicas it is set aside, under
another name: the next run writes what is missing from those, and needs the rest. It is removed when a later save is
committed, or then.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from stager.ranks.notes import Note, Notes, end_by
from stager.ranks.rank_group import RankGroup, some_ranks
from stager.ranks.rendezvous import poll_secs
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
    """A save whose parts of this rank are written."""

    spec: SaveSpec
    committed: Callable[[Committed], None]
    failed: Callable[[BaseException], None]
    deadline: float
    looks_at: float
    commit: Future[Committed | None] | None = field(default=None)
    has_every_part: bool = False

    def wait_for_commit(self, timeout_secs: float) -> None:
        """Every part is written: it only has to be committed, which is worth as long again, once."""
        self.has_every_part = True
        self.deadline += timeout_secs


class CommitWatch:
    """The saves of this rank that wait for the others'. One thread looks after them, while there are any.

    Args:
        group: with a rendezvous.
        pool: whose workers tidy up and finish commits.
        keep_unfinished: see NOTE [ Unfinished saves ].

    Attributes:
        notes: what this rank posts of a save.
    """

    def __init__(self, group: RankGroup, pool: WorkerPool, *, keep_unfinished: bool = False) -> None:
        self.notes = Notes(group)
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
        """Whether the caller is a callback, which must not wait for the thread that runs it."""
        return threading.current_thread() is self._thread

    def expect(
        self,
        spec: SaveSpec,
        committed: Callable[[Committed], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """This rank's parts are written; call one of the two when the save has ended."""
        now = time.monotonic()
        first_look_secs = (1 + self._group.rank) * _LOOK_SECS
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

    def remove_unfinished(self, before: float) -> None:
        """Of saves before this time (unix): a later one is committed. Does not wait."""
        with self._changed:
            left = [spec for spec in self._unfinished if spec.created < before]
            self._unfinished = [spec for spec in self._unfinished if spec.created >= before]
        if self._group.is_coordinator:
            for spec in left:
                with suppress(ClosedError):
                    self._pool.submit(discard_unfinished, spec.directory, spec.step, spec.save_id)

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
            logger.exception("the end of the save of step %d", one.spec.step)
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
        try:
            note, is_told = self.notes.read(one.spec.save_id), True
        except RankFailedError:  # the directory is still there
            note, is_told = None, False
        return self._look(one, is_told) if note is None else self._ending(one, note)

    def _ending(self, one: _Pending, note: Note) -> Callable[[], None]:
        """As the note says."""
        end = end_by(note, one.spec)
        if isinstance(end, RankFailedError):
            return self._failing(one, end, is_unfinished=bool(note.get("unfinished")))
        return lambda: one.committed(end)

    def _look(self, one: _Pending, is_told: bool) -> Callable[[], None] | None:
        """At the directory, if it is this rank's turn: see NOTE [ Who looks at the directory ].

        Args:
            is_told: the store answers.
        """
        now, rank = time.monotonic(), self._group.rank
        if not is_told:
            one.looks_at = min(one.looks_at, now + _LOOK_SECS)
        is_late = now >= one.deadline + (rank.bit_length() * _TURN_SECS if is_told else 0.0)
        if not is_late and now < one.looks_at:
            return None
        if is_late and is_told and not one.has_every_part and self.notes.every_part_is_written(one.spec.save_id):
            one.wait_for_commit(self._group.timeout_secs)
            return None
        found = found_committed(one.spec)
        if found is not None:
            self.notes.post_found(found)
            return lambda: one.committed(found)
        one.looks_at = now + (1 if self._group.is_coordinator else self._group.num_ranks) * _LOOK_SECS
        if is_late:
            return self._too_late(one, is_told)
        if self._group.is_coordinator or is_told:
            self._help(one)
        return None

    def _helped(self, one: _Pending) -> Callable[[], None] | None:
        """The end that ``_help`` has brought about."""
        if one.commit is None or not one.commit.done():
            return None
        commit, one.commit = one.commit, None
        error = commit.exception()
        if error is None and (done := commit.result()) is not None:
            self.notes.post_committed(done)
            return lambda: one.committed(done)
        if isinstance(error, StagerError) and not isinstance(error, (StorageError, ClosedError)):
            self.notes.post_failed(one.spec.save_id, error)
            return self._failing(one, error)
        return None

    def _help(self, one: _Pending) -> None:
        """Every receipt is there, and no commit: its worker was killed, or locks do not reach from host to host."""
        if one.commit is not None:
            return
        with suppress(OSError):
            names = os.listdir(partial_path(one.spec))
            is_written = MANIFEST_NAME in names or len(finished_ranks(names)) >= one.spec.num_ranks
            if is_written and (self._group.is_coordinator or self.notes.claims_commit(one.spec.save_id)):
                self._commit(one)

    def _commit(self, one: _Pending) -> None:
        with suppress(ClosedError):
            one.commit = one.commit or self._pool.submit(commit_recorded, one.spec)

    def _too_late(self, one: _Pending, is_told: bool) -> Callable[[], None] | None:
        missing: list[int] = []
        try:
            names = os.listdir(partial_path(one.spec))
            if MANIFEST_NAME not in names:  # or every receipt was there, and they may be gone by now
                missing = sorted(set(range(one.spec.num_ranks)) - finished_ranks(names))
            what = f"rank {some_ranks(missing)} did not finish its part" if missing else "nobody committed it"
        except FileNotFoundError:
            with suppress(RankFailedError):  # who removed it has said why, first
                if (note := self.notes.read(one.spec.save_id)) is not None:
                    return self._ending(one, note)
            what = "another rank has given it up, and removed it"
        except OSError as error:
            what = f"not committed, and its directory cannot be read ({error.strerror})"
        else:
            if not missing and not one.has_every_part:
                one.wait_for_commit(self._group.timeout_secs)
                self.notes.post_every_part(one.spec.save_id)
                if self._group.is_coordinator or is_told:
                    self._commit(one)
                return None
        why = f"was not complete within {self._group.timeout_secs:g} s (ranks.timeout_secs): {what}"
        self.notes.post_failure(one.spec.save_id, why, missing, is_unfinished=bool(missing))
        failure = RankFailedError(f"the save of step {one.spec.step} {why}", tuple(missing))
        return self._failing(one, failure, is_unfinished=bool(missing))

    def _failing(self, one: _Pending, error: BaseException, *, is_unfinished: bool = False) -> Callable[[], None]:
        """Fail, when what is there of the save is removed; unless it was committed just now."""

        def fail() -> None:
            # Once it has lost its name, nobody can commit it. Most often another rank has taken care of that already.
            keeps = is_unfinished and self._keep_unfinished
            if not _is_gone(partial_path(one.spec)):
                self._take_away(one.spec, quarantine if keeps else discard_partial)
            if keeps:
                with self._changed:
                    self._unfinished.append(one.spec)
            found = found_committed(one.spec)
            if found is None:
                one.failed(error)
            else:
                one.committed(found)

        return fail

    def _take_away(self, spec: SaveSpec, how: Callable[[str, int, str], None]) -> None:
        leftovers = spec.directory, spec.step, spec.save_id
        try:
            self._pool.submit(how, *leftovers).result()
        except ClosedError:
            with suppress(StorageError):
                how(*leftovers)
        except Exception as failure:  # noqa: BLE001  # the next run tries again
            logger.warning("what is left of the save of step %d was not removed: %s", spec.step, failure)


def _is_gone(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:  # who knows
        pass
    return False


def found_committed(spec: SaveSpec) -> Committed | None:
    """The commit of this save, when it is to be seen in the directory."""
    try:
        return already_committed(spec)
    except StorageError:  # not now, that is
        return None
