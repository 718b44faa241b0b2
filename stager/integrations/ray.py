"""Ray Train: ``report()`` hands a checkpoint over when stager has committed it, while training goes on.

NOTE [ Who owns a checkpoint ]
    training function          save(): snapshot          stager's workers: write, commit
           |                                                      |
           | ray.train.report(ASYNC)                              v
           +--> a thread of Ray: checkpoint_upload_fn() waits for the commit, and returns the directory
                       |
                       v
                controller of Ray, every 2 s: registers it, then removes what is beyond num_to_keep
  1. Checkpoints lie in the run's own directory of Ray (``storage_path/name``): Ray refuses to register any other.
  2. Ray registers, counts and removes. So stager has no rules of retention here, and looks for no newest checkpoint.
  3. Until the controller has registered it, a committed checkpoint is nobody's: if the worker dies then, Ray resumes from
     the one before. The training comes to the same step again, and its save replaces the directory.
  4. So the name tells the step, and steps only rise: a name that Ray has registered must not be given to another
     checkpoint, because Ray would remove that one in place of the first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from types import TracebackType
from typing import Any, SupportsIndex

import ray.train
import torch.distributed as dist
from torch.optim import Optimizer
from typing_extensions import Self

from stager.config import StagerConfig, arguments, load_config
from stager.loading.foreign import load_checkpoint
from stager.loading.loaded import Loaded
from stager.path_checkpointer import PathCheckpointer
from stager.saving.preemption import Preemption
from stager.saving.save import SaveHandle
from stager.saving.sidecars import File
from stager.state.stateful import Stateful
from stager.workers.checkpoint.documents.names import number_in
from stager.workers.errors import ArgumentError, ConfigError, UsageError

_NAME = "checkpoint_{step:08d}"


def committed(handle: SaveHandle) -> Callable[[Any, str], Any]:
    """Make the upload function of a save, for ``ray.train.report(checkpoint_upload_fn=...)``.

    Ray calls it in a thread of its own with ``CheckpointUploadMode.ASYNC``; it waits until stager has committed the
    checkpoint. Give ``delete_local_checkpoint_after_upload=False``, or Ray removes the checkpoint that it registers. The
    directory must lie in the run's directory of Ray. :class:`RayTrainCheckpointer` sees to all of that.

    Args:
        handle: what ``save()`` has returned.
    """

    def upload(checkpoint: Any, checkpoint_dir_name: str) -> Any:
        info = handle.upload_completion.result()
        return ray.train.Checkpoint(info.path, filesystem=checkpoint.filesystem)

    return upload


class RayTrainCheckpointer:
    """The checkpoints of a training function of Ray Train. Every worker makes one, and calls its methods as often as others.

    Workers that have a process group, as those of ``TorchTrainer`` have, save one checkpoint together: sharded tensors by
    their shards, what is the same on all of them once, and :class:`stager.PerRank` for each. Without a process group, or
    with ``ranks.together: false``, the worker of rank 0 saves, and the others load what it has saved.

    Args:
        config: as of :class:`stager.PathCheckpointer`.

    Attributes:
        checkpointer: the :class:`stager.PathCheckpointer`, for ``listen()``, ``warmup()`` and so on; None on a worker that
            does not save.

    Raises:
        UsageError: not called by a worker of Ray Train.
        ConfigError: the run's storage is not a local or mounted file system; ``arena.when_full`` is ``skip``; or as of
            :class:`stager.PathCheckpointer`.
        Exception: as of :class:`stager.PathCheckpointer`.
    """

    checkpointer: PathCheckpointer | None

    def __init__(self, config: str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None = None) -> None:
        self._config = load_config(config)
        if self._config.arena.when_full == "skip":
            raise ConfigError(
                "arena.when_full is skip, and Ray waits for the checkpoint of every report; set it to wait or raise"
            )
        self._context, storage = _worker()
        self._filesystem = storage.storage_filesystem
        if self._filesystem.type_name != "local":
            raise ConfigError(
                f"the run's storage is of the kind {self._filesystem.type_name!r}, and stager writes to file systems "
                "that are mounted; give RunConfig a storage_path in one that all nodes see"
            )
        self._directory: str = storage.experiment_fs_path
        newest = ray.train.get_checkpoint()
        found = None if newest is None else number_in(os.path.basename(newest.path))
        self._last_step = -1 if found is None else found
        self._preemption: Preemption | None = None
        self._together = self._config.ranks.together is not False and dist.is_available() and dist.is_initialized()
        saves = self._together or self._context.get_world_rank() == 0
        self.checkpointer = PathCheckpointer(self._config) if saves else None

    def guard(self, *optimizers: Optimizer | Iterable[Optimizer]) -> None:
        """Copy what these optimizers hold while training goes on, as :meth:`stager.Checkpointer.guard` does.

        Raises:
            Exception: as of :meth:`stager.Checkpointer.guard`.
        """
        if self.checkpointer is not None:
            self.checkpointer.guard(*optimizers)

    def load(
        self,
        into: MutableMapping[str, Any] | Stateful | None = None,
        strict: bool = True,
        *,
        allow_pickle: bool | None = None,
    ) -> Loaded[Any] | None:
        """Load what ``ray.train.get_checkpoint()`` names: the checkpoint from which Ray resumes, or that was reported last.

        Args:
            into, strict, allow_pickle: as of :meth:`stager.Checkpointer.load`.

        Returns:
            None if Ray has no checkpoint.

        Raises:
            Exception: as of :meth:`stager.PathCheckpointer.load`.
        """
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        if self.checkpointer is not None:
            return self.checkpointer.load(checkpoint.path, into, strict, allow_pickle=allow_pickle)
        rules = self._config.loading
        allowed = rules.allow_pickle if allow_pickle is None else allow_pickle
        options: dict[str, Any] = {"allow_pickle": allowed, "safe_globals": rules.safe_globals}
        return load_checkpoint(checkpoint.path, into, strict, **options)

    def report(
        self,
        metrics: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        step: SupportsIndex,
        files: Mapping[str, File] | None = None,
    ) -> SaveHandle | None:
        """Save a state, and report the checkpoint with these metrics when it is committed. Returns when it is staged.

        It is ``ray.train.report()`` with a checkpoint, and like that a barrier of all workers. A save that fails fails the
        training function, which ``FailureConfig`` may start again.

        Args:
            metrics: for Ray, without tensors.
            state, files: as of :meth:`stager.Checkpointer.save`.
            step: the training step, higher than that of the last report, and than that from which Ray has resumed.

        Returns:
            The save; None on a worker that does not save.

        Raises:
            ArgumentError: ``step`` is no step, or not higher.
            Exception: as of :meth:`stager.PathCheckpointer.save`, or of ``ray.train.report()``.
        """
        number = arguments.as_step(step)
        if number <= self._last_step:
            raise ArgumentError(
                f"step is {number}, and a checkpoint of step {self._last_step} was reported to Ray, which keeps them by "
                "their names; report higher steps: go on from the step that load() returns, or give RunConfig another "
                "name to begin anew"
            )
        if self.checkpointer is None:
            ray.train.report(dict(metrics))
            self._last_step = number
            return None
        name = _NAME.format(step=number)
        path = os.path.join(self._directory, name)
        handle = self.checkpointer.save(path, state, step=number, files=files)
        self._last_step = number
        ray.train.report(
            dict(metrics),
            checkpoint=ray.train.Checkpoint(path, filesystem=self._filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # it is the checkpoint
            checkpoint_upload_fn=committed(handle),
        )
        return handle

    def preemption(self) -> Preemption | None:
        """Ask Ray whether a node of this run is about to be taken away. A barrier of all workers.

        From then on ``close()`` waits for commits no longer than until Ray's deadline, if it gives one.

        Returns:
            None: no. Otherwise ``remaining_secs()`` says how long there is; report once more.

        Raises:
            UsageError: this version of Ray has no ``get_preemption_info()``.
        """
        if not hasattr(ray.train, "get_preemption_info"):
            raise UsageError(
                f"Ray {ray.__version__} has no ray.train.get_preemption_info(); update Ray, or do not call preemption()"
            )
        info = ray.train.get_preemption_info()
        if info is not None and self._preemption is None:
            secs = None if info.deadline_ms is None else max(0.0, info.deadline_ms / 1000 - time.time())
            # Without signals: Ray runs the training function in a thread, where Python can set no handler.
            ckpt = self.checkpointer
            announced = Preemption((), secs) if ckpt is None else ckpt.on_preemption((), deadline_secs=secs)
            announced.request()
            self._preemption = announced
        return self._preemption

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Finish every save that was begun, then stop the workers and free the memory. Idempotent.

        Args:
            timeout: seconds to wait for saves in flight; those not committed by then fail.

        Raises:
            Exception: as of :meth:`stager.Checkpointer.close`.
        """
        if self.checkpointer is not None:
            self.checkpointer.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.checkpointer is not None:
            self.checkpointer.__exit__(kind, error, trace)


def _worker() -> tuple[Any, Any]:
    """Return the context of this worker of Ray Train, and its run's storage."""
    if not hasattr(ray.train, "CheckpointUploadMode"):
        raise UsageError(
            f"this is the first version of Ray Train (Ray {ray.__version__}), which takes no checkpoint_upload_fn; update "
            "Ray, or set RAY_TRAIN_V2_ENABLED=1 where the trainer is started"
        )
    try:
        context = ray.train.get_context()
        return context, context.get_storage()
    except RuntimeError as error:
        raise UsageError(
            "RayTrainCheckpointer() was called outside of a training function of Ray Train; make it in the function that "
            "you give to TorchTrainer"
        ) from error
