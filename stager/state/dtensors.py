"""DTensors: the boxes and the memory that a rank has of them.

Where a local tensor lies in the whole comes from DCP's save planner, so that what is written is what ``dcp.load`` expects,
on any mesh. But the planner knows one box only. ``_StridedShard`` (FSDP2 over tensor parallelism) can give a rank rows that
are not side by side: of 8 rows on two ranks with ``split_factor=2``, rows 0, 1, 4 and 5 to the first one. Their true rows
are found as torch itself finds them, by splitting: what is split here is not the tensor but the numbers of its rows.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch

from stager.workers.errors import UnstageableError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class _Stretch(NamedTuple):
    """Consecutive elements of one dimension: where they start in the whole tensor and in the local one, and how many."""

    start: int
    local_start: int
    length: int


class _Place(NamedTuple):
    """Where a box lies in the whole tensor, in each dimension."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Tell whether a value is a DTensor. Without torch.distributed no value is."""
    if not hasattr(value, "__tensor_flatten__") or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # late: it takes long to import, and most programs have none

    return isinstance(value, DTensor)


def local_of(tensor: DTensor) -> torch.Tensor:
    """Return this rank's memory, not a copy. Of a local tensor that wraps another one, it is the other one."""
    with torch.no_grad():
        local = tensor.to_local()
    if hasattr(local, "__tensor_flatten__") and (inner := _wrapped(local)) is not None:
        return inner
    return local


def _wrapped(local: Any) -> torch.Tensor | None:
    """Return the inner tensor that holds a wrapper's values, as in torchao's float8 weights under FSDP2, or None."""
    parts = [getattr(local, name) for name in local.__tensor_flatten__()[0]]
    values = [part for part in parts if isinstance(part, torch.Tensor) and part.shape == local.shape]
    if len(values) != 1 or values[0].dtype != local.dtype or hasattr(values[0], "__tensor_flatten__"):
        return None
    return values[0].detach()


def problem_of(tensor: DTensor) -> str | None:
    """Say why a DTensor cannot be stored, or loaded into; None if it can be."""
    if any(placement.is_partial() for placement in tensor.placements):
        return f"is a DTensor with placements {tensor.placements}: ranks hold terms of a sum; redistribute() it first"
    if tensor.device_mesh.get_coordinate() is None:
        return None
    with torch.no_grad():
        local: Any = tensor.to_local()
    if not hasattr(local, "__tensor_flatten__"):
        return None
    names = local.__tensor_flatten__()[0]
    if _wrapped(local) is not None and len(names) == 1:
        return None
    return (
        f"is a DTensor whose local tensor is a {type(local).__name__}, made of {', '.join(names)}: stager stores a "
        "wrapper in a DTensor only if it has one inner tensor of its own shape and dtype; save to_local() in PerRank, or "
        "full_tensor()"
    )


def views_of_dtensor(tensor: DTensor) -> list[torch.Tensor]:
    """Return this rank's memory of each box; nothing if it has no elements."""
    local = local_of(tensor)
    if not local.numel():
        return []
    stretches = _strided_stretches(tensor)
    if stretches is None:
        return [local]
    return [_narrowed(local, box) for box in itertools.product(*stretches)]


def boxes_of_dtensor(tensor: DTensor, name: str) -> list[_Place] | None:
    """Find the boxes, in the order of :func:`views_of_dtensor`; None: this rank is outside of the tensor's mesh.

    Raises:
        UnstageableError: the local tensor is not the boxes that the placements say.
    """
    if tensor.device_mesh.get_coordinate() is None:
        return None
    lengths = tuple(local_of(tensor).shape)
    stretches = _strided_stretches(tensor)
    if stretches is None:
        return [_only_box(tensor, name, lengths)]
    if tuple(sum(one.length for one in of_dimension) for of_dimension in stretches) != lengths:
        raise UnstageableError(
            name,
            f"is a DTensor of shape {tuple(tensor.shape)} whose local tensor has the shape {lengths}, which is not what "
            f"its placements {tensor.placements} say; save its full_tensor()",
        )
    boxes = itertools.product(*stretches)
    return [_Place(tuple(one.start for one in box), tuple(one.length for one in box)) for box in boxes]


def _only_box(tensor: DTensor, name: str, lengths: tuple[int, ...]) -> _Place:
    """Ask DCP's save planner where the local tensor, of these lengths, lies in the whole.

    Raises:
        UnstageableError: the planner cuts it into several chunks, or expects other lengths.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner({name: tensor}, is_coordinator=False)
    items: list[Any] = planner.create_local_plan().items
    if len(items) != 1 or tuple(items[0].tensor_data.chunk.sizes) != lengths:
        raise UnstageableError(
            name,
            f"is a DTensor whose local tensor of shape {lengths} is not one box of the whole; save its full_tensor()",
        )
    return _Place(tuple(items[0].tensor_data.chunk.offsets), lengths)


def _narrowed(local: torch.Tensor, box: tuple[_Stretch, ...]) -> torch.Tensor:
    for dim, one in enumerate(box):
        local = local.narrow(dim, one.local_start, one.length)
    return local


def _strided_stretches(tensor: DTensor) -> tuple[tuple[_Stretch, ...], ...] | None:
    """Return the stretches that this rank has of each dimension; None if no placement is strided."""
    placements = tensor.placements
    if not any(hasattr(placement, "split_factor") for placement in placements):
        return None
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    return _stretches(tuple(tensor.shape), tuple(placements), tuple(mesh.shape), tuple(coordinate))


@lru_cache(maxsize=4096)  # models have many tensors and few shapes
def _stretches(
    shape: tuple[int, ...], placements: tuple[Any, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...]
) -> tuple[tuple[_Stretch, ...], ...]:
    """Return the stretches of each dimension, for the rank at ``coordinate`` of the mesh."""
    rows = [torch.arange(length) for length in shape]
    for placement, num_chunks, position in zip(placements, mesh_shape, coordinate, strict=True):
        dim = getattr(placement, "dim", None)
        if dim is not None:  # else all ranks of this dimension of the mesh have the same
            along_first = type(placement)(0, **_factor(placement))  # the numbers have one dimension
            parts, _ = along_first._split_tensor(rows[dim], num_chunks, with_padding=False, contiguous=True)
            rows[dim] = parts[position]
    return tuple(_joined(numbers.tolist()) for numbers in rows)


def _factor(placement: Any) -> dict[str, int]:
    return {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}


def _joined(numbers: list[int]) -> tuple[_Stretch, ...]:
    """Join consecutive numbers into stretches: of 0, 1, 4, 5 the first has 0 and 1, the second 4 and 5."""
    stretches: list[_Stretch] = []
    for position, number in enumerate(numbers):
        last = stretches[-1] if stretches else None
        if last is not None and number == last.start + last.length:
            stretches[-1] = last._replace(length=last.length + 1)
        else:
            stretches.append(_Stretch(start=number, local_start=position, length=1))
    return tuple(stretches)
