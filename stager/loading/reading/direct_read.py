"""Reading straight into a tensor's memory: which tensors allow it, and what autograd has to be told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress, filterfalse
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from stager.workers.checkpoint.layout.items import Item, ItemKind

_layout, _is_cpu = map(attrgetter, ("layout", "is_cpu"))

_Extent = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]  # start and end address, key, shape, stride


def takes_bytes(item: Item | ItemKind, tensor: torch.Tensor) -> bool:
    """Whether the stored bytes of an item of the same shape and dtype can be read into the tensor's memory as they are."""
    return tensor.is_cpu and has_memory_like(item, tensor)


def has_memory_like(item: Item | ItemKind, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the same shape and dtype, on any device, has its elements where the stored item has them."""
    return (
        tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
        and (tensor.stride() == item.stride or tensor.numel() == 0)
    )


def tell_autograd(tensors: Iterable[torch.Tensor]) -> None:
    """Count an in-place change of each tensor: autograd does not see what ``preadv`` writes."""
    versioned = list(filterfalse(torch.Tensor.is_inference, tensors))  # inference tensors have no version
    if versioned:
        torch.autograd.graph.increment_version(versioned)


def overlapping(keys: Sequence[int], targets: Sequence[torch.Tensor]) -> set[int]:
    """Return the keys of targets that share memory with another target, or several of whose elements share memory.

    Threads that read into overlapping targets would mix their bytes. Such targets are copied in order instead.

    Args:
        keys: of the targets. The same view twice under one key does not count.
    """
    if not {torch.strided}.issuperset(map(_layout, targets)):
        strided = [tensor.layout is torch.strided for tensor in targets]
        keys, targets = list(compress(keys, strided)), list(compress(targets, strided))
    if all(map(_is_cpu, targets)):  # in most states
        return _overlapping_there(keys, targets)
    by_device: dict[torch.device, tuple[list[int], list[torch.Tensor]]] = {}
    for key, tensor in zip(keys, targets, strict=True):
        keys_there, tensors_there = by_device.setdefault(tensor.device, ([], []))
        keys_there.append(key)
        tensors_there.append(tensor)
    return set[int]().union(*(_overlapping_there(*there) for there in by_device.values()))


def _overlapping_there(keys: Sequence[int], targets: Sequence[torch.Tensor]) -> set[int]:
    """Return the keys of targets on one device that share memory with another of them, or in themselves."""
    starts = np.array(list(map(torch.Tensor.data_ptr, targets)), np.uint64)
    nbytes = np.array([nbytes_spanned(tensor) if tensor.numel() else 0 for tensor in targets], np.uint64)
    pairs = filterfalse(lambda pair: pair[1].is_contiguous(), zip(keys, targets, strict=True))
    shared = {key for key, tensor in pairs if elements_share_memory(tensor)}
    if are_apart(starts, nbytes):
        return shared
    furthest: _Extent | None = None
    for extent in sorted({_extent(key, tensor) for key, tensor in zip(keys, targets, strict=True) if tensor.numel()}):
        if furthest is not None and extent[0] < furthest[1]:
            shared.update((extent[2], furthest[2]))
        if furthest is None or extent[1] > furthest[1]:
            furthest = extent
    return shared


def are_apart(starts: Any, nbytes: Any) -> bool:
    """Tell whether no two stretches of memory overlap: arrays of their addresses and lengths."""
    starts, nbytes = starts[nbytes > 0], nbytes[nbytes > 0]
    order = np.argsort(starts)
    ends = np.maximum.accumulate((starts + nbytes)[order])
    return bool((starts[order][1:] >= ends[:-1]).all())


def elements_share_memory(tensor: torch.Tensor) -> bool:
    """Tell whether two elements of a strided tensor are one: those of an expanded tensor, or of windows that overlap."""
    dimensions = sorted((step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    if 0 in tensor.shape or not dimensions:
        return False
    reach = 0  # how far the dimensions of smaller steps go
    for step, length in dimensions:
        if step <= reach:
            break
        reach += step * (length - 1)
    else:
        return False
    if dimensions[0][0] == 0:
        return True
    places = torch.zeros(1, dtype=torch.int64)  # steps such as (2, 3) interleave: only the places themselves tell
    for step, length in dimensions:
        places = (places[:, None] + step * torch.arange(length)).flatten()
    return len(torch.unique(places)) < len(places)


def nbytes_spanned(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last one."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _extent(key: int, tensor: torch.Tensor) -> _Extent:
    start = tensor.data_ptr()
    return start, start + nbytes_spanned(tensor), key, tuple(tensor.shape), tensor.stride()
