"""Restoring a checkpoint that stager did not write: the steps and the matching are those of ``restore.py``.

1. fit      give the checkpoint's keys the types that those of the target have (foreign_keys.py), where its format lost them,
            and the names of tied weights that it does not store (tied_names.py)
2. match    find every mismatch, and plan what goes where (match.py); nothing is changed yet
3. objects  unpickle them under ``weights_only`` rules, run the checks of the plan
4. tensors  read them into new memory; of a tensor that lies on several ranks, this rank's boxes only
5. copy     into the tensors of the target, which have not been touched so far
6. apply    call ``load_state_dict()`` of objects that have it, put other values into their containers

Nothing has hashes here, so everything is read before anything is changed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch

from stager.loading.extras import NO_OTHER_RANKS, OtherRanks
from stager.loading.foreign_keys import fitted, refuse_if_itself
from stager.loading.loaded import Outcome
from stager.loading.match import match
from stager.loading.reading.direct_read import overlapping
from stager.loading.renaming import Renaming
from stager.loading.restore import copy_to_targets
from stager.loading.restore_plan import RestorePlan, refuse
from stager.loading.selection import Selection
from stager.loading.tied_names import with_tied_names
from stager.state.shards import Box, is_sharded, shard_of, views_of
from stager.workers.checkpoint.documents.manifest import Manifest
from stager.workers.checkpoint.formats.torch_settings import torch_defaults
from stager.workers.checkpoint.layout.building import build
from stager.workers.checkpoint.layout.structure import Node, describe, walk
from stager.workers.gc_pause import no_collection


class ForeignCheckpoint(Protocol):
    """A checkpoint of another library, as restoring asks for it.

    Attributes:
        path: of the checkpoint, for messages.
        manifest: what stager's would say of it: its items, without places and hashes, and its structure.
        keeps_keys: its keys have the types that were saved, and its empty containers are there. Otherwise keys are text, and
            those of nested mappings may be joined by dots.
    """

    path: str
    manifest: Manifest
    keeps_keys: bool

    def objects(self, numbers: Sequence[int]) -> dict[int, Any]:
        """Unpickle objects, by item."""

    def tensors(self, wanted: Sequence[tuple[int, Box | None]]) -> list[torch.Tensor]:
        """Read items, or boxes of them, into new memory."""


def restore_foreign(
    source: ForeignCheckpoint,
    into: Any,
    strict: bool,
    selection: Selection | None,
    renaming: Renaming,
    other_ranks: OtherRanks = NO_OTHER_RANKS,
) -> tuple[Any, Outcome]:
    """Load into ``into``, and return it, or a new state without it; and the names that only one side has.

    Args:
        into: see :meth:`stager.loading.restore.Restorer.load_into`.
        other_ranks: asked which names they have.

    Raises:
        StateMismatchError: keys, shapes or dtypes differ, or nothing is selected; nothing was changed.
        UnsafePickleError: nothing was changed.
        UnloadableError: an object cannot be made, or its ``load_state_dict()`` raised; says what was restored.
        CorruptCheckpointError, StorageError: nothing was changed.
    """
    if into is None:
        structure = renaming.of(source.manifest.layout.structure, source.path)
        if selection is not None:
            structure = selection.of(structure, source.path)
        with no_collection(), torch_defaults():
            values = _read(source, {index for _, index in walk(structure)})
            return build(structure, values.__getitem__), Outcome()

    def fit(structure: Node, target: Any) -> Node:
        if renaming == Renaming():
            refuse_if_itself(structure, target, source.path)
        return structure if source.keeps_keys else fitted(structure, target)

    with no_collection():
        plan = match(
            source.manifest,
            source.path,
            into,
            strict,
            selection,
            renaming=renaming,
            other_ranks=other_ranks,
            fit=fit,
            complete=lambda structure, target: with_tied_names(structure, target, renaming),
        )
        with torch_defaults():
            values = _fill(source, plan)
    plan.apply(values, source.path)
    return into, plan.outcome()


def _read(source: ForeignCheckpoint, numbers: Collection[int]) -> dict[int, Any]:
    """Read whole items: objects, then tensors."""
    items = source.manifest.layout.items
    objects = sorted(number for number in numbers if items[number].kind == "object")
    tensors = sorted(number for number in numbers if items[number].kind != "object")
    read = source.objects(objects)
    return read | dict(zip(tensors, source.tensors([(number, None) for number in tensors]), strict=True))


def _fill(source: ForeignCheckpoint, plan: RestorePlan) -> dict[int, Any]:
    """Read what the plan wants, and fill the tensors of the target. Returns the values by item, as ``Restorer`` does."""
    items = source.manifest.layout.items
    sharded = {one.index: one.tensor for one in plan.sharded}
    wanted = (plan.wanted - sharded.keys()) | set(plan.targets.indices)
    objects = source.objects(sorted(index for index in wanted if items[index].kind == "object"))
    plan.refuse_failed_checks(source.path, objects)
    whole = sorted(wanted - objects.keys())
    boxes = [(one.index, box, view) for one in plan.sharded for box, view in _boxes(one.tensor, one.name)]
    read = source.tensors([*((index, None) for index in whole), *((index, box) for index, box, _ in boxes)])
    tensors = dict(zip(whole, read, strict=False))
    _refuse_parts(source, plan, tensors)
    plan.refuse_contradictions(source.path, tensors)
    copy_to_targets(tensors, plan.targets)
    with torch.no_grad():
        for (_, _, view), part in zip(boxes, read[len(whole) :], strict=True):
            view.copy_(part)
    targets = plan.targets
    own = targets.first_of_each(without=overlapping(targets.indices, targets.tensors))
    return {**objects, **tensors, **sharded, **own}


def _boxes(tensor: torch.Tensor, name: str) -> list[tuple[Box, torch.Tensor]]:
    """This rank's boxes of a tensor of the target, and the memory of each."""
    shard = shard_of(tensor, name)
    if shard is None or not shard.boxes:
        return []
    return list(zip(shard.boxes, views_of(tensor), strict=True))


def _refuse_parts(source: ForeignCheckpoint, plan: RestorePlan, tensors: dict[int, torch.Tensor]) -> None:
    """Refuse to fill a whole tensor from a file that has a DTensor in its place: the other ranks' parts are not in it."""
    parts = {index for index in plan.targets.indices if is_sharded(tensors[index])}
    names = [describe(path) for path, index in source.manifest.paths() if index in parts]
    refuse(
        source.path,
        [
            f"{name}: is a whole tensor in the target, and the file has only what one rank held of a DTensor; load it into "
            "a DTensor of the same mesh and placements, or save full_tensor()"
            for name in names
        ],
    )
