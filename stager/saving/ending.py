"""How a Checkpointer's saves end: all finished, out of time, or interrupted.

    no deadline                     finish everything
    preempted, with a deadline      finish what can be finished until then; leave the rest to the workers
    interrupted (a second Ctrl-C)   leave everything to the workers, now

"Left to the workers" means: they have the snapshot, and commit it after this process is gone (``workers/pool/pool.py``).
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from stager.saving.save import SaveHandle
from stager.saving.saver import Saver
from stager.workers.errors import InternalError, LeftRunningError
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_STAGING_SECS = 10.0  # a snapshot is copied at the speed of memory; without it the save is lost


def finish_saves(saver: Saver, pool: WorkerPool, timeout: float | None, deadline_secs: float | None) -> None:
    """Wait for the saves in flight, and stop the pool.

    Args:
        timeout: seconds for saves in flight; those not committed by then fail. None: as long as they take.
        deadline_secs: seconds for the same; those not committed by then are left to the workers. None: no deadline.

    Raises:
        KeyboardInterrupt: while it waited. Everything has been left to the workers then.
    """
    try:
        if deadline_secs is None:
            with suppress(TimeoutError):
                saver.wait_for_staging(timeout)
            drained = _drain(saver, pool, timeout)
            pool.close(None if drained else 0)
            return
        secs = deadline_secs if timeout is None else min(timeout, deadline_secs)
        with suppress(TimeoutError):
            saver.wait_for_staging(secs)
        if _drain(saver, pool, secs):
            pool.close()
        else:
            leave_to_workers(saver, pool)
    except (KeyboardInterrupt, SystemExit):
        leave_to_workers(saver, pool)
        raise


def _drain(saver: Saver, pool: WorkerPool, timeout: float | None) -> bool:
    """Own parts, then the other ranks', then what a commit leaves to be done (retention), which is still accepted."""
    deadline = None if timeout is None else time.monotonic() + timeout

    def rest() -> float | None:
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    return pool.drain(rest()) and saver.settler.wait_for_ranks(rest()) and pool.drain(rest())


def leave_to_workers(saver: Saver, pool: WorkerPool) -> None:
    """Wait for no commit. ``upload_completion`` of what is left fails with LeftRunningError, which ``close()`` does not
    raise: it is most likely not an error."""
    with suppress(TimeoutError):
        saver.wait_for_staging(_STAGING_SECS)
    pool.detach()
    for handle in saver.settler.in_flight():
        if handle.staging_completion.done():
            _let_go(handle)


def _let_go(handle: SaveHandle) -> None:
    logger.warning("step %d is staged and not committed yet: the workers finish it on their own", handle.step)
    handle.upload_completion.was_read = True
    with suppress(InternalError):  # the other ranks' parts came just now
        handle._fail(
            LeftRunningError(
                f"the save of step {handle.step} was staged, but not committed before this process had to go on; the "
                "workers commit it, unless they are killed"
            )
        )
