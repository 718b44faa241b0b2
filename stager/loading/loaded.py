"""``Loaded``: what loading a checkpoint returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple

from typing_extensions import TypeVar  # typing's own has no default before Python 3.13

from stager.workers.checkpoint.directory.run_directory import CheckpointInfo

StepT = TypeVar("StepT", bound="int | None", default=int)


class Outcome(NamedTuple):
    """The names that only the checkpoint or only the target has. For the fields see :class:`Loaded`."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    per_rank: Mapping[str, Mapping[int, Any]] = {}


@dataclass(frozen=True, slots=True)
class Loaded(Generic[StepT]):
    """A checkpoint that was loaded, by ``Checkpointer.load()`` or ``load_checkpoint()``.

    Attributes:
        step: the training step of the checkpoint; None if stager did not write it.
        path: the checkpoint's directory or file, absolute.
        state: the loaded state, or what was given as ``into``.
        info: what the checkpoint says about itself; None if stager did not write it.
        missing: names that ``into`` has and the checkpoint has not. Objects and parameters stayed as they were; tensors of
            containers that belong to nobody were removed from these.
        unexpected: names that the checkpoint has and ``into`` has no place for. With ``strict``, only names at the top.
        replaced: names of tensors in ``into`` that did not fit, so that what the checkpoint has took their place. With
            ``strict``, only those for which the checkpoint has None.
        per_rank: values of :class:`~stager.PerRank` that were saved by ranks which this job does not have: by name, then by
            rank. Each is offered on one rank: that of rank ``r`` on rank ``r`` modulo the number of ranks.
        files: what was given to ``save(files=...)``: names to bytes, read and checked when somebody asks for one.

    A name is its keys, joined by dots, as ``keys=`` takes it. Without ``into``, ``missing`` to ``per_rank`` are empty.
    """

    step: StepT
    path: str
    state: Any = field(repr=False)  # it may be large
    info: CheckpointInfo | None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    per_rank: Mapping[str, Mapping[int, Any]] = field(default_factory=dict, repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
