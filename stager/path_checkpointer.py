"""Checkpoints anywhere, by their paths: for programs that name them themselves, as most frameworks do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any, SupportsIndex

from torch.profiler import record_function

from stager.base_checkpointer import BaseCheckpointer
from stager.config import StagerConfig, arguments
from stager.config.calls import explained
from stager.exporting.weights_export import WeightsExport
from stager.loading.foreign import load_checkpoint
from stager.loading.joint_loader import JointLoader
from stager.loading.loaded import Loaded
from stager.loading.loader import Loader
from stager.loading.place import OneCheckpoint
from stager.loading.renaming import Renaming
from stager.loading.selection import Selection
from stager.saving.deletions import Deletions
from stager.saving.destination import Destination
from stager.saving.open_here import weakly
from stager.saving.pipeline import Pipeline
from stager.saving.save import Save, SaveHandle
from stager.saving.sidecars import File
from stager.state.stateful import Stateful
from stager.telemetry.event import Event
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.checkpoint.documents.names import check_name, number_in
from stager.workers.checkpoint.maintenance.retention import PruneReport
from stager.workers.checkpoint.storage.paths import place_path
from stager.workers.checkpoint.storage.places import is_url, resolved
from stager.workers.errors import ArgumentError, ConfigError, UsageError


class PathCheckpointer(BaseCheckpointer[Pipeline]):
    """Saves checkpoints to paths, loads them from there, and deletes them.

    Workers and memory are shared by all of them. What decides over the checkpoints of a run is left to the caller: there is
    no retention, no "newest", and no falling back to an older one. A path is a directory that appears when all of it is
    committed, and is a checkpoint like any other: ``stager.load_checkpoint()``, ``stager verify`` and ``dcp.load`` read it.

    The directory that a checkpoint lies in is locked from the first save there until :meth:`close`. What an earlier process
    left unfinished there is then committed or removed.

    Args:
        config: path of a YAML file, a mapping, a :class:`~stager.config.StagerConfig`, or None for the defaults.
        on_event: a first listener, see :meth:`listen`; None: none.

    Raises:
        ConfigError: the configuration is wrong, or has rules for ``retention``, or ``replication``.
        WorkerStartError: no worker process can be started.

    Thread safety: as of :class:`stager.Checkpointer`. Where several ranks save together, every rank calls ``save()`` and
    ``load()`` with the same paths, in the same order, and ``recover()`` with the same directories.
    """

    @explained("PathCheckpointer()")
    def __init__(
        self,
        config: str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None = None,
        *,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        super().__init__("the PathCheckpointer", config, read_only=False, on_event=on_event)
        refuse_rules(self._config)
        self._num_tries = 0  # loads of several ranks
        self._deletions = Deletions()
        self._belongs_here(Pipeline(self._config, self._group, self._listeners, weakly(self._become_closed)))

    @explained('save("out/checkpoint-100", state)')
    def save(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        *,
        step: SupportsIndex | None = None,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, File] | None = None,
        export: WeightsExport | None = None,
    ) -> SaveHandle:
        """Take a snapshot of ``state`` and let the workers write it as the checkpoint at ``path``.

        Returns when the snapshot is whole, or, for tensors of guarded optimizers, when it is safe to go on. A checkpoint
        that is at ``path`` is replaced when the new one is committed.

        Args:
            path: of the checkpoint's directory. The directory that it lies in is made if it does not exist.
            step: the training step, for ``CheckpointInfo.step``; None: the last number in the path's name, or 0.
            state, metrics, files, export: as of :meth:`stager.Checkpointer.save`.

        Raises:
            ArgumentError: ``path`` cannot be that of a checkpoint.
            DirectoryInUseError: another run saves into the directory that ``path`` lies in.
            Exception: as :meth:`stager.Checkpointer.save`.
        """
        directory, name = _split(path)
        arguments.check_state(state, "save(path, {example})")
        number = (number_in(name) or 0) if step is None else arguments.as_step(step)
        numbers = {} if metrics is None else arguments.as_metrics(metrics)
        self._refuse_in_callback("save()")
        self._deletions.wait(Destination.path_of(directory, name))
        with self._lock, record_function("stager: save"):
            run = self._opened()
            destination = Destination(directory, name, run.directories.take(directory))
            return SaveHandle(run.save(number, destination, state, numbers, {} if files is None else files, export))

    @explained('load("out/checkpoint-100", into=state)')
    def load(
        self,
        path: str | os.PathLike[str],
        into: MutableMapping[str, Any] | Stateful | None = None,
        strict: bool = True,
        *,
        keys: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        strip_prefix: str | None = None,
        allow_pickle: bool | None = None,
    ) -> Loaded[Any]:
        """Load the checkpoint at ``path``. A save to it that is in flight is waited for.

        What :func:`stager.load_checkpoint` reads, this reads, too: also checkpoints of ``dcp.save``, ``torch.save`` and
        safetensors. Where several ranks save together, every rank has to call it to load ``into`` something.

        Args:
            path: of the checkpoint.
            into, strict, keys, rename, strip_prefix, allow_pickle: as of :meth:`stager.Checkpointer.load`.

        Raises:
            CheckpointNotFoundError: there is no checkpoint at ``path``.
            Exception: as :meth:`stager.Checkpointer.load`.
        """
        arguments.check_into(into)
        found = _absolute(path)
        if self._is_open:
            self._refuse_in_callback("load()")
            self._opened().saver.wait_for_saves(self._in_flight(found))
            if into is not None:
                self._run.saver.wait_for_staging()  # do not overwrite what is being copied
        if into is None or self._group.is_alone or not has_own_manifest(found):
            allowed = self._config.loading.allow_pickle if allow_pickle is None else allow_pickle
            options: dict[str, Any] = {"keys": keys, "rename": rename, "strip_prefix": strip_prefix}
            options["safe_globals"] = self._config.loading.safe_globals
            return load_checkpoint(found, into, strict=strict, allow_pickle=allowed, **options)
        selection = None if keys is None else Selection(keys)
        renaming = Renaming.of_arguments(rename, strip_prefix)
        place = OneCheckpoint(found)
        loader = Loader(place, self._config.loading, self._group.own_rank)
        together = JointLoader(self._group, loader, self._num_tries)

        def load_here(step: int | None) -> Loaded | None:
            options: dict[str, Any] = {"selection": selection, "renaming": renaming, "other_ranks": together}
            return loader.load(step, into, strict=strict, allow_pickle=allow_pickle, **options)

        try:
            loaded = together.load(place.steps()[0], load_here)
        finally:
            self._num_tries = together.num_tries
        assert loaded is not None  # a step was given
        return loaded

    @explained('delete("out/checkpoint-100")')
    def delete(self, path: str | os.PathLike[str]) -> PruneReport:
        """Remove the checkpoint at ``path``, in a worker, and wait for it.

        A save to it that is in flight is cancelled: its ``upload_completion`` is, and it does not appear later. Where
        several ranks save together, any rank may call it, or each. Other threads may save meanwhile; a save to this path
        waits until it is deleted, and so does ``close()``.

        Returns:
            The verdict on this checkpoint, and the bytes that were freed.

        Raises:
            CheckpointNotFoundError: there is no checkpoint at ``path``, and no other rank that could have removed it.
            StorageError: it is being read, or cannot be removed.
            UsageError: called by a listener, or by a callback of a save's Future.
            WorkerError, ClosedError
        """
        directory, name = _split(path)
        self._refuse_in_callback("delete()")
        with ExitStack() as in_flight:
            with self._lock:
                run = self._opened()
                in_flight.enter_context(self._deletions.of(Destination.path_of(directory, name)))
            # Without the lock: removing many gigabytes takes seconds.
            return run.delete(directory, name, number_in(name) or 0)

    @explained('recover("out")')
    def recover(self, directory: str | os.PathLike[str]) -> None:
        """Lock a directory now, and finish or remove what an earlier process left unfinished there.

        The first save there does so otherwise. Call it before you look for the newest checkpoint: a process that was killed
        leaves workers who still commit its last one. Waits for them for ``persistence.lock_timeout_secs`` at most.

        Args:
            directory: in which checkpoints lie. It is made if it does not exist.

        Raises:
            DirectoryInUseError: another run saves there.
            UsageError: ``directory`` is a checkpoint; or called by a listener, or by a callback of a save's Future.
            StorageError: it cannot be made, read or locked.
            ClosedError
        """
        found = resolved(place_path(directory, "directory"))
        self._refuse_in_callback("recover()")
        if has_own_manifest(found):
            raise UsageError(
                f"{found} is a checkpoint; call recover({os.path.dirname(found)!r}), with the directory that it lies in"
            )
        with self._lock:
            self._opened().directories.take(found)

    def wait_for(self, path: str | os.PathLike[str]) -> None:
        """Wait until every save to ``path`` has ended, committed or not. Errors stay unread in their Futures.

        Raises:
            UsageError: called by a listener, or by a callback of a save's Future.
        """
        found = _absolute(path)
        self._refuse_in_callback("wait_for()")
        if self._is_open:
            self._opened().saver.wait_for_saves(self._in_flight(found))

    def _before_end(self) -> None:
        self._deletions.wait()

    def _in_flight(self, path: str) -> list[Save]:
        if not self._is_open or self._owner != os.getpid():  # in a forked child, nothing resolves their Futures
            return []
        return [save for save in self._run.saver.completion.in_flight() if save.destination.path == path]


def _split(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the directory that a checkpoint lies in, absolute, and the name of its own."""
    found = _absolute(path)
    directory, name = os.path.split(found)
    try:
        check_name(name)
    except ValueError as error:
        raise ArgumentError(f"path is {found}, and no checkpoint can have the name {name!r}: {error}") from error
    return directory, name


def _absolute(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a checkpoint; the directory that it lies in without links, as it has several paths."""
    found = place_path(path, "path")
    if is_url(found) and found.count("/") == 2:
        raise ArgumentError(f"path is {found}, a bucket; name a checkpoint in it, as in {found}/last")
    directory, name = os.path.split(found)
    return os.path.join(resolved(directory), name)


def refuse_rules(config: StagerConfig) -> None:
    """Raise a ConfigError if the configuration has what only a Checkpointer does: ``retention``, ``replication``."""
    if config.replication.partners:
        raise ConfigError(
            "replication.partners is 1, and a PathCheckpointer keeps no replicas; set it to 0, or use a Checkpointer"
        )
    if not config.retention.has_rules:
        return
    raise ConfigError(
        "retention has rules, and a PathCheckpointer removes nothing by itself; take them out and call delete(path), or use "
        "a Checkpointer"
    )
