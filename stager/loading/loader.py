"""Loading the newest valid checkpoint of a run.

1. Go through the committed checkpoints, newest first.
2. Verify one as far as the configuration asks for. If it is damaged or gone, note why, and go on with the one before.
3. Restore it. Each hash is checked on the way, so damage may show only now; then go on with the one before, which overwrites
   all that was restored so far.

Directories that were never committed are not looked at, only listed among what was skipped.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stager.config import LoadingConfig
from stager.config.host import reading_threads
from stager.loading.checkpoint_files import CheckpointFiles
from stager.loading.extras import NO_OTHER_RANKS, OtherRanks
from stager.loading.loaded import Loaded
from stager.loading.lookalikes import lookalikes
from stager.loading.place import Run
from stager.loading.renaming import Renaming
from stager.loading.restore import Restorer
from stager.loading.selection import Selection
from stager.workers.checkpoint.directory.reading import reading
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, SkippedCheckpoint
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.read.verify import check_files, fingerprint
from stager.workers.checkpoint.storage.posix.files import storage_errors
from stager.workers.checkpoint.storage.storage import Fingerprint
from stager.workers.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StagerError,
    StateMismatchError,
    StorageError,
)

logger = logging.getLogger("stager")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A checkpoint that was found valid, and its fingerprint from before it was read."""

    info: CheckpointInfo
    manifest: Manifest
    identity: Fingerprint


