"""The bits of a tensor's elements, as bytes."""

from __future__ import annotations

import torch


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a strided tensor, in order, as one row of uint8; a copy only if they do not lie so.

    ``contiguous()`` is not enough: a tensor of one element is contiguous whatever its stride, and ``view()`` may refuse it.
    """
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
