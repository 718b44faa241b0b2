"""How a Checkpointer's saves end: all finished, out of time, or interrupted.

    no deadline                     finish every save
    preempted, with a deadline      finish what can be finished until then; detach from the rest
    interrupted (a second Ctrl-C)   detach from everything, now

To detach from a save means to leave its workers to finish it alone: they have the snapshot, and commit it after this process
is gone (``workers/pool/pool.py``).

The order of a full close:
    1. Wait for staging: only what the workers have survives this process.
    2. Wait for this rank's own parts: their receipts let the other ranks commit.
    3. Wait for the other ranks.
    4. Wait for what a commit leaves to be done (retention); the pool still accepts it.
    5. Stop the pool.
    6. Wait for the exports of weights, and stop their worker. Nobody detaches from an export: the command line repeats it.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from stager.replication.replication import Replication
from stager.saving.exporter import Exporter
from stager.saving.save_errors import SaveErrors
from stager.saving.saver import Saver
from stager.workers.errors import InternalError, LeftRunningError
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")

_STAGING_SECS = 10.0  # a snapshot is copied at the speed of memory; without it the save is lost


@dataclass(frozen=True)
class Ending:
    """What it takes to close a Checkpointer, without a reference to it.

    Attributes:
        group_secs: how long a rank waits for another.
        resources: everything else that is to be closed.
    """

    saver: Saver
    pool: WorkerPool
    replication: Replication
    exporter: Exporter
    group_secs: float
    errors: SaveErrors
    resources: ExitStack

    def finish(
        self, timeout: float | None = None, deadline_secs: float | None = None, *, has_failed: bool = False
    ) -> None:
        """Finish the saves and close everything.

        1. The saves end, and with them the pool. 2. The replicas of what is committed go. 3. The exports end. 4. Everything
        else is closed, whatever was raised: the slabs after the workers that read them, the lock after the last write.

        Args:
            timeout, deadline_secs: as of :func:`finish_saves`; both bound the exports, too.
            has_failed: whether the program has: its replicas stay.

        Raises:
            KeyboardInterrupt: while it waited.
            Exception: the oldest error of a save that nobody has looked at.
        """
        started = time.monotonic()
        with self.resources:
            limits = timeout, deadline_secs, self.group_secs
            with self.replication.closing(limits, has_failed=has_failed):
                finish_saves(self.saver, self.pool, timeout, deadline_secs)
            secs = _shorter(timeout, deadline_secs)
            self.exporter.finish(None if secs is None else max(0.0, started + secs - time.monotonic()))
        self.errors.raise_all()


def finish_saves(saver: Saver, pool: WorkerPool, timeout: float | None, deadline_secs: float | None) -> None:
    """Wait for the saves in flight, and stop the pool.

    Args:
        timeout: seconds for saves in flight; those not committed by then fail. None: as long as they take.
        deadline_secs: seconds for the same; from those not committed by then it detaches. None: no deadline.

    Raises:
        KeyboardInterrupt: while it waited. It has detached from every save then.
    """
    secs = _shorter(timeout, deadline_secs)
    try:
        with saver.progress.shown("closing"):
            is_drained = _drain(saver, pool, secs)
        if is_drained:
            pool.close()  # 5.
        elif deadline_secs is None:
            pool.close(0)
        else:
            _detach(saver, pool)
    except (KeyboardInterrupt, SystemExit):
        _detach(saver, pool)
        raise


def _shorter(*limits: float | None) -> float | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _drain(saver: Saver, pool: WorkerPool, timeout: float | None) -> bool:
    """Steps 1 to 4; False: they took longer than ``timeout`` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout

    def rest() -> float | None:
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    try:
        saver.wait_for_staging(rest())
    except TimeoutError:
        return False  # the pool may have nothing to do now, and has not got all that it is to write
    return pool.drain(rest()) and saver.completion.wait_for_ranks(rest()) and pool.drain(rest())


def _detach(saver: Saver, pool: WorkerPool) -> None:
    """Leave the workers to finish alone, and wait for no commit.

    ``upload_completion`` of what they finish fails with LeftRunningError, which ``close()`` does not raise: it is most
    likely not an error.
    """
    with suppress(TimeoutError):
        saver.wait_for_staging(_STAGING_SECS)
    pool.detach()
    for save in saver.completion.in_flight():
        if not save.staging_completion.done():
            continue
        logger.warning("step %d is staged and not committed yet: the workers finish it on their own", save.step)
        save.upload_completion.was_read = True  # before it fails: otherwise close() would raise it
        with suppress(InternalError):  # it ended just now: the other ranks' parts came
            save.fail(
                LeftRunningError(
                    f"the save of step {save.step} was staged, but not committed before this process had to go on; the "
                    "workers commit it, unless they are killed"
                )
            )
