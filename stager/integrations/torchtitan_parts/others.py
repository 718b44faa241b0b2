"""``keep_latest_k`` for what torchtitan's own manager has left in the folder: stager's retention removes only its own."""

from __future__ import annotations

import logging
import os
import shutil

from stager.integrations.torchtitan_parts.contents import step_path, steps_in
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest

logger = logging.getLogger("stager")


def surplus_of_others(folder: str, limit: int) -> list[str]:
    """Return the checkpoints that stager has not written and that are not among the newest, oldest first.

    Args:
        limit: how many checkpoints stay, whoever wrote them.
    """
    paths = [step_path(folder, step) for step in steps_in(folder)]
    return [path for path in reversed(paths[limit:]) if not has_own_manifest(path)]


def remove_surplus_of_others(folder: str, limit: int) -> None:
    """Remove what :func:`surplus_of_others` returns. What cannot be removed is tried again after the next commit."""
    for path in surplus_of_others(folder, limit):
        logger.info("removing %s, because of keep_latest_k", path)
        try:
            os.unlink(os.path.join(path, ".metadata"))  # first: what is half removed must not be a checkpoint
            shutil.rmtree(path)
        except FileNotFoundError:
            pass  # somebody else has removed it
        except OSError as error:
            logger.warning("%s was not removed: %s", path, error)
