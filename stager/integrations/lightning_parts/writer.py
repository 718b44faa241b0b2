"""The ``PathCheckpointer`` behind a CheckpointIO or a strategy: opened when something is saved, closed after each fit."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from stager import CheckpointNotFoundError, Event, PathCheckpointer, SaveHandle, SaveState, StagerConfig, StorageError
from stager.integrations.lightning_parts.removals import Removals
from stager.path_checkpointer import refuse_rules
from stager.saving.sidecars import File
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.checkpoint.documents.names import number_in
from stager.workers.checkpoint.maintenance.retention import remove as remove_here
from stager.workers.checkpoint.storage.paths import local_path

logger = logging.getLogger("stager")

_OF_SLURM = "hpc_ckpt_"  # what Lightning saves when Slurm is about to end the job, right before it asks for a new one


_writers: WeakSet[CheckpointWriter] = WeakSet()  # of this process

_FAILING_SECS = 60.0  # a rank that fails waits so long for the others' parts of a save: they may have failed before


class CheckpointWriter:
    """Saves and removes checkpoints of one trainer, by their paths. Usable again after :meth:`close`.

    Args:
        config: with ``ranks.together`` as the strategy needs it.
        on_event: gets every event; None: nobody does.

    Raises:
        ConfigError: the configuration has rules that a ``PathCheckpointer`` refuses.
    """

    def __init__(self, config: StagerConfig, on_event: Callable[[Event], object] | None) -> None:
        refuse_rules(config)
        self.config = config
        self._on_event = on_event
        self._opened: PathCheckpointer | None = None
        self._owner = os.getpid()
        self._handles: dict[
            str, SaveHandle
        ] = {}  # the newest save of each path, newest last; most that ended are dropped
        self._removals = Removals(self._remove_now)
        self._is_busy = False
        self._interrupting: list[Callable[[], None]] = []
        _writers.add(self)

    # -- saving -------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        *,
        step: Any = None,
        files: Mapping[str, File] | None = None,
    ) -> None:
        """Take a snapshot of ``state``, and return; workers write it to ``path``.

        A signal handler may call it while this thread is in it: then it saves as soon as the interrupted call is done.

        Args:
            step: the training step; None: as the path says.
            files: as of :meth:`stager.PathCheckpointer.save`.

        Raises:
            Exception: as :meth:`stager.PathCheckpointer.save`; and the error of an earlier save, once.
        """
        save = partial(self._save, absolute(path), state, step, files)
        if self._is_busy:
            self._interrupting.append(save)
            return
        with self._uninterrupted():
            save()

    def _save(self, path: str, state: Mapping[str, Any], step: Any, files: Mapping[str, File] | None) -> None:
        checkpointer = self._open()
        os.makedirs(os.path.dirname(path), exist_ok=True)  # ModelCheckpoint makes a link there when this returns
        self._removals.forget(path)
        handle = checkpointer.save(path, state, step=step, files=files)
        for other in [one for one, earlier in self._handles.items() if earlier.upload_completion.done()]:
            del self._handles[other]
        self._handles.pop(path, None)  # so that the newest save is the last one
        self._handles[path] = handle
        self._removals.replace(handle)
        if os.path.basename(path).startswith(_OF_SLURM):
            handle.upload_completion.result()  # Slurm may kill the workers, too, once the job is queued again

    def guard(self, optimizers: Iterable[Any]) -> None:
        """Copy what these optimizers own while training goes on. Errors: :meth:`stager.PathCheckpointer.guard`."""
        self._open().guard(*optimizers)

    def wait_for_staging(self) -> None:
        """Wait until every snapshot is taken."""
        if (checkpointer := self._current) is not None:
            checkpointer.wait_for_staging()

    def wait_for(self, path: str | os.PathLike[str]) -> None:
        """Wait until every save to ``path`` has ended."""
        if (checkpointer := self._current) is not None:
            checkpointer.wait_for(path)

    def is_in_flight(self, path: str | os.PathLike[str]) -> bool:
        """Tell whether the newest save to ``path`` has not ended."""
        handle = self._handles.get(absolute(path))
        return handle is not None and not handle.upload_completion.done()

    @property
    def is_open(self) -> bool:
        """Whether something was saved or guarded since the last :meth:`close`."""
        return self._current is not None

    # -- removing -----------------------------------------------------------------------------------------------

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove what is at ``path``, as soon as the save that was begun last is committed. Nothing there is no error."""
        found = absolute(path)
        with self._uninterrupted():
            others = [handle for path_, handle in self._handles.items() if path_ != found]
            if not others or others[-1].state is SaveState.COMMITTED:
                self._remove_now(found)
            else:
                self._removals.add(found, others[-1])

    def _remove_now(self, path: str) -> None:
        """Remove a path. Runs in the training thread, or in that of the removals."""
        checkpointer = self._current
        try:
            if self.is_in_flight(path):
                assert checkpointer is not None
                checkpointer.delete(path)
            elif os.path.islink(path) or os.path.isfile(path):  # a link of save_last="link": not what it leads to
                os.unlink(path)
            elif checkpointer is not None and has_own_manifest(path):
                checkpointer.delete(path)
            elif has_own_manifest(path):
                remove_here(os.path.dirname(path), number_in(os.path.basename(path)) or 0, os.path.basename(path))
            elif os.path.isfile(os.path.join(path, "meta.pt")):  # Lightning's own, of FSDP
                shutil.rmtree(path)
            elif os.path.lexists(path):
                logger.warning("%s was to be removed, and stays: it is no checkpoint; remove it yourself", path)
        except (CheckpointNotFoundError, FileNotFoundError):
            pass
        except StorageError as error:  # somebody reads it, for example
            logger.warning("%s stays, remove it yourself: %s", path, error)

    # -- lifecycle ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait until every save has ended and every removal is done, then stop the workers. Idempotent.

        Raises:
            Exception: the error of a save that nobody has seen. Only logged if another exception is on its way up.
        """
        checkpointer = self._current
        if checkpointer is None:
            return
        failing = sys.exc_info()[1] is not None  # Lightning tears down in the except block of fit()
        deadline = None
        if failing and self.config.ranks.together is not False:
            deadline = time.monotonic() + _FAILING_SECS
        try:
            self._removals.drain(_until(deadline))  # they wait for commits, and so for other ranks
        finally:
            self._opened = None
            self._handles.clear()
            try:
                checkpointer.close(_until(deadline))
            except Exception:
                if not failing:
                    raise
                logger.exception("a save failed as well")

    def _open(self) -> PathCheckpointer:
        if (checkpointer := self._current) is None:
            checkpointer = self._opened = PathCheckpointer(self.config, on_event=self._on_event)
            self._owner = os.getpid()
        return checkpointer

    @property
    def _current(self) -> PathCheckpointer | None:
        """The open one; a forked child has none."""
        return self._opened if self._owner == os.getpid() else None

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """Put off what a signal handler saves meanwhile."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False
            while self._interrupting:
                self._interrupting.pop(0)()

    def __reduce__(self) -> Any:
        return type(self), (self.config, self._on_event)  # to the processes of ddp_spawn: nothing is open there


def wait_for_saves_to(path: str) -> None:
    """Wait until every save to ``path`` has ended that a trainer of this process has begun."""
    for writer in list(_writers):
        if writer.is_in_flight(path):  # a listener may not wait, and what it is told of is committed
            writer.wait_for(path)


def _until(deadline: float | None) -> float | None:
    """Return the seconds until a time of ``time.monotonic()``; None: there is no deadline."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a checkpoint, without links in the directory that it lies in.

    Raises:
        UsageError: it is the URL of an object store; says what to do.
    """
    directory, name = os.path.split(local_path(path, "the path of the checkpoint"))
    return os.path.join(os.path.realpath(directory), name)


def optimizers_of(values: Iterable[Any]) -> list[Optimizer]:
    """Return optimizers without Lightning's wrappers around them."""
    return [getattr(value, "_optimizer", value) for value in values]
