"""What becomes of a Checkpointer that is still open at the end of its process.

    the interpreter exits   close it: what was saved last is committed, although close() was forgotten
    a fork                  in the child: let go of the directory's lock, which the child would hold otherwise

Handlers of ``atexit`` run in the reverse order of their registration. The pool's handler stops every worker, so ours must
run before it: this file imports the pool, whose handler is thus registered first.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakMethod

import stager.workers.pool.pool  # noqa: F401  (registers its handler; see above)

logger = logging.getLogger("stager")

_open: WeakKeyDictionary[object, tuple[WeakMethod[Callable[[bool], None]], WeakMethod[Callable[[], None]]]]
_open = WeakKeyDictionary()  # and weak methods: a Checkpointer that nobody holds any more is not kept alive


def watch(owner: object, close: Callable[[bool], None], abandon: Callable[[], None]) -> None:
    """Call one of two methods of ``owner`` at the end: ``close(has_failed)`` or, in a forked child, ``abandon()``."""
    _open[owner] = WeakMethod(close), WeakMethod(abandon)


def forget(owner: object) -> None:
    """Call nothing: it is closed. Does nothing for an owner that is not watched."""
    _open.pop(owner, None)


def _close_all() -> None:
    has_failed = getattr(sys, "last_value", None) is not None
    for weak_close, _ in list(_open.values()):
        try:
            if (close := weak_close()) is not None:
                close(has_failed)
        except Exception:
            logger.exception("a save failed, and the program ended without looking at it")


def _abandon_all() -> None:
    for _, weak_abandon in list(_open.values()):
        if (abandon := weak_abandon()) is not None:
            abandon()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_abandon_all)
