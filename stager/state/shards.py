"""What a rank holds of a DTensor: its local tensor, and where in the whole that lies.

The place comes from DCP's save planner, so that what is written is what ``dcp.load`` expects, on any mesh.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from stager.workers.errors import UnstageableError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Shard:
    """Attributes:
    shape: of the whole.
    offsets, lengths: of what this rank has, in elements.
    spread: how the tensor lies on its mesh; tensors of one spread are held by the same ranks.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    spread: Hashable


def is_sharded(value: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Without torch.distributed there are none."""
    if not hasattr(value, "__tensor_flatten__") or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # late: it takes long to import, and most programs have none

    return isinstance(value, DTensor)


def spread_of(tensor: DTensor) -> Hashable:
    """What the place of a DTensor's shard depends on, beside its shape; the same objects as long as nothing changed."""
    return tensor.device_mesh, tensor.placements


def local_of(tensor: DTensor) -> torch.Tensor:
    """This rank's part: its memory, not a copy."""
    return locals_of([tensor])[0]


def locals_of(tensors: Sequence[DTensor]) -> list[torch.Tensor]:
    """As :func:`local_of`, of many."""
    with torch.no_grad():
        return [tensor.to_local() for tensor in tensors]


def shard_of(tensor: DTensor, name: str) -> Shard | None:
    """None: this rank holds nothing of it, being outside of its mesh.

    Raises:
        UnstageableError: it is not made up of shards: its ranks hold terms of a sum, say.
    """
    if tensor.device_mesh.get_coordinate() is None:
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnstageableError(
            name,
            f"is a DTensor with placements {tensor.placements}: ranks hold terms of a sum; redistribute() it first",
        )
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({name: tensor}, is_coordinator=False)
    items: list[Any] = planner.create_local_plan().items
    lengths = tuple(local_of(tensor).shape)
    if len(items) != 1 or tuple(items[0].tensor_data.chunk.sizes) != lengths:
        raise UnstageableError(name, f"is a DTensor whose local tensor of shape {lengths} is no single chunk of it")
    chunk = items[0].tensor_data.chunk
    return Shard(tuple(tensor.shape), tuple(chunk.offsets), lengths, spread_of(tensor))
