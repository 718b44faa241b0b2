"""The public face: a run's checkpoints.

Start here. Then read ``saving/open_run.py`` (what it takes to save) and ``saving/saver.py`` (one save, end to end);
``snapshot/`` and ``arena/``; ``loading/`` for the way back; ``ranks/`` for several processes that make one checkpoint;
``replication/`` for processes that keep copies of each other's snapshots. ``workers/`` is what the worker processes run
(``workers/pool/pool.py`` has the diagram).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from enum import Enum
from types import TracebackType
from typing import Any, SupportsIndex

from torch.optim import Optimizer
from torch.profiler import record_function

from stager.config import StagerConfig, arguments, load_config
from stager.config.calls import explained
from stager.loading.joint_loader import JointLoader, nothing_to_restore
from stager.loading.loaded import Loaded
from stager.loading.loader import Loader
from stager.loading.place import place_of
from stager.loading.renaming import Renaming
from stager.loading.selection import Selection
from stager.ranks.rank_group import find_rank_group
from stager.saving import at_exit, setup
from stager.saving.open_here import weakly
from stager.saving.open_run import OpenRun
from stager.saving.preemption import Preemption
from stager.saving.retainer import change_protected
from stager.saving.save import SaveHandle
from stager.state.stateful import Stateful
from stager.telemetry.event import Event, FellBackEvent
from stager.telemetry.listeners import Listeners
from stager.workers.checkpoint.directory.paths import local_path
from stager.workers.checkpoint.directory.run_directory import (
    CheckpointInfo,
    SkippedCheckpoint,
    parse_checkpoint,
    require_run_directory,
)
from stager.workers.checkpoint.maintenance.retention import PruneReport, prune
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


_LOOK_SECS = 0.05  # so often who waits for the lock looks whether the Checkpointer is being closed


class Checkpointer:
    """Saves and loads the checkpoints of one run, in one directory.

    Args:
        directory: where the checkpoints are. It is created if it does not exist. ``~`` and ``$VAR`` are expanded.
        config: path of a YAML file, a mapping, a :class:`~stager.config.StagerConfig`, or None for the defaults.
        read_only: only load: start no workers, take no lock, change nothing. ``directory`` may then be one checkpoint.
        on_event: a first listener, see :meth:`listen`; None: none.

    Raises:
        ConfigError: the configuration is wrong.
        ArgumentError: ``directory`` is no path here: a URL, for example.
        UsageError: ``directory`` is one checkpoint, not a run.
        DirectoryInUseError: another run writes there, or another Checkpointer of this process.
        StorageError: the directory cannot be made or read.
        WorkerStartError: no worker process can be started.

    Thread safety: ``save()`` and the other methods may be called from any thread, one at a time (a lock enforces it); the
    Futures may be awaited anywhere. After ``fork()`` the child cannot use it.
    """

    @explained('Checkpointer("runs/gpt")')
    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None = None,
        *,
        read_only: bool = False,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        self._config = load_config(config)
        self._directory = local_path(directory)
        self._place = place_of(self._directory, read_only=read_only)
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._lifecycle = _Lifecycle.READ_ONLY if read_only else _Lifecycle.OPEN
        self._listeners = Listeners()
        if on_event is not None:
            self._listeners.add(on_event)
        ranks = self._config.ranks
        self._group = find_rank_group(False if read_only else ranks.together, ranks.timeout_secs)
        self._loader = Loader(self._place, self._config.loading, self._group.own_rank)
        self._together = JointLoader(self._group, self._directory, self._loader)
        if not read_only:
            on_closed = weakly(self._become_closed)
            self._run = OpenRun(self._directory, self._config, self._group, self._listeners, on_closed)
            self._run.belongs_to(self)
            self._together.restore = self._run.replication.restore
            at_exit.watch(self, self._close, self._abandon)
        elif not os.path.lexists(self._directory):
            logger.warning("%s does not exist, so no checkpoint is found there", self._directory)

    # -- saving -------------------------------------------------------------------------------------------------

    @explained("save(100, state)")
    def save(
        self, step: SupportsIndex, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Take a snapshot of ``state`` and let the workers write it as the checkpoint of ``step``.

        Returns when the snapshot is whole, or, for tensors of guarded optimizers, when it is safe to go on.
        A checkpoint of the same step is replaced when the new one is committed.

        Args:
            step: the training step, 0 or more: an int, an integer of numpy's, or an integer tensor without dimensions.
            state: names to tensors, nested containers, objects with ``state_dict()`` and ``load_state_dict()``, or
                anything that can be pickled.
            metrics: numbers that describe the checkpoint: for ``retention.keep_best``, ``CheckpointInfo.metrics``, and
                ``stager ls``. Of several ranks, those of rank 0 are kept. None: no metrics.

        Raises:
            UnstageableError: a value cannot be saved; names its key path.
            MemoryBudgetError, ArenaFullError: see ``arena`` in the configuration.
            ArgumentError: ``step``, ``state`` or ``metrics`` cannot be meant.
            UsageError: called by a listener, or by a callback of a save's Future.
            ClosedError
            Exception: the error of an earlier save that nobody has read. The save that was asked for is begun all the same.

        ``persistence.on_save_error`` and ``tolerate_failures`` say whether a failed save raises. Where it does not, this
        returns the handle of the failed save.
        """
        arguments.check_save(step, state)
        number = arguments.as_step(step)
        numbers = {} if metrics is None else arguments.as_metrics(metrics)
        self._refuse_in_callback("save()")
        with self._lock, record_function("stager: save"):
            return SaveHandle(self._opened().save(number, state, numbers))

    def listen(self, listener: Callable[[Event], object]) -> Callable[[], None]:
        """Call ``listener`` with every event from now on, in the order in which they happen, in a thread of its own.

        Whatever a listener does changes no save: an error in it is logged, and one that hangs holds up nothing, except that
        ``close()`` waits for it for up to ``telemetry.listen_timeout_secs``. It may look at checkpoints and load them.

        Args:
            listener: gets an object of a subclass of ``stager.Event``: ``CommittedEvent`` and so on.

        Returns:
            A function that ends it. Events that are not delivered by then are dropped.

        Raises:
            ClosedError
        """
        if self._lifecycle is _Lifecycle.CLOSED:
            raise ClosedError(f"the Checkpointer of {self._directory} {self._lifecycle.value}")
        return self._listeners.add(listener)

    def guard(self, *optimizers: Optimizer | Iterable[Optimizer]) -> None:
        """Copy the parameters and state of these optimizers while training goes on.

        ``save()`` then returns before these tensors are copied, and the optimizers' ``step()`` waits for the copy. Do not
        write to these tensors in any other way between ``save()`` and the next ``step()``, unless you call
        ``wait_for_staging()`` first. Memory for a snapshot of them is allocated in the background from here on.

        Args:
            optimizers: one or several, each by itself or in a list.

        Raises:
            ArgumentError: something else than an optimizer; none is guarded then.
            ClosedError
        """
        with self._exclusively() as run:
            run.saver.guard.add(*arguments.each_of(optimizers))
            run.saver.memory.expect_what_is_guarded()

    @explained("warmup(state)")
    def warmup(self, state: Mapping[str, Any]) -> None:
        """Do now what the first save of such a state would have to do: plan, allocate, start workers. Waits for it."""
        arguments.check_state(state, "warmup({example})")
        self._refuse_in_callback("warmup()")
        with self._lock:
            self._opened().saver.warm_up(state)

    @explained("on_preemption(signal.SIGTERM, deadline_secs=60)")
    def on_preemption(
        self, signals: Iterable[int] | int = (signal.SIGTERM, signal.SIGUSR1), deadline_secs: float | None = None
    ) -> Preemption:
        """Treat these signals as a warning that this process will be killed soon.

        ``requested`` of the returned object becomes true when a signal comes. Read it in the training loop, save once more,
        and close. ``close()`` waits for commits until ``deadline_secs`` after the signal. The workers commit what is only
        staged by then, after this process is gone. A ``save()`` that still waits for a buffer at the deadline raises
        ArenaFullError. ``close()`` restores the earlier signal handlers.

        Args:
            signals: one or several; their earlier handlers are called as well; their default actions are not taken.
            deadline_secs: seconds from the first signal until this process must be gone; None: no limit.

        Raises:
            ArgumentError: a signal that no process can handle, or a deadline below 0.
            UsageError: called twice, or not in the main thread.
            ClosedError
        """
        with self._lock:
            return self._opened().expect_preemption(signals, deadline_secs)

    def wait_for_staging(self, timeout: float | None = None) -> None:
        """Wait until every snapshot begun so far is taken. Then the state may be changed in any way.

        Raises:
            TimeoutError: a snapshot is not taken within ``timeout`` seconds (None: as long as it takes).
            ArgumentError: ``timeout`` is no number of seconds.
        """
        arguments.check_secs(timeout)
        self._refuse_in_callback("wait_for_staging()")
        self._opened().saver.wait_for_staging(timeout)

    def _refuse_in_callback(self, what: str) -> None:
        if self._listeners.is_current:
            raise UsageError(
                f"{what} was called by a listener, and close() would wait for both; set a flag in the listener, and call "
                f"{what} from the training loop when it is set"
            )
        if self._lifecycle in (_Lifecycle.OPEN, _Lifecycle.CLOSING) and self._run.saver.in_callback:
            raise UsageError(
                f"{what} was called in a callback of a save's Future, and would wait for that callback for ever; "
                f"set a flag in the callback, and call {what} from the training loop when it is set"
                + (" (or look with latest(), or read with stager.load_checkpoint())" if what == "load()" else "")
            )

    def _opened(self) -> OpenRun:
        if self._owner != os.getpid():
            raise ClosedError(f"this Checkpointer belongs to process {self._owner}; make a new one in the forked child")
        if not self._is_open:
            advice = (
                "make one without it to change the run" if self._lifecycle is _Lifecycle.READ_ONLY else "make a new one"
            )
            raise ClosedError(f"the Checkpointer of {self._directory} {self._lifecycle.value}; {advice}")
        return self._run

    @contextmanager
    def _exclusively(self) -> Iterator[OpenRun]:
        """Hold the lock, for what a listener may do, too: close() holds it while it waits for the listeners.

        Raises:
            ClosedError: it is closed, or is being closed.
        """
        self._opened()
        while not self._lock.acquire(timeout=_LOOK_SECS):
            self._opened()
        try:
            yield self._opened()
        finally:
            self._lock.release()

    @property
    def _is_open(self) -> bool:
        return self._lifecycle is _Lifecycle.OPEN

    # -- retention ----------------------------------------------------------------------------------------------

    @explained("protect(100)")
    def protect(self, step: SupportsIndex) -> None:
        """Keep the checkpoint of ``step``, whatever the rules of ``retention`` say, in this run and in later ones.

        The checkpoint need not exist yet.

        Raises:
            CheckpointNotFoundError: it is being removed right now.
            CorruptCheckpointError: the list of protected steps is damaged.
            StorageError, ClosedError
        """
        self._protect(step, keep=True)

    @explained("unprotect(100)")
    def unprotect(self, step: SupportsIndex) -> None:
        """Let the rules of ``retention`` decide on ``step`` again, if it was protected. Errors: as of :meth:`protect`."""
        self._protect(step, keep=False)

    def _protect(self, step: SupportsIndex, *, keep: bool) -> None:
        number = arguments.as_step(step)
        with self._exclusively():
            change_protected(self._directory, number, keep=keep)

    @explained("delete(100)")
    def delete(self, step: SupportsIndex) -> PruneReport:
        """Remove the checkpoint of ``step``, in a worker, and wait for it. Saves of this step that are in flight end first.

        Checkpoints that share files with it (incremental saves) stay whole. Where several ranks save together, any rank may
        call it, or each: then the first one removes it, and the others find nothing to do.

        Returns:
            The verdict on this checkpoint, and the bytes that were freed.

        Raises:
            UsageError: it is protected; or called by a listener, or by a callback of a save's Future.
            CheckpointNotFoundError: there is no such checkpoint, and no other rank that could have removed it.
            StorageError: it is being read, or cannot be removed.
            WorkerError, ClosedError
        """
        number = arguments.as_step(step)
        self._refuse_in_callback("delete()")
        with self._lock:
            report = self._opened().delete(number)
            self._together.deleted(number)
            return report

    @explained("prune(dry_run=True)")
    def prune(self, *, dry_run: bool = False) -> PruneReport:
        """Apply the rules of ``retention`` now, in a worker, and wait for it. Every commit does so without being asked.

        Args:
            dry_run: only say what would be removed; also with ``read_only=True``, and in a listener.

        Raises:
            CorruptCheckpointError: the list of protected steps is damaged; nothing was removed.
            UsageError: called by a listener without ``dry_run``, or by a callback of a save's Future.
            StorageError, WorkerError, ClosedError
        """
        in_listener = self._listeners.is_current
        if not (dry_run and in_listener):
            self._refuse_in_callback("prune()")
        if dry_run and (in_listener or self._lifecycle is _Lifecycle.READ_ONLY):
            require_run_directory(self._directory)
            rules = setup.retention_rules(self._config.retention, num_threads=None)
            return prune(self._directory, rules, dry_run=True)
        return self._opened().retainer.run(dry_run=dry_run)

    # -- looking ------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[CheckpointInfo]:
        """List the committed checkpoints, oldest first, by their manifests (data files are not read)."""
        return self._place.listed()[0]

    def latest(self, *, wait: bool = True) -> CheckpointInfo | None:
        """Find the newest checkpoint that is committed and valid; None if there is none.

        Each candidate is verified as ``loading.verify`` says. What is skipped is logged, and listed in :attr:`skipped`.

        Args:
            wait: first wait for the saves in flight of this Checkpointer, as :meth:`load` does. A listener, and a callback
                of a save's Future, look at once: the saves would wait for the callback.

        Raises:
            StorageError
        """
        if wait and self._is_open and not (self._run.saver.in_callback or self._listeners.is_current):
            self._wait_for_saves()
        found = self._together.latest(self._loader.latest)
        self._after_looking(None if found is None else found.step)
        return found

    def latest_step(self, *, wait: bool = True) -> int | None:
        """Return the step of the checkpoint that :meth:`latest` finds, and ``load()`` would load; None if there is none."""
        found = self.latest(wait=wait)
        return None if found is None else found.step

    def _wait_for_saves(self) -> None:
        """Wait until the saves of this Checkpointer have ended, so that what was saved before is found."""
        if self._owner == os.getpid():  # in a forked child, nothing resolves their Futures
            self._run.saver.wait_for_saves()

    def _after_looking(self, taken: int | None) -> None:
        """Link nothing to a checkpoint that is known to be damaged, and tell that it was passed over.

        Args:
            taken: the step that was found in its place.
        """
        damaged = {step: one for one in self._loader.skipped if (step := parse_checkpoint(one.name)) is not None}
        if self._is_open:
            self._run.saver.completion.forget_base(damaged)
        if damaged:
            self._listeners.post(lambda: FellBackEvent(step=taken, skipped=tuple(damaged.values())))

    @property
    def skipped(self) -> list[SkippedCheckpoint]:
        """The checkpoints that the last ``latest()`` or ``load()`` skipped, newest first, and why."""
        return self._loader.skipped

    # -- loading ------------------------------------------------------------------------------------------------

    @explained("load(into=state)")
    def load(
        self,
        step: SupportsIndex | CheckpointInfo | str | os.PathLike[str] | MutableMapping[str, Any] | None = None,
        into: MutableMapping[str, Any] | Stateful | None = None,
        strict: bool = True,
        *,
        keys: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        strip_prefix: str | None = None,
        allow_pickle: bool | None = None,
        wait: bool = True,
    ) -> Loaded | None:
        """Load a checkpoint.

        Args:
            step: which one; None: the newest valid one, falling back to the one before if it is damaged. A checkpoint of
                this run may also be named by its path or its CheckpointInfo. ``load(state)`` means ``load(into=state)``.
            into: restore into these values in place: tensors keep their identity, objects get ``load_state_dict()``, plain
                containers become what the checkpoint has. Or one object, if the checkpoint has exactly one value that fits.
                None: return a new state.
            strict: the names at the top, those of modules, and the shapes and dtypes of tensors must match. If False, what
                matches is restored; ``Loaded.missing`` and ``Loaded.unexpected`` name the rest. If nothing of a name fits,
                it is an error in any case.
            keys: only what has a name like this, or like one of these, and all that is in it: keys joined by dots, with
                ``*`` and ``?`` (``model``, ``model.*.weight``). The rest of ``into`` is left alone. A list is taken whole.
                Each has to match something.
            rename: names of the checkpoint to names of ``into``, as a mapping or a function: ``{"model.head": "model.fc"}``.
            strip_prefix: what keys of the checkpoint lose if they begin with it: ``"module."``. If only the keys of ``into``
                have it, the checkpoint's get it. ``keys`` sees the new names.
            allow_pickle: unpickle any object, which runs code from the checkpoint; None: as configured.
            wait: first wait for the saves in flight of this Checkpointer, so that what was saved last is what is loaded.
                With ``wait=False``, a checkpoint that is not committed yet is not there. A listener does not wait.

        Where several ranks save together, every rank has to call it to load ``into`` something: all of them load the
        same checkpoint, each what it holds. Without ``into``, or with ``read_only=True``, a rank loads for itself.

        Returns:
            None if ``step`` is None and there is no checkpoint.

        Raises:
            ArgumentError: ``step`` or ``into`` cannot be meant.
            UsageError: called by a callback of a save's Future; or ``into`` is given, by a listener, and several ranks save
                together.
            CheckpointNotFoundError: there is no ``step``; says which there are.
            CorruptCheckpointError: ``step`` is damaged; or, without ``step``, every checkpoint is, or ``into`` is partly
                overwritten from a damaged one, and there is none to overwrite all of that (see ``loading.verify_first``).
            StateMismatchError: it does not fit ``into``, or a pattern of ``keys`` matches nothing; nothing was changed.
            RankFailedError: it failed on another rank, which is named; says if nothing was changed on any rank.
            UnsafePickleError: see ``allow_pickle``; nothing was changed.
            UnloadableError: the bytes are right, and an object cannot be made from them here, or its
                ``load_state_dict()`` raised. No older checkpoint is tried. The cause is the original error.
            StorageError
        """
        in_listener = self._listeners.is_current
        try:
            number, into = arguments.load_arguments(step, into, self._directory)
            selection = None if keys is None else Selection(keys)
            renaming = Renaming.of_arguments(rename, strip_prefix)
        except UsageError as error:
            if into is not None and not in_listener:
                self._together.refuse(error)  # the other ranks must not wait for this one
            raise
        if in_listener and into is not None and not self._group.is_alone:
            raise UsageError(
                "load(into=...) was called by a listener; where several ranks save together, all of them load together, and "
                "listeners run at other times on each: call load() without into, or let the training loop call it"
            )
        is_open = self._is_open and self._owner == os.getpid()  # a forked child loads as a closed one does
        if is_open:
            if not in_listener:
                self._refuse_in_callback("load()")
                if wait:
                    self._wait_for_saves()
            if into is not None:
                self._run.saver.wait_for_staging()  # do not overwrite what is being copied

        def load(step: int | None) -> Loaded | None:
            return self._loader.load(
                step,
                into,
                strict=strict,
                allow_pickle=allow_pickle,
                selection=selection,
                renaming=renaming,
                other_ranks=self._together,
            )

        loaded = load(number) if into is None else self._together.load(number, load)
        self._after_looking(None if loaded is None else loaded.step)
        if number is None and not is_open:  # opening for saving has told it, and what is there now is this run's
            self._loader.tell_of_unfinished(None if loaded is None else loaded.step)
        if is_open and loaded is not None:
            if into is not None and loaded.info is not None:  # what was loaded will be saved: about this rank's share
                self._run.saver.memory.expect_loaded(loaded.info.nbytes)
            if self._loader.knows_whole(loaded.path):
                self._run.saver.completion.set_base(loaded.step)
        return loaded

    # -- the end ------------------------------------------------------------------------------------------------

    @explained("close(timeout=60)")
    def close(self, timeout: float | None = None) -> None:
        """Finish every save that was begun, then stop the workers and free the memory. Idempotent.

        The listeners get the events that are still queued, for which it waits ``telemetry.listen_timeout_secs`` at most.

        Args:
            timeout: seconds to wait for saves in flight; those not committed by then fail with ClosedError.

        Raises:
            ArgumentError: ``timeout`` is no number of seconds; nothing was closed.
            UsageError: called by a listener, or by a callback of a save's Future.
            KeyboardInterrupt: while it waited; what is staged is committed by the workers after this process is gone.
            Exception: the oldest error of a save that nobody has looked at, unless ``persistence.on_save_error`` says
                otherwise; others follow it as its context.
        """
        arguments.check_secs(timeout)
        self._close(has_failed=False, timeout=timeout)

    def _close(self, has_failed: bool, timeout: float | None = None) -> None:
        if self._owner != os.getpid():
            return
        self._refuse_in_callback("close()")  # before the lock, which close() holds while it waits for a listener
        with self._lock:
            at_exit.forget(self)
            if not self._is_open:
                if self._lifecycle is _Lifecycle.READ_ONLY:
                    self._listeners.close(self._config.telemetry.listen_timeout_secs)
                self._lifecycle = _Lifecycle.CLOSED
                return
            self._lifecycle = _Lifecycle.CLOSING
            self._together.restore = nothing_to_restore  # load() still works, but nothing is written any more
            self._run.finish(timeout, has_failed=has_failed)

    def _become_closed(self) -> None:
        self._lifecycle = _Lifecycle.CLOSED

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
        if self._is_open:
            self._run.abandon()
