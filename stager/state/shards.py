"""What a rank holds of a tensor that lies on several ranks: boxes of the whole, and the memory of each.

    kind                   made by                                 boxes on a rank
    DTensor                FSDP2, tensor parallelism               one; of some ``_StridedShard`` several (``dtensors.py``)
    ShardedTensor          FSDP1's sharded ``state_dict()``        one for each of its ``local_shards()``
    a plain tensor with    the program itself, by the protocol     as many as the attributes say
    four attributes        ``CheckpointableTensor`` of torch 2.14

The rest of stager sees boxes only, and does not know the kinds. The attributes are recognized on any version of torch.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stager.state.dtensors import boxes_of_dtensor, is_dtensor, local_of, views_of_dtensor
from stager.state.dtensors import problem_of as problem_of_dtensor
from stager.workers.checkpoint.layout.layout_check import check_tiling
from stager.workers.errors import UnstageableError

_PLACES = ("global_offsets", "local_offsets", "local_sizes")
_ATTRIBUTES = ("global_shape", *_PLACES)


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: from ``offsets``, ``lengths`` elements in each dimension. It is not empty."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank holds of a tensor.

    Attributes:
        shape: of the whole tensor.
        boxes: this rank's parts, in the order of :func:`views_of`.
        spread: how the tensor lies on the ranks. The same ranks hold all tensors of one spread.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    spread: Hashable

    @property
    def is_empty(self) -> bool:
        """Whether the whole tensor has no elements: then it is the same on all ranks, and no box is in it."""
        return 0 in self.shape

    @property
    def is_whole(self) -> bool:
        """Whether one box is the whole tensor."""
        return len(self.boxes) == 1 and self.boxes[0].lengths == self.shape


def is_sharded(value: object) -> bool:
    """Tell whether a value is a tensor of one of the kinds at the head of this file."""
    return isinstance(value, torch.Tensor) and (is_dtensor(value) or _is_sharded_tensor(value) or is_marked(value))


def is_marked(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has the attributes of torch's ``CheckpointableTensor``."""
    return hasattr(tensor, "global_shape") and all(hasattr(tensor, name) for name in _ATTRIBUTES)


