"""The public face: a run's checkpoints.

Start here. Then read ``saving/saver.py`` (one save, end to end), ``snapshot/`` and ``arena/``; ``loading/`` for the way
back; ``ranks/`` for several processes that make one checkpoint; ``replication/`` for processes that keep copies of each
other's snapshots. ``workers/`` is what the worker processes run (``workers/pool/pool.py`` has the diagram).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, suppress
from enum import Enum
from types import TracebackType
from typing import Any

from torch.optim import Optimizer

from stager.config import StagerConfig, load_config
from stager.loading.joint_loader import JointLoader, nothing_to_restore
from stager.loading.loaded import Loaded
from stager.loading.loader import Loader
from stager.loading.selection import Selection
from stager.ranks.opening import take_directory
from stager.ranks.rank_group import find_rank_group
from stager.replication.replication import Replication
from stager.saving import at_exit, setup
from stager.saving.ending import finish_saves
from stager.saving.preemption import Preemption
from stager.saving.retainer import Retainer, change_protected
from stager.saving.save import Save, SaveHandle, UnreadErrors
from stager.saving.saver import Saver
from stager.telemetry.report import SaveState
from stager.workers.checkpoint.directory.run_directory import (
    CheckpointInfo,
    SkippedCheckpoint,
    list_checkpoints,
    parse_checkpoint,
)
from stager.workers.checkpoint.maintenance.retention import PruneFate, PruneReport, prune
from stager.workers.errors import ClosedError, UsageError

logger = logging.getLogger("stager")


class _Lifecycle(Enum):
    """What a Checkpointer may do.

    READ_ONLY --------------> CLOSED        a closed one still loads
    OPEN ------> CLOSING ---> CLOSED        while it is CLOSING, saves in flight end, and callbacks of their Futures run
    """

    READ_ONLY = "was opened with read_only=True"
    OPEN = "is open"
    CLOSING = "is being closed"
    CLOSED = "is closed"


_NOT_PREEMPTED = Preemption()  # until on_preemption() is called


class Checkpointer:
    """Saves and loads the checkpoints of one run, in one directory.

    Args:
        directory: where the checkpoints are. It is created if it does not exist.
        config: path of a YAML file, a mapping, a :class:`~stager.config.StagerConfig`, or None for the defaults.
        read_only: only load: start no workers, take no lock, change nothing.

    Raises:
        ConfigError: the configuration is wrong.
        DirectoryInUseError: another run writes there.
        StorageError: the directory cannot be made or read.
        WorkerStartError: no worker process can be started.

    Thread safety: ``save()`` and the other methods may be called from any thread, one at a time (a lock enforces it); the
    Futures may be awaited anywhere. After ``fork()`` the child cannot use it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        self._config = load_config(config)
        self._directory = os.path.abspath(os.fspath(directory))
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._lifecycle = _Lifecycle.READ_ONLY if read_only else _Lifecycle.OPEN
        self._unread = UnreadErrors()
        self._preemption = _NOT_PREEMPTED
        ranks = self._config.ranks
        self._job = find_rank_group(False if read_only else ranks.together, ranks.timeout_secs)
        self._loader = Loader(self._directory, self._config.loading, self._job.own_rank)
        self._together = JointLoader(self._job, self._directory, self._loader)
        if not read_only:
            self._open_for_writing()
            at_exit.watch(self, self._close, self._abandon)

    def _open_for_writing(self) -> None:
        """Make what saves; a Checkpointer with ``read_only=True`` has none of it.

        ``_resources`` lists what is to be closed, in the order of opening: the end closes it from the last to the first, and
        so does a failure of a later step.
        """
        config, job = self._config, self._job
        setup.check_for_ranks(config, job)
        with ExitStack() as opened:
            opened.callback(setattr, self, "_lifecycle", _Lifecycle.CLOSED)
            opened.callback(lambda: self._preemption.restore())  # noqa: PLW0108  (on_preemption() sets it later)
            opened.callback(job.close)
            replicates = config.replication.partners > 0
            self._lock_fd = take_directory(
                self._directory, job, config.persistence.lock_timeout_secs, replicates=replicates
            )
            opened.callback(os.close, self._lock_fd)
            self._telemetry = setup.make_telemetry(config.telemetry, job)
            opened.callback(self._telemetry.close)
            self._arena = setup.make_arena(config.arena, job)
            opened.callback(self._arena.close)
            segment_bytes = setup.agree_on_segment_bytes(config.persistence, job, self._arena)
            self._pool = setup.start_pool(config.workers, job, self._lock_fd)
            try:  # not one of the resources: how the pool ends depends on the saves in flight (saving/ending.py)
                self._replication = Replication.open(config.replication, self._directory, job, self._pool)
                shared = self._arena, self._pool, job, self._replication.replicator
                self._saver = Saver(config, self._directory, segment_bytes, *shared, on_done=self._on_done)
            except BaseException:
                self._pool.close(0)
                raise
            opened.callback(self._saver.close)
            self._resources = opened.pop_all()
        self._together.restore = self._replication.restore
        rules = setup.retention_rules(config.retention)
        self._retainer = Retainer(self._pool, self._directory, rules, self._on_pruned)

    # -- saving -------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Mapping[str, Any]) -> SaveHandle:
        """Take a snapshot of ``state`` and let the workers write it as the checkpoint of ``step``.

        Returns when the snapshot is whole, or, for tensors of guarded optimizers, when it is safe to go on.
        A checkpoint of the same step is replaced when the new one is committed.

        Args:
            step: the training step, 0 or more.
            state: names to tensors, nested containers, objects with ``state_dict()`` and ``load_state_dict()``, or
                anything that can be pickled.

        Raises:
            UnstageableError: a value cannot be saved; names its key path.
            MemoryBudgetError, ArenaFullError: see ``arena`` in the configuration.
            UsageError: called by a callback of a save's Future.
            ClosedError
            Exception: the error of an earlier save that nobody has read. This save is then not taken; but if several ranks
                save together, it is, because the other ranks take part in it.
        """
        _check_step(step)
        self._refuse_in_callback("save()")
        with self._lock:
            saver = self._writer()
            if self._job.is_alone:
                self._unread.raise_oldest()
            save = saver.save(step, state)
            self._unread.add(save)
            # Only now: if this rank stayed away, this save would fail on the others, who would stay away from the next
            # because of that, which would then fail here, and so on.
            if not self._job.is_alone:
                self._unread.raise_oldest()
            return SaveHandle(save)

    def guard(self, *optimizers: Optimizer) -> None:
        """Copy the parameters and state of these optimizers while training goes on.

        ``save()`` then returns before these tensors are copied, and the optimizers' ``step()`` waits for the copy. Do not
        write to these tensors in any other way between ``save()`` and the next ``step()``, unless you call
        ``wait_for_staging()`` first.
        """
        with self._lock:
            saver = self._writer()
            for optimizer in optimizers:
                saver.guard.add(optimizer)

    def warmup(self, state: Mapping[str, Any]) -> None:
        """Do now what the first save of such a state would have to do: plan, allocate, start workers. Waits for it."""
        self._refuse_in_callback("warmup()")
        with self._lock:
            self._writer().warm_up(state)

    def on_preemption(
        self, signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1), deadline_secs: float | None = None
    ) -> Preemption:
        """Treat these signals as a warning that this process will be killed soon.

        ``requested`` of the returned object becomes true when a signal comes. Read it in the training loop, save once more,
        and close. ``close()`` waits for commits until ``deadline_secs`` after the signal. The workers commit what is only
        staged by then, after this process is gone. A ``save()`` that still waits for a buffer at the deadline raises
        ArenaFullError. ``close()`` restores the earlier signal handlers.

        Args:
            signals: their earlier handlers are called as well; their default actions are not taken.
            deadline_secs: seconds from the first signal until this process must be gone; None: no limit.

        Raises:
            UsageError: called twice, or not in the main thread.
            ClosedError
        """
        with self._lock:
            self._writer()
            if self._preemption is not _NOT_PREEMPTED:
                raise UsageError("on_preemption() was called before; read the object that it returned")
            self._preemption = Preemption(signals, deadline_secs)
            if deadline_secs is not None:
                self._arena.wait_no_longer_than(self._preemption.remaining_secs)
            return self._preemption

    def wait_for_staging(self, timeout: float | None = None) -> None:
        """Wait until every snapshot begun so far is taken. Then the state may be changed in any way.

        Raises:
            TimeoutError: a snapshot is not taken within ``timeout`` seconds (None: as long as it takes).
        """
        self._refuse_in_callback("wait_for_staging()")
        self._writer().wait_for_staging(timeout)

    def _refuse_in_callback(self, what: str) -> None:
        if self._lifecycle in (_Lifecycle.OPEN, _Lifecycle.CLOSING) and self._saver.in_callback:
            raise UsageError(
                f"{what} was called in a callback of a save's Future, and would wait for that callback for ever; "
                "let the callback set a flag, and call it from the training loop"
            )

    def _on_done(self, save: Save) -> None:
        """Called in the pool's thread when a save is committed or has failed."""
        report = save.report
        if report.state is SaveState.COMMITTED:
            logger.info("step %d committed after %.2f s", report.step, report.committed_secs or 0.0)
            if self._job.is_coordinator:
                self._retainer.after_commit()
        else:
            logger.error("save of step %d failed", report.step)
        with suppress(OSError):
            self._telemetry.record(report)

    def _writer(self) -> Saver:
        if self._owner != os.getpid():
            raise ClosedError(f"this Checkpointer belongs to process {self._owner}; make a new one in the forked child")
        if not self._is_open:
            raise ClosedError(f"the Checkpointer of {self._directory} {self._lifecycle.value}")
        return self._saver

    @property
    def _is_open(self) -> bool:
        return self._lifecycle is _Lifecycle.OPEN

    # -- retention ----------------------------------------------------------------------------------------------

    def protect(self, step: int) -> None:
        """Keep the checkpoint of ``step``, whatever the rules of ``retention`` say, in this run and in later ones.

        The checkpoint need not exist yet.

        Raises:
            CheckpointNotFoundError: it is being removed right now.
            CorruptCheckpointError: the list of protected steps is damaged.
            StorageError, ClosedError
        """
        self._protect(step, keep=True)

    def unprotect(self, step: int) -> None:
        """Let the rules of ``retention`` decide on ``step`` again, if it was protected. Errors: as of :meth:`protect`."""
        self._protect(step, keep=False)

    def _protect(self, step: int, *, keep: bool) -> None:
        _check_step(step)
        with self._lock:
            self._writer()
            change_protected(self._directory, step, keep=keep)

    def prune(self, *, dry_run: bool = False) -> PruneReport:
        """Apply the rules of ``retention`` now, in a worker, and wait for it. Every commit does so without being asked.

        Args:
            dry_run: only say what would be removed; also with ``read_only=True``.

        Raises:
            CorruptCheckpointError: the list of protected steps is damaged; nothing was removed.
            UsageError: called by a callback of a save's Future.
            StorageError, WorkerError, ClosedError
        """
        self._refuse_in_callback("prune()")
        if dry_run and self._lifecycle is _Lifecycle.READ_ONLY:
            rules = setup.retention_rules(self._config.retention, num_threads=None)
            return prune(self._directory, rules, dry_run=True)
        self._writer()
        return self._retainer.run(dry_run=dry_run)

    def _on_pruned(self, report: PruneReport) -> None:
        self._saver.completion.forget_base({*report.damaged, *report.steps(PruneFate.REMOVED)})

    # -- looking ------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[CheckpointInfo]:
        """List the committed checkpoints, oldest first, by their manifests (data files are not read)."""
        return list_checkpoints(self._directory)[0]

    def latest(self) -> CheckpointInfo | None:
        """Find the newest checkpoint that is committed and valid; None if there is none.

        Each candidate is verified as ``loading.verify`` says. What is skipped is logged, and listed in :attr:`skipped`.
        """
        found = self._together.latest(self._loader.latest)
        self._forget_damaged_base()
        return found

    def _forget_damaged_base(self) -> None:
        """Link nothing to a checkpoint that is known to be damaged."""
        if self._is_open:
            steps = {step for item in self._loader.skipped if (step := parse_checkpoint(item.name)) is not None}
            self._saver.completion.forget_base(steps)

    @property
    def skipped(self) -> list[SkippedCheckpoint]:
        """The checkpoints that the last ``latest()`` or ``load()`` skipped, newest first, and why."""
        return self._loader.skipped

    # -- loading ------------------------------------------------------------------------------------------------

    def load(
        self,
        step: int | None = None,
        into: MutableMapping[str, Any] | None = None,
        strict: bool = True,
        *,
        keys: str | Sequence[str] | None = None,
        allow_pickle: bool | None = None,
    ) -> Loaded | None:
        """Load a checkpoint.

        Args:
            step: which one; None: the newest valid one, falling back to the one before if it is damaged.
            into: restore into these values in place: tensors keep their identity, objects get ``load_state_dict()``.
                None: return a new state.
            strict: keys must match, as in ``nn.Module.load_state_dict``.
            keys: only what has a name like this, or like one of these: keys joined by dots, with ``*`` and ``?``
                (``model.*.weight``). The rest of ``into`` is left alone. A list is taken whole.
            allow_pickle: unpickle any object, which runs code from the checkpoint; None: as configured.

        Where several ranks save together, every rank has to call it to load ``into`` something: all of them load the
        same checkpoint, each what it holds. Without ``into``, or with ``read_only=True``, a rank loads for itself.

        Returns:
            None if ``step`` is None and there is no checkpoint.

        Raises:
            CheckpointNotFoundError: there is no ``step``.
            CorruptCheckpointError: ``step`` is damaged; or, without ``step``, every checkpoint is, or ``into`` is partly
                overwritten from a damaged one, and there is none to overwrite all of that (see ``loading.verify_first``).
            StateMismatchError: it does not fit ``into``; nothing was changed.
            RankFailedError: it failed on another rank; what it was loaded into may be overwritten.
            UnsafePickleError: see ``allow_pickle``; nothing was changed.
            UnloadableError: the bytes are right, and an object cannot be made from them here, or its
                ``load_state_dict()`` raised. No older checkpoint is tried. The cause is the original error.
            StorageError
        """
        if self._is_open:
            self._refuse_in_callback("load()")
            self._saver.wait_for_staging()  # do not overwrite what is being copied
        selection = None if keys is None else Selection(keys)

        def load(step: int | None) -> Loaded | None:
            return self._loader.load(step, into, strict=strict, allow_pickle=allow_pickle, selection=selection)

        loaded = load(step) if into is None else self._together.load(step, load)
        self._forget_damaged_base()
        if self._is_open and loaded is not None:
            if into is not None and loaded.info is not None:  # what was loaded will be saved: about this rank's share
                self._saver.expect(loaded.info.nbytes // self._job.num_ranks)
            if self._loader.knows_whole(loaded.path):
                self._saver.completion.set_base(loaded.step)
        return loaded

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Finish every save that was begun, then stop the workers and free the memory. Idempotent.

        Args:
            timeout: seconds to wait for saves in flight; those not committed by then fail with ClosedError.

        Raises:
            UsageError: called by a callback of a save's Future.
            KeyboardInterrupt: while it waited; what is staged is committed by the workers after this process is gone.
            Exception: the oldest error of a save that nobody has looked at; others follow it as its context.
        """
        self._close(has_failed=False, timeout=timeout)

    def _close(self, has_failed: bool, timeout: float | None = None) -> None:
        if self._owner != os.getpid():
            return
        self._refuse_in_callback("close()")
        with self._lock:
            at_exit.forget(self)
            if not self._is_open:
                self._lifecycle = _Lifecycle.CLOSED
                return
            self._lifecycle = _Lifecycle.CLOSING
            self._together.restore = nothing_to_restore  # load() still works, but nothing is written any more
            # 1. The saves end, and with them the pool. 2. The replicas of what is committed go. 3. Everything else is
            # closed, whatever was raised: the slabs after the workers that read them, the lock after the last write.
            with self._resources:
                deadline_secs = self._preemption.remaining_secs()
                limits = timeout, deadline_secs, self._job.timeout_secs
                with self._replication.closing(limits, has_failed=has_failed):
                    finish_saves(self._saver, self._pool, timeout, deadline_secs)
            self._unread.raise_all()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._close(has_failed=True)
        except Exception:  # the exception that is on its way up comes first, whatever a worker's was
            logger.exception("a save failed as well")

    def _abandon(self) -> None:
        """Close the lock's descriptor in a forked child: otherwise the child would hold the directory."""
        if self._is_open:
            with suppress(OSError):
                os.close(self._lock_fd)


def _check_step(step: int) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step must be an integer of 0 or more, got {step!r}")
