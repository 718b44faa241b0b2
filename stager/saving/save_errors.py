"""What becomes of the error of a save that nobody has read: ``persistence.on_save_error``.

    raise   a later save() raises it, or close(); but the first ``tolerate_failures`` in a row are only logged
    warn    it is logged
    call    the listeners get it; it is logged only if there is none

An error of ``save()`` itself follows the same rule: the same call raises it, or returns the handle of a failed save. Saves
are judged in the order in which they were begun, so that "in a row" means the same on every rank.

NOTE [ All ranks raise in the same save() ]
A save fails on all ranks, but not at the same moment. If one rank raised in a ``save()`` in which another does not know of
the failure yet, the other would go on to the next collective, and wait there for a rank that has left its loop. So:
  1. Every ``save()`` begins its own save before it raises the error of an earlier one. A rank that stayed away would fail
     that save on the others, who would stay away from the next, and so on.
  2. When a rank learns of a failure, a background thread posts the number of saves that the rank has begun by then.
  3. A ``save()`` that knows of a failure waits until all ranks have posted. The highest number, plus one, is the number of
     the ``save()`` that raises: no rank has begun that one before it knew.
  4. Who is to blame for the failure may be dead, and is waited for a few seconds only. The first decision stands for all.
Without a failure nobody asks the store. A group of one knows at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from stager.ranks import keys
from stager.ranks.messages import Number
from stager.ranks.rank_group import RankGroup
from stager.saving.save import Save
from stager.telemetry.report import SaveState
from stager.workers.errors import LeftRunningError, RankFailedError

logger = logging.getLogger("stager")

OnSaveError = Literal["raise", "warn", "call"]

_POLL_SECS = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class _Due:
    """An error that a later save() has to raise."""

    save: Save
    error: BaseException


class SaveErrors:
    """Judges the saves of one rank when they have ended.

    Args:
        on_error: see the head of this file.
        tolerated: so many failures in a row are only logged, where ``on_error`` is "raise".
        group: the ranks that save together.
        is_heard: whether there is a listener.
    """

    def __init__(self, on_error: OnSaveError, tolerated: int, group: RankGroup, is_heard: Callable[[], bool]) -> None:
        self._on_error = on_error
        self._tolerated = tolerated
        self._group = group
        self._is_heard = is_heard
        self._lock = threading.Lock()  # guards what follows; save() and background threads come here
        self._num_begun = 0
        self._in_order: deque[Save] = deque()  # saves that are not judged yet, in the order of save()
        self._num_failed = 0  # in a row
        self._due: list[_Due] = []
        self._in_call: Save | None = None  # whose save() has not returned
        self._raised: set[Save] = set()  # whose save() raised the error, and that are not judged yet
        self._unlogged = ""  # about the save whose save() has not returned

    def begin(self, save: Save) -> None:
        """Count a save, before its first step."""
        with self._lock:
            self._num_begun += 1
            self._in_order.append(save)
            self._in_call, self._unlogged = save, ""

    def was_raised(self, save: Save) -> None:
        """Log nothing about a failure that ``save()`` raises itself: whoever called it has it."""
        with self._lock:
            self._in_call = None
            if any(one is save for one in self._in_order):
                self._raised.add(save)

    def has_returned(self, save: Save) -> None:
        """Log what was held back in case ``save()`` raises it itself."""
        with self._lock:
            self._in_call, unlogged = None, self._unlogged
        if unlogged:
            logger.error("%s", unlogged)

    def judge(self) -> None:
        """Judge the saves that have ended, up to the first that has not. Called whenever one has ended, in any thread."""
        failed: list[Save] = []
        with self._lock:
            while self._in_order and self._in_order[0].upload_completion.done():
                save = self._in_order.popleft()
                if save.state is SaveState.COMMITTED:
                    self._num_failed = 0
                elif (error := save.error) is not None and not isinstance(error, LeftRunningError):
                    self._judge_failed(save, error)
                    failed.append(save)
            num_begun = self._num_begun  # with the lock: a save() that begins after this knows of the failure (2.)
        if not self._group.is_alone:
            for save in failed:
                with suppress(RankFailedError):  # without the store everyone decides alone
                    self._group.contribute(keys.failure(save.save_id), Number(num_begun))

    def _judge_failed(self, save: Save, error: BaseException) -> None:
        self._num_failed += 1
        what = f"save of step {save.step} failed ({self._num_failed} in a row)"
        if self._on_error == "raise" and self._num_failed > self._tolerated:
            self._due.append(_Due(save, error))
            if save is self._in_call:
                self._unlogged = what
            elif save not in self._raised:
                logger.error("%s: %s", what, _text_of(error))
            self._raised.discard(save)
            return
        save.upload_completion.was_read = True  # close() does not raise it
        if self._on_error != "call" or not self._is_heard():
            logger.warning("%s, and training goes on: %s", what, _text_of(error))

    def tolerates(self, save: Save) -> bool:
        """Whether a save whose ``save()`` failed is to be returned as a failed one; else that call raises its error."""
        if self._on_error != "raise":
            return True
        with self._lock:
            return self._tolerated > 0 and all(due.save is not save for due in self._due)

    def raise_due(self) -> None:
        """Raise the oldest error that is due and that nobody has read. Called by ``save()``, when it has begun its save."""
        with self._lock:
            self._due = [due for due in self._due if not due.save.upload_completion.was_read]
            due = self._due[0] if self._due else None
            number = self._num_begun
        if due is None or (not self._group.is_alone and number < self._agreed_number(due)):
            return
        with self._lock:
            self._due.remove(due)
        due.save.upload_completion.was_read = True
        raise due.error

    def _agreed_number(self, due: _Due) -> int:
        """Steps 3 and 4 of the NOTE; 0 if the ranks cannot be reached."""
        group, key = self._group, keys.failure(due.save.save_id)
        blamed = len(due.error.ranks) if isinstance(due.error, RankFailedError) else 0
        started = time.monotonic()
        try:
            while (decision := group.first(f"{key}/raises", Number)) is None:
                num_known, waited = group.num_contributed(key), time.monotonic() - started
                expected = group.num_ranks - (blamed if waited >= group.turn_secs else 0)
                if num_known >= expected or waited >= group.timeout_secs:
                    highest = max((number.value for number in group.gather(key, Number)), default=-1)
                    group.post_first(f"{key}/raises", Number(highest + 1))
                else:
                    time.sleep(_POLL_SECS)
        except RankFailedError:
            return 0
        return decision.value

    def raise_all(self) -> None:
        """Raise the oldest unread error, with the others as its context: there is no later call that could raise them."""
        with self._lock:
            saves = [*(due.save for due in self._due), *self._in_order]
            self._due = []
            self._in_order.clear()
        unread = [(save, error) for save in saves if (error := save.upload_completion.take_unread()) is not None]
        if self._on_error != "raise":
            for save, error in unread:  # not judged: an earlier save, that the workers finish alone, had not ended
                logger.warning("save of step %d failed: %s", save.step, _text_of(error))
            return
        errors = list({id(error): error for _, error in unread}.values())  # saves that fail together share one error
        for error, following in pairwise(errors):
            last, seen = error, {id(error), id(following)}
            while (inner := last.__cause__ or last.__context__) is not None and id(inner) not in seen:
                last = inner
                seen.add(id(last))
            if inner is None and last is not following:
                last.__context__ = following
        if errors:
            raise errors[0]


def _text_of(error: BaseException) -> str:
    """Return what is logged of an error. Not the error itself: whoever keeps the record would keep the snapshot, too."""
    return f"{type(error).__name__}: {error}"
