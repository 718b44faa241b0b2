"""The saves of one ``Trainer.train()``: a PathCheckpointer, what it has begun, and the rotation."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from stager import Event, PathCheckpointer, SaveHandle, StagerConfig
from stager.integrations.transformers_parts.trainer_rotation import Rotation, RotationRule
from stager.telemetry.report import SaveState

logger = logging.getLogger("stager")

Config = str | os.PathLike[str] | Mapping[str, Any] | StagerConfig | None
"""What a ``PathCheckpointer`` takes as its configuration."""

_FAILING_SECS = 60.0

_NO_CHECKPOINT = (SaveState.FAILED, SaveState.SKIPPED, SaveState.CANCELLED)


class TrainerSaves:
    """Saves checkpoints, and knows which are still to come.

    Where several ranks train, every rank makes one and calls the same methods.

    Args:
        config, on_event: of the PathCheckpointer.

    Raises:
        Exception: as :class:`stager.PathCheckpointer`.
    """

    def __init__(self, config: Config, on_event: Callable[[Event], object] | None) -> None:
        self._checkpointer = PathCheckpointer(config, on_event=on_event)
        self._rotation = Rotation(self._checkpointer.delete)
        self._handles: dict[str, SaveHandle] = {}  # the last save to each path

    def recover(self, directory: str) -> None:
        """Finish what an earlier process left in a directory."""
        self._checkpointer.recover(directory)

    def guard(self, optimizer: Any) -> None:
        """Copy the optimizer's parameters and state while training goes on."""
        self._checkpointer.guard(optimizer)

    def save(
        self, path: str, state: Mapping[str, Any], step: int, files: Mapping[str, bytes], rule: RotationRule | None
    ) -> SaveHandle:
        """Begin a save.

        Args:
            files: beside the state; of ranks other than 0, nothing.
            rule: applied when the save is committed; None: nothing is removed.

        Raises:
            Exception: as :meth:`stager.PathCheckpointer.save`.
        """
        if rule is not None:
            self._rotation.before(path)
        handle = self._checkpointer.save(path, state, step=step, files=files)
        self._handles[path] = handle
        if rule is not None:
            self._rotation.after(handle, path, rule)
        return handle

    def will_have(self, path: str) -> bool:
        """Tell whether a checkpoint is at ``path``, or will be when the saves in flight are committed."""
        handle = self._handles.get(path)
        return os.path.isdir(path) if handle is None else handle.state not in _NO_CHECKPOINT

    def finish(self) -> None:
        """Wait for every commit and removal, and free everything.

        Raises:
            Exception: the oldest error of a save that nobody has looked at (``persistence.on_save_error``).
        """
        try:
            self._rotation.close()  # while the workers are there that remove
        except BaseException as error:
            self.finish_after(error)
            raise
        self._checkpointer.close()

    def finish_after(self, error: BaseException) -> None:
        """Wait for every commit, and free everything, while an exception is on its way. Errors of saves are logged.

        Where several ranks train, others may have failed before, so it does not wait for their parts of a save for long.
        """
        self._rotation.give_up()
        try:
            self._checkpointer.close(_FAILING_SECS if _has_other_ranks() else None)
        except Exception:
            logger.exception("a save failed as well, after %s", type(error).__name__)
        finally:
            self._rotation.close()


def _has_other_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
