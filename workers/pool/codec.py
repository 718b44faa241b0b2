"""Pickling of what tasks carry: any callable (cloudpickle), any torch storage (torch.multiprocessing).

torch.multiprocessing's reducers give each shared storage's file descriptor to ``multiprocessing.reduction.DupFd``. By
default, that starts a server thread in the sender, from which the receiver fetches the descriptor later. If the sender is
killed in between, the memory is lost. Here the descriptors travel *with* the message (``SCM_RIGHTS``): once it is sent, the
kernel keeps the memory alive, whichever process dies. ``DupFd`` supports that: it asks the "spawning popen" of the current
thread, for which :class:`_FdCollector` stands in.

Nothing here imports torch. A process that sends a tensor has imported torch, and with it torch.multiprocessing, which
registers its reducers with ForkingPickler. A pickle that names something of torch imports it where it is loaded.
"""

from __future__ import annotations

import io
import os
import pickle
import threading
from collections import ChainMap
from contextlib import suppress
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import cloudpickle

from stager.workers.errors import InternalError

_received = threading.local()


class _SentFd:
    """Stands in a pickle for the n-th descriptor that travels beside it."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def detach(self) -> int:
        """Take the descriptor; the caller closes it. Legal once, while its message is being loaded."""
        fds: list[int] | None = getattr(_received, "fds", None)
        if fds is None or fds[self.index] < 0:
            raise InternalError("a descriptor was taken twice, or after the message that it came with was loaded")
        fd = fds[self.index]
        fds[self.index] = -1
        return fd


class _FdCollector:
    """Looks to ``DupFd`` like a process that is being spawned."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        self.fds.append(os.dup(fd))
        return len(self.fds) - 1

    def DupFd(self, index: int) -> _SentFd:
        return _SentFd(index)


class _TaskPickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no types
    def __init__(self, file: io.BytesIO) -> None:
        # 1. A new table for each pickler: torch may have been imported since the last, and ForkingPickler returns a copy.
        registered = cast("dict[type, Any]", ForkingPickler(io.BytesIO()).dispatch_table)
        self.dispatch_table = ChainMap(registered, cloudpickle.Pickler.dispatch_table)
        # 2. After the table is set, because the initialisation looks it up.
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)


def dumps(value: object) -> tuple[bytes, list[int]]:
    """Pickle ``value``; return the bytes, and duplicates of the descriptors they refer to, which the caller closes."""
    collector = _FdCollector()
    file = io.BytesIO()
    previous = context.get_spawning_popen()
    context.set_spawning_popen(cast(Any, collector))
    try:
        _TaskPickler(file).dump(value)
    except BaseException:
        close_fds(collector.fds)
        raise
    finally:
        context.set_spawning_popen(previous)
    return file.getvalue(), collector.fds


def loads(data: bytes, fds: list[int]) -> Any:
    """Unpickle, and close the descriptors that nothing took."""
    outer = getattr(_received, "fds", None)  # a value's __setstate__ may load something itself
    _received.fds = fds
    try:
        return pickle.loads(data)
    finally:
        _received.fds = outer
        close_fds(fds)


def close_fds(fds: list[int]) -> None:
    for fd in fds:
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)
    fds.clear()