def _is_sharded_tensor(value: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed._shard.sharded_tensor")  # not imported: there is no such tensor
    return module is not None and isinstance(value, module.ShardedTensor)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the whole tensor."""
    if hasattr(tensor, "global_shape") and is_marked(tensor):
        return _numbers(tensor.global_shape)
    return tuple(tensor.size())


def spread_of(tensor: torch.Tensor) -> Hashable:
    """Return how a sharded tensor lies on the ranks: all that its boxes depend on, beside its shape.

    Two results are equal if the tensors have the same kind and lie on the ranks in the same way.
    """
    if is_dtensor(tensor):
        return tensor.device_mesh, tensor.placements
    if _is_sharded_tensor(tensor):
        shards: Any = tensor.metadata().shards_metadata  # type: ignore[attr-defined]  # torch's stubs lack it
        return tuple((tuple(one.shard_offsets), tuple(one.shard_sizes), str(one.placement)) for one in shards)
    return tuple(tuple(map(_numbers, getattr(tensor, name))) for name in _PLACES)


def views_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return this rank's memory of each box, as plain tensors; of a tensor without elements, one of its shape."""
    shape = shape_of(tensor)
    if 0 in shape:
        return [torch.empty(shape, dtype=tensor.dtype)]
    if is_dtensor(tensor):
        return views_of_dtensor(tensor)
    if _is_sharded_tensor(tensor):
        views: list[torch.Tensor] = [shard.tensor.detach() for shard in tensor.local_shards()]  # type: ignore[attr-defined]  # torch's stubs lack it
    else:
        whole, marked = tensor.detach(), _Marks.of(tensor)
        views = [_narrowed(whole, *place) for place in zip(marked.local_offsets, marked.local_sizes, strict=True)]
    return [view for view in views if view.numel()]


def memory_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors whose memory a rank has for a tensor of any kind."""
    if is_dtensor(tensor):
        return [local_of(tensor)]
    return views_of(tensor) if _is_sharded_tensor(tensor) else [tensor]


def problem_of_shard(tensor: torch.Tensor) -> str | None:
    """Say why a rank's part of a sharded tensor cannot be stored, or loaded into; None if it can be."""
    if is_dtensor(tensor):
        return problem_of_dtensor(tensor)
    return None if _is_sharded_tensor(tensor) else _Marks.of(tensor).problem(tuple(tensor.shape))


def shard_of(tensor: torch.Tensor, name: str) -> Shard | None:
    """Find what this rank holds of a sharded tensor; None: nothing, because it is outside of the tensor's mesh.

    Args:
        name: of the tensor, for errors.

    Raises:
        UnstageableError: the tensor is not made of boxes, for example because its ranks hold terms of a sum.
    """
    if (problem := problem_of_shard(tensor)) is not None:
        raise UnstageableError(name, problem)
    shape, spread = shape_of(tensor), spread_of(tensor)
    places: Sequence[tuple[Any, Any]]
    if is_dtensor(tensor):
        found = boxes_of_dtensor(tensor, name)
        if found is None:
            return None
        places = found
    elif _is_sharded_tensor(tensor):
        group = tensor._process_group  # type: ignore[attr-defined]  # torch's stubs lack it
        shards: Any = tensor.local_shards()  # type: ignore[attr-defined]  # torch's stubs lack it
        places = [(shard.metadata.shard_offsets, shard.metadata.shard_sizes) for shard in shards]
        spread = "ShardedTensor", id(group), tuple(placement for *_, placement in spread)  # type: ignore[attr-defined]  # torch's stubs lack it
    else:
        marks = _Marks.of(tensor)
        places = list(zip(marks.global_offsets, marks.local_sizes, strict=True))
        spread = "CheckpointableTensor", name  # nothing says which other tensors lie on the same ranks
    boxes = [Box(_numbers(offsets), _numbers(lengths)) for offsets, lengths in places]
    return Shard(shape, tuple(box for box in boxes if 0 not in box.lengths), spread)


@dataclass(frozen=True, slots=True)
class _Marks:
    """The attributes of a ``CheckpointableTensor``; what they mean stands in ``torch.distributed.checkpoint.protocol``."""

    global_shape: tuple[int, ...]
    global_offsets: tuple[tuple[int, ...], ...]
    local_offsets: tuple[tuple[int, ...], ...]
    local_sizes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(tensor: Any) -> _Marks:
        places = (tuple(map(_numbers, getattr(tensor, name))) for name in _PLACES)
        return _Marks(_numbers(tensor.global_shape), *places)

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Say what is wrong with the attributes of a tensor whose own shape is ``shape``."""
        counts = {len(self.global_offsets), len(self.local_offsets), len(self.local_sizes)}
        is_right = len(counts) == 1 and all(
            _is_inside(offsets, sizes, self.global_shape) and _is_inside(local, sizes, shape)
            for offsets, local, sizes in zip(self.global_offsets, self.local_offsets, self.local_sizes, strict=True)
        )
        if is_right:
            return None
        return (
            f"has global_shape {self.global_shape}, global_offsets {self.global_offsets}, local_offsets "
            f"{self.local_offsets} and local_sizes {self.local_sizes}, which do not fit its own shape {shape} or each "
            "other; see torch's CheckpointableTensor for what they mean"
        )


def _is_inside(offsets: tuple[int, ...], lengths: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if not len(offsets) == len(lengths) == len(shape):
        return False
    return all(0 <= first <= first + n <= end for first, n, end in zip(offsets, lengths, shape, strict=True))


def _narrowed(tensor: torch.Tensor, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(map(int, values))


def is_complete(shard: Shard | None) -> bool:
    """Tell whether a rank holds all of a tensor, each element once."""
    if shard is None:
        return False
    try:
        check_tiling([(box.offsets, box.lengths) for box in shard.boxes], shard.shape)
    except ValueError:
        return False
    return True


def state_dict_of(module: torch.nn.Module) -> Any:
    """Return ``module.state_dict()``, whose tensors have the attributes of the module's own.

    ``nn.Module.state_dict()`` detaches, and a detached tensor has lost them. Only a program of several ranks has any.
    """
    state = module.state_dict()
    if isinstance(state, Mapping) and torch.distributed.is_available() and torch.distributed.is_initialized():
        for prefix, part in module.named_modules():
            for name, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is not None and hasattr(tensor, "global_shape") and is_marked(tensor):
                    _mark(state.get(f"{prefix}.{name}" if prefix else name), tensor)
    return state


def _mark(tensor: Any, like: torch.Tensor) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.shape == like.shape and not hasattr(tensor, "global_shape"):
        for attribute in _ATTRIBUTES:
            setattr(tensor, attribute, getattr(like, attribute))
