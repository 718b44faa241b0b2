"""Whether targets that share memory get values that agree: tied weights, the same tensor at two names, overlapping views.

Only one value can be in one memory. The loaded values are written, in order, to a copy of that memory; then each target has
to have its own value there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from stager.loading.reading.direct_read import nbytes_spanned, overlapping
from stager.loading.targets import Targets
from stager.state.bits import bits_of
from stager.workers.checkpoint.layout.structure import describe

_ALIGNMENT = 16  # bytes; no element of a tensor is larger


def contradictions(targets: Targets, tensors: Mapping[int, torch.Tensor]) -> list[str]:
    """Return a line for each target whose value would be overwritten by another's.

    Args:
        targets: in the order in which they are filled.
        tensors: loaded, by item, in memory of their own; those whose targets share memory are among them.
    """
    shared = overlapping(targets.indices, targets.tensors)
    numbers = [k for k, index in enumerate(targets.indices) if index in shared]
    found = conflicts(numbers, targets.tensors, lambda number: tensors[targets.indices[number]])
    return [_contradiction(describe(targets.paths[one]), describe(targets.paths[other])) for one, other in found]


def _contradiction(one: str, other: str) -> str:
    if one == other:
        return (
            f"{one}: several of its elements share memory in the target, and have different values in the checkpoint; "
            "load into a tensor whose elements have memory of their own"
        )
    return (
        f"{one} and {other}: share memory in the target, and have different values in the checkpoint; give each a tensor "
        "of its own, or select one of them by keys="
    )


def conflicts(
    numbers: Sequence[int], targets: Sequence[torch.Tensor], source: Callable[[int], torch.Tensor]
) -> Iterator[tuple[int, int]]:
    """Find the targets whose values would be lost if all were filled in order.

    Args:
        numbers: of the targets that are filled.
        source: returns the value of a target, in memory of its own.

    Yields:
        The number of a target, and that of the one that overwrites it: its own if several of its elements share memory.
    """
    for group in _groups(numbers, targets):
        yield from _of_group(group, targets, source)


def _groups(numbers: Sequence[int], targets: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Group the numbers of targets whose memory is one stretch, each group in the order of the targets."""

    def start(number: int) -> tuple[str, int]:
        tensor = targets[number]
        return str(tensor.device), tensor.data_ptr()

    group: list[int] = []
    device, end = "", 0
    for number in sorted((one for one in numbers if targets[one].numel()), key=start):
        here, address = start(number)
        if group and (here != device or address >= end):
            yield sorted(group)
            group, end = [], 0
        group.append(number)
        device, end = here, max(end, address + nbytes_spanned(targets[number]))
    if group:
        yield sorted(group)


def _of_group(
    group: Sequence[int], targets: Sequence[torch.Tensor], source: Callable[[int], torch.Tensor]
) -> Iterator[tuple[int, int]]:
    members = [targets[number] for number in group]
    start = min(tensor.data_ptr() for tensor in members) // _ALIGNMENT * _ALIGNMENT
    end = max(tensor.data_ptr() + nbytes_spanned(tensor) for tensor in members)
    memory = torch.empty(end - start + _ALIGNMENT, dtype=torch.uint8).untyped_storage()
    views = [_view(memory, tensor, start) for tensor in members]
    sources = [source(number) for number in group]
    with torch.no_grad():
        for view, value in zip(views, sources, strict=True):
            view.copy_(value)
    lost = [k for k, (view, value) in enumerate(zip(views, sources, strict=True)) if not _same_bits(view, value)]
    for position in lost:
        others = (k for k in range(position, len(group)) if _overwrites(k, position, views, sources))
        if (other := next(others, None)) is not None:
            yield group[position], group[other]


def _view(memory: torch.UntypedStorage, tensor: torch.Tensor, start: int) -> torch.Tensor:
    """View memory that is a copy of that from the address ``start`` on as ``tensor`` views the original."""
    offset = (tensor.data_ptr() - start) // tensor.element_size()
    view = torch.empty(0, dtype=tensor.dtype).set_(memory, offset, tensor.shape, tensor.stride())
    view = view.conj() if tensor.is_conj() else view
    return torch._neg_view(view) if tensor.is_neg() else view


def _overwrites(later: int, earlier: int, views: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> bool:
    """Whether writing one value after another changes the first. The values of ``views`` are lost."""
    with torch.no_grad():
        views[earlier].copy_(sources[earlier])
        views[later].copy_(sources[later])
    return not _same_bits(views[earlier], sources[earlier])


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(bits_of(one), bits_of(other))
