"""What lies where a checkpoint is going to be, before its save has begun.

The Trainer's preemption callback (``enable_jit_checkpoint``) makes ``checkpoint-100`` with a sentinel in it, and then calls
``_save_checkpoint()``. Some Trainers of TRL put a file of theirs there, and then do the same. Such a directory is no
checkpoint, and ``get_last_checkpoint()`` would take it for one until the save is committed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field

from transformers.trainer import TRAINER_STATE_NAME

from stager.workers.checkpoint.directory.manifest import has_own_manifest

_SENTINEL = "checkpoint-is-incomplete.txt"


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What was there.

    Attributes:
        files: to be saved with the checkpoint.
        is_preemption: whether the preemption callback saves.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    is_preemption: bool = False


def take_leftovers(path: str) -> Leftovers:
    """Read and remove what lies at the path of a checkpoint and is none. A checkpoint stays until it is replaced."""
    sentinel = os.path.join(path, _SENTINEL)
    is_preemption = os.path.lexists(sentinel)
    if is_preemption:
        os.remove(sentinel)
    if not os.path.isdir(path) or has_own_manifest(path) or os.path.exists(os.path.join(path, TRAINER_STATE_NAME)):
        return Leftovers({}, is_preemption)
    files = {}
    for entry in os.scandir(path):
        if entry.is_file():
            with open(entry.path, "rb") as file:
                files[entry.name] = file.read()
    shutil.rmtree(path)
    return Leftovers(files, is_preemption)
