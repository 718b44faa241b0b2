"""What somebody could take for checkpoints where a run has none: what it is, and what to call.

``load()`` returns None where there is no checkpoint, and training begins anew. Where the wrong directory was
named, that must not happen in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from stager.loading.foreign_path import TORCH_ENDINGS, Origin, find, is_in_safetensors
from stager.workers.checkpoint.directory.manifest import has_own_manifest
from stager.workers.checkpoint.directory.run_directory import checkpoint_name, committed_steps, parse_checkpoint
from stager.workers.errors import StagerError

_LOOKED_AT = 1000  # names
_SHOWN = 3


def lookalikes(directory: str) -> str:
    """Name what could be taken for checkpoints in a directory without a checkpoint of stager's; "" if there is nothing.

    Args:
        directory: absolute.
    """
    found: list[str] = []
    with suppress(OSError, StagerError):  # it only looks
        if (itself := _foreign(directory)) is not None:
            found.append(itself)
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in islice(entries, _LOOKED_AT))
        if itself is not None:
            names = [name for name in names if not is_in_safetensors(name)]  # they are the checkpoint
        found += islice(_of_names(directory, names), _SHOWN + 1)
    return "; ".join(found[:_SHOWN]) + ("; and more" if len(found) > _SHOWN else "")


def _of_names(directory: str, names: list[str]) -> Iterator[str]:
    for name in names:
        path = os.path.join(directory, name)
        stem, dot, _ = name.partition(".")
        if dot and parse_checkpoint(stem) is not None:
            continue  # of stager's, and no checkpoint any more, or not yet
        if not os.path.isdir(path):
            if name.endswith(TORCH_ENDINGS) or is_in_safetensors(name):
                yield f"{name} is one file, which load_checkpoint({path!r}) reads"
        elif has_own_manifest(path):
            if parse_checkpoint(name) is None:
                yield f"{name} is a checkpoint that was renamed, which load_checkpoint({path!r}) reads"
        elif any(has_own_manifest(os.path.join(path, checkpoint_name(step))) for step in committed_steps(path)):
            yield f"{name} is the directory of a run, which Checkpointer({path!r}) opens"
        elif (foreign := _foreign(path)) is not None:
            yield f"{name}: {foreign}"


def _foreign(path: str) -> str | None:
    """Say who wrote the checkpoint in a directory, and what reads it; None: there is none, or it is stager's."""
    try:
        origin = find(path).origin
    except StagerError:
        return None
    if origin is Origin.STAGER:
        return None
    return f"a checkpoint that {origin.value} wrote, which load_checkpoint({path!r}) reads"
