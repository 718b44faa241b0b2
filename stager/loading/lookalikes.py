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
from stager.workers.checkpoint.directory.choice import is_run
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.checkpoint.directory.run_directory import checkpoint_names
from stager.workers.checkpoint.documents.names import may_be_checkpoint, parse_checkpoint
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
        if (itself := _foreign(directory, "the directory itself")) is not None:
            found.append(itself)
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in islice(entries, _LOOKED_AT))
        if itself is not None:
            names = [name for name in names if not is_in_safetensors(name)]  # they are the checkpoint
        found += islice(_of_names(directory, names), _SHOWN + 1)
    return "; ".join(found[:_SHOWN]) + ("; and more" if len(found) > _SHOWN else "")


def _of_names(directory: str, names: list[str]) -> Iterator[str]:
    ours = {*checkpoint_names(directory).values(), *(name for name in names if parse_checkpoint(name) is not None)}
    for name in names:
        path = os.path.join(directory, name)
        stem, dot, _ = name.partition(".")
        if (dot and parse_checkpoint(stem) is not None) or not may_be_checkpoint(name):
            continue  # of stager's, and no checkpoint any more, or not yet
        if not os.path.isdir(path):
            if name.endswith(TORCH_ENDINGS) or is_in_safetensors(name):
                wrote = Origin.SAFETENSORS if is_in_safetensors(name) else Origin.TORCH_SAVE  # by its name
                yield _found(name, wrote.value, f"load_checkpoint({path!r})")
        elif has_own_manifest(path):
            if name not in ours:
                yield _found(name, "a checkpoint that was renamed", f"load_checkpoint({path!r})")
        elif is_run(path):
            yield _found(name, "the directory of a run", f"Checkpointer({path!r})")
        elif (foreign := _foreign(path, name)) is not None:
            yield foreign


def _foreign(path: str, name: str) -> str | None:
    """Describe the checkpoint in the directory at ``path``; None: there is none, or it is stager's."""
    try:
        origin = find(path).origin
    except StagerError:
        return None
    return None if origin is Origin.STAGER else _found(name, origin.value, f"load_checkpoint({path!r})")


def _found(name: str, what: str, call: str) -> str:
    return f"{name} ({what}): {call}"
