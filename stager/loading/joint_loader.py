"""Loading on all ranks: one checkpoint for all of them, whatever each sees of the file system at that moment.

1. Rank 0 broadcasts which checkpoint to load (``StepToLoad``).
2. Every rank waits until it sees that checkpoint, and loads it. A rank on which that fails posts ``LoadFailed``. On the
   way, each asks the others whether they have the names that it has no place for (``LoadNames``), and waits until all have
   found that the checkpoint fits. Until then nothing is changed on any rank.
3. All come to a barrier. Only then does each read what failed on any rank.
4. Nothing failed: done. Damaged on any rank: the ranks restore it from replicas, if there are any; if not, rank 0 goes on
   to the checkpoint before it (step 1). Failed for another reason: every rank raises.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import NoReturn

from stager.loading.extras import KnownNames, OtherRanks
from stager.loading.loaded import Loaded
from stager.loading.loader import Loader
from stager.ranks import keys
from stager.ranks.messages import LoadFailed, LoadNames, NewestStep, StepToLoad
from stager.ranks.rank_group import RankGroup
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, SkippedCheckpoint
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    RankFailedError,
    StagerError,
)
from stager.workers.long_wait import LongWait

logger = logging.getLogger("stager")

_POLL_SECS = 0.02
_VISIBLE_SECS = 60.0  # for so long NFS may keep a directory's attributes


def nothing_to_restore(step: int) -> bool:
    """Restore nothing: there are no replicas."""
    return False


class _StoppedError(Exception):
    """Another rank has failed before anything was changed on any rank; the barrier at the end of the load says why."""


class JointLoader(OtherRanks):
    """Loads the same checkpoint on every rank of a group.

    Args:
        group: a group of one leaves everything to ``loader``, which falls back by itself.
        loader: of this rank.
        num_tries: how many loads the group has tried before, with other loaders.

    Attributes:
        num_tries: how many loads the group has tried; each has keys of its own.
        restore: restores the checkpoint of a damaged step, or a newer one, from replicas; returns whether it did. Every rank
            calls it.
    """

    def __init__(self, group: RankGroup, loader: Loader, num_tries: int = 0) -> None:
        self._group = group
        self._loader = loader
        self.num_tries = num_tries
        self._is_changing = False  # all ranks have found that the checkpoint fits
        self._awaited: set[int] = set()
        self._restored: set[int] = set()
        self.restore: Callable[[int], bool] = nothing_to_restore

    def load(self, step: int | None, load: Callable[[int | None], Loaded | None]) -> Loaded | None:
        """Load a checkpoint on all ranks. Every rank calls it.

        Args:
            step: which checkpoint; None: the newest that is valid on every rank.
            load: loads the checkpoint of a step on this rank; None: the newest valid one.

        Raises:
            RankFailedError: it failed on another rank, or a rank did not come.
            CorruptCheckpointError, CheckpointNotFoundError: ``step`` was given, and is damaged or not there.
            StagerError: whatever ``load`` raised here.
        """
        if self._group.is_alone:
            return load(step)
        passed_over: list[SkippedCheckpoint] = []
        try:
            return self._load(step, load, passed_over)
        finally:
            self._loader.note_passed_over(passed_over)

    def _load(
        self, step: int | None, load: Callable[[int | None], Loaded | None], passed_over: list[SkippedCheckpoint]
    ) -> Loaded | None:
        """Load by the steps at the head of this file. ``passed_over`` gets the checkpoints that were damaged."""
        below: int | None = None
        damaged: StagerError | None = None
        while True:
            self.num_tries += 1
            key = keys.load(self.num_tries)
            choice = self._choose(key, step, below)
            chosen = choice.step if step is None else step
            if chosen is None:
                if damaged is not None:
                    raise damaged  # nothing is left, and what it was loaded into may be partly overwritten
                return None
            self._is_changing = False
            loaded, error = self._try(key, chosen, choice.is_there, load)
            self._group.barrier(key, f"loading the checkpoint of step {chosen}")
            failed = self._group.first(f"{key}/failed", LoadFailed)
            found_damage = self._group.first(f"{key}/damaged", LoadFailed)
            cause = failed or found_damage
            if cause is None:
                return loaded
            if error is None:
                here = "this rank has loaded it" if self._is_changing else "nothing was changed on any rank"
                why = f"the checkpoint of step {chosen} was not loaded on rank {cause.rank}: {cause.error}; {here}"
                error = RankFailedError(why, (cause.rank,))
            if failed is not None or step is not None:
                raise error
            assert isinstance(error, StagerError)
            damaged, below = error, None if self.restores(chosen) else chosen
            if below is not None:
                reason = f"damaged on rank {cause.rank}: {cause.error}"
                name = os.path.basename(self._loader.place.path(chosen))
                passed_over.append(SkippedCheckpoint(name, reason, chosen))
                logger.warning("%s skipped on all ranks: %s", name, reason)

    def refuse(self, error: Exception) -> NoReturn:
        """Raise ``error``, which keeps this rank from loading, and let the load fail on the other ranks, too."""

        def fail(_: int | None) -> Loaded | None:
            raise error

        if not self._group.is_alone:
            self.load(None, fail)
        raise error

    def _try(
        self, key: str, step: int, is_there: bool, load: Callable[[int | None], Loaded | None]
    ) -> tuple[Loaded | None, Exception | None]:
        """Load on this rank, and post a failure. Returns what was loaded, or the error."""
        try:
            if is_there:
                self._await_visible(step)
            return load(step), None
        except _StoppedError:
            return None, None
        except BaseException as error:
            is_damaged = isinstance(error, (CorruptCheckpointError, CheckpointNotFoundError))
            failure = LoadFailed(self._group.rank, f"{type(error).__name__}: {error}")
            self._group.post_first(f"{key}/damaged" if is_damaged else f"{key}/failed", failure)
            for barrier in (keys.load_names, keys.load_names_had, keys.load_fits):
                self._group.leave_barrier(barrier(self.num_tries), error)  # no effect on those to which this rank came
            if isinstance(error, RankFailedError):  # a rank did not come: it does not come to the end, either
                self._group.cancel_barrier(key, str(error), error.ranks)
            if not isinstance(error, Exception):  # Ctrl-C: this rank does not come to the barrier
                self._group.cancel_barrier(key, f"interrupted on rank {failure.rank}: {error!r}", (failure.rank,))
                raise
            return None, error

    def which_have(self, names: Collection[str], own: KnownNames, unexpected: Collection[str]) -> set[str]:
        """Which of the names that only the checkpoint has are in the target of another rank. Every rank calls it.

        1. Each rank posts its names, unless another rank posted the same ones.
        2. After a barrier, each reads them all. Most often there are none.
        3. Each posts which of them it has. After another barrier, each reads those.

        Args:
            names: that this rank's target does not have.
            own: the names that it has.
            unexpected: is not looked at: the ranks come together in any case.

        Raises:
            RankFailedError: a rank did not come.
        """
        if self._group.is_alone:
            return set()
        asked, had = keys.load_names(self.num_tries), keys.load_names_had(self.num_tries)
        try:
            self._post_names(asked, names)
            self._group.barrier(asked, "comparing the names of what is loaded")
            wanted = self._read_names(asked)
            if not wanted:
                return set()
            self._post_names(had, own.among(wanted))
            self._group.barrier(had, "comparing the names of what is loaded")
            return self._read_names(had)
        except RankFailedError:
            if self._has_said_why():
                raise _StoppedError from None
            raise

    def wait_until_it_fits_all(self) -> None:
        """Return when every rank has found that the checkpoint fits. Every rank calls it, after :meth:`which_have`.

        Raises:
            RankFailedError: a rank did not come.
        """
        if self._group.is_alone:
            return
        try:
            self._group.barrier(keys.load_fits(self.num_tries), "checking that the checkpoint fits on every rank")
        except RankFailedError:
            if self._has_said_why():
                raise _StoppedError from None
            raise
        self._is_changing = True

    def _has_said_why(self) -> bool:
        """Whether the rank that did not come has posted what failed there: the end of this load repeats that."""
        key = keys.load(self.num_tries)
        return any(self._group.first(f"{key}/{how}", LoadFailed) is not None for how in ("failed", "damaged"))

    def _post_names(self, key: str, names: Collection[str]) -> None:
        """Post names once for all ranks that have the same, as the ranks of one pipeline stage do."""
        if names:
            message = LoadNames(tuple(sorted(names)))
            digest = hashlib.blake2b("\0".join(message.names).encode(), digest_size=16).hexdigest()
            if self._group.count(f"{key}/of/{digest}") == 1:
                self._group.contribute(key, message)

    def _read_names(self, key: str) -> set[str]:
        return {name for message in self._group.gather(key, LoadNames) for name in message.names}

    def restores(self, step: int) -> bool:
        """Restore a step from replicas, once: if it is damaged again, they are, too. Returns whether it did."""
        if step in self._restored:
            return False
        self._restored.add(step)
        return self.restore(step)

    def latest(self, find: Callable[[], CheckpointInfo | None]) -> CheckpointInfo | None:
        """What ``find`` finds, once it sees every commit that any rank knew of when this was called."""
        with suppress(RankFailedError):  # without the rendezvous: what this rank sees
            newest = self._group.read(keys.NEWEST)
            if isinstance(newest, NewestStep) and newest.step >= 0:
                self._await_visible(newest.step)
        return find()

    def deleted(self, step: int) -> None:
        """Let no rank wait to see the checkpoint of a step, which was deleted."""
        with suppress(RankFailedError):
            if not self._group.is_alone and self._group.read(keys.NEWEST) == NewestStep(step):
                left = self._loader.place.steps()
                self._group.post(keys.NEWEST, NewestStep(left[0] if left else -1))

    def _choose(self, key: str, step: int | None, below: int | None) -> StepToLoad:
        """Rank 0's choice; of a given step, whether it is there."""

        def choose() -> StepToLoad:
            if step is None:
                found = self._loader.newest(below)
                if found is None and below is None:
                    self._loader.refuse_if_unusable()
                    self._loader.tell_of_lookalikes()
                return StepToLoad(None if found is None else found.step, is_there=True)
            # The newest of this run may be there before rank 0 sees it.
            is_newest = self._group.read(keys.NEWEST) == NewestStep(step)
            return StepToLoad(step, is_newest or self._sees(step))

        return self._group.broadcast(f"{key}/step", StepToLoad, choose, "choose the checkpoint to load")

    def _await_visible(self, step: int) -> None:
        """Wait until this host sees a checkpoint: a network file system may show it later.

        A step that does not come in time, or that was seen before, has been removed, and is not waited for again.
        """
        secs = min(_VISIBLE_SECS, self._group.timeout_secs)
        deadline = time.monotonic() + secs
        waiting = LongWait(f"this host to see the checkpoint of step {step}, which another rank has seen", secs)
        while not self._sees(step) and step not in self._awaited and time.monotonic() < deadline:
            waiting.tick()
            time.sleep(_POLL_SECS)
        self._awaited.add(step)

    def _sees(self, step: int) -> bool:
        path = self._loader.place.path(step)
        return storage_of(path).has_manifest(path)
