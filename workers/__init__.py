"""The workers' side of stager: the pool, its protocol and supervision, and what workers run.

Reading order: ``errors.py``; ``pool/``: ``pool.py`` (diagram), ``messages.py``, ``channel.py``, ``worker_main.py``,
``worker_loop.py``, ``roster.py``, ``supervisor.py``, ``heartbeat.py``; ``memory/``, from ``slab.py`` on;
then what workers run: ``offload/`` (the deep copy), ``staged_copy/`` (a worker's share of it) and ``checkpoint/`` (layout,
write, commit, read, maintenance).

This package never imports the rest of ``stager``. Names are imported when they are first used, so that
``stager.workers.errors`` and ``stager.workers.checkpoint.storage.posix.files`` can be imported where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "stager.workers.errors": (
        "ClosedError",
        "LeftRunningError",
        "RemoteTraceback",
        "TaskTimeoutError",
        "WorkerDiedError",
        "WorkerError",
        "WorkerStartError",
    ),
    "stager.workers.pool.pool": ("PoolOptions", "WorkerPool"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'stager.workers' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from stager.workers.errors import ClosedError as ClosedError
    from stager.workers.errors import LeftRunningError as LeftRunningError
    from stager.workers.errors import RemoteTraceback as RemoteTraceback
    from stager.workers.errors import TaskTimeoutError as TaskTimeoutError
    from stager.workers.errors import WorkerDiedError as WorkerDiedError
    from stager.workers.errors import WorkerError as WorkerError
    from stager.workers.errors import WorkerStartError as WorkerStartError
    from stager.workers.pool.pool import PoolOptions as PoolOptions
    from stager.workers.pool.pool import WorkerPool as WorkerPool
