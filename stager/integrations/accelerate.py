"""Accelerate: what ``Accelerator.save_state()`` saves, written by stager's workers while training goes on.

:func:`state` lists what an ``Accelerator`` has prepared and registered, for any Checkpointer.
:class:`AcceleratorCheckpointer` has ``save_state()`` and ``load_state()`` as the ``Accelerator`` has them.

NOTE [ Checkpoints lie beside those of Accelerate ]
With ``automatic_checkpoint_naming``, Accelerate takes every name in ``project_dir/checkpoints`` for a checkpoint. A name
without a digit is an IndexError. Of the others, the one with the highest number is the newest, whole or not. Its rotation
removes the oldest before it writes. stager has a lock file and partial directories where it saves, and a rotation of its
own. So
  1. stager saves into ``project_dir/stager_checkpoints``, and neither program touches the files of the other;
  2. ``load_state()`` without a path takes the newest valid checkpoint of stager's; only if stager has none, it lets
     Accelerate load the newest of its own, so that a run which was begun without stager goes on;
  3. numbers never repeat: the next one is above all that are in the directory, also after an older one was loaded.
"""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from typing_extensions import Self

from stager.checkpointer import Checkpointer
from stager.config import StagerConfig, load_config
from stager.integrations.accelerate_parts.state import refuse_engines, state, torch_optimizer
from stager.integrations.two_weights import has_two_weights
from stager.loading.foreign import load_checkpoint
from stager.loading.loaded import Loaded
from stager.path_checkpointer import PathCheckpointer
from stager.saving.save import SaveHandle
from stager.saving.sidecars import File
from stager.workers.checkpoint.directory.manifest_file import has_own_manifest
from stager.workers.checkpoint.storage.paths import local_path
from stager.workers.errors import ArgumentError, ConfigError, UsageError

__all__ = ["DIRECTORY", "AcceleratorCheckpointer", "state"]

logger = logging.getLogger("stager")

DIRECTORY = "stager_checkpoints"  # in project_dir; see NOTE [ Checkpoints lie beside those of Accelerate ]
_NAME = "checkpoint_{step}"
_NUMBERED = re.compile(r"checkpoint_([0-9]+)")


