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
    """A rank's part of a DTensor.

    Attributes:
        shape: of the whole tensor.
        offsets, lengths: of this rank's part, in elements.
        spread: how the tensor lies on its mesh. The same ranks hold all tensors of one spread.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    spread: Hashable


def is_sharded(value: object) -> TypeGuard[DTensor]:
    """Tell whether a value is a DTensor. Without torch.distributed no value is."""
    if not hasattr(value, "__tensor_flatten__") or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # late: it takes long to import, and most programs have none

    return isinstance(value, DTensor)


def spread_of(tensor: DTensor) -> Hashable:
    """Return what the place of a shard depends on, beside the tensor's shape; the same objects while nothing changes."""
    return tensor.device_mesh, tensor.placements


def local_of(tensor: DTensor) -> torch.Tensor:
    """Return this rank's part: its memory, not a copy."""
    return locals_of([tensor])[0]


def locals_of(tensors: Sequence[DTensor]) -> list[torch.Tensor]:
    """Return this rank's parts of several DTensors, as :func:`local_of` does."""
    with torch.no_grad():
        return [tensor.to_local() for tensor in tensors]


def shard_of(tensor: DTensor, name: str) -> Shard | None:
    """Find what this rank holds of a DTensor; None: nothing, because the rank is outside of the tensor's mesh.

    Raises:
        UnstageableError: the tensor is not made of shards, for example because its ranks hold terms of a sum.
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
