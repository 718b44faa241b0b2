"""Pickling of what tasks carry: any callable (cloudpickle), any torch storage (torch.multiprocessing).

torch.multiprocessing's reducers hand each shared storage's file descriptor to ``multiprocessing.reduction.DupFd``.
By default that starts a server thread in the sender, from which the receiver fetches the descriptor later, and a
sender that is killed in between takes the memory with it. Here the descriptors go *with* the message
(``SCM_RIGHTS``): from the moment the message is sent the kernel keeps the memory alive, whoever dies. DupFd supports
this: it asks the "spawning popen" of the current thread, which is where :class:`_FdCollector` stands in.

Nothing here imports torch. Whoever has a tensor to send has imported it, and with it torch.multiprocessing, which registers
its reducers with ForkingPickler; and a pickle that names something of torch imports it where it is loaded.
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
        """Take the descriptor; whoever calls this closes it. Legal once, while its message is being loaded."""
        fds: list[int] | None = getattr(_received, "fds", None)
        if fds is None or fds[self.index] < 0:
            raise InternalError("a descriptor was asked for outside of the message that it came with")
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
        # Each time: torch may have been imported since the last one, and ForkingPickler hands out a copy. Before the real
        # initialisation, which looks it up.
        registered = cast("dict[type, Any]", ForkingPickler(io.BytesIO()).dispatch_table)
        self.dispatch_table = ChainMap(registered, cloudpickle.Pickler.dispatch_table)
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)


def dumps(value: object) -> tuple[bytes, list[int]]:
    """Pickle ``value``; returns the bytes and duplicates of the descriptors they refer to (the caller closes them)."""
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
    """Unpickle; descriptors that nothing took are closed."""
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
