"""What lies where a checkpoint is going to be, before its save has begun.

The Trainer's preemption callback (``enable_jit_checkpoint``) makes ``checkpoint-100`` with a sentinel in it, and then calls
``_save_checkpoint()``. Some Trainers of TRL put a file of theirs there, and then do the same. Such a directory is no
checkpoint, and ``get_last_checkpoint()`` would take it for one until the save is committed.

A Trainer without stager that was killed while it saved leaves a directory there, too. Its weights are older, and may not be
whole: beside stager's, ``from_pretrained()`` would read them.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field

from transformers.trainer import TRAINER_STATE_NAME

from stager.workers.checkpoint.directory.manifest_file import has_own_manifest

_SENTINEL = "checkpoint-is-incomplete.txt"

# What a Trainer without stager writes between the first weights and trainer_state.json.
_OF_UNFINISHED = re.compile(
    r"(pytorch_model|model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth"
)


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
    """Read and remove the files that lie at the path of a checkpoint, if they are none.

    A checkpoint stays until it is replaced. What a Trainer without stager has not finished stays, too, and a directory with
    more than files: when the checkpoint is committed, it is set aside.
    """
    sentinel = os.path.join(path, _SENTINEL)
    is_preemption = os.path.lexists(sentinel)
    if is_preemption:
        os.remove(sentinel)
    if not os.path.isdir(path) or has_own_manifest(path) or os.path.exists(os.path.join(path, TRAINER_STATE_NAME)):
        return Leftovers({}, is_preemption)
    with os.scandir(path) as entries:
        found = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    if any(_OF_UNFINISHED.fullmatch(entry.name) for entry in found):
        return Leftovers({}, is_preemption)
    files = {}
    for entry in found:
        with open(entry.path, "rb") as file:
            files[entry.name] = file.read()
        os.remove(entry.path)
    with suppress(OSError):  # not empty
        os.rmdir(path)
    return Leftovers(files, is_preemption)
