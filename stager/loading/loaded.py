"""``Loaded``: what loading a checkpoint returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

from typing_extensions import TypeVar  # typing's own has no default before Python 3.13

from stager.workers.checkpoint.directory.run_directory import CheckpointInfo

StepT = TypeVar("StepT", bound="int | None", default=int)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[StepT]):
    """A checkpoint that was loaded, by ``Checkpointer.load()`` or ``load_checkpoint()``.

    Attributes:
        step: the training step of the checkpoint; None if stager did not write it.
        path: the checkpoint's directory or file, absolute.
        state: the loaded state, or the mapping given as ``into``.
        info: what the checkpoint says about itself; None if stager did not write it.
    """

    step: StepT
    path: str
    state: Any
    info: CheckpointInfo | None
