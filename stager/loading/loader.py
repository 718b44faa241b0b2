"""Finding and loading: the newest checkpoint that is whole, what was passed over, and the way back into a state."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from stager.config import LoadingConfig
from stager.config.host import usable_cores
from stager.loading.restore import Restorer
from stager.loading.selection import Selection
from stager.workers.checkpoint.directory.files import storage_errors
from stager.workers.checkpoint.directory.manifest import Manifest
from stager.workers.checkpoint.directory.read_lock import reading
from stager.workers.checkpoint.directory.run_directory import (
    CheckpointInfo,
    SkippedCheckpoint,
    checkpoint_name,
    committed_steps,
    partial_names,
    read_checkpoint,
)
from stager.workers.checkpoint.read.verify import check_files, extra_files, fingerprint
from stager.workers.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StagerError,
    StateMismatchError,
    StorageError,
)

logger = logging.getLogger("stager")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What ``load()`` returns.

    Attributes:
        step: of the checkpoint.
        state: the whole state, or the mapping given as ``into``.
        info: where it came from.
    """

    step: int
    state: Any
    info: CheckpointInfo


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A checkpoint that was found: what it is, and its fingerprint from before it was read."""

    info: CheckpointInfo
    manifest: Manifest
    identity: object


class Loader:
    """Reads the checkpoints of one directory. Its lock is its own: a callback may look while a save waits.

    Args:
        directory: of the run, absolute.
        config: section ``loading``.
        rank: whose values those of ``PerRank`` are.
    """

    def __init__(self, directory: str, config: LoadingConfig, rank: int = 0) -> None:
        self._directory = directory
        self._config = config
        self._rank = rank
        self._lock = threading.RLock()
        self._verified: dict[str, object] = {}  # path -> fingerprint of what was verified in full here
        self._skipped: list[SkippedCheckpoint] = []

    @property
    def skipped(self) -> list[SkippedCheckpoint]:
        return list(self._skipped)

    def knows_whole(self, path: str) -> bool:
        """Whether every byte of this checkpoint was hashed here, and nothing has changed since."""
        with self._lock, storage_errors("look at", path):
            try:
                return path in self._verified and self._verified[path] == fingerprint(path)
            except FileNotFoundError:
                return False

    def latest(self) -> CheckpointInfo | None:
        with self._lock:
            found = self._find(None, self._config.verify == "full")
            return None if found is None else found.info

    def newest(self, below: int | None = None) -> CheckpointInfo | None:
        """As :meth:`latest`, of those before step ``below``, and verified as far as ``load()`` does before it reads."""
        with self._lock:
            if below is None:
                self._skipped = []
            found = self._find_newest(self._config.verify_first, below)
            return None if found is None else found.info

    def load(
        self,
        step: int | None,
        into: MutableMapping[str, Any] | None,
        *,
        strict: bool,
        allow_pickle: bool | None,
        selection: Selection | None = None,
    ) -> Loaded | None:
        allowed = self._config.allow_pickle if allow_pickle is None else allow_pickle
        first = self._config.verify_first and into is not None
        damaged: CorruptCheckpointError | None = None  # what left ``into`` partly overwritten
        with self._lock:
            found = self._find(step, first)
            while found is not None and (damaged is None or strict):
                restorer = Restorer(found.info.path, found.manifest, self._threads(), allowed, selection, self._rank)
                try:
                    with reading(found.info.path):
                        state = self._restore(restorer, into, strict)
                    if restorer.has_read_all:
                        self._verified[found.info.path] = found.identity  # every byte was read and hashed
                    return Loaded(found.info.step, state, found.info)
                # Damaged since it was verified, found out by reading it, or removed.
                except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                    self._verified.pop(found.info.path, None)
                    if step is not None:
                        raise
                    self._skip(found.info.step, error)
                    if isinstance(error, CorruptCheckpointError) and restorer.has_overwritten:
                        damaged = error
                    found = self._find_newest(first, below=found.info.step)
                except StateMismatchError as error:
                    if damaged is not None:  # "nothing was changed" would not be true
                        raise damaged from error
                    raise
            if damaged is not None:  # None would mean that there is nothing wrong with going on from what is there
                raise damaged
            return None

    def _restore(self, restorer: Restorer, into: MutableMapping[str, Any] | None, strict: bool) -> Any:
        if into is None:
            return restorer.load()
        restorer.load_into(into, strict)
        return into

    def _find(self, step: int | None, full: bool) -> _Candidate | None:
        """The newest valid checkpoint, or the one of ``step``."""
        self._skipped = [
            SkippedCheckpoint(name, "partial: it was never committed, or is being written now")
            for name in reversed(partial_names(self._directory))
        ]
        return self._find_newest(full) if step is None else self._check(step, full)

    def _find_newest(self, full: bool, below: int | None = None) -> _Candidate | None:
        for candidate in committed_steps(self._directory):
            if below is not None and candidate >= below:
                continue
            try:
                return self._check(candidate, full)
            except (CorruptCheckpointError, StorageError) as error:  # not there any more, or the disk does not give it
                self._skip(candidate, error)
        return None

    def _skip(self, step: int, error: StagerError) -> None:
        self._skipped.append(SkippedCheckpoint(checkpoint_name(step), str(error)))
        logger.warning("%s skipped: %s", checkpoint_name(step), error)

    def _check(self, step: int, full: bool) -> _Candidate:
        path = os.path.join(self._directory, checkpoint_name(step))
        with storage_errors("look at", path):
            try:  # before anything is read: what changes after this is not what was verified
                identity = fingerprint(path)
            except (FileNotFoundError, NotADirectoryError):  # which reading it will say, too
                identity = None
        with reading(path):
            info, manifest = read_checkpoint(self._directory, step)
            if identity is None or self._verified.get(path) != identity:
                problems = extra_files(path, manifest)
                problems += check_files(path, manifest, full=full, num_threads=self._threads())
                if problems:
                    raise CorruptCheckpointError(path, "; ".join(problems[:3]))
                if full:
                    self._verified[path] = identity
        return _Candidate(info, manifest, identity)

    def _threads(self) -> int:
        threads = self._config.threads
        return min(8, usable_cores()) if threads == "auto" else threads
