"""Writing a staged state dict to a file, in a worker."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from stager.workers.faults import point
from stager.workers.memory.attached import Memory
from stager.workers.offload.packed_state import unpack
from stager.workers.staged_copy.share import Places, placed_storages
from stager.workers.staged_copy.state_file import write_state_file


@dataclass(frozen=True, slots=True)
class StagedCopy:
    """A staged state dict as a worker gets it.

    Attributes:
        structure: of the copy.
        places: of its storages, in the slab.
        shared: the functions and classes that its objects are made of, by number.
    """

    structure: bytes
    places: Places
    slab: Memory
    shared: tuple[Any, ...]


def persist_copy(copy: StagedCopy, path: str) -> None:
    """Write a staged state dict to ``path``; return when it is durable. Runs in a worker.

    Raises:
        StorageError: the file system failed. What was at ``path`` before is there still.
    """
    point("persist.begin")
    _name_in_main(copy.shared)
    write_state_file(unpack(copy.structure, placed_storages(copy.places, copy.slab), copy.shared.__getitem__), path)


def _name_in_main(shared: tuple[Any, ...]) -> None:
    """Let this process's main module have what the trainer's defines, so that the file names it as the trainer would."""
    main = sys.modules["__main__"]
    for value in shared:
        if getattr(value, "__module__", None) == "__main__":
            setattr(main, value.__qualname__, value)
