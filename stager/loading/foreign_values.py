"""A state that is in memory, for example because ``torch.load`` made it, as a checkpoint to restore from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stager.loading.restore_plan import refuse
from stager.state.flatten import flatten
from stager.state.shards import Box, is_sharded, shard_of, views_of
from stager.state.tensor_kinds import WholeTensor
from stager.workers.checkpoint.documents.manifest import Manifest, ManifestHeader
from stager.workers.checkpoint.layout.dtypes import name_of
from stager.workers.checkpoint.layout.items import Item, Items
from stager.workers.checkpoint.layout.layout import Layout
from stager.workers.checkpoint.layout.structure import describe


class LoadedValues:
    """See :class:`stager.loading.foreign_restore.ForeignCheckpoint`.

    Args:
        path: of the file, for messages.
        state: what is in it.

    Raises:
        UnstageableError: ``state`` has keys that a checkpoint of stager cannot have.
    """

    keeps_keys = True

    def __init__(self, path: str, state: Mapping[str, Any]) -> None:
        self.path = path
        flat = flatten(state)
        self._leaves = [leaf.tensor if type(leaf) is WholeTensor else leaf for leaf in flat.leaves]
        layout = Layout((), Items.of(map(_item_of, self._leaves)), flat.structure, 1)
        self.manifest = Manifest(ManifestHeader("", 0, "", 0.0, "", ""), layout, (), ())

    def objects(self, numbers: Sequence[int]) -> dict[int, Any]:
        """Return objects by item."""
        return {number: self._leaves[number] for number in numbers}

    def tensors(self, wanted: Sequence[tuple[int, Box | None]]) -> list[torch.Tensor]:
        """Return tensors, or views of them.

        Raises:
            StateMismatchError: a DTensor was saved, and this rank's part of it is not the box.
        """
        parts = [self._leaves[number] if box is None else self._part(number, box) for number, box in wanted]
        numbers = {number for (number, _), part in zip(wanted, parts, strict=True) if part is None}
        refuse(
            self.path,
            [
                f"{describe(path)}: the file has only what one rank held of a DTensor, and the target has another part of "
                "it; load it into the mesh and placements that it was saved with, or save full_tensor(), or by dcp.save"
                for path, number in self.manifest.paths()
                if number in numbers
            ],
        )
        return [part for part in parts if part is not None]

    def _part(self, number: int, box: Box) -> torch.Tensor | None:
        tensor = self._leaves[number]
        if is_sharded(tensor):
            shard = shard_of(tensor, "")
            held = () if shard is None or not shard.boxes else zip(shard.boxes, views_of(tensor), strict=True)
            return next((memory for one, memory in held if one == box), None)
        view: torch.Tensor = tensor.detach()
        for dim, (offset, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view


def _item_of(leaf: object) -> Item:
    """What stager would have stored for a leaf, as far as matching asks for it."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_nested:
        return Item("object", 0, 0, 0, 0, 0, "", (), ())
    return Item("tensor", 0, 0, 0, 0, 0, name_of(leaf.dtype), tuple(leaf.shape), leaf.stride())
