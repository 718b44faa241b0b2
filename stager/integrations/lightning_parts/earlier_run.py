"""What a killed run has left: its workers may still be writing, and commit their checkpoints in a moment."""

from __future__ import annotations

import logging
import os
import time

from stager import recover
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.checkpoint.directory.run_directory import partial_names
from stager.workers.checkpoint.documents.manifest import MANIFEST_NAME
from stager.workers.errors import DirectoryInUseError, StorageError

logger = logging.getLogger("stager")

_POLL_SECS = 0.05


def finish_earlier_run(directory: str, timeout_secs: float) -> None:
    """Wait until no earlier run writes in ``directory``; commit or remove what it left. Any rank may call it.

    Without this, one rank may look before a checkpoint is committed, and another one after that.

    Args:
        timeout_secs: how long to wait for it: a run that is alive does not end.
    """
    deadline = time.monotonic() + timeout_secs
    try:
        while os.path.isdir(directory) and partial_names(directory):
            try:
                report = recover(directory)
            except DirectoryInUseError as error:
                if time.monotonic() >= deadline:
                    logger.warning("%s: goes on without what is being written there: %s", directory, error)
                    return
                time.sleep(_POLL_SECS)
            else:
                for found in report.found:
                    logger.warning("%s", found)
                return
    except StorageError as error:  # it may be read-only
        logger.warning("%s: goes on without what is unfinished there: %s", directory, error)


def newest_in(directory: str, ending: str) -> str | None:
    """Return the checkpoint of stager's in ``directory`` that was committed last; None if there is none.

    Args:
        ending: of its name, ``.ckpt``.
    """
    names = os.listdir(directory) if os.path.isdir(directory) else []
    paths = [os.path.join(directory, name) for name in names if name.endswith(ending) and not name.startswith(".")]
    found = [path for path in paths if not os.path.islink(path) and has_own_manifest(path)]
    return max(found, key=lambda path: os.stat(os.path.join(path, MANIFEST_NAME)).st_mtime_ns, default=None)
