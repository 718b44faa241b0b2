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

from stager.workers.errors import ArgumentError, InternalError, WorkerError

_SYSTEM_ERRORS = (OSError, MemoryError)  # no descriptors or memory are left: nothing is wrong with the value
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


def dump_call(call: tuple[Any, tuple[Any, ...], dict[str, Any]], label: str) -> tuple[bytes, list[int]]:
    """Pickle a function, its arguments by position and those by name, as :func:`dumps` does.

    Raises:
        ArgumentError: one of them cannot be pickled; says which.
    """
    try:
        return dumps(call)
    except _SYSTEM_ERRORS:
        raise
    except Exception as error:
        problem = f"cannot be pickled: {_first_line(error)}"
        raise ArgumentError(f"{label} cannot be sent to a worker: {_blame(call[1], call[2], problem)}") from error


def _blame(args: tuple[Any, ...], kwargs: dict[str, Any], problem: str) -> str:
    for name, value in (*enumerate(args, 1), *kwargs.items()):
        if not _can_be_pickled(value):
            kind = type(value).__name__
            return (
                f"argument {name} ({kind}) {problem}; pass values that it can be made from, such as the path of a file"
            )
    return f"the function, or a value that it uses, {problem}; let the function make such a value itself"


def dump_result(result: object, label: str) -> tuple[bytes, list[int]]:
    """Pickle what a task returned, as :func:`dumps` does.

    Raises:
        WorkerError: it cannot be pickled.
    """
    try:
        return dumps(result)
    except _SYSTEM_ERRORS:
        raise
    except Exception as error:
        raise WorkerError(
            f"the result of {label} ({type(result).__name__}) cannot be sent back from the worker: {_first_line(error)}; "
            "return values that it can be made from"
        ) from error


def _can_be_pickled(value: object) -> bool:
    try:
        _, fds = dumps(value)
    except Exception:  # noqa: BLE001  (a user's __reduce__ can fail in any way)
        return False
    close_fds(fds)
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


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
