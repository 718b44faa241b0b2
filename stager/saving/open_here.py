"""Which run directories this process has open, and by whom: one Checkpointer at a time saves into a directory.

Two of them in one process (a cell of a notebook that is run twice) cannot wait for each other. So the second one

    takes over     from one that nobody holds any more: its saves are finished, and all that it had is closed
    fails at once  where the first one is still held, and says where that was made

A Checkpointer that nobody holds is not closed by the garbage collector: that may run in any thread, also in one of the
pool's, for which closing would wait.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeAlias

from stager.workers.checkpoint.storage.places import is_url
from stager.workers.errors import DirectoryInUseError

logger = logging.getLogger("stager")

_P = ParamSpec("_P")
Identity: TypeAlias = tuple[int, int] | str
"""Of a directory: device and inode, because it may have several paths; in an object store its URL."""

_OURS = f"{os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}{os.sep}"


@dataclass(frozen=True)
class _Opened:
    """An open Checkpointer.

    Attributes:
        owner: the Checkpointer.
        where: file and line of the call that made it.
        close: finishes its saves and closes what it has; holds no reference to it.
    """

    owner: weakref.ref[object]
    where: str
    close: Callable[[], None]


_opened: dict[Identity, _Opened] = {}


def add(owner: object, directory: str, close: Callable[[], None]) -> Callable[[], None]:
    """Remember that ``owner`` has the directory open; returns what forgets it.

    Args:
        close: see :class:`_Opened`.
    """
    identity = _identity(directory)
    opened = _Opened(weakref.ref(owner), _caller(), close)
    if identity is not None:
        _opened[identity] = opened

    def forget() -> None:
        if identity is not None and _opened.get(identity) is opened:
            del _opened[identity]

    return forget


def take_over(
    directory: str,
    advice: str = "use that one, or close it first with its close(); to look only, pass read_only=True",
) -> None:
    """Make sure that no other Checkpointer of this process has the directory open.

    Args:
        advice: what to do if one has, for the message.

    Raises:
        DirectoryInUseError: one has, and somebody still holds it.
    """
    identity = _identity(directory)
    opened = None if identity is None else _opened.get(identity)
    if opened is None:
        return
    if opened.owner() is not None:
        gc.collect()  # it may be garbage in a cycle: an error's traceback, for example
    if opened.owner() is not None:
        raise DirectoryInUseError(
            errno.EBUSY,
            f"this process has it open already, by the Checkpointer that was made at {opened.where}; {advice}",
            directory,
        )
    logger.warning(
        "the Checkpointer of %s that was made at %s was never closed, and nobody holds it any more; it is closed now",
        directory,
        opened.where,
    )
    try:
        opened.close()
    except Exception:  # nobody else could be told
        logger.exception("closing an earlier Checkpointer, which nobody holds, failed; its last save may be missing")


def weakly(method: Callable[_P, None]) -> Callable[_P, None]:
    """Return a function that calls a bound method as long as its object is held by somebody else."""
    weak = weakref.WeakMethod(method)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if (strong := weak()) is not None:
            strong(*args, **kwargs)

    return call


def _identity(directory: str) -> Identity | None:
    if is_url(directory):
        return directory
    try:
        stat = os.stat(directory)
    except OSError:  # it is not there yet
        return None
    return stat.st_dev, stat.st_ino


def _caller() -> str:
    """Return file and line of the innermost call that is not of stager's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


os.register_at_fork(after_in_child=_opened.clear)  # a child has none of them
