"""The exports of weights that saves ask for, in a worker process of their own, one after the other.

    save(export=...)   say what is wrong before anything is copied; start the worker if there is none yet
    commit             hold the read lock of the checkpoint, and queue the export. The pool of the saves knows nothing of it
    worker             export from the checkpoint, each hash checked (``stager/exporting/weights.py``)
    done               release the lock, resolve ``export_completion``; log an error, because the save has succeeded
    close              wait for the exports, within its limits; kill what is left, and log the command that makes it

The read lock is taken at the commit and not by the worker alone: retention, which runs after each commit, could remove a
checkpoint whose export waits behind another one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from stager.config.arguments import shown
from stager.exporting.new_directory import remove_abandoned
from stager.exporting.weights import ExportedWeights, export_saved
from stager.exporting.weights_export import WeightsExport, command_of, resolved
from stager.saving.save import Save
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import ArgumentError, CheckpointNotFoundError, ClosedError, LeftRunningError, UsageError
from stager.workers.long_wait import LongWait
from stager.workers.pool import codec
from stager.workers.pool.pool import WorkerPool

logger = logging.getLogger("stager")


@dataclass(eq=False)
class _Export:
    """One export. It holds no save: the save's Future holds it.

    Attributes:
        export: resolved.
        checkpoint: the path that the save commits.
        step: of the save.
        save_id: of the checkpoint; "" until it is committed.
        completion: what the user has.
        lock: the read lock of the checkpoint.
    """

    export: WeightsExport
    checkpoint: str
    step: int
    save_id: str = ""
    completion: Future[ExportedWeights] = field(default_factory=Future)
    lock: ExitStack = field(default_factory=ExitStack)

    @property
    def out(self) -> str:
        return os.fspath(self.export.out)

    @property
    def command(self) -> str:
        return command_of(self.export, self.checkpoint)

    @property
    def is_replaced(self) -> bool:
        """Whether another checkpoint has the path now, or none, so that the command would export other weights."""
        storage = storage_of(self.checkpoint)
        head = storage.head(self.checkpoint)
        return head.save_id != self.save_id if head is not None else not storage.has_manifest(self.checkpoint)


def check_export(export: object) -> None:
    """Raise ArgumentError unless ``export`` is None or a WeightsExport."""
    if export is not None and not isinstance(export, WeightsExport):
        raise ArgumentError(
            f"export must be a stager.WeightsExport, got {shown(export)}; write "
            'export=WeightsExport("gpt-hf-{step}", keys="model", strip_prefix="model.")'
        )


class Exporter:
    """Makes the exports of one Checkpointer's saves.

    Args:
        start_pool: starts the pool of one worker.
    """

    def __init__(self, start_pool: Callable[[], WorkerPool]) -> None:
        self._start_pool = start_pool
        self._pool: WorkerPool | None = None
        self._exports: list[_Export] = []  # those that have not ended
        self._lock = threading.Lock()  # guards the list

    # -- save() -------------------------------------------------------------------------------------------------

    def accept(self, export: WeightsExport, save: Save) -> None:
        """Check an export, start the worker if there is none, and make the export when ``save`` is committed.

        Raises:
            ArgumentError: ``rename`` cannot be sent to a worker.
            UsageError: ``out`` is taken, or will be by an earlier export; or a file of ``sidecars`` is missing.
            StorageError: the directory that ``out`` lies in does not exist.
            WorkerStartError
        """
        one = _Export(resolved(export, save.step), save.destination.path, save.step)
        if one.out == one.checkpoint:
            raise UsageError(
                f"{one.out}: is the path of the checkpoint itself; export the weights to another directory"
            )
        with self._lock:
            if not export.force and any(other.out == one.out for other in self._exports):
                raise UsageError(
                    f"{one.out}: an earlier save exports to it; put {{step}} into out, or replace that one with force=True"
                )
        if export.rename is not None:  # now, and not when the checkpoint is committed
            codec.close_fds(codec.dump_call((export_saved, (), {"rename": one.export.rename}), "the export")[1])
        if self._pool is None:
            self._pool = self._start_pool()
        save.export_completion = one.completion
        with self._lock:
            self._exports.append(one)
        save.upload_completion.add_done_callback(partial(self._save_ended, one))

    # -- the threads that end saves and exports -----------------------------------------------------------------

    def _save_ended(self, one: _Export, upload: Future[CheckpointInfo]) -> None:
        if upload.cancelled():
            self._end(one)
            one.completion.cancel()
            one.completion.set_running_or_notify_cancel()
            return
        error = Future.exception(upload)  # not as the user reads it
        if isinstance(error, LeftRunningError):
            why = f"this process did not wait for the commit of its save, so its weights are not exported to {one.out}"
            what = f"{why}; when the workers have committed it: {one.command}"
            logger.warning("step %d: %s", one.step, what)
            error = LeftRunningError(what)
        if not one.completion.set_running_or_notify_cancel():  # the user has cancelled it
            self._end(one)
        elif error is not None:
            self._end(one)
            one.completion.set_exception(error)
        else:
            self._queue(one, Future.result(upload))

    def _queue(self, one: _Export, info: CheckpointInfo) -> None:
        assert self._pool is not None  # accept() has started it
        one.save_id = info.save_id
        try:
            one.lock.enter_context(storage_of(one.checkpoint).reading(one.checkpoint))
            done = self._pool.submit(export_saved, one.checkpoint, info.save_id, one.export)
        except Exception as error:  # noqa: BLE001  # the edge of a callback: whatever it is, the Future must have it
            self._give_up(one, error)
        else:
            done.add_done_callback(partial(self._done, one))

    def _done(self, one: _Export, done: Future[ExportedWeights]) -> None:
        error = done.exception()
        if error is None:
            self._end(one)
            result = done.result()
            logger.info("weights of step %d exported to %s after %.2f s", one.step, result.path, result.secs)
            one.completion.set_result(result)
        else:
            remove_abandoned(one.out)  # what a worker that died has left
            self._give_up(one, error)

    def _give_up(self, one: _Export, error: BaseException) -> None:
        """Fail an export whose save is committed, and say what to do."""
        if isinstance(error, ClosedError):
            error = ClosedError(f"close() did not wait until the weights of step {one.step} were exported to {one.out}")
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, CheckpointNotFoundError):
            pass  # it says that there is nothing to export any more
        elif one.is_replaced:
            what += f"; they cannot be exported any more: {one.checkpoint} was replaced or removed meanwhile"
        else:
            what += f"; the checkpoint is committed. To export them now: {one.command}"
        logger.error("the weights of step %d were not exported: %s", one.step, what)
        self._end(one)
        one.completion.set_exception(error)

    def _end(self, one: _Export) -> None:
        """Forget an export, and release its checkpoint. Called once, before its Future is done."""
        with self._lock:
            self._exports.remove(one)
        one.lock.close()

    # -- the end ------------------------------------------------------------------------------------------------

    @property
    def in_callback(self) -> bool:
        """Whether this thread runs a callback of an export's Future."""
        return self._pool is not None and self._pool.in_callback

    def finish(self, timeout: float | None) -> None:
        """Wait for the exports whose saves are committed, and close.

        Args:
            timeout: seconds; what is not done by then is given up. None: as long as they take.
        """
        if self._pool is not None:
            try:
                with self._lock:
                    outs = ", ".join(one.out for one in self._exports)
                LongWait(f"the export of weights to {outs}", timeout).until(self._pool.drain, timeout)
            finally:
                self.close()

    def close(self) -> None:
        """Give up what is not done, and stop the worker. Idempotent."""
        if self._pool is not None:
            self._pool.close(0)

    def abandon(self) -> None:
        """In a forked child: close the copies of the read locks, which would last as long as the child."""
        for one in self._exports:
            with suppress(Exception):
                one.lock.close()
