"""The public face: a run's checkpoints.

Start here. Then read ``saving/pipeline.py`` (what it takes to save) and ``saving/saver.py`` (one save, end to end);
``snapshot/`` and ``arena/``; ``loading/`` for the way back; ``ranks/`` for several processes that make one checkpoint;
``replication/`` for processes that keep copies of each other's snapshots. ``workers/`` is what the worker processes run
(``workers/pool/pool.py`` has the diagram).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, SupportsIndex

from torch.profiler import record_function

from stager.base_checkpointer import BaseCheckpointer
from stager.config import StagerConfig, arguments
from stager.config.calls import explained
from stager.exporting.weights_export import WeightsExport
from stager.loading.joint_loader import JointLoader, nothing_to_restore
from stager.loading.loaded import Loaded
from stager.loading.loader import Loader
from stager.loading.place import place_of
from stager.loading.renaming import Renaming
from stager.loading.selection import Selection
from stager.saving import setup
from stager.saving.open_here import weakly
from stager.saving.open_run import OpenRun
from stager.saving.retainer import change_protected
from stager.saving.save import SaveHandle
from stager.saving.sidecars import File
from stager.state.stateful import Stateful
from stager.telemetry.event import Event, FellBackEvent
from stager.workers.checkpoint.directory.run_directory import CheckpointInfo, SkippedCheckpoint, require_run_directory
from stager.workers.checkpoint.maintenance.retention import PruneReport, prune
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.places import storage_of
from stager.workers.errors import UsageError

logger = logging.getLogger("stager")


class Checkpointer(BaseCheckpointer[OpenRun]):
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
        self._directory = place_path(directory)
        self._place = place_of(self._directory, read_only=read_only)
        super().__init__(f"the Checkpointer of {self._directory}", config, read_only=read_only, on_event=on_event)
        self._loader = Loader(self._place, self._config.loading, self._group.own_rank)
        self._together = JointLoader(self._group, self._loader)
        if not read_only:
            on_closed = weakly(self._become_closed)
            run = OpenRun(self._directory, self._config, self._group, self._listeners, on_closed)
            self._together.restore = run.replication.restore
            self._belongs_here(run)
        elif not storage_of(self._directory).has_directory(self._directory):
            logger.warning("%s does not exist, so no checkpoint is found there", self._directory)

    # -- saving -------------------------------------------------------------------------------------------------

    @explained("save(100, state)")
    def save(
        self,
        step: SupportsIndex,
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, File] | None = None,
        export: WeightsExport | None = None,
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
            files: small files that belong to the checkpoint, by their names: bytes, or the path of a file to copy. They are
                read before this returns, committed and hashed with the rest, and lie beside it in the directory. Of several
                ranks, those of rank 0 are kept. None: no files.
            export: when the checkpoint is committed, a worker process of its own exports weights from it, one export after
                the other: ``WeightsExport("gpt-hf-{step}", keys="model", strip_prefix="model.")``. The handle's
                ``export_completion`` is its Future. An export that fails is logged, and the save has succeeded. Of several
                ranks, rank 0 has it made. Until it is made, the checkpoint is not removed. None: no export.

        Raises:
            UnstageableError: a value cannot be saved; names its key path.
            MemoryBudgetError, ArenaFullError: see ``arena`` in the configuration.
            ArgumentError: ``step``, ``state``, ``metrics``, ``files`` or ``export`` cannot be meant.
            StorageError: one of ``files`` cannot be read, or there is no room; or the directory in which the weights are to
                lie does not exist.
            UsageError: called by a listener, or by a callback of a save's Future; or something is in the way of the export.
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
            return SaveHandle(self._opened().save_step(number, state, numbers, {} if files is None else files, export))

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
        """Remove the checkpoint of ``step``, in a worker, and wait for it.

        A save of this step that is in flight is cancelled: its ``upload_completion`` is, and it does not appear later.
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
            report = self._opened().delete_step(number)
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
        if dry_run and (in_listener or self._is_read_only):
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
        damaged = {one.step: one for one in self._loader.skipped if one.step is not None}
        if self._is_open:
            self._run.saver.completion.forget_base(self._directory, {one.name for one in damaged.values()})
        if damaged:
            self._listeners.post(lambda: FellBackEvent(step=taken, skipped=tuple(damaged.values())))

    def _fell_back(self, passed_over: list[SkippedCheckpoint], taken: int) -> None:
        """Note and tell what was passed over by an integration that chooses checkpoints itself.

        Args:
            passed_over: newest first.
            taken: the step that was loaded in its place.
        """
        self._loader.note_passed_over(passed_over)
        self._after_looking(taken)

    def _restores_from_replicas(self, step: int) -> bool:
        """Restore the checkpoint of a damaged step, or a newer one, once. Every rank calls it. Returns whether it did."""
        return self._together.restores(step)

    def _forget_replicas(self, step: int) -> None:
        """Let no later run restore a step from replicas: an integration gives its name to something else."""
        with self._lock:
            self._opened().replication.replicator.forget(step)

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
                self._run.saver.completion.set_base(*os.path.split(loaded.path))
        return loaded

    # -- the end ------------------------------------------------------------------------------------------------

    def _before_end(self) -> None:
        self._together.restore = nothing_to_restore  # load() still works, but nothing is written any more
