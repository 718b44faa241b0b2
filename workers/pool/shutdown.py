"""NOTE [ The shutdown ladder ]

    drain    (pool.py)   every task done, or the caller's timeout over
    ask                  Shutdown to the workers that have nothing to do
    join                 until the timeout of a rung
    kill, join           SIGKILL to what is left: nothing can refuse it

Workers that are still starting, or whose task did not end in time, would not read the request: they are killed at once.
There is no rung for SIGTERM, because workers ignore it (``worker_main.py`` says why). SIGKILL loses nothing: the task
of a killed worker can run again, and the next run cleans up what it left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from stager.workers.pool.handle import WorkerHandle, WorkerState
from stager.workers.pool.messages import Shutdown

logger = logging.getLogger("stager")


def stop_workers(workers: Sequence[WorkerHandle], rung_secs: float) -> None:
    """Ask, join, kill, join; then close the descriptors. When this returns, no worker runs any task."""
    for worker in workers:
        if worker.state is WorkerState.READY and not worker.items:
            worker.send(Shutdown(), [])
        else:
            worker.kill()
    for worker in _join(workers, rung_secs):
        worker.kill()
    for worker in _join(workers, rung_secs):  # stuck in the kernel, in a hung file system for example
        logger.error("worker %d does not end although it was killed; it is left behind", worker.pid)
    for worker in workers:
        worker.process.release()


def _join(workers: Sequence[WorkerHandle], timeout: float) -> list[WorkerHandle]:
    """Wait for all together; returns those that have not ended."""
    deadline = time.monotonic() + timeout
    return [w for w in workers if not w.process.join(max(0.0, deadline - time.monotonic()))]
