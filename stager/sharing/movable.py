"""Moving a storage of the user's into shared memory: which may be moved, and how.

NOTE [ What a move changes ]
torch's ``_share_fd_cpu_`` copies the bytes to a new shared mapping and exchanges the two inside the ``StorageImpl``, as
``share_memory_`` and sending a tensor to another process do. Tensors, views, aliases, optimizer state and autograd's saved
tensors hold the ``StorageImpl``, so all of them see the new memory; the old memory is freed. Nothing else follows: code with
a raw pointer (a C extension, DLPack, a numpy array over the memory) reads freed memory from then on. torch marks a storage
as not resizable when it hands its memory to numpy, or when the memory was never its own. Such a storage is not moved. A
pointer that was taken in another way leaves no trace.

The mapping is a file in ``/dev/shm`` that is unlinked as soon as it is mapped: a kill leaves nothing there. torch 2.10 and
newer reserve its pages at once; if there is no room, they raise and leave the name behind. Older versions reserve none: the
copy is made inside of torch, and if ``/dev/shm`` fills meanwhile, the process dies of SIGBUS. Nobody can reserve pages for
torch's file from outside. So with a torch that does not reserve (``torch_reserves``), nothing is moved.

torch 2.13 crashes when a shared storage is made larger (its mapping has no allocator; seen as SIGSEGV in ``resize_``). A
storage that was moved here is marked as not resizable, so that it raises instead.
"""

# mypy: allow-untyped-calls
# (torch annotates none of what this file calls on storages)

from __future__ import annotations

import logging
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from enum import Enum
from functools import cache
from typing import Any

import torch

from stager.state.tensor_kinds import PLAIN_TENSORS
from stager.workers.device import accelerator

logger = logging.getLogger("stager")

SHM_DIRECTORY = "/dev/shm"
# More than a first page, which every version writes to, even if that is a huge one; or less, where /dev/shm is as small.
_PROBE_BYTES = (4 << 20, 64 << 10)
_NAME = re.compile(r"</?(torch_\d+_\d+_\d+)>")


class Reason(Enum):
    """Why a large tensor is copied by the trainer although workers could copy it faster from shared memory."""

    NOT_SHARED = "not in shared memory; they were not to be moved at that moment"
    UNMOVABLE = "their storage wraps memory that cannot be moved (numpy or a mapped file)"
    SUBCLASS = "a tensor or storage subclass, whose memory is its own business"
    PINNED = "page-locked, which shared memory is not"
    NAMED = "shared by name (torch's sharing strategy file_system)"
    NO_DESCRIPTOR = "no more descriptors for shared storages (an eighth of `ulimit -n`)"
    NO_ROOM = f"{SHM_DIRECTORY} has no room for them"
    NOT_RESERVED = "this version of torch does not reserve shared memory (2.10 does), and dies where it is short"
    REFUSED = "the operating system refused shared memory"


def why_not(tensor: torch.Tensor) -> Reason | None:
    """Return why the storage of a CPU tensor that is not shared may not be moved; None: it may."""
    storage = tensor.untyped_storage()
    if type(tensor) not in PLAIN_TENSORS or type(storage) is not torch.UntypedStorage:
        return Reason.SUBCLASS
    if not storage.resizable():
        return Reason.UNMOVABLE
    if accelerator.is_in_use() and tensor.is_pinned():
        return Reason.PINNED
    return None


def move(storage: torch.UntypedStorage) -> Reason | None:
    """Move a storage into shared memory; return why that failed, or None. See NOTE [ What a move changes ].

    Legal if :func:`why_not` returns None, and while no other thread and no snapshot reads or writes it.
    """
    # Before the move: see the second paragraph of the note.
    if storage.nbytes() > free_shm_bytes():
        return Reason.NO_ROOM
    if not torch_reserves():
        return Reason.NOT_RESERVED
    try:
        storage._share_fd_cpu_()
    except RuntimeError as error:
        logger.warning("a tensor of %d bytes could not be moved into shared memory: %s", storage.nbytes(), error)
        _remove_leftover(str(error))
        return Reason.REFUSED
    _forbid_resizing(storage)
    return None


def torch_reserves() -> bool:
    """Return whether torch reserves the pages of a shared mapping when it makes it; False if there is no room to see."""
    for nbytes in _PROBE_BYTES:
        try:
            return _probe(nbytes)
        except RuntimeError as error:
            _remove_leftover(str(error))
    return False


@cache
def _probe(nbytes: int) -> bool:
    storage = torch.UntypedStorage._new_using_fd_cpu(nbytes)  # nobody writes to it
    return os.fstat(storage._share_fd_cpu_()[0]).st_blocks * 512 >= nbytes


def free_shm_bytes() -> int:
    """Return how many bytes of ``/dev/shm`` may be taken. An eighth of it stays free for data loaders and others."""
    try:
        stats = os.statvfs(SHM_DIRECTORY)
    except OSError:
        return 0
    return max(0, (stats.f_bavail - stats.f_blocks // 8) * stats.f_frsize)


def _forbid_resizing(storage: torch.UntypedStorage) -> None:
    flat: Any = torch.empty(0, dtype=torch.uint8)
    flat.set_(storage, 0, (1,)).numpy()  # handing the memory to numpy is what sets the mark


def _remove_leftover(message: str) -> None:
    """Remove the name that torch left in ``/dev/shm`` when there was no room for its pages."""
    for name in _NAME.findall(message):
        with suppress(OSError):
            os.unlink(os.path.join(SHM_DIRECTORY, name))


# -- storages that somebody else has shared --------------------------------------------------------------------------


def sendable(storages: Iterable[torch.UntypedStorage]) -> list[Reason | None]:
    """Return, for each storage that is shared already, None if its descriptor can be sent, else why not.

    ``is_shared()`` is also true for mapped files, and for storages that are shared by name. ``_share_fd_cpu_`` would *move*
    the latter away from the processes that share them. ``/proc/self/maps`` tells them apart: a storage that has a descriptor
    and no name is a shared mapping of a deleted file, from its first byte on (a named one begins with a count of its users).
    """
    mappings = dict(_shared_mappings())
    reasons: list[Reason | None] = []
    for storage in storages:
        in_page = storage.data_ptr() % mmap.PAGESIZE
        path = mappings.get(storage.data_ptr() - in_page)
        if type(storage) is not torch.UntypedStorage:
            reasons.append(Reason.SUBCLASS)
        elif path is None:
            reasons.append(Reason.UNMOVABLE)
        elif in_page or not path.endswith(" (deleted)"):
            reasons.append(Reason.NAMED if path.startswith(f"{SHM_DIRECTORY}/") else Reason.UNMOVABLE)
        else:
            reasons.append(None if storage._share_fd_cpu_()[0] >= 0 else Reason.UNMOVABLE)
    return reasons


def _shared_mappings() -> Iterator[tuple[int, str]]:
    """Yield the first address and the path of every shared mapping of a file in this process."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
            if permissions.endswith("s") and path:
                yield int(addresses.partition("-")[0], 16), path[0].rstrip("\n")
