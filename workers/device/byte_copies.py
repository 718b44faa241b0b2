"""Device memory as bytes: a stretch of it as a tensor, and many small stretches copied by one kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch


def stretch_of(tensor: torch.Tensor, address: int, nbytes: int) -> torch.Tensor:
    """View ``nbytes`` bytes of a tensor's storage, from ``address`` on, as uint8 on its device.

    Raises:
        RuntimeError: they are not in it. ``set_()`` would enlarge the storage.
    """
    storage = tensor.untyped_storage()
    offset = address - storage.data_ptr()
    if not 0 <= offset <= storage.nbytes() - nbytes:
        raise RuntimeError("a tensor's storage was resized, or has other memory now")
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(storage, offset, (nbytes,))  # type: ignore[call-overload,no-any-return]  # torch's stubs lack it


def copy_many(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy many stretches of one device, on its current stream: one kernel for each width of elements.

    Args:
        pairs: (target, source), uint8 and of one length.
    """
    # The multi-tensor kernel wants pairs of one dtype; bytes are right for all, but wider elements are faster.
    by_width: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for pair in pairs:
        target, source = pair
        if (target.data_ptr() | source.data_ptr() | source.nbytes) % 8 == 0:
            target, source = target.view(torch.int64), source.view(torch.int64)
        targets, sources = by_width[source.dtype]
        targets.append(target)
        sources.append(source)
    for targets, sources in by_width.values():
        torch._foreach_copy_(targets, sources)
