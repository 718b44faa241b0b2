"""Reading straight into a tensor's memory: which tensors allow it, and what autograd has to be told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from stager.workers.checkpoint.layout.items import Item

_Extent = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]  # start and end address, key, shape, stride


def takes_bytes(item: Item, tensor: torch.Tensor) -> bool:
    """Whether the stored bytes of an item of the same shape and dtype can be read into the tensor's memory as they are."""
    return tensor.is_cpu and has_memory_like(item, tensor)


def has_memory_like(item: Item, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the same shape and dtype, on any device, has its elements where the stored item has them."""
    return (
        tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
        and (tensor.stride() == item.stride or tensor.numel() == 0)
    )


def tell_autograd(tensors: Iterable[torch.Tensor]) -> None:
    """Count an in-place change of each tensor: autograd does not see what ``preadv`` writes."""
    versioned = [tensor for tensor in tensors if not tensor.is_inference()]  # inference tensors have no version
    if versioned:
        torch.autograd.graph.increment_version(versioned)


def overlapping(targets: Sequence[tuple[int, torch.Tensor]]) -> set[int]:
    """Return the keys of targets that share memory with another target.

    Threads that read into overlapping targets would mix their bytes. Such targets are copied in order instead.

    Args:
        targets: (key, tensor). The same view twice under one key does not count.
    """
    by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for key, tensor in targets:
        if tensor.layout is torch.strided and tensor.numel():
            by_device.setdefault(tensor.device, []).append((key, tensor))
    return set[int]().union(*map(_overlapping_there, by_device.values()))


def _overlapping_there(targets: Sequence[tuple[int, torch.Tensor]]) -> set[int]:
    """Return the keys of targets on one device that share memory with another of them."""
    if _are_apart([tensor for _, tensor in targets]):
        return set()
    shared: set[int] = set()
    furthest: _Extent | None = None
    for extent in sorted({_extent(key, tensor) for key, tensor in targets}):
        if furthest is not None and extent[0] < furthest[1]:
            shared.update((extent[2], furthest[2]))
        if furthest is None or extent[1] > furthest[1]:
            furthest = extent
    return shared


def _are_apart(tensors: list[torch.Tensor]) -> bool:
    """Whether no two tensors overlap. This is the usual case, and numpy finds it out fast for 100,000 tensors."""
    starts = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
    nbytes = [t.nbytes if t.is_contiguous() else nbytes_spanned(t) for t in tensors]
    order = np.argsort(starts)
    ends = np.maximum.accumulate((starts + np.array(nbytes, np.uint64))[order])
    return bool((starts[order][1:] >= ends[:-1]).all())


def nbytes_spanned(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _extent(key: int, tensor: torch.Tensor) -> _Extent:
    start = tensor.data_ptr()
    return start, start + nbytes_spanned(tensor), key, tuple(tensor.shape), tensor.stride()
