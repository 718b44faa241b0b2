"""The workers' side of stager: the pool, its protocol and supervision, and what workers run.

Reading order: ``pool.py`` (diagram), ``protocol.py``, ``channel.py``, ``main.py``, ``supervisor.py``; then what is run:
``layout.py``, ``slab.py``, ``persist.py``, ``commit.py``, ``verify.py``.

This package never imports ``stager``.
"""

from workers.errors import (
    ClosedError,
    RemoteTraceback,
    TaskTimeoutError,
    WorkerDiedError,
    WorkerError,
    WorkerStartError,
)
from workers.pool import PoolOptions, WorkerPool

__all__ = [
    "ClosedError",
    "PoolOptions",
    "RemoteTraceback",
    "TaskTimeoutError",
    "WorkerDiedError",
    "WorkerError",
    "WorkerPool",
    "WorkerStartError",
]