class Loader:
    """Reads the checkpoints of one run. Thread-safe; its lock is its own, so that a callback may load while a save waits.

    Args:
        place: where the checkpoints are.
        config: section ``loading``.
        rank: selects the values of ``PerRank``.

    Attributes:
        place: where the checkpoints are.
    """

    def __init__(self, place: Run, config: LoadingConfig, rank: int = 0) -> None:
        self.place = place
        self._config = config
        self._rank = rank
        self._lock = threading.RLock()
        # path -> the files of a checkpoint whose every byte was hashed here
        self._verified: dict[str, Fingerprint] = {}
        self._skipped: list[SkippedCheckpoint] = []
        self._told: set[int] = set()
        # step -> why its committed checkpoint was skipped, newest first; those that were removed excepted
        self._unusable: dict[int, StagerError] = {}

    @property
    def skipped(self) -> list[SkippedCheckpoint]:
        """What the last look at the run skipped, newest first, and why."""
        return list(self._skipped)

    def knows_whole(self, path: str) -> bool:
        """Whether this process hashed every byte of the checkpoint, and no file has changed since."""
        with self._lock, storage_errors("look at", path):
            try:
                return path in self._verified and self._verified[path].items() <= fingerprint(path).items()
            except FileNotFoundError:
                return False

    def latest(self) -> CheckpointInfo | None:
        """Return the newest valid checkpoint, verified as ``loading.verify`` says; None if there is none."""
        with self._lock:
            found = self._find(None, self._config.verify == "full")
            return None if found is None else found.info

    def newest(self, below: int | None = None) -> CheckpointInfo | None:
        """Return the newest valid checkpoint, verified as far as ``load()`` verifies before it reads; None if there is none.

        Args:
            below: only checkpoints of earlier steps.
        """
        with self._lock:
            if below is None:
                self._skipped, self._unusable = [], {}
            found = self._find_newest(self._config.verify_first, below)
            return None if found is None else found.info

    def load(
        self,
        step: int | None,
        into: Any,
        *,
        strict: bool,
        allow_pickle: bool | None,
        selection: Selection | None = None,
        renaming: Renaming = Renaming(),  # noqa: B008  # frozen
        other_ranks: OtherRanks = NO_OTHER_RANKS,
    ) -> Loaded | None:
        """Load the checkpoint of ``step``, or the newest valid one. For the rest see :meth:`stager.Checkpointer.load`."""
        allowed = self._config.allow_pickle if allow_pickle is None else allow_pickle
        first = self._config.verify_first and into is not None
        damaged: CorruptCheckpointError | None = None  # set once a damaged checkpoint has overwritten some of ``into``
        with self._lock, self._advising(step):
            found = self._find(step, first)
            while found is not None and (damaged is None or strict):
                restorer = Restorer(
                    found.info.path,
                    found.manifest,
                    self._num_threads,
                    allowed,
                    selection,
                    self._rank,
                    self._config.safe_globals,
                    renaming,
                    other_ranks,
                )
                try:
                    with reading(found.info.path):
                        state = restorer.restore(into, strict)
                    if restorer.has_read_all and len(found.identity) == len(found.manifest.file_names):
                        self._verified[found.info.path] = found.identity  # every byte was hashed
                    files = CheckpointFiles(found.info.path, found.manifest)
                    return Loaded(found.info.step, found.info.path, state, found.info, *restorer.outcome, files)
                # Reading found damage, or the checkpoint was removed meanwhile.
                except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                    self._verified.pop(found.info.path, None)
                    if step is not None:
                        raise
                    self._skip(found.info.step, error)
                    if isinstance(error, CorruptCheckpointError) and restorer.has_overwritten:
                        damaged = error
                    found = self._find_newest(first, below=found.info.step)
                except StateMismatchError as error:
                    if damaged is not None:  # this error says that nothing was changed, which is not true any more
                        raise damaged from error
                    raise
            if damaged is not None:  # after None the caller would train with a partly overwritten ``into``
                raise damaged
            self.refuse_if_unusable()
            self.tell_of_lookalikes()
            return None

    @contextmanager
    def _advising(self, step: int | None) -> Iterator[None]:
        """Add to the error of a damaged checkpoint that was asked for what to do."""
        try:
            yield
        except CorruptCheckpointError as error:
            if step is None:
                raise
            raise CorruptCheckpointError(error.path, f"{error.problem}; {self.place.instead_of([step])}") from error

    def note_passed_over(self, passed_over: list[SkippedCheckpoint]) -> None:
        """Add to :attr:`skipped` what this load has passed over before, newest first."""
        self._skipped[:0] = passed_over

    def refuse_if_unusable(self) -> None:
        """Raise if checkpoints are there and none can be used. None, or no error, means that there is none.

        Raises:
            CorruptCheckpointError: the newest of them is damaged.
            StorageError: the newest of them cannot be read.
        """
        if not self._unusable:
            return
        newest_error = next(iter(self._unusable.values()))
        advice = self.place.instead_of(list(self._unusable))
        if isinstance(newest_error, CorruptCheckpointError):
            raise CorruptCheckpointError(newest_error.path, f"{newest_error.problem}; {advice}") from newest_error
        if isinstance(newest_error, StorageError):
            raise StorageError(
                newest_error.errno, f"{newest_error.message}; {advice}", newest_error.path
            ) from newest_error

    def tell_of_lookalikes(self) -> None:
        """Warn of what could be taken for checkpoints, where there are none."""
        if found := lookalikes(self.place.directory):
            logger.warning(
                "%s has no checkpoint of a run, so load() returns None. Found there, with what reads it: %s",
                self.place.directory,
                found,
            )

    def tell_of_unfinished(self, taken: int | None) -> None:
        """Tell, once for each step, that a later one than what is loaded was begun and is not there."""
        later = {step for step in self.place.begun() if taken is None or step > taken} - self._told
        self._told |= later
        for step in sorted(later):
            logger.info(
                "step %d was begun and is not whole: its save was broken off, or is still being written; %s",
                step,
                "nothing is loaded" if taken is None else f"step {taken} is loaded",
            )

    def _find(self, step: int | None, full: bool) -> _Candidate | None:
        """Find the checkpoint of ``step``, or the newest valid one, and start the list of skipped ones anew."""
        self._skipped = [
            SkippedCheckpoint(name, "partial: its save was never committed, or is still being written")
            for name in reversed(self.place.partial_names())
        ]
        self._unusable = {}
        if step is None:
            return self._find_newest(full)
        if not self.place.has(step):
            raise CheckpointNotFoundError(None, self.place.which(step), self.place.directory)
        return self._check(step, full)

    def _find_newest(self, full: bool, below: int | None = None) -> _Candidate | None:
        for candidate in self.place.steps():
            if below is not None and candidate >= below:
                continue
            try:
                return self._check(candidate, full)
            except (
                CorruptCheckpointError,
                StorageError,
            ) as error:  # damaged or removed, or the disk does not return it
                self._skip(candidate, error)
        return None

    def _skip(self, step: int, error: StagerError) -> None:
        name = os.path.basename(self.place.path(step))
        self._skipped.append(SkippedCheckpoint(name, str(error), step))
        if not isinstance(error, CheckpointNotFoundError):
            self._unusable[step] = error
        logger.warning("%s skipped: %s", name, str(error))

    def _check(self, step: int, full: bool) -> _Candidate:
        path = self.place.path(step)
        with storage_errors("look at", path):
            try:  # before anything is read, so that a later change of a file is noticed
                found = fingerprint(path)
            except (FileNotFoundError, NotADirectoryError):  # read_checkpoint() below says so; or a stranger vanished
                found = {}
        with reading(path):
            info, manifest = self.place.read(step)
            # Only the files of the checkpoint count, not what somebody else has put beside them.
            identity = {name: found[name] for name in found.keys() & manifest.file_names}
            if self._verified.get(path) != identity:
                problems = check_files(path, manifest, full=full, num_threads=self._num_threads)
                if problems:
                    raise CorruptCheckpointError(
                        path, "; ".join(problem.removeprefix(f"{path}{os.sep}") for problem in problems[:3])
                    )
                if full and len(identity) == len(manifest.file_names):
                    self._verified[path] = identity
        return _Candidate(info, manifest, identity)

    @cached_property
    def _num_threads(self) -> int:
        threads = self._config.threads
        return reading_threads() if threads == "auto" else threads