class AcceleratorCheckpointer:
    """``save_state()`` and ``load_state()`` of an ``Accelerator``, with checkpoints that stager writes.

    ``save_state()`` returns when the snapshot is taken. With ``automatic_checkpoint_naming`` checkpoints are
    ``project_dir/stager_checkpoints/checkpoint_0``, ``checkpoint_1`` and so on; of them ``total_limit`` are kept, and the
    oldest is removed when the newest is committed, not before. Without it, ``save_state(output_dir)`` says where. Where
    several processes train together, every process makes one of these and calls each method.

    Args:
        accelerator: which prepares models, optimizers and so on, before or after this is made.
        config: as of :class:`stager.Checkpointer`. ``persistence.name`` and ``retention.keep_latest`` are set from the
            ``ProjectConfiguration`` when it names the checkpoints.
        guard: copy what the optimizers hold while training goes on (:meth:`stager.Checkpointer.guard`). Only
            ``optimizer.step()`` may then write to it between two steps. Schedule-free optimizers, whose ``train()`` and
            ``eval()`` write to it, are not guarded.

    Attributes:
        checkpointer: the :class:`stager.Checkpointer`, or the :class:`stager.PathCheckpointer` without automatic naming: for
            ``on_preemption()``, ``listen()``, ``warmup()``, ``latest()``, ``delete()``.

    Raises:
        ConfigError: the configuration is wrong; ``total_limit`` is given, and rules for ``retention``; or
            ``save_on_each_node`` is.
        UsageError: as of :func:`state`.
        ArgumentError: there is no ``project_dir``; or, with ``guard``, an optimizer that cannot be guarded.
        Exception: as of :class:`stager.Checkpointer`.
    """

    checkpointer: Checkpointer | PathCheckpointer

    def __init__(
        self,
        accelerator: Accelerator,
        config: str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None = None,
        *,
        guard: bool = True,
    ) -> None:
        refuse_engines(accelerator)
        project = accelerator.project_configuration
        if project.save_on_each_node:
            raise ConfigError(
                "ProjectConfiguration has save_on_each_node=True, and stager writes one checkpoint of all processes, on a "
                "file system that all of them see; take it out"
            )
        self._config = load_config(config)
        self._accelerator = accelerator
        self._guards = guard
        self._guarded: weakref.WeakSet[Any] = weakref.WeakSet()
        self._run: Checkpointer | None = None
        if project.automatic_checkpoint_naming:
            self._directory = os.path.join(_project_dir(accelerator), DIRECTORY)
            self.checkpointer = self._run = Checkpointer(
                self._directory, _run_config(self._config, project.total_limit)
            )
        else:
            self._by_path = self.checkpointer = PathCheckpointer(self._config)
        try:
            self._guard()
        except BaseException:
            self.checkpointer.close()
            raise

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, File] | None = None,
    ) -> SaveHandle:
        """Take a snapshot of all that the Accelerator has, and let the workers write it.

        Args:
            output_dir: where, unless ``automatic_checkpoint_naming`` says so. A checkpoint that is there is replaced when
                the new one is committed.
            metrics, files: as of :meth:`stager.Checkpointer.save`.

        Returns:
            The save. ``upload_completion.result()`` waits for the commit, and ``.path`` of that is the directory.

        Raises:
            ArgumentError: ``output_dir`` is given and ``automatic_checkpoint_naming`` is on, or neither is; the checkpoint
                of ``save_iteration`` exists; or as of :func:`state`.
            UsageError: hooks of ``register_save_state_pre_hook()`` are registered, or as of :func:`state`.
            Exception: as of :meth:`stager.Checkpointer.save`.
        """
        self._refuse_hooks(self._accelerator._save_model_state_pre_hook, "save")
        self._guard()
        content = state(self._accelerator)
        if self._run is None:
            if output_dir is None:
                raise ArgumentError(
                    "save_state() was called without output_dir, and automatic_checkpoint_naming is off; give output_dir, "
                    "or turn automatic_checkpoint_naming on in ProjectConfiguration"
                )
            return self._by_path.save(output_dir, content, metrics=metrics, files=files)
        if output_dir is not None:
            raise ArgumentError(
                f"save_state() got output_dir={os.fspath(output_dir)!r}, and automatic_checkpoint_naming is on, so that "
                f"checkpoints go to {self._directory}; take one of the two out"
            )
        number = self._accelerator.save_iteration
        path = os.path.join(self._directory, _NAME.format(step=number))
        if os.path.lexists(path):
            raise ArgumentError(
                f"{path} exists; call load_state() before the first save_state() to go on behind it, or set "
                "accelerator.project_configuration.iteration to a number that is free"
            )
        # Before save(), which may raise the error of an earlier save after it has begun this one.
        self._accelerator.project_configuration.iteration = number + 1
        return self._run.save(number, content, metrics=metrics, files=files)

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        *,
        strict: bool = True,
        allow_pickle: bool | None = None,
    ) -> Loaded[Any] | None:
        """Restore all that the Accelerator has, in place. Saves that are in flight are waited for.

        Call it after ``prepare()`` and ``register_for_checkpointing()``.

        Args:
            input_dir: a checkpoint of stager, or one that ``accelerator.save_state()`` has written, which Accelerate then
                loads itself. None, with ``automatic_checkpoint_naming``: the newest valid one of stager's; if stager has
                none, the newest of Accelerate's own.
            strict, allow_pickle: as of :meth:`stager.Checkpointer.load`.

        Returns:
            What was loaded; ``step`` is its number. None if ``input_dir`` is None and there is no checkpoint.

        Raises:
            ArgumentError: ``input_dir`` is None, and ``automatic_checkpoint_naming`` is off; or as of :func:`state`.
            UsageError: hooks of ``register_load_state_pre_hook()`` are registered, or as of :func:`state`.
            CheckpointNotFoundError: there is no checkpoint at ``input_dir``.
            Exception: as of :meth:`stager.Checkpointer.load`.
        """
        self._refuse_hooks(self._accelerator._load_model_state_pre_hook, "load")
        self._guard()
        content = state(self._accelerator)
        loaded: Loaded[Any] | None
        if input_dir is not None:
            loaded = self._load_from(local_path(input_dir, "input_dir"), content, strict, allow_pickle)
        elif self._run is None:
            raise ArgumentError(
                "load_state() was called without input_dir, and automatic_checkpoint_naming is off; give the directory of a "
                "checkpoint"
            )
        else:
            loaded = self._run.load(into=content, strict=strict, allow_pickle=allow_pickle)
            if loaded is None:
                loaded = self._load_newest_of_accelerate(content)
        if loaded is not None and self._run is not None:
            self._go_on_behind(loaded.step)
        return loaded

    def _load_from(self, path: str, content: dict[str, Any], strict: bool, allow_pickle: bool | None) -> Loaded[Any]:
        options: dict[str, Any] = {"into": content, "strict": strict}
        if self._run is None:
            self._by_path.wait_for(path)
            if _is_of_accelerate(path):
                return self._load_of_accelerate(path, content)
            return self._by_path.load(path, allow_pickle=allow_pickle, **options)
        directory, name = os.path.split(path)
        numbered = _NUMBERED.fullmatch(name)
        if numbered is not None and os.path.realpath(directory) == os.path.realpath(self._directory):
            loaded = self._run.load(int(numbered[1]), allow_pickle=allow_pickle, **options)
            assert loaded is not None  # a checkpoint was named
            return loaded
        if _is_of_accelerate(path):
            return self._load_of_accelerate(path, content)
        self._run.wait_for_staging()  # do not overwrite what is being copied
        rules = self._config.loading
        options["allow_pickle"] = rules.allow_pickle if allow_pickle is None else allow_pickle
        return load_checkpoint(path, safe_globals=rules.safe_globals, **options)

    def _load_newest_of_accelerate(self, content: dict[str, Any]) -> Loaded[Any] | None:
        directory = os.path.join(_project_dir(self._accelerator), "checkpoints")
        number = max(_numbers_in(directory), default=None)
        if number is None:
            return None
        path = os.path.join(directory, _NAME.format(step=number))
        logger.info("%s has no checkpoint; Accelerate loads %s, which it has written itself", self._directory, path)
        return self._load_of_accelerate(path, content)

    def _load_of_accelerate(self, path: str, content: dict[str, Any]) -> Loaded[Any]:
        self.checkpointer.wait_for_staging()  # do not overwrite what is being copied
        self._accelerator.load_state(path)
        numbered = _NUMBERED.fullmatch(os.path.basename(path))
        return Loaded(None if numbered is None else int(numbered[1]), path, content, None)

    def _go_on_behind(self, step: int | None) -> None:
        """Let ``save_iteration`` be above every number that is taken. All processes take that of the main one."""
        number = [1 + max([*_numbers_in(self._directory), -1 if step is None else step])]
        if self._accelerator.num_processes > 1:
            broadcast_object_list(number)  # of a shared file system, two processes may see different contents
        self._accelerator.project_configuration.iteration = number[0]

    def _guard(self) -> None:
        """Guard the optimizers that were prepared since the last call."""
        if not self._guards:
            return
        for optimizer in self._accelerator._optimizers:
            if optimizer in self._guarded or has_two_weights(torch_optimizer(optimizer)):
                continue
            try:
                self.checkpointer.guard(optimizer)
            except ArgumentError as error:
                raise ArgumentError(
                    f"an optimizer of the Accelerator, a {type(torch_optimizer(optimizer)).__name__}, is no "
                    "torch.optim.Optimizer and has none inside, so stager cannot tell when it writes; make the "
                    "AcceleratorCheckpointer with guard=False: save_state() then returns when everything is copied"
                ) from error
            self._guarded.add(optimizer)

    def _refuse_hooks(self, hooks: Mapping[Any, Any], what: str) -> None:
        if hooks:
            raise UsageError(
                f"{len(hooks)} hooks are registered by register_{what}_state_pre_hook(), and stager does not call them: "
                "they write to, or read, a directory that appears only at the commit. Remove them; give small files to "
                "save_state(files=...), and register objects with register_for_checkpointing()"
            )

    # -- the end ------------------------------------------------------------------------------------------------

    def end_training(self, timeout: float | None = None) -> None:
        """Wait until every save is committed, then call ``accelerator.end_training()``.

        Args:
            timeout: as of :meth:`close`.

        Raises:
            Exception: as of :meth:`close`. The trackers are finished all the same.
        """
        try:
            self.close(timeout)  # before the process group is destroyed, by which the ranks agree
        finally:
            self._accelerator.end_training()

    def close(self, timeout: float | None = None) -> None:
        """Finish every save that was begun, then stop the workers and free the memory. Idempotent.

        Args:
            timeout: seconds to wait for saves in flight; those not committed by then fail.

        Raises:
            Exception: as of :meth:`stager.Checkpointer.close`.
        """
        self.checkpointer.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checkpointer.__exit__(kind, error, trace)


def _project_dir(accelerator: Accelerator) -> str:
    if accelerator.project_dir is None:
        raise ArgumentError(
            "automatic_checkpoint_naming is on, and the Accelerator has no project_dir; give "
            "ProjectConfiguration(project_dir=...)"
        )
    return local_path(accelerator.project_dir, "project_dir")


def _run_config(given: StagerConfig, total_limit: int | None) -> StagerConfig:
    overrides = [f"persistence.name={_NAME}"]
    if total_limit is not None:
        if given.retention.has_rules:
            raise ConfigError(
                f"ProjectConfiguration has total_limit={total_limit}, and retention has rules; both say what is kept: take "
                "one of them out"
            )
        overrides.append(f"retention.keep_latest={total_limit}")
    return load_config(given, overrides)


def _numbers_in(directory: str) -> list[int]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return [int(found[1]) for name in names if (found := _NUMBERED.fullmatch(name)) is not None]


def _is_of_accelerate(path: str) -> bool:
    """Tell whether ``accelerator.save_state()`` has written it: each process always leaves its random states."""
    if not os.path.isdir(path) or has_own_manifest(path):
        return False
    return any(name.startswith("random_states_") and name.endswith(".pkl") for name in os.listdir(path))
