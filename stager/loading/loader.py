"""Finding and loading: the newest checkpoint that is whole, what was passed over, and the way back into a state."""

from __future__ import annotations

import logging
import threading
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from stager.config import LoadingConfig
from stager.config.host import usable_cores
from stager.loading.restore import Restorer
from workers.directory import (
    CheckpointInfo,
    SkippedCheckpoint,
    checkpoint_name,
    committed_steps,
    partial_names,
    read_checkpoint,
)
from workers.errors import CheckpointNotFoundError, CorruptCheckpointError, StagerError
from workers.files import storage_errors
from workers.manifest import Manifest
from workers.verify import fingerprint, verify_checkpoint

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


class Loader:
    """Reads the checkpoints of one directory. Its lock is its own: a callback may look while a save waits.

    Args:
        directory: of the run, absolute.
        config: section ``loading``.
    """

    def __init__(self, directory: str, config: LoadingConfig) -> None:
        self._directory = directory
        self._config = config
        self._lock = threading.RLock()
        self._verified: dict[str, object] = {}  # path -> fingerprint of what was verified here
        self._skipped: list[SkippedCheckpoint] = []

    @property
    def skipped(self) -> list[SkippedCheckpoint]:
        return list(self._skipped)

    def latest(self) -> CheckpointInfo | None:
        with self._lock:
            found = self._find(None)
            return None if found is None else found[0]

    def load(
        self, step: int | None, into: MutableMapping[str, Any] | None, *, strict: bool, allow_pickle: bool | None
    ) -> Loaded | None:
        allowed = self._config.allow_pickle if allow_pickle is None else allow_pickle
        with self._lock:
            found = self._find(step)
            while found is not None:
                info, manifest = found
                restorer = Restorer(info.path, manifest, self._threads(), allowed)
                try:
                    if into is None:
                        return Loaded(info.step, restorer.load(), info)
                    restorer.load_into(into, strict)
                    return Loaded(info.step, into, info)
                except CorruptCheckpointError as error:  # damaged since it was verified, or verified quickly only
                    self._verified.pop(info.path, None)
                    if step is not None:
                        raise
                    self._skip(info.step, error)
                    found = self._find_newest(below=info.step)
            return None

    def _find(self, step: int | None) -> tuple[CheckpointInfo, Manifest] | None:
        """The newest valid checkpoint, or the one of ``step``."""
        self._skipped = [
            SkippedCheckpoint(name, "partial: it was never committed, or is being written now")
            for name in reversed(partial_names(self._directory))
        ]
        return self._find_newest() if step is None else self._check(step)

    def _find_newest(self, below: int | None = None) -> tuple[CheckpointInfo, Manifest] | None:
        for candidate in committed_steps(self._directory):
            if below is not None and candidate >= below:
                continue
            try:
                return self._check(candidate)
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                self._skip(candidate, error)
        return None

    def _skip(self, step: int, error: StagerError) -> None:
        self._skipped.append(SkippedCheckpoint(checkpoint_name(step), str(error)))
        logger.warning("%s skipped: %s", checkpoint_name(step), error)

    def _check(self, step: int) -> tuple[CheckpointInfo, Manifest]:
        info, manifest = read_checkpoint(self._directory, step)
        with storage_errors("look at", info.path):
            identity = fingerprint(info.path)
        if self._verified.get(info.path) != identity:
            result = verify_checkpoint(info.path, full=self._config.verify == "full", num_threads=self._threads())
            if not result.ok:
                raise CorruptCheckpointError(info.path, "; ".join(result.problems[:3]))
            self._verified[info.path] = identity
        return info, manifest

    def _threads(self) -> int:
        threads = self._config.threads
        return min(8, usable_cores()) if threads == "auto" else threads
